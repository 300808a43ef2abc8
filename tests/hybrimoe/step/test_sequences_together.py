"""A step of several sequences with a cache each gives every one the bits that it has alone, whoever joins or leaves."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import hybrimoe
from cpu_kernels.errors import ActivationValueError
from cpu_kernels.step.program import MAX_ROWS
from hybrimoe.generation.growing import growing_cache

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import tiny_model

LENGTHS = (1, 3, 40, 17)
"""Tokens of the prompts: below and above a window of 16, one that is a single token."""


def injected(family: str, **options: Any) -> Any:
    model = tiny_model(family)
    hybrimoe.inject(model, accelerator="none", **({"expert_dtype": "float32"} | options))
    assert model.hybrimoe.step.one_by_one is None, model.hybrimoe.way
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return injected("qwen2_moe")


def prompts(model: Any) -> list[DynamicCache]:
    """A cache for each length, which holds a prompt."""
    generator, caches = torch.Generator().manual_seed(5), []
    for length in LENGTHS:
        cache = growing_cache(model.config.get_text_config(decoder=True))
        ids = torch.randint(3, 60, (1, length), generator=generator)
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        caches.append(cache)
    return caches


def compare(model: Any, rounds: list[list[int]], halved: tuple[int, ...] = ()) -> None:
    """Steps the sequences of each round together, and copies of them one by one. halved: kept in bfloat16."""
    together = prompts(model)
    for layer in (layer for sequence in halved for layer in together[sequence].layers):
        layer.keys, layer.values, layer.dtype = layer.keys.bfloat16(), layer.values.bfloat16(), torch.bfloat16
    alone = copy.deepcopy(together)
    step = model.hybrimoe.step
    for number, chosen in enumerate(rounds):
        tokens = [3 + (7 * number + 11 * sequence) % 50 for sequence in chosen]
        found = step.logits_of_each(tokens, [together[sequence] for sequence in chosen])
        assert found is not None
        for row, (sequence, token) in enumerate(zip(chosen, tokens, strict=True)):
            expected = step.next_logits([token], alone[sequence])
            assert torch.equal(found[row], expected[0]), (number, sequence)
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            for held, expected in zip(tensors(one), tensors(other), strict=True):
                assert torch.equal(held, expected)


def tensors(layer: Any) -> list[torch.Tensor]:
    """Keys and values, or states."""
    if not hasattr(layer, "recurrent_states"):
        index = [layer.indexer_keys] if getattr(layer, "is_indexer_initialized", False) else []
        return [layer.keys, layer.values, *index]
    return [state for state in (layer.conv_states[0], layer.recurrent_states[0]) if state is not None]


ROUNDS = [[0, 1, 2, 3]] * 3 + [[3, 0]] + [[2]] + [[1, 3, 2]] * 18
"""The windows of some fill and move on the way."""


@pytest.mark.parametrize(
    "family",
    ["olmoe", "gpt_oss", "deepseek_v3", "qwen3_next", "kimi_linear", "lfm2_moe", "deepseek_v32", "glm_moe_dsa"],
)
def test_families_with_plain_windowed_latent_linear_and_indexed_attention(family: str) -> None:
    """The last two choose 32 tokens, which one prompt has already and another comes to have on the way."""
    compare(injected(family), ROUNDS)


@pytest.mark.parametrize("packed", ["int4", "int8", "bfloat16"])
def test_packed_weights(packed: str) -> None:
    compare(injected("qwen3_moe", expert_dtype=packed, dense_dtype=packed), ROUNDS)


def test_caches_of_bfloat16_beside_those_of_float32(model: Any) -> None:
    compare(model, ROUNDS, halved=(1, 2))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=4, unique=True), min_size=1, max_size=8)
)
def test_any_order_of_joining_and_leaving(model: Any, rounds: list[list[int]]) -> None:
    compare(model, rounds)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next"])
def test_a_failed_step_leaves_every_cache_as_it_was(family: str) -> None:
    model = injected(family)
    caches = prompts(model)[:3]
    step = model.hybrimoe.step
    for _ in range(2):  # states lie elsewhere after each
        assert step.logits_of_each([5, 6, 7], caches) is not None
    layer = caches[1].layers[-1]
    layer.keys = torch.full_like(layer.keys, float("nan"))
    lengths = [cache.get_seq_length() for cache in caches]
    before = copy.deepcopy(caches)
    with pytest.raises(ActivationValueError):
        step.logits_of_each([5, 6, 7], caches)
    assert [cache.get_seq_length() for cache in caches] == lengths
    for cache, old in zip(caches, before, strict=True):
        for one, other in zip(cache.layers, old.layers, strict=True):
            assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(tensors(one), tensors(other), strict=True))
    for sequence in (0, 2):
        twin = copy.deepcopy(caches[sequence])
        assert torch.equal(step.next_logits([9], caches[sequence]), step.next_logits([9], twin))


def test_what_a_step_of_several_leaves_to_others(model: Any) -> None:
    step, caches = model.hybrimoe.step, prompts(model)
    empty = growing_cache(model.config)
    assert step.logits_of_each([5, 6], [caches[0], empty]) is None, "a first token"
    assert step.logits_of_each([5] * (MAX_ROWS + 1), [caches[0]] * (MAX_ROWS + 1)) is None
    mixed = tiny_model("jamba")
    hybrimoe.inject(mixed, accelerator="none", expert_dtype="float32")
    assert mixed.hybrimoe.step.logits_of_each([5], [caches[0]]) is None
