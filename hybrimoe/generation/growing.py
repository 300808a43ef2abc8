"""A KV cache layer with room to grow, so that a new token is written and not all before it copied."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["GrowingLayer", "growing_cache"]

LEAST_ROOM = 256
"""Tokens of room that a new buffer has at least."""
ROOM_SHARE = 8
"""A new buffer has room for 1/8 of what it holds: copying stays a constant share, and no more memory lies idle."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc] # transformers is not typed
    """`keys` and `values` [B, heads, T, D] are the used beginning of buffers.

    transformers' own layer concatenates: each token copies the whole context, which at 4,000 tokens of a model of 16
    heads takes longer than reading it for attention does. Whatever else replaces `keys` and `values` (a crop, a choice
    of rows) is taken as it is; the next token finds a new buffer where it has to.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """No tokens and no buffers yet."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, new tokens, D]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def _appended(self, which: int, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        n_held = held.shape[-2] if held.numel() else 0
        n_tokens = n_held + new.shape[-2]
        buffer = self._buffers[which]
        if buffer is None or buffer.shape[-2] < n_tokens or not _begins(held, buffer):
            room = max(LEAST_ROOM, n_tokens // ROOM_SHARE)
            buffer = new.new_empty(*new.shape[:-2], n_tokens + room, new.shape[-1])
            if n_held:
                buffer[..., :n_held, :] = held
            self._buffers[which] = buffer
        buffer[..., n_held:n_tokens, :] = new
        return buffer[..., :n_tokens, :]


def _begins(held: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether `held` is the beginning of `buffer`, not a copy or a choice of its rows."""
    alike = held.shape[:-2] == buffer.shape[:-2] and held.stride() == buffer.stride()
    return alike and held.data_ptr() == buffer.data_ptr() and held.dtype == buffer.dtype


def growing_cache(text_config: Any) -> DynamicCache:
    """transformers' cache for a model, its plain layers with room to grow; others (windows, states) as they are."""
    cache = DynamicCache(config=text_config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
