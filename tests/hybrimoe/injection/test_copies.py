"""A deep copy of an injected model runs in the same session; each is restored without the other."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hybrimoe
from hybrimoe.experts.module import HybridExperts

IDS = torch.arange(3, 12)[None]
SETTINGS: list[dict[str, Any]] = [
    {"accelerator": "none", "expert_dtype": "float32"},
    {"accelerator": "none", "expert_dtype": "int8", "dense_dtype": "int8"},
    {"accelerator": "emulated", "gpu_expert_slots": 0.5, "expert_dtype": "float32"},
]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def make(family: str) -> PreTrainedModel:
    from tiny_families import tiny_model

    return tiny_model(family)


def injected_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, HybridExperts)]


def test_a_copy_that_is_saved_is_the_copy(tmp_path: Path) -> None:
    model = make("qwen3_moe")
    hybrimoe.inject(model, **SETTINGS[0])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight += 1
    twin.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(saved, twin.lm_head.weight)
    assert not torch.equal(saved, model.lm_head.weight)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_restoring_the_copy_leaves_the_original_injected(family: str, settings: dict[str, Any]) -> None:
    model = make(family)
    plain = logits(model)
    injection = hybrimoe.inject(model, **settings)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert twin.hybrimoe is not injection
    assert twin.hybrimoe.model is twin
    torch.testing.assert_close(logits(twin), expected)
    twin.hybrimoe.restore()
    assert injection.active
    assert not injected_modules(twin)
    assert not hasattr(twin, "hybrimoe")
    assert torch.equal(logits(twin), plain)
    torch.testing.assert_close(logits(model), expected)
    injection.restore()
    assert torch.equal(logits(model), plain)
    assert not model._forward_pre_hooks
    assert not twin._forward_pre_hooks


@pytest.mark.parametrize("settings", SETTINGS)
def test_restoring_the_original_leaves_the_copy_running(settings: dict[str, Any]) -> None:
    model = make("qwen3_moe")
    plain = logits(model)
    injection = hybrimoe.inject(model, **settings)
    expected = logits(model)
    twin = copy.deepcopy(model)
    injection.restore()
    assert torch.equal(logits(model), plain)
    torch.testing.assert_close(logits(twin), expected)
    assert twin.hybrimoe.session.started
    session = twin.hybrimoe.session
    twin.hybrimoe.restore()
    assert not session.started
    assert torch.equal(logits(twin), plain)


def test_the_copy_has_weights_of_its_own() -> None:
    model = make("qwen3_moe")
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    twin = copy.deepcopy(model)
    twin.hybrimoe.restore()
    injection.restore()
    plain = logits(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(logits(model), plain)


def test_a_copy_of_a_loaded_model(tmp_path: Path) -> None:
    plain = make("qwen3_moe")
    plain.save_pretrained(tmp_path)
    model = hybrimoe.load(tmp_path, accelerator="none", expert_dtype="float32", progress=False, packed_file=False)
    twin = copy.deepcopy(model)
    twin.hybrimoe.restore()
    assert torch.equal(logits(twin), logits(plain))
    assert model.hybrimoe.active
    torch.testing.assert_close(logits(model), logits(plain))
    assert all(weight.is_meta for module in injected_modules(model) for weight in module.replaced.parameters())


def test_a_copy_that_is_dropped_does_not_keep_the_session_open() -> None:
    model = make("qwen3_moe")
    injection = hybrimoe.inject(model, accelerator="none")
    twin = copy.deepcopy(model)
    del twin
    gc.collect()
    injection.restore()
    assert not injection.session.started


def test_a_copied_injection_brings_its_model() -> None:
    with hybrimoe.inject(make("qwen3_moe"), accelerator="none", expert_dtype="float32") as injection:
        twin = copy.deepcopy(injection)
        assert twin is not injection
        assert twin.model.hybrimoe is twin
        assert torch.equal(logits(twin.model), logits(injection.model))
        twin.restore()
