"""Compiled layers that keep states: they leave in a cache what transformers' forward does, and goes on from."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import hybrimoe
from cpu_kernels.errors import ActivationValueError
from cpu_kernels.step.compiled import CompiledStates
from hybrimoe.generation.growing import growing_cache
from hybrimoe.step.reading.states import read_gated_norm
from hybrimoe.step.states import States, put_states, states_of

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import FAMILIES, prompt, tiny_model

COMPILED = ("qwen3_next", "qwen3_5_moe", "kimi_linear", "minimax", "lfm2_moe", "granitemoehybrid")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=COMPILED)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A family's plain model, and the same with a compiled step."""
    plain, injected = tiny_model(request.param), tiny_model(request.param)
    hybrimoe.inject(injected, accelerator="none", expert_dtype="float32")
    assert injected.hybrimoe.step.states, injected.hybrimoe.way
    return plain, injected


def after_prompt(model: Any, n_sequences: int = 1) -> Any:
    with torch.no_grad():
        return model(input_ids=prompt(n_sequences), use_cache=True).past_key_values


def step(model: Any, cache: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, **options).logits
    return logits


def states(cache: Any) -> list[torch.Tensor]:
    """All that the cache's layers keep as states."""
    held = [states_of(cache, number) for number in range(len(cache))]
    return [part for each in held if each is not None for part in each if part is not None]


def own_kind(cache: Any) -> bool:
    """Whether it is no plain cache of transformers."""
    return type(cache) is not DynamicCache


def alike(one: torch.Tensor, other: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("n_new", [1, 2, 5])
@pytest.mark.parametrize("n_sequences", [1, 3])
def test_states_are_those_of_transformers(pair: tuple[Any, Any], n_new: int, n_sequences: int) -> None:
    plain, injected = pair
    generator = torch.Generator().manual_seed(3)
    caches = [after_prompt(model, n_sequences) for model in pair]
    before = injected.hybrimoe.step.n_steps
    for _ in range(3):
        tokens = torch.randint(3, 90, (n_sequences, n_new), generator=generator)
        expected, found = (step(model, cache, tokens) for model, cache in zip(pair, caches, strict=True))
        assert alike(found, expected)
    assert injected.hybrimoe.step.n_steps == before + 3
    assert all(alike(found, expected) for expected, found in zip(*map(states, caches), strict=True))
    assert alike(step(plain, caches[1], tokens), step(plain, caches[0], tokens)), "transformers goes on from there"


def test_a_step_changes_states_where_they_lie(pair: tuple[Any, Any]) -> None:
    cache = after_prompt(pair[1])
    before = states(cache)
    old = [state.clone() for state in before]
    step(pair[1], cache, torch.tensor([[5]]))
    assert all(one is other for one, other in zip(states(cache), before, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(before, old, strict=True))


def test_beams_take_other_rows(pair: tuple[Any, Any]) -> None:
    if own_kind(after_prompt(pair[0])):
        pytest.skip("MiniMax's cache reorders no states")
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    plain, found = (model.generate(prompt(1), **options) for model in pair)
    assert torch.equal(found, plain)


def test_new_tokens_that_a_mask_hides_are_left_to_transformers(pair: tuple[Any, Any]) -> None:
    tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.ones(2, prompt(2).shape[1] + 3, dtype=torch.long)
    mask[1, -1] = 0
    caches = [after_prompt(model, 2) for model in pair]
    before = pair[1].hybrimoe.step.n_steps
    expected, found = (
        step(model, cache, tokens, attention_mask=mask) for model, cache in zip(pair, caches, strict=True)
    )
    assert pair[1].hybrimoe.step.n_steps == before
    assert alike(found[0], expected[0])
    assert all(alike(found, expected) for expected, found in zip(*map(states, caches), strict=True))


def test_a_first_token_finds_states_of_zeros(pair: tuple[Any, Any]) -> None:
    plain, injected = pair
    if own_kind(after_prompt(plain)):
        pytest.skip("the model makes its cache in its first call")
    cache = growing_cache(injected.config.get_text_config(decoder=True))
    tokens = prompt(1)[0].tolist()
    logits = injected.hybrimoe.step.next_logits(tokens, cache)
    assert logits is not None
    other = after_prompt(plain)
    assert all(alike(found, expected) for found, expected in zip(states(cache), states(other), strict=True))
    new = torch.tensor([[11]])
    assert alike(step(injected, cache, new), step(plain, other, new))


def test_drafts_are_not_verified(pair: tuple[Any, Any]) -> None:
    own, cache = pair[1].hybrimoe.step, after_prompt(pair[1])
    before = [state.clone() for state in states(cache)]
    assert own.next_logits([5, 6], cache, drafted=True) is None
    assert all(torch.equal(one, other) for one, other in zip(states(cache), before, strict=True))
    assert "keeps a state" in str(own.differs_in_batches)
    assert own.one_by_one is None


@pytest.mark.parametrize("change", ["dtype", "rows", "recorded"])
def test_states_of_another_form_are_left_to_transformers(pair: tuple[Any, Any], change: str) -> None:
    cache = after_prompt(pair[1])
    (number,) = pair[1].hybrimoe.step.states
    held = states_of(cache, number)
    assert held is not None
    if change != "rows" and own_kind(cache):
        pytest.skip("MiniMax's matrices have the dtype of its values, and its cache records no past")
    if change == "dtype":
        put_states(cache, number, States(*(None if part is None else part.double() for part in held)))
    elif change == "rows":
        turned = (None if part is None else part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in held)
        put_states(cache, number, States(*turned))
    else:
        cache.activate_past_recording()
    before = pair[1].hybrimoe.step.n_steps
    own = copy.deepcopy(cache)
    assert alike(step(pair[1], cache, torch.tensor([[5]])), step(pair[0], own, torch.tensor([[5]])))
    assert pair[1].hybrimoe.step.n_steps == before


def test_a_failed_step_of_one_cache_spoils_its_states(pair: tuple[Any, Any]) -> None:
    """They have the failed token in them: to go on from there must fail, not be wrong."""
    cache = after_prompt(pair[1])
    layer = next(layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized)
    keys = layer.keys
    layer.keys = torch.full_like(keys, float("nan"))
    with pytest.raises(ActivationValueError):
        step(pair[1], cache, torch.tensor([[5]]))
    layer.keys = keys
    with pytest.raises(ActivationValueError):
        step(pair[1], cache, torch.tensor([[5]]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", COMPILED)
def test_packed_and_rounded_weights(family: str, dtype: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    options = {} if dtype == "bfloat16" else {"dense_dtype": dtype}
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="bfloat16", **options)
    assert injection.step is not None
    assert injection.step.states, injection.explain().ways
    caches = [after_prompt(model) for _ in range(2)]
    tokens = torch.tensor([[5]])
    found = step(model, caches[0], tokens)
    n_steps = injection.step.n_steps
    with torch.enable_grad():  # left to transformers
        expected = model(input_ids=tokens, past_key_values=caches[1], use_cache=True).logits.detach()
    assert (n_steps, injection.step.n_steps) == (1, 1)
    assert alike(found, expected, 6e-2)
    assert all(alike(one.float(), other.float(), 6e-2) for one, other in zip(*map(states, caches), strict=True))


def test_minimax_with_a_first_layer_of_linear_attention() -> None:
    """As real models have: it counts no tokens, and several new ones are what transformers makes of them."""
    plain, model = (tiny_model("minimax", layer_types=["linear_attention", "full_attention"]) for _ in range(2))
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    assert set(injection.explain().ways.values()) == {"compiled"}, injection.explain().ways
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt(2), **options), plain.generate(prompt(2), **options))
    assert injection.step is not None
    assert injection.step.n_steps == 5
    tokens = torch.tensor([[5, 6, 7]])
    positions = torch.arange(3)[None] + prompt(1).shape[1]
    found, expected = (step(one, after_prompt(one), tokens, position_ids=positions) for one in (model, plain))
    assert alike(found, expected)
    assert injection.step.n_steps == 5


@pytest.mark.parametrize("bound", [0.0, -3.0])
def test_fading_within_a_bound(bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    known, own = FAMILIES["bailing_hybrid"], {"kda_safe_gate": bound < 0, "kda_lower_bound": bound}
    monkeypatch.setitem(FAMILIES, "bailing_hybrid", dataclasses.replace(known, overrides=known.overrides | own))
    plain, injected = tiny_model("bailing_hybrid"), tiny_model("bailing_hybrid")
    injection = hybrimoe.inject(injected, accelerator="none", expert_dtype="float32")
    assert injection.explain().ways["model.layers.0"] == "compiled"
    caches = [after_prompt(model) for model in (plain, injected)]
    for token in (5, 6, 7):
        expected, found = (
            step(model, cache, torch.tensor([[token]])) for model, cache in zip((plain, injected), caches, strict=True)
        )
        assert alike(found, expected)
    assert all(alike(found, expected) for expected, found in zip(*map(states, caches), strict=True))
    assert injection.step is not None
    assert injection.step.n_steps == 3


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_sequences", "n_new"), [(1, 65), (1, 130), (2, 64), (3, 45), (33, 3)])
def test_long_prompts_have_the_models_logits_and_states(pair: tuple[Any, Any], n_sequences: int, n_new: int) -> None:
    """Behind nothing, and behind an earlier part; more sequences than have two rows each are left to transformers."""
    generator, caches = torch.Generator().manual_seed(9), []
    parts = [torch.randint(3, 90, (n_sequences, n), generator=generator) for n in (n_new, 70)]
    results = []
    for model in pair:
        with torch.no_grad():
            first = model(input_ids=parts[0], use_cache=True)
            cache = first.past_key_values
            results.append([first.logits, step(model, cache, parts[1])])
        caches.append(cache)
    assert all(alike(found, expected) for expected, found in zip(*results, strict=True))
    assert all(alike(found, expected) for expected, found in zip(*map(states, caches), strict=True))


@pytest.fixture
def prompts(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens of each compiled part of a prompt."""
    if not pair[1].hybrimoe.step.reading.prompts:
        pytest.skip("the layer returns its states, too")
    told: list[int] = []
    own = CompiledStates.run

    def run(self: CompiledStates, n_sequences: int, n_new: int) -> None:
        told.append(n_new)
        own(self, n_sequences, n_new)

    monkeypatch.setattr(CompiledStates, "run", run)
    return told


@pytest.mark.parametrize(("n_sequences", "parts"), [(1, [43, 43, 44]), (2, [26, 26, 26, 26, 26])])
def test_parts_of_a_prompt_are_of_even_size(
    pair: tuple[Any, Any], prompts: list[int], n_sequences: int, parts: list[int]
) -> None:
    with torch.no_grad():
        pair[1](input_ids=torch.full((n_sequences, 130), 5), use_cache=True)
    assert prompts == parts


@pytest.mark.parametrize("why", ["padding", "gradients", "no cache", "hooks", "recorded"])
def test_prompts_that_are_left_to_transformers(
    pair: tuple[Any, Any], prompts: list[int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 90, (2, 80), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"use_cache": True, "attention_mask": mask}
    model, mode = pair[1], torch.no_grad()
    if why == "padding":
        mask[0, :9] = 0
    elif why == "gradients":
        mode = torch.enable_grad()
    elif why == "no cache":
        options["use_cache"] = False
    elif why == "hooks":
        hook = model.get_output_embeddings().register_forward_hook(lambda *_: None)
    else:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        options["past_key_values"] = cache
    with mode:
        found = model(input_ids=ids, **options)
    if why == "hooks":
        hook.remove()
    assert prompts == []
    if why != "recorded":
        with torch.no_grad():
            assert alike(found.logits, pair[0](input_ids=ids, attention_mask=mask).logits)


# Norms with a gate ----------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A norm of groups of columns, with a gate before or after it."""

    def __init__(self, width: int, group: int, act: Any, *, first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.group, self.eps, self.first = group, 1e-5, first
        self._act = act

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        x = x * self._act(gate) if self.first else x
        groups = x.unflatten(-1, (-1, self.group))
        x = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight
        return x if self.first else x * self._act(gate)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("group", [12, 4])
@pytest.mark.parametrize("act", [torch.sigmoid, nn.functional.silu])
def test_what_a_gated_norm_computes_is_found_out(act: Any, group: int, first: bool) -> None:
    norm = read_gated_norm(Gated(12, group, act, first=first))
    assert norm is not None
    assert (norm.group, norm.eps, norm.gate_first) == (group, 1e-5, first)
    assert norm.has_sigmoid == (act is torch.sigmoid)


def test_other_norms_are_refused() -> None:
    assert read_gated_norm(Gated(12, 12, torch.tanh, first=False)) is None
    assert read_gated_norm(nn.Linear(12, 12)) is None
    assert read_gated_norm(nn.Bilinear(12, 12, 12)) is None
