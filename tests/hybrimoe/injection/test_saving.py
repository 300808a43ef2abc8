"""Every way of writing or loading an injected model's weights is complete, or refused; never a part in silence."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import PreTrainedModel

import hybrimoe
from hybrimoe.errors import ModelError
from hybrimoe.experts.absent import AbsentWeights

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "llama4")
PACKED = {"accelerator": "none", "expert_dtype": "int4", "dense_dtype": "int8"}
LOADED = {"accelerator": "none", "progress": False, "packed_file": False}
Weights = dict[str, torch.Tensor]
Write = Callable[[PreTrainedModel, Path], Weights]


def by_torch(model: PreTrainedModel, folder: Path) -> Weights:
    torch.save(model.state_dict(), folder / "weights.pt")
    found: Weights = torch.load(folder / "weights.pt")
    return found


def by_safetensors(model: PreTrainedModel, folder: Path) -> Weights:
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "weights.st")
    return load_file(folder / "weights.st")


def by_save_model(model: PreTrainedModel, folder: Path) -> Weights:
    save_model(model, str(folder / "model.st"))
    return load_file(folder / "model.st")


def by_save_pretrained(model: PreTrainedModel, folder: Path) -> Weights:
    model.save_pretrained(folder / "whole")
    return dict(type(model).from_pretrained(folder / "whole").state_dict())


def by_save_pretrained_of_the_inner_model(model: PreTrainedModel, folder: Path) -> Weights:
    model.model.save_pretrained(folder / "inner")
    inner = type(model.model).from_pretrained(folder / "inner").state_dict()
    whole = {f"model.{name}": weight for name, weight in inner.items()}
    return whole | {"lm_head.weight": model.state_dict()["lm_head.weight"]}


def by_accelerate(model: PreTrainedModel, folder: Path) -> Weights:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(model, str(folder / "accelerate"))
    return load_file(folder / "accelerate" / "model.safetensors")


WAYS = (
    by_torch, by_safetensors, by_save_model, by_save_pretrained, by_save_pretrained_of_the_inner_model, by_accelerate,
)  # fmt: skip


def make(family: str) -> PreTrainedModel:
    from tiny_families import tiny_model

    return tiny_model(family)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", WAYS)
def test_an_injected_model_is_written_whole(write: Write, family: str, tmp_path: Path) -> None:
    model = make(family)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    with hybrimoe.inject(model, **PACKED):
        assert_equal(write(model, tmp_path), expected)


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("settings", [{"expert_dtype": "float32"}, {"expert_dtype": "int4", "dense_dtype": "int8"}])
def test_a_loaded_model_holds_packed_weights_only_and_says_so(
    write: Write, settings: dict[str, str], tmp_path: Path
) -> None:
    make("qwen3_moe").save_pretrained(tmp_path / "checkpoint")
    model = hybrimoe.load(tmp_path / "checkpoint", **LOADED, **settings)
    with pytest.raises(ModelError, match=r"is packed in .*restore\(\) first, or take .*full_state_dict\(\)"):
        write(model, tmp_path)
    assert not list(tmp_path.glob("whole/*")), "refused before a file is written"
    assert list(tmp_path.rglob("*.safetensors")) == [tmp_path / "checkpoint" / "model.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_state_dict_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    plain = make(family)
    plain.save_pretrained(tmp_path / "checkpoint")
    model = hybrimoe.load(tmp_path / "checkpoint", **LOADED, expert_dtype="float32")
    assert_equal(model.hybrimoe.full_state_dict(), plain.state_dict())
    model.save_pretrained(tmp_path / "again", state_dict=model.hybrimoe.full_state_dict())
    assert_equal(type(plain).from_pretrained(tmp_path / "again").state_dict(), plain.state_dict())


def test_the_full_state_dict_is_dequantised(tmp_path: Path) -> None:
    plain = make("qwen3_moe")
    plain.save_pretrained(tmp_path / "checkpoint")
    model = hybrimoe.load(tmp_path / "checkpoint", **LOADED, expert_dtype="int8", dense_dtype="int8")
    found, expected = model.hybrimoe.full_state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert (found[name] - weight).abs().max() <= 0.01 * weight.abs().max()


def test_keys_shapes_and_dtypes_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain = make("gpt_oss")
    plain.save_pretrained(tmp_path)
    found = hybrimoe.load(tmp_path, **LOADED, expert_dtype="int4", dense_dtype="int8").state_dict()
    expected = {name: (weight.shape, weight.dtype, weight.numel()) for name, weight in plain.state_dict().items()}
    assert {name: (weight.shape, weight.dtype, weight.numel()) for name, weight in found.items()} == expected
    assert any(isinstance(weight, AbsentWeights) for weight in found.values())


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight.clone(),
        lambda weight: weight.data,
        lambda weight: weight + 1,
        lambda weight: weight.numpy(),
        lambda weight: weight.to("cpu"),
        lambda weight: weight.data_ptr(),
        lambda weight: weight[0],
        lambda weight: torch.empty(2, 3).copy_(weight),
        pickle.dumps,
    ],
)
def test_a_placeholder_is_not_read(use: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(ModelError, match=r"layer\.weight is packed"):
        use(AbsentWeights.like(torch.empty(2, 3), "layer.weight"))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("settings", [PACKED, {"accelerator": "none", "expert_dtype": "float32"}])
def test_nothing_is_loaded_into_packed_weights_in_silence(strict: bool, settings: dict[str, str]) -> None:
    model = make("qwen3_moe")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with hybrimoe.inject(model, **settings):
        with pytest.raises(ModelError, match=r"nothing can be loaded.*restore\(\) first"):
            model.load_state_dict(weights, strict=strict)
        experts = {name: weight for name, weight in weights.items() if ".experts." in name}
        with pytest.raises(ModelError, match=r"mlp.experts holds packed experts"):
            model.load_state_dict(experts, strict=False)


def test_weights_that_are_not_packed_are_loaded() -> None:
    model = make("qwen3_moe")
    with hybrimoe.inject(model, **PACKED):
        assert model.load_state_dict({"model.norm.weight": torch.full((32,), 2.0)}, strict=False).unexpected_keys == []
        assert torch.equal(model.model.norm.weight, torch.full((32,), 2.0))
        with pytest.raises(RuntimeError, match=r"Missing key.*experts.gate_up_proj"):
            model.load_state_dict({"model.norm.weight": torch.ones(32)})


@pytest.mark.parametrize("dump", [pickle.dumps, lambda model: torch.save(model, "never.pt")])
def test_an_injected_model_is_not_pickled(dump: Callable[[Any], Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = make("qwen3_moe")
    for settings in (PACKED, {"accelerator": "none"}):
        with (
            hybrimoe.inject(model, **settings) as injection,
            pytest.raises(ModelError, match=r"cannot be pickled.*restore\(\) first"),
        ):
            dump(model)
        with pytest.raises(ModelError, match="cannot be pickled"):
            pickle.dumps(injection)
    assert pickle.loads(pickle.dumps(model)).num_parameters() == model.num_parameters()


def test_what_else_asks_an_injected_model() -> None:
    model = make("qwen3_moe")
    ids = torch.arange(3, 9)[None]
    with hybrimoe.inject(model, accelerator="none", expert_dtype="float32"):
        expected = model.generate(ids, max_new_tokens=3, do_sample=False)
        model.train().eval().to("cpu").requires_grad_(False)
        model.tie_weights()
        assert model.num_parameters() == sum(weight.numel() for _, weight in model.named_parameters())
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
