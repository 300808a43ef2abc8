"""What is planned for keys and values is what caches come to hold."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe.generation.kv_memory import estimated_token_bytes, keeps_every_token
from hybrimoe.kv_sizes import number_of, text_config_of, values_expanded, values_kept
from hybrimoe.runtime.startup.budget import KV_VALUE_BYTES, beside_slots, kv_cache_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from tiny_families import FAMILIES, built, tiny_model

N_TOKENS = 80
WITHIN = 1.1
"""A window of 16 tokens is planned whole and holds 15; growing buffers have an eighth of room more."""


def held(layers: list[Any]) -> int:
    """Values in the keys, values and index of layers."""
    names = ("keys", "values", "indexer_keys")
    tensors = [getattr(layer, name, None) for layer in layers for name in names]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))


def model_of(family: str) -> Any:
    if family != "step3p7":
        return tiny_model(family)
    known = FAMILIES[family]  # other heads in its windows: the whole configuration says nothing of heads then
    own = {"layer_types": ["full_attention", "sliding_attention"], "num_sliding_attention_heads": 6}
    return built(dataclasses.replace(known, text={**(known.text or {}), **own}))


def test_what_latent_attention_makes_of_its_short_vectors_is_kept_free_beside() -> None:
    config = text_config_of(tiny_model("deepseek_v3"))
    assert values_expanded(config, 10) == 10 * 4 * (2 * 8 + 8 + 8)
    assert values_expanded(text_config_of(tiny_model("qwen2_moe")), 10) == 0
    latent, plain = (beside_slots(None, (), tiny_model(family), 0) for family in ("deepseek_v3", "qwen2_moe"))
    assert latent.reserve - plain.reserve == KV_VALUE_BYTES * values_expanded(config, 128)


@pytest.mark.parametrize(
    "family",
    ["qwen2_moe", "gpt_oss", "mixtral", "deepseek_v3", "deepseek_v32", "kimi_linear", "jamba", "gemma4", "step3p7"],
)
def test_what_is_planned_is_what_a_prompt_leaves(family: str) -> None:
    """All tokens, windows, short vectors, an index, states, other sizes in some layers."""
    model = model_of(family)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 3 + N_TOKENS)[None], use_cache=True).past_key_values
    config = text_config_of(model)
    found = held(cache.layers)
    assert found <= values_kept(config, N_TOKENS) <= WITHIN * found
    context = number_of(config, "max_position_embeddings")
    assert kv_cache_bytes(model) == KV_VALUE_BYTES * values_kept(config, context)
    each = held([layer for layer in cache.layers if keeps_every_token(layer)]) * model.dtype.itemsize // N_TOKENS
    assert each <= estimated_token_bytes(model) <= each + each // 8
