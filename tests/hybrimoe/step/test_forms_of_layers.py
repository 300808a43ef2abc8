"""Layers that look like a known form and are not: the comparison finds them, and they stay with transformers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybrimoe
from cpu_kernels.step.parts import Moe

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from family_check import outputs
from tiny_families import tiny_model


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def granite(change: str) -> Callable[..., Any]:
    """A layer of GraniteMoeShared whose experts and shared MLP meet in another way."""

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        stream, factor = hidden_states, self.residual_multiplier
        stream = stream + factor * self.self_attn(hidden_states=self.input_layernorm(stream), **kwargs)[0]
        given = self.post_attention_layernorm(stream)
        routed, shared = self.block_sparse_moe(given), self.shared_mlp(given)
        if change == "a part counts twice":
            return stream + factor * (routed + 2 * shared)
        if change == "a part is left out":
            return stream + factor * routed
        if change == "a norm of the sum that is no module":
            return stream + factor * rms(routed + shared)
        if change == "the product of both":
            return stream + factor * routed * shared
        if change == "one behind the other":
            return stream + factor * (routed + self.shared_mlp(self.post_attention_layernorm(stream + routed)))
        return stream + factor * (routed + shared)

    return forward


CHANGES = (
    "a part counts twice", "a part is left out", "a norm of the sum that is no module", "the product of both",
    "one behind the other",
)  # fmt: skip


def ways_of(model: nn.Module) -> dict[str, str]:
    """The way of each layer; what is generated is what plain transformers generate."""
    plain = outputs(model)  # type: ignore[arg-type]
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    found = outputs(model)  # type: ignore[arg-type]
    assert float((found.decode - plain.decode).abs().max()) <= 1e-4
    assert torch.equal(found.tokens, plain.tokens)
    return {path.rpartition(".")[2]: way for path, way in injection.explain().ways.items()}


@pytest.mark.parametrize("change", [*CHANGES, None])
def test_parts_that_meet_in_another_way(change: str | None) -> None:
    model: Any = tiny_model("granitemoeshared", residual_multiplier=0.5)
    layer = model.model.layers[0]
    layer.forward = types.MethodType(granite(change or ""), layer)
    ways = ways_of(model)
    assert ways["1"] == "compiled"
    assert (ways["0"] == "compiled") is (change is None), ways


HOOKED = {
    "granitemoeshared": ("shared_mlp", "block_sparse_moe", "post_attention_layernorm"),
    "cohere2_moe": ("self_attn.o_proj", "mlp", "input_layernorm", "mlp.shared_experts"),
    "laguna": ("self_attn.g_proj", "self_attn.v_proj"),
    "mimo_v2_flash": ("self_attn.v_proj",),
    "axk1": ("mlp.post_mlp_layernorm", "mlp.shared_experts", "mlp.experts"),
    "minimax_m3_vl": ("mlp.shared_experts",),
    "mistral4": ("self_attn.q_b_proj", "self_attn.kv_b_proj"),
    "gemma4": (
        "mlp", "router.proj", "router.norm", "experts", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2", "post_feedforward_layernorm", "self_attn.v_norm",
    ),
    "longcat_flash": (
        "mlp.experts", "mlps.0", "mlps.1", "self_attn.0.q_b_proj", "self_attn.1.kv_b_proj",
        "self_attn.0.kv_a_layernorm",
    ),
    "bailing_hybrid": ("self_attn.g_proj", "self_attn.kv_b_proj"),
}  # fmt: skip

LATER = ("bailing_hybrid",)
"""Families whose second layer is the one with such parts."""
LARGER = 10
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"num_shared_experts": 1},
    "gemma4": {"hidden_size_per_layer_input": 0},
}


@pytest.mark.parametrize(("family", "part"), [(family, part) for family, parts in HOOKED.items() for part in parts])
def test_a_hook_that_changes_a_part(family: str, part: str) -> None:
    """In a call of its own kind, whatever it does to the values: a step leaves it to the model."""
    model: Any = tiny_model(family, **OPTIONS.get(family, {}))
    number = int(family in LATER)
    hooked = model.model.layers[number].get_submodule(part)
    with torch.no_grad():
        for weight in hooked.parameters():
            weight.mul_(LARGER)  # such that what the hook changes is no rounding beside the rest
    hooked.register_forward_hook(lambda _, __, output: _changed(output))
    ways = ways_of(model)
    assert ways[str(1 - number)] == "compiled"
    assert ways[str(number)] != "compiled", ways


def gemma(change: str) -> Callable[..., Any]:
    """A layer of Gemma 4 whose MLP and experts meet in another way."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stream = hidden_states
        attended = self.self_attn(hidden_states=self.input_layernorm(stream), **kwargs)[0]
        stream = stream + self.post_attention_layernorm(attended)
        flat = stream.reshape(-1, stream.shape[-1])
        given = self.pre_feedforward_layernorm_2(flat)
        _, weights, ids = self.router(given if change == "the router reads the experts' norm" else flat)
        if change == "weights that are changed on their way":
            weights = weights**2
        routed = self.post_feedforward_layernorm_2(self.experts(given, ids, weights).reshape(stream.shape))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(stream)))
        if change == "the norm of the difference":
            return stream + self.post_feedforward_layernorm(dense - routed)
        if change == "no norm of the sum":
            return stream + dense + routed + 0 * self.post_feedforward_layernorm(dense)
        return stream + self.post_feedforward_layernorm(dense + routed)

    return forward


OTHER_GEMMAS = (
    "the router reads the experts' norm", "weights that are changed on their way", "the norm of the difference",
    "no norm of the sum",
)  # fmt: skip


@pytest.mark.parametrize("change", [*OTHER_GEMMAS, None])
def test_experts_beside_an_mlp_in_another_way(change: str | None) -> None:
    model: Any = tiny_model("gemma4", **OPTIONS["gemma4"])
    layer = model.model.layers[0]
    layer.forward = types.MethodType(gemma(change or ""), layer)
    ways = ways_of(model)
    assert ways["1"] == "compiled"
    assert (ways["0"] == "compiled") is (change is None), ways


def longcat(change: str) -> Callable[..., Any]:
    """A layer of LongCat-Flash whose experts' result goes another way."""

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        stream = hidden_states
        stream = stream + self.self_attn[0](hidden_states=self.input_layernorm[0](stream), **kwargs)[0]
        given = self.post_attention_layernorm[0](stream)
        late = self.mlp(given)
        stream = stream + self.mlps[0](given)
        if change == "in the first sum as well":
            stream = stream + late
        stream = stream + self.self_attn[1](hidden_states=self.input_layernorm[1](stream), **kwargs)[0]
        result = self.mlps[1](self.post_attention_layernorm[1](stream))
        if change == "nowhere":
            return stream + result
        if change == "twice":
            return stream + result + 2 * late
        if change == "multiplied":
            return stream + result + late * given
        return stream + result + late

    return forward


@pytest.mark.parametrize("change", ["in the first sum as well", "nowhere", "twice", "multiplied", None])
def test_a_late_result_that_goes_another_way(change: str | None) -> None:
    model: Any = tiny_model("longcat_flash")
    layer = model.model.layers[0]
    layer.forward = types.MethodType(longcat(change or ""), layer)
    ways = ways_of(model)
    assert ways["1"] == "compiled"
    assert (ways["0"] == "compiled") is (change is None), ways


@pytest.mark.parametrize("chosen", ["only the identity", "never the identity"])
def test_experts_that_are_the_identity(chosen: str) -> None:
    model: Any = tiny_model("longcat_flash", zero_expert_num=6)
    for layer in model.model.layers:
        bias = layer.mlp.router.e_score_correction_bias
        bias[-6:] = 10.0 if chosen == "only the identity" else -10.0
    assert set(ways_of(model).values()) == {"compiled"}


@pytest.mark.parametrize("latent", [None, 16, 40])
def test_experts_between_projections(latent: int | None) -> None:
    ways = ways_of(tiny_model("nemotron_h", moe_latent_size=latent))
    assert ways["1"] == ways["3"] == "compiled", ways


@pytest.mark.parametrize("part", ["fc1_latent_proj", "fc2_latent_proj", "shared_experts"])
def test_projections_around_experts_with_a_hook(part: str) -> None:
    model: Any = tiny_model("nemotron_h", moe_latent_size=16)
    hooked = model.model.layers[1].mixer.get_submodule(part)
    with torch.no_grad():
        for weight in hooked.parameters():
            weight.mul_(LARGER)
    hooked.register_forward_hook(lambda _, __, output: _changed(output))
    ways = ways_of(model)
    assert ways["3"] == "compiled" != ways["1"], ways


@pytest.mark.parametrize("family", ["cohere2_moe", "gemma4", "axk1", "mimo_v2_flash", "nemotron_h"])
def test_weights_of_bfloat16_and_int8(family: str) -> None:
    """Factors and sums are found where the recorded values are rounded."""
    model: Any = tiny_model(family, **OPTIONS.get(family, {})).to(torch.bfloat16)
    found = []
    for step in ("transformers", "auto"):
        config = {"cpu": {"step": step}}
        injection = hybrimoe.inject(model, accelerator="none", expert_dtype="int8", config=config)
        if step == "auto":
            assert set(injection.explain().ways.values()) == {"compiled"}
        found.append(outputs(model).decode[1])
        injection.restore()
    plain, compiled = found
    assert float((compiled - plain).abs().max()) <= 0.05 * float(plain.abs().max())


@pytest.mark.parametrize("strategy", ["sum", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_experts(strategy: str, dtype: torch.dtype) -> None:
    """What shared experts add may be far below the rounding of the sum, as here."""
    options = {"num_shared_experts": 1, "shared_expert_combination_strategy": strategy}
    model: Any = tiny_model("cohere2_moe", **options).to(dtype)
    step: Any = hybrimoe.inject(model, accelerator="none", expert_dtype="int8").step
    for layer in step.reading.layers.values():
        (moe,) = [core for branch in layer.branches for core in branch.cores if isinstance(core, Moe)]
        assert moe.selection.scale == (1.0 if strategy == "sum" else 0.5)


def _changed(output: Any) -> Any:
    if isinstance(output, tuple):
        return (_changed(output[0]), *output[1:])
    return output + 0.3 * output.roll(1, -1)
