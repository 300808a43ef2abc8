"""A GGUF model from start to start: found in its places, packed once, found again, told from another."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
import torch

from hybrimoe.checkpoint import load, load_tokenizer
from hybrimoe.checkpoint.inspection import inspect
from hybrimoe.checkpoint.meta import model_shape
from hybrimoe.checkpoint.source import model_path
from hybrimoe.checkpoint.weights import weight_stamps
from hybrimoe.errors import ModelError

from ....families.tiny_families import tiny_model
from ..models import DENSE_OPTIONS, FLOAT32, OPTIONS, done_in_loading, files_of, logits
from ..test_adapters import pair, product, written
from .models import OVERRIDES, gguf_model, letters

Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def test_the_second_start_maps_what_the_first_packed(file: Path) -> None:
    assert done_in_loading(file) >= {"packing experts", "packing dense layers"}
    beside = file.with_suffix(".hybrimoe")
    assert [len(files_of(what, beside)) for what in ("experts", "dense")] == [1, 1]
    assert done_in_loading(file) == {"reading packed dense layers"}, "experts are mapped"


def test_two_files_of_one_folder_keep_their_packed_files_apart(tmp_path: Path) -> None:
    first = gguf_model("olmoe", tmp_path)
    expected = logits(load(first, **DENSE_OPTIONS))
    second = gguf_model("olmoe", tmp_path / "other", kind=Q8_0).rename(tmp_path / "second.gguf")
    load(second, **DENSE_OPTIONS)
    assert done_in_loading(first) == {"reading packed dense layers"}
    assert torch.equal(logits(load(first, **DENSE_OPTIONS)), expected)


def test_a_file_that_was_replaced_is_packed_again(file: Path, tmp_path: Path) -> None:
    done_in_loading(file)
    file.write_bytes(gguf_model("olmoe", tmp_path / "other", kind=Q8_0, tokenizer=letters).read_bytes())
    assert "packing experts" in done_in_loading(file)


def test_a_split_model_is_the_model(tmp_path: Path, file: Path) -> None:
    first = gguf_model("olmoe", tmp_path / "split", split=10)
    last = sorted(first.parent.glob("*.gguf"))[-1]
    expected = logits(load(file, **FLOAT32))
    for named in (first, last, first.parent):
        assert model_path(named) == first
        assert torch.equal(logits(load(named, **FLOAT32)), expected)


def test_every_part_of_a_split_model_tells_it_from_others(tmp_path: Path) -> None:
    first = gguf_model("olmoe", tmp_path, split=10)
    last, before = sorted(first.parent.glob("*.gguf"))[-1], weight_stamps(first)
    facts, content = last.stat(), bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    os.utime(last, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert weight_stamps(first) != before


def test_a_folder_with_several_models_asks_for_one(tmp_path: Path, file: Path) -> None:
    file.with_name("model-q8.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"has several GGUF models \(model-q8.gguf, model.gguf\); name one"):
        model_path(file.parent)


def test_the_tokenizer_and_the_ends_of_a_reply_come_from_the_file(file: Path) -> None:
    tokenizer, model = load_tokenizer(file), load(file, **OPTIONS)
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    assert tokenizer("<|eos|>")["input_ids"] == [1], "a special token is one token"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (1, 0)


@pytest.mark.parametrize(("kind", "dtype"), [(Q4_0, "int4"), (Q8_0, "int8")])
def test_quantised_experts_in_records_of_their_size_change_little(kind: object, dtype: str, tmp_path: Path) -> None:
    file = gguf_model("olmoe", tmp_path, kind=kind)
    exact, found = load(file, **FLOAT32), load(file, **FLOAT32 | {"expert_dtype": dtype})
    difference = (logits(exact) - logits(found)).abs().max()
    assert difference < 0.05 * logits(exact).abs().max(), "activations are rounded to int8 beside such weights"


def test_an_adapter_is_merged_into_the_values_of_a_quantised_file(tmp_path: Path) -> None:
    file = gguf_model("olmoe", tmp_path, kind=Q4_0)
    q, down = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.5.down_proj"
    adapter = written(tmp_path / "adapter", tensors := pair(q, 32, 32) | pair(down, 32, 64))
    options = FLOAT32 | {"dense_dtype": "float32"}
    values = load(file, **options).hybrimoe.full_state_dict()
    values[f"{q}.weight"] = values[f"{q}.weight"] + product(tensors, q)
    experts = values["model.layers.1.mlp.experts.down_proj"].clone()
    experts[5] += product(tensors, down)
    merged = tiny_model("olmoe", **OVERRIDES["olmoe"])
    merged.load_state_dict(values | {"model.layers.1.mlp.experts.down_proj": experts})
    found = load(file, adapters=[str(adapter)], **options)
    torch.testing.assert_close(logits(found), logits(merged), rtol=1e-4, atol=1e-4)
    assert (inspect(file).choice.dtype, inspect(file, [str(adapter)]).choice.dtype) == ("int4", "int8")


def test_an_inspection_says_what_packing_costs(tmp_path: Path) -> None:
    found = inspect(gguf_model("olmoe", tmp_path, kind=Q4_0))
    assert [(total.type_name, total.n_tensors) for total in found.experts] == [("Q4_0", 6)]
    assert {total.type_name for total in found.dense} == {"Q4_0", "F32"}
    errors = {cost.dtype: cost.error for cost in found.records}
    assert errors["float32"] == 0.0
    assert 0 < errors["int4"] < 0.002, "only the scales are rounded"
    assert sum(total.n_bytes for total in (*found.experts, *found.dense)) <= sum(found.files.values())
    plain = inspect(tmp_path / "model")
    assert [total.type_name for total in plain.experts] == ["F32"]
    assert {cost.dtype: cost.n_bytes for cost in plain.records} == {cost.dtype: cost.n_bytes for cost in found.records}


def test_the_shape_of_a_file_is_that_of_its_model(file: Path) -> None:
    shape, directory = model_shape(file), model_shape(file.parent / "model")
    assert (shape.hidden, shape.inter, shape.n_experts, shape.n_layers) == (
        directory.hidden, directory.inter, directory.n_experts, directory.n_layers,
    )  # fmt: skip
