"""How many tokens of a prompt go through a model at once: as many as gain anything, fewer where memory is short."""

from __future__ import annotations

from typing import Any

from hybrimoe.generation.kv_memory import device_memory, number_of

__all__ = ["MOST_TOKENS", "chunk_tokens"]

MOST_TOKENS = 2048
"""More gain nothing: each expert has so many rows by then that its weights are read in no time."""
FEWEST_TOKENS = 64
"""Fewer would save little memory, and each would read most of the weights."""
WORK_SHARE = 0.125
"""Of the free memory, for the intermediate results of a prompt; the rest is for keys and values and other programs."""
FLOAT_BYTES = 4
STREAMS = 12
"""Rows of the width of the stream that a layer holds of a token at most: stream, norms, queries, keys, values, sums."""


def chunk_tokens(model: Any, free_bytes: int | None = None) -> int:
    """Tokens that the intermediate results of `model` leave room for, between FEWEST_TOKENS and MOST_TOKENS.

    free_bytes: of the memory that they lie in; None asks for that of the model's device.
    """
    free = device_memory(model.device)[0] if free_bytes is None else free_bytes
    fits = int(free * WORK_SHARE) // max(1, token_bytes(model))
    return max(FEWEST_TOKENS, min(MOST_TOKENS, fits))


def token_bytes(model: Any) -> int:
    """Bytes of the intermediate results of one token in the layer that has most of them."""
    config = model.config.get_text_config(decoder=True)
    width, chosen = number_of(config, "hidden_size"), number_of(config, "num_experts_per_tok")
    injection = getattr(model, "hybrimoe", None)
    inners = [layer.spec.inter for layer in injection.session.layer_specs()] if injection is not None else []
    inner = max(inners, default=number_of(config, "moe_intermediate_size") or number_of(config, "intermediate_size"))
    return FLOAT_BYTES * (STREAMS * width + max(1, chosen) * (width + inner))
