"""A KV cache as a graph of a device needs it: buffers that stay where they are, and a length that is a tensor."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from hybrimoe.generation.growing import Buffers, GrowingLayer, GrowingWindowLayer, grow_in_place


class FixedLayer(StaticLayer):  # type: ignore[misc] # transformers is not typed
    """The buffers of a growing layer, whole: what is beyond the tokens held is hidden by the mask.

    A step's tokens are written behind `n_past` (int64, one number, on the device), which nothing here changes. first:
    number of the token that the buffers begin with.
    """

    def __init__(self, buffers: Buffers, n_past: torch.Tensor) -> None:
        super().__init__(int(buffers.keys.shape[-2]))
        self.keys, self.values, self.first = buffers.keys, buffers.values, buffers.first
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.cumulative_length = n_past
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, heads, new tokens, D]; returns the whole buffers."""
        new = torch.arange(key_states.shape[-2], device=self.device)
        places = new + (self.cumulative_length - self.first)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the buffers have room for, and the number of the first one."""
        return self.max_cache_len, self.first


class FixedWindowLayer(FixedLayer):
    """The same of a sliding window; the mask hides what is before it, too."""

    is_sliding = True

    def __init__(self, buffers: Buffers, n_past: torch.Tensor, sliding_window: int) -> None:
        super().__init__(buffers, n_past)
        self.sliding_window = sliding_window


def growing_layers(cache: Any, n_past: int, n_sequences: int, device: torch.device) -> list[GrowingLayer] | None:
    """The layers of a cache that holds `n_past` tokens on `device`, with room to grow; None where one of them is of
    another kind (the states of linear attention), or in another state."""
    if any(not isinstance(layer, GrowingLayer) for layer in cache.layers):
        grow_in_place(cache)
    layers = cache.layers
    for layer in layers:
        if type(layer) not in (GrowingLayer, GrowingWindowLayer) or not layer.is_initialized:
            return None
        if layer.device != device or layer.get_seq_length() != n_past or layer.n_sequences != n_sequences:
            return None
        if getattr(layer, "record_past", False):
            return None
    return list(layers) or None


def fixed_cache(layers: list[GrowingLayer], buffers: list[Buffers], n_past: torch.Tensor) -> DynamicCache:
    """A cache over the buffers of growing layers."""
    cache = DynamicCache()
    cache.layers = [
        FixedWindowLayer(held, n_past, int(layer.sliding_window))
        if isinstance(layer, GrowingWindowLayer) else FixedLayer(held, n_past)
        for layer, held in zip(layers, buffers, strict=True)
    ]  # fmt: skip
    return cache
