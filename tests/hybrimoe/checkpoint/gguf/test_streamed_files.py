"""DeepSeek-V4, Qwen4 and GLM-5.3 files that are cut, damaged, or lie about themselves; and files with layers that
predict."""

from __future__ import annotations

import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from hybrimoe.checkpoint import load
from hybrimoe.checkpoint.errors import LeftOutWarning, UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.config import config_of
from hybrimoe.checkpoint.gguf.file import open_gguf
from hybrimoe.checkpoint.source import read_config_dict
from hybrimoe.errors import CheckpointError, HybriMoEError

from ..models import FLOAT32, logits
from .models import OVERRIDES, gguf_model, letters, saved_model
from .test_bad_files import MAX_MEMORY_BYTES, header_bytes, opened, put

FAMILIES = ("deepseek_v4", "qwen4_exp", "glm5_next")
FLIPS = {"deepseek_v4": 120, "qwen4_exp": 120, "glm5_next": 50}  # the last is opened with its tower, which takes time
STEP = 13


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family."""
    return {name: gguf_model(name, tmp_path_factory.mktemp(name), tokenizer=letters) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_truncations_are_errors(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    data, cut = files[family].read_bytes(), tmp_path / "cut.gguf"
    for length in (*range(0, header_bytes(files[family]), STEP), len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated or no valid GGUF"):
            open_gguf(cut)


@pytest.mark.parametrize("family", FAMILIES)
def test_flipped_bits_of_the_header_are_errors_or_harmless(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    data, damaged, end = files[family].read_bytes(), tmp_path / "damaged.gguf", header_bytes(files[family])
    config, generator, refused = read_config_dict(files[family]), random.Random(0), 0
    tracemalloc.start()
    try:
        for index in range(FLIPS[family]):
            changed = bytearray(data)
            changed[generator.randrange(end)] ^= 1 << generator.randrange(8)
            damaged.write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    if read_config_dict(damaged) != config or index % 10 == 0:
                        opened(damaged)
                except HybriMoEError:
                    refused += 1
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES
    finally:
        tracemalloc.stop()
    assert refused > FLIPS[family] / 5


OF_A_LIST = 4 + 4 + 8  # kind, kind of the entries, their number
OF_A_VALUE = 4
Change = Callable[[bytearray], None]
WRONG: dict[str, tuple[str, Change, str]] = {
    "a ratio that no layer has": (
        "deepseek_v4", put("deepseek4.attention.compress_ratios", "<i", 8, OF_A_LIST), "of 0, 4, 128 only",
    ),
    "other scores": ("deepseek_v4", put("deepseek4.expert_gating_func", "<I", 2, OF_A_VALUE), "4, as in every such"),
    "groups of heads": (
        "deepseek_v4", put("deepseek4.attention.output_group_count", "<I", 3, OF_A_VALUE), "a divisor of the 4 heads",
    ),
    "limits that differ": (
        "deepseek_v4", put("deepseek4.swiglu_clamp_exp", "<f", 9.0, OF_A_LIST), "one positive number for all experts",
    ),
    "more rotated than there is": (
        "deepseek_v4", put("deepseek4.rope.dimension_count", "<I", 64, OF_A_VALUE), "at most the 32 dimensions",
    ),
    "more hashed layers than layers": (
        "deepseek_v4", put("deepseek4.hash_layer_count", "<I", 1 << 30, OF_A_VALUE), "the checkpoint lacks",
    ),
    "n-grams of a layer that is not there": ("qwen4_exp", put("qwen4exp.ple.layers", "<i", 3, OF_A_LIST), "0 to 2"),
    "n-grams of no tokens": ("qwen4_exp", put("qwen4exp.ple.ngram_size", "<I", 1, OF_A_VALUE), "of 2 or more"),
    "n-grams of many tokens": (
        "qwen4_exp", put("qwen4exp.ple.ngram_size", "<I", 1 << 30, OF_A_VALUE), "expected 2147483646 whole numbers",
    ),
    "rows beyond the table": (
        "qwen4_exp", put("qwen4exp.ple.head_offsets", "<Q", 255, OF_A_LIST + 8), "of the table, which has 256",
    ),
    "a vocabulary larger than the table": (
        "qwen4_exp", put("qwen4exp.ple.head_vocab_sizes", "<Q", 1 << 60, OF_A_LIST), "whole numbers from 1 to 256",
    ),
    "a factor that int64 has no room for": (
        "qwen4_exp", put("qwen4exp.ple.layer_multipliers", "<Q", 1 << 63, OF_A_LIST), "3 whole numbers",
    ),
    "latents that are rotated": (
        "glm5_next", put("glm5-next.rope.dimension_count", "<I", 4, OF_A_VALUE), "expected 0: no such model rotates",
    ),
    "weights of a softmax": ("glm5_next", put("glm5-next.expert_gating_func", "<I", 1, OF_A_VALUE), "2, as in every"),
    "another epsilon": (
        "glm5_next", put("glm5-next.attention.layer_norm_epsilon", "<f", 1e-5, OF_A_VALUE), "1e-06, as in every such",
    ),
    "a state that grows": (
        "glm5_next", put("glm5-next.kda.gate_lower_bound", "<f", 0.5, OF_A_VALUE), "expected a number below 0",
    ),
    "a part of a pool": (
        "glm5_next", put("glm5-next.attention.indexer.top_k", "<I", 5, OF_A_VALUE), "a multiple of the 2 tokens",
    ),
    "pools of other tokens": (
        "glm5_next", put("glm5-next.attention.indexer.kpool", "<I", 4, OF_A_VALUE), "index_kpool_compress_ape",
    ),
    "a choice that nobody made": (
        "glm5_next", put("glm5-next.attention.indexer.types", "<?", False, OF_A_LIST + 1), "layer 1 chooses no tokens",
    ),
    "limits of shared experts": (
        "glm5_next", put("glm5-next.swiglu_clamp_shexp", "<f", 9.0, OF_A_LIST), "one positive number for all experts",
    ),
    "streams that are not there": (
        "glm5_next", put("glm5-next.hyper_connection.count", "<I", 3, OF_A_VALUE), "attn_hc",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str, files: dict[str, Path], tmp_path: Path) -> None:
    family, change, message = WRONG[what]
    data = bytearray(files[family].read_bytes())
    change(data)
    (tmp_path / "wrong.gguf").write_bytes(data)
    with pytest.raises(HybriMoEError, match=message):
        load(tmp_path / "wrong.gguf", **FLOAT32)


def test_several_layers_with_tables_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(files["qwen4_exp"].read_bytes())
    put("qwen4exp.ple.layers", "<Q", 2, OF_A_LIST - 8)(data)  # and what follows is read as the second
    key = data.index(b"qwen4exp.ple.layers") + len("qwen4exp.ple.layers") + OF_A_LIST + 4
    data[key:key] = struct.pack("<i", 2)
    (tmp_path / "wrong.gguf").write_bytes(data)
    with pytest.raises(UnsupportedCheckpointError, match="2 layers look n-grams up"):
        config_of(open_gguf(tmp_path / "wrong.gguf"))


@pytest.mark.parametrize("expert", [-1, 8])
def test_a_token_of_an_expert_that_is_not_there_is_an_error(
    expert: int, files: dict[str, Path], tmp_path: Path
) -> None:
    data = bytearray(files["deepseek_v4"].read_bytes())
    table = open_gguf(files["deepseek_v4"]).tensors["blk.0.ffn_gate_tid2eid.weight"]
    struct.pack_into("<i", data, table.offset_bytes, expert)
    (tmp_path / "wrong.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"experts .*{expert}.*, of 8 that there are"):
        load(tmp_path / "wrong.gguf", **FLOAT32)


def test_whole_numbers_are_no_experts(files: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(files["deepseek_v4"].read_bytes())
    put("blk.1.ffn_up_exps.weight", "<I", 26, 4 + 3 * 8)(data)
    (tmp_path / "wrong.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up_exps.weight of I32 do not fit"):
        load(tmp_path / "wrong.gguf", **FLOAT32)


def test_layers_that_predict_are_left_out_where_they_are_there(tmp_path: Path) -> None:
    """The scripts of the first DeepSeek-V4 files name one that the file has not; later ones write and count it."""

    def predicting(writer: gguf.GGUFWriter) -> None:
        letters(writer)
        writer.add_block_count(5)
        writer.add_tensor("blk.4.nextn.eh_proj.weight", np.zeros((32, 64), np.float32))

    first = gguf_model("deepseek_v4", tmp_path)
    whole = load(first, **FLOAT32)
    later = gguf_model("deepseek_v4", tmp_path / "later", tokenizer=predicting)
    with pytest.warns(LeftOutWarning, match="predict"):
        found = load(later, **FLOAT32)
    assert found.config.num_hidden_layers == whole.config.num_hidden_layers
    assert torch.equal(logits(found), logits(whole))


def test_a_layer_that_predicts_is_left_out_of_glm(tmp_path: Path) -> None:
    def predicting(writer: gguf.GGUFWriter) -> None:
        letters(writer)
        writer.add_block_count(4)
        writer.add_uint32(f"{writer.arch}.nextn_predict_layers", 1)
        writer.add_head_count_kv([0, 1, 1, 1])
        writer.add_tensor("blk.3.nextn.eh_proj.weight", np.zeros((32, 64), np.float32))

    whole = load(gguf_model("glm5_next", tmp_path), **FLOAT32)
    with pytest.warns(LeftOutWarning, match="predict"):
        found = load(gguf_model("glm5_next", tmp_path / "later", tokenizer=predicting), **FLOAT32)
    assert torch.equal(logits(found), logits(whole))


def test_a_state_without_a_lower_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES, "glm5_next", OVERRIDES["glm5_next"] | {"linear_lower_bound": None})
    expected = load(saved_model("glm5_next", tmp_path), **FLOAT32)
    assert torch.equal(logits(load(gguf_model("glm5_next", tmp_path), **FLOAT32)), logits(expected))
