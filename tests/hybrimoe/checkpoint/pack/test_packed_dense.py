"""Packed dense layers: read at the second start, made anew where the checkpoint changed, never twice in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeConfig, MixtralConfig, PreTrainedModel

from hybrimoe.checkpoint import load, safetensors_file
from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.errors import CheckpointError

from ..conftest import SMALL
from ..models import DENSE_OPTIONS, done_in_loading, files_of, logits
from ..test_memory import SLACK_BYTES, peak_growth

LARGE = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 131072}


def records_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {path: module._record for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def test_the_second_start_packs_nothing_and_reads_nothing_that_is_packed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(directory, **DENSE_OPTIONS)
    assert len(files_of("dense", directory)) == len(files_of("experts", directory)) == 1
    keys: list[str] = []
    real = safetensors_file._read

    def noted(tensor: StoredTensor, offset_bytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        keys.append(tensor.key)
        return real(tensor, offset_bytes, shape)

    monkeypatch.setattr(safetensors_file, "_read", noted)
    calls: list[str] = []
    second = load(directory, **DENSE_OPTIONS | {"progress": lambda *call: calls.append(call[2])})
    assert set(calls) == {"reading packed dense layers"}
    assert len(keys) == len(set(keys)), "nothing is read twice"
    one, other = records_of(first), records_of(second)
    assert not [key for key in keys if "experts" in key or key.removesuffix(".weight") in one]
    assert "model.embed_tokens.weight" in keys
    assert list(one) == list(other)
    assert all(np.array_equal(record, other[path]) for path, record in one.items())
    assert torch.equal(logits(first), logits(second))


def test_packing_while_loading_gives_what_packing_a_loaded_model_gives(
    directory: Path, mixtral: PreTrainedModel
) -> None:
    loaded = records_of(load(directory, **DENSE_OPTIONS))
    for path, record in loaded.items():
        linear = mixtral.get_submodule(path)
        assert isinstance(linear, torch.nn.Linear)
        assert np.array_equal(PackedLinear(linear, "int8")._record, record)
    assert "model.layers.0.self_attn.q_proj" in loaded


def test_other_dense_weights_of_the_same_size_and_time_are_packed_again(directory: Path) -> None:
    done_in_loading(directory)
    file = directory / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "packing dense layers" in done_in_loading(directory)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "apart"])
def test_an_output_layer_tied_to_the_embedding(
    tie: bool, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    config = GraniteMoeConfig(**SMALL | {"tie_word_embeddings": tie})
    make_model(config).save_pretrained(tmp_path / "granite")
    first, second = (load(tmp_path / "granite", **DENSE_OPTIONS) for _ in range(2))
    assert isinstance(second.lm_head, PackedLinear)
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(second.model.embed_tokens.weight, first.model.embed_tokens.weight)


def test_values_that_are_not_finite_name_their_tensor(edit: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = torch.nan

    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight has values that are NaN"):
        load(edit(damage), **DENSE_OPTIONS)


def test_no_weight_is_there_twice_while_it_is_packed(
    directory: Path, tmp_path: Path, make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # each thread that packs has rows of its own in float32
    load(directory, **DENSE_OPTIONS)  # imports and compiled kernels are not part of the footprint
    make_model(MixtralConfig(**SMALL | LARGE), dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    for start in ("first", "second"):
        with peak_growth() as growth:
            model = load(tmp_path / "large", **DENSE_OPTIONS)
        kept = model.hybrimoe.dense.nbytes + sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
        kept += model.hybrimoe.session.store.nbytes if start == "first" else 0
        largest = model.get_input_embeddings().weight.nbytes
        room = SLACK_BYTES + largest // 2  # rows that are being packed, the allocator; a copy more would be seen
        assert growth[0] <= kept + largest + room, start
        del model
