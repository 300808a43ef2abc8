"""GGUF files that are cut, damaged, or lie about themselves: an error of ours, soon, with no memory asked for."""

from __future__ import annotations

import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from hybrimoe.checkpoint.dense import dense_dtype, meta_model, read_config
from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.experts import layer_sources
from hybrimoe.checkpoint.gguf.config import config_of
from hybrimoe.checkpoint.gguf.file import open_file, open_gguf
from hybrimoe.checkpoint.gguf.tokenizer import load_tokenizer
from hybrimoe.checkpoint.source import model_path, read_config_dict
from hybrimoe.checkpoint.weights import open_weights
from hybrimoe.errors import CheckpointError, HybriMoEError, ModelError
from hybrimoe.experts.layout import find_experts, read

from . import windowed_scripts
from .models import gguf_model, letters

FLIPS = 1000
MAX_MEMORY_BYTES = 64 << 20  # of a file of 300 kB: a count that is believed would ask for far more


def opened(path: Path) -> None:
    """All that loading does before it reads weights."""
    found = model_path(path)
    raw = read_config_dict(found)
    weights = open_weights(found, raw)
    config = read_config(found)
    model = meta_model(config, dense_dtype("auto", config))
    plan = weights.plan(model)
    layer_sources({name: read(module) for name, module in find_experts(model)}, plan.conversions)
    load_tokenizer(found)


def header_bytes(file: Path) -> int:
    """Where the tensors start."""
    return min(tensor.offset_bytes for tensor in open_file(file).tensors.values())


def test_every_truncation_is_an_error(file: Path, tmp_path: Path) -> None:
    data, cut = file.read_bytes(), tmp_path / "cut.gguf"
    end = header_bytes(file)
    for length in (*range(end), *range(end, len(data), 997), len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated or no valid GGUF"):
            open_gguf(cut)


def test_flipped_bits_of_the_header_are_errors_or_harmless(file: Path, tmp_path: Path) -> None:
    data, damaged, end = file.read_bytes(), tmp_path / "damaged.gguf", header_bytes(file)
    generator, refused, config = random.Random(0), 0, read_config_dict(file)
    tracemalloc.start()
    try:
        for index in range(FLIPS):
            changed = bytearray(data)
            changed[generator.randrange(end)] ^= 1 << generator.randrange(8)
            damaged.write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rope sizes that transformers remarks on
                try:
                    if read_config_dict(damaged) != config or (index % 10) == 0:
                        opened(damaged)
                    open_weights(damaged, config)
                except HybriMoEError:
                    refused += 1
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES
    finally:
        tracemalloc.stop()
    assert refused > FLIPS / 4


Change = Callable[[bytearray], None]


def put(key: str, form: str, value: float, skip: int = 0) -> Change:
    """Overwrites what follows the text `key` and `skip` bytes more."""

    def change(data: bytearray) -> None:
        place = data.index(key.encode()) + len(key) + skip
        struct.pack_into(form, data, place, value)

    return change


AFTER_KIND = 4  # a metadata value follows its kind
AFTER_SHAPE = {2: 4 + 16, 3: 4 + 24}  # a tensor's type follows the number of its dimensions, and them
WRONG_BYTES: dict[str, tuple[Change, str]] = {
    "magic": (put("", "<I", 1), "does not start with GGUF"),
    "version": (put("GGUF", "<I", 7), "GGUF of version 7"),
    "big-endian": (put("GGUF", ">I", 3), "big-endian"),
    "number of tensors": (put("GGUF", "<Q", 1 << 60, 4), "truncated or no valid GGUF"),
    "number of values": (put("GGUF", "<Q", 1 << 60, 12), "truncated or no valid GGUF"),
    "length of a text": (put("general.architecture", "<Q", 1 << 62, AFTER_KIND), "truncated or no valid GGUF"),
    "length of a list": (put("tokenizer.ggml.tokens", "<Q", 1 << 62, AFTER_KIND + 4), "truncated or no valid GGUF"),
    "list of lists": (put("tokenizer.ggml.tokens", "<I", 9, AFTER_KIND), "unknown kind 9"),
    "kind of a value": (put("olmoe.block_count", "<I", 77), "unknown kind 77"),
    "layers": (put("olmoe.block_count", "<I", 1 << 30, AFTER_KIND), "asks for 1073741824 layers"),
    "no layers": (put("olmoe.block_count", "<I", 0, AFTER_KIND), "expected a whole number of 1 or more"),
    "hidden size": (put("olmoe.embedding_length", "<I", 1 << 30, AFTER_KIND), "the configuration asks for shape"),
    "heads": (put("olmoe.attention.head_count", "<I", 7, AFTER_KIND), "asks for shape"),
    "experts used": (put("olmoe.expert_used_count", "<I", 9, AFTER_KIND), "at most the 8 experts"),
    "dimensions": (put("blk.0.attn_q.weight", "<I", 5), "has 5 dimensions"),
    "a size": (put("blk.0.attn_q.weight", "<Q", 1 << 61, 4), "truncated or no valid GGUF"),
    "type": (put("blk.0.attn_q.weight", "<I", 999, AFTER_SHAPE[2]), "type of number 999; readable are F32"),
    "a smaller type": (put("blk.0.attn_q.weight", "<I", 8, AFTER_SHAPE[2]), "starts at [0-9]+ only"),
    "blocks": (put("blk.0.attn_q_norm.weight", "<I", 12, 4 + 8), "no whole number of blocks"),
    "outside": (put("blk.0.attn_q.weight", "<Q", 1 << 40, AFTER_SHAPE[2] + 4), "ends at"),
    "overlap": (put("blk.1.attn_q.weight", "<Q", 64, AFTER_SHAPE[2] + 4), "inside"),
    "alignment": (put("blk.1.attn_q.weight", "<Q", 4097, AFTER_SHAPE[2] + 4), "starts at"),
}


@pytest.mark.parametrize("what", WRONG_BYTES)
def test_what_is_wrong_is_named(what: str, file: Path, tmp_path: Path) -> None:
    change, message = WRONG_BYTES[what]
    data = bytearray(file.read_bytes())
    change(data)
    (tmp_path / "wrong.gguf").write_bytes(data)
    with pytest.raises(HybriMoEError, match=message):
        opened(tmp_path / "wrong.gguf")


def test_an_architecture_that_is_not_read_gives_the_list_of_those_that_are(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(file.read_bytes().replace(b"olmoe", b"gemma"))
    with pytest.raises(
        UnsupportedCheckpointError, match=r"is a gemma model; .* deepseek2, .* qwen3moe, .*qwen4exp.* are read"
    ):
        read_config_dict(tmp_path / "other.gguf")


@pytest.mark.parametrize("name", ["general.architecture", "olmoe.context_length", "olmoe.expert_count"])
def test_a_value_that_is_missing_is_named(name: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "less.gguf").write_bytes(file.read_bytes().replace(name.encode(), name[:-1].encode() + b"X"))
    with pytest.raises(CheckpointError, match=name):
        read_config_dict(tmp_path / "less.gguf")


def test_metadata_that_are_missing_mean_what_llama_cpp_takes_them_for(tmp_path: Path) -> None:
    data = gguf_model("deepseek_v3", tmp_path).read_bytes()

    def without(name: bytes) -> dict[str, Any]:
        assert name in data
        (tmp_path / "less.gguf").write_bytes(data.replace(name, name[:-1] + b"X"))
        return read_config_dict(tmp_path / "less.gguf")

    rope = without(b"rope.scaling.type")["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    assert without(b"rope.scaling.yarn_log_multiplier")["rope_parameters"]["attention_factor"] == 1.0
    with pytest.raises(CheckpointError, match=r"expert_group_used_count is missing"):
        without(b"expert_group_used_count")


def test_a_tensor_that_is_missing_is_named(file: Path, tmp_path: Path) -> None:
    (tmp_path / "less.gguf").write_bytes(file.read_bytes().replace(b"blk.1.ffn_up_exps", b"blk.1.ffn_uX_exps"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        opened(tmp_path / "less.gguf")


@pytest.mark.parametrize(
    ("architecture", "kind", "wanted"),
    [
        ("clip", None, r"part of a model that sees or hears \(mmproj\): give the model's own file"),
        ("clip", "mmproj", r"\(mmproj\)"), ("olmoe", "adapter", r"LoRA adapter for llama\.cpp.*--adapter DIR"),
        ("olmoe", "imatrix", "importance matrix"), ("olmoe", "vocab", "vocabulary alone"),
        ("nosuch", None, "is a nosuch model; of GGUF files the architectures .*olmoe.* are read"),
    ],
)  # fmt: skip
def test_what_is_no_model_that_is_read_is_named(
    architecture: str, kind: str | None, wanted: str, tmp_path: Path
) -> None:
    """By its first keys: none of a language model's are there."""
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedCheckpointError, match=wanted):
        opened(tmp_path / "model.gguf")


def test_a_projector_beside_a_model_is_passed_over(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("model-Q8_0.gguf", "mmproj-F16.gguf"):
        (folder / name).write_bytes(file.read_bytes())
    assert model_path(folder).name == "model-Q8_0.gguf"


def test_a_directory_with_a_files_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(ModelError, match=r"is no model directory: it has no config\.json"):
        read_config_dict(model_path(tmp_path / "model.gguf"))


def test_a_split_model_lacks_a_part(tmp_path: Path) -> None:
    first = gguf_model("olmoe", tmp_path, split=10, tokenizer=letters)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    opened(parts[1])
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"lacks {parts[1].name} \(1 of {len(parts)} parts\)"):
        open_gguf(first)
    parts[0].rename(parts[1])
    with pytest.raises(CheckpointError, match=rf"lacks {parts[0].name}"):
        open_gguf(model_path(parts[2]))


def test_a_part_in_anothers_place_is_noticed(tmp_path: Path) -> None:
    first = gguf_model("olmoe", tmp_path, split=10, tokenizer=letters)
    parts = sorted(tmp_path.glob("*.gguf"))
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="fetch the parts again"):
        open_gguf(first)


def test_a_vocabulary_that_is_not_known_is_refused(tmp_path: Path) -> None:
    def unknown(writer: gguf.GGUFWriter) -> None:
        letters(writer)
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "klingon"

    with pytest.raises(ModelError, match=r"splits text like 'klingon' .* known are .*qwen2"):
        load_tokenizer(gguf_model("olmoe", tmp_path, tokenizer=unknown))
    with pytest.raises(ModelError, match="found 'no_vocab'"):
        load_tokenizer(gguf_model("mixtral", tmp_path))


@pytest.mark.parametrize("factors", [[1.0, 3.0, 2.0, 8.0], [1.0, 1.0, 1.0, 0.0]])
def test_rotations_that_are_scaled_in_an_unknown_way_are_refused(
    factors: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windowed_scripts, "_llama3_factors", lambda config: torch.tensor(factors))
    with pytest.raises(CheckpointError, match="rope_freqs"):
        read_config_dict(gguf_model("llama4", tmp_path))


def test_a_dense_model_of_a_family_with_experts_is_refused_as_one(tmp_path: Path) -> None:
    file = gguf_model("qwen3_moe", tmp_path)
    raw = file.read_bytes().replace(b"qwen3moe.expert_count", b"qwen3moe.expert_c0unt")
    file.write_bytes(raw)
    with pytest.raises(UnsupportedCheckpointError, match="is a dense model"):
        read_config_dict(file)


def test_layers_with_attention_at_other_distances_are_refused(tmp_path: Path) -> None:
    model = open_gguf(gguf_model("jamba", tmp_path))
    tensors = {name.replace("blk.0.ssm_a", "blk.0.attn_q.weight"): value for name, value in model.tensors.items()}
    tensors["blk.1.attn_q.weight"] = tensors["blk.2.attn_q.weight"]
    with pytest.raises(UnsupportedCheckpointError, match="equal distances"):
        config_of(replace(model, tensors=tensors))
