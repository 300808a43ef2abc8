"""Gradients through an injected model are plain transformers': to inputs, adapters, routers; checkpointed too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hybrimoe
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.errors import ModelError
from hybrimoe.experts.module import HybridExperts

FAMILIES = ("qwen3_moe", "gpt_oss", "llama4", "deepseek_v2", "inkling2", "granitemoehybrid", "muse_spark")
"""Plain, biased and clamped, sorted by expert, latent attention, own activation, Mamba, a norm on each output."""
TOLERANCE = 1e-4
"""Of a gradient, relative to its norm; float32 in another order of summation."""
Gradients = dict[str, torch.Tensor]


class Lora(nn.Module):
    """A low-rank adapter beside a frozen linear layer."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) / base.in_features**0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def add_adapters(model: PreTrainedModel) -> None:
    """Freezes the model and adapts its attention's projections."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if name in ("q_proj", "v_proj", "o_proj") and isinstance(child, nn.Linear):
                setattr(module, name, Lora(child, seed=len(path) + len(name)))


def gradients(model: PreTrainedModel, ids: torch.Tensor, embeds: bool = False) -> Gradients:
    """Of a loss over all logits: by name of the parameter, and "inputs"."""
    model.zero_grad()
    inputs: dict[str, Any] = {"input_ids": ids}
    if embeds:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_()}
    logits = model(**inputs, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return found | ({"inputs": inputs["inputs_embeds"].grad} if embeds else {})


def assert_same(found: Gradients, expected: Gradients, tolerance: float = TOLERANCE) -> None:
    """Every gradient that plain transformers has, but those of the experts' own weights, which are frozen."""
    expected = {name: value for name, value in expected.items() if name in found or ".experts." not in name}
    assert found.keys() == expected.keys()
    assert any(value.norm() > 0 for value in expected.values())
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm().clamp(min=1e-3))
        assert error <= tolerance, name


@pytest.fixture
def family_model() -> Callable[[str], PreTrainedModel]:
    from tiny_families import tiny_model

    return tiny_model


@pytest.fixture
def ids() -> torch.Tensor:
    from tiny_families import prompt

    return prompt(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_every_other_weight(
    family: str, family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    model = family_model(family)
    expected = gradients(model, ids, embeds=True)
    with hybrimoe.inject(model, accelerator="none", expert_dtype="float32"):
        assert_same(gradients(model, ids, embeds=True), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_adapters_of_the_attention(
    family: str, family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    model = family_model(family)
    add_adapters(model)
    expected = gradients(model, ids)
    assert any(name.endswith("q_proj.a") for name in expected)
    with hybrimoe.inject(model, accelerator="none", expert_dtype="float32"):
        assert_same(gradients(model, ids), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(
    reentrant: bool, family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    model = family_model("qwen3_moe")
    add_adapters(model)
    model.train()
    expected = gradients(model, ids, embeds=True)
    with hybrimoe.inject(model, accelerator="none", expert_dtype="float32"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(gradients(model, ids, embeds=True), expected)


@pytest.mark.parametrize("policy", ["hybrimoe", "static"])
def test_through_slots_of_an_accelerator(
    policy: str, family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    model = family_model("qwen3_moe")
    expected = gradients(model, ids, embeds=True)
    options = {"accelerator": "emulated", "gpu_expert_slots": 0.5, "expert_dtype": "float32"}
    with hybrimoe.inject(model, scheduler={"policy": policy}, **options):
        for _ in range(2):
            assert_same(gradients(model, ids, embeds=True), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_packed_experts_and_dense_layers_are_those_of_their_dequantised_weights(
    dtype: str, family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    model = family_model("qwen3_moe")
    dense = {} if dtype == "bfloat16" else {"dense_dtype": dtype}
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype=dtype, **dense)
    assert isinstance(model.lm_head, PackedLinear) == bool(dense)
    found = gradients(model, ids, embeds=True)
    for module in list(model.modules()):
        if isinstance(module, HybridExperts):
            unpack(injection, module)
        if isinstance(module, PackedLinear):
            assert module.original is not None
            module.original.weight.data.copy_(module.weight)
    injection.restore()
    expected = {name: value for name, value in gradients(model, ids, embeds=True).items() if name in found}
    assert_same(found, expected, 0.05 if dense else TOLERANCE)  # activations are rounded to int8 in the kernels


def unpack(injection: hybrimoe.injection.Injection, module: HybridExperts) -> None:
    """Writes what the store holds into the module that was replaced."""
    from hybrimoe.experts.layout import read

    layout = read(module.replaced)
    for expert in range(module.num_experts):
        layout.assign(expert, injection.session.store.read(module.layer, expert))


def test_packed_linear_against_its_own_weight() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 2100)
    packed = PackedLinear(linear)
    x = torch.randn(3, 5, 96, requires_grad=True)
    upstream = torch.randn(3, 5, 2100)
    (packed(x) * upstream).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ packed.weight)
    assert linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad, upstream.sum(dim=(0, 1)))


def test_what_a_lossy_policy_computed_has_no_gradient(
    family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    model = family_model("qwen3_moe")
    options = {"accelerator": "emulated", "gpu_expert_slots": 0.5, "expert_dtype": "float32"}
    with hybrimoe.inject(model, scheduler={"lossy": "hobbit"}, **options), pytest.raises(ModelError, match="hobbit"):
        gradients(model, ids)


def test_without_gradients_nothing_is_kept(family_model: Callable[[str], PreTrainedModel], ids: torch.Tensor) -> None:
    model = family_model("qwen3_moe")
    with hybrimoe.inject(model, accelerator="none", expert_dtype="float32"), torch.no_grad():
        assert not model(ids).logits.requires_grad
