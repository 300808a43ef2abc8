"""A cache as a graph of a device needs it: memory that stays where it is, and a length that is a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, LinearAttentionLayer, StaticLayer

from hybrimoe.generation.growing import (
    Buffers,
    GrowingHybridLayer,
    GrowingHybridWindowLayer,
    GrowingIndexedLayer,
    GrowingLayer,
    GrowingWindowLayer,
    grow_hybrids_in_place,
    grow_in_place,
)

CacheLayer = Any
"""A layer of transformers' caches, which are not typed. Graphs can keep three kinds: keys and values with room to grow,
states that each token overwrites, and layers that hold nothing."""


KINDS = (
    GrowingLayer,
    GrowingWindowLayer,
    GrowingIndexedLayer,
    GrowingHybridLayer,
    GrowingHybridWindowLayer,
    LinearAttentionLayer,
    DummyLayer,
)


class FixedLayer(StaticLayer):  # type: ignore[misc] # transformers is not typed
    """The buffers of a growing layer, whole: what is beyond the tokens held is hidden by the mask.

    A step's tokens are written behind `n_past` (int64, one number, on the device), which nothing here changes. first:
    number of the token that the buffers begin with.
    """

    def __init__(self, buffers: Buffers, n_past: torch.Tensor) -> None:
        super().__init__(int(buffers.keys.shape[-2]))
        self.keys, self.values, self.first = buffers.keys, buffers.values, buffers.first
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.cumulative_length = self.n_past = n_past
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, heads, new tokens, D]; returns the whole buffers."""
        new = torch.arange(key_states.shape[-2], device=self.device)
        places = new + (self.n_past - self.first)
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


class FixedIndexedLayer(FixedLayer):
    """The same with an index: the mask hides what is beyond the tokens held there, too. It is for one call of the
    model's forward, which may ask in the middle how many tokens there are with the new ones."""

    def __init__(self, buffers: Buffers, n_past: torch.Tensor) -> None:
        super().__init__(buffers, n_past)
        self.indexer_keys: Any = buffers.index_keys
        self.is_indexer_initialized = buffers.index_keys is not None
        self.indexer_position_ids = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a plain layer."""
        written = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length = self.n_past + key_states.shape[-2]
        return written

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Writes [B, new tokens, D]; returns as much of the buffer as keys and values have."""
        index = self.indexer_keys
        new = torch.arange(indexer_key_states.shape[1], device=self.device)
        index.index_copy_(1, new + (self.n_past - self.first), indexer_key_states)
        written: torch.Tensor = index[:, : self.max_cache_len]
        return written


class FixedHybridLayer(LinearAttentionLayer, FixedLayer):  # type: ignore[misc] # as above
    """The same with states beside keys and values; `_with_states` tells which."""

    def __init__(self, buffers: Buffers, n_past: torch.Tensor) -> None:
        FixedLayer.__init__(self, buffers, n_past)


class FixedHybridWindowLayer(LinearAttentionLayer, FixedWindowLayer):  # type: ignore[misc] # as above
    """The same of a sliding window."""

    def __init__(self, buffers: Buffers, n_past: torch.Tensor, sliding_window: int) -> None:
        FixedWindowLayer.__init__(self, buffers, n_past, sliding_window)


class HeldLayer:
    """What a recorded step reads and writes of one layer of a cache, which it does not keep alive itself.

    buffers: of a layer with keys and values, with room for one token more; None for others. states: what a layer of
    linear attention has in their place, which transformers overwrites where it lies.
    """

    def __init__(self, layer: CacheLayer) -> None:
        self._layer = weakref.ref(layer)
        self.buffers = layer.grown(1) if isinstance(layer, GrowingLayer) else None
        self.states = states_of(layer)

    @property
    def layer(self) -> CacheLayer | None:
        """The layer; None once it is gone."""
        return self._layer()

    def is_of(self, layer: CacheLayer) -> bool:
        """Whether these are a layer's buffers and states as they are now."""
        return self._layer() is layer and self.is_there()

    def is_there(self) -> bool:
        """Whether the layer still exists, in the same memory."""
        layer = self._layer()
        if layer is None or (self.buffers is not None and layer.buffers is not self.buffers):
            return False
        now = states_of(layer)
        return len(now) == len(self.states) and all(a is b for a, b in zip(now, self.states, strict=True))

    def advance(self) -> None:
        """A step has written one token."""
        layer = self._layer()
        if isinstance(layer, GrowingLayer):
            layer.stepped(1)

    def clear(self, n_past: int) -> None:
        """Zeros behind the `n_past` tokens held: a mask hides what is there, but 0 times NaN is NaN."""
        if self.buffers is not None:
            for part in (self.buffers.keys, self.buffers.values, self.buffers.index_keys):
                if part is not None:
                    part[..., n_past - self.buffers.first :, :] = 0

    def fixed(self, n_past: torch.Tensor) -> Any:
        """The layer as the model's forward is given it while it is recorded; n_past: as of `FixedLayer`."""
        layer = self._layer()
        assert layer is not None
        if self.buffers is None:
            return _with_states(type(layer)(), layer)
        if isinstance(layer, GrowingHybridLayer):
            return _with_states(FixedHybridLayer(self.buffers, n_past), layer)
        if isinstance(layer, GrowingHybridWindowLayer):
            return _with_states(FixedHybridWindowLayer(self.buffers, n_past, int(layer.sliding_window)), layer)
        if isinstance(layer, GrowingWindowLayer):
            return FixedWindowLayer(self.buffers, n_past, int(layer.sliding_window))
        if isinstance(layer, GrowingIndexedLayer):
            return FixedIndexedLayer(self.buffers, n_past)
        return FixedLayer(self.buffers, n_past)


def states_of(layer: CacheLayer) -> list[torch.Tensor]:
    """The states of a layer of linear attention that are there; of others none."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    both = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return [state for state in both if state is not None]


@contextmanager
def unchanged_states(held: Sequence[HeldLayer]) -> Iterator[None]:
    """Whatever the block computes, states are afterwards as they were: tokens are added to them, not written behind."""
    states = [state for each in held for state in each.states]
    before = [state.clone() for state in states]
    try:
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            state.copy_(old)


def fixable_layers(cache: Any, n_past: int, n_sequences: int, device: torch.device) -> list[CacheLayer] | None:
    """The layers of a cache that holds `n_past` tokens on `device`, those with keys and values with room to grow; None
    where one of them is of another kind, or in another state."""
    if any(not isinstance(layer, GrowingLayer) for layer in cache.layers):
        grow_in_place(cache)
        grow_hybrids_in_place(cache)
    layers = list(cache.layers)
    fits = all(
        type(layer) in KINDS
        and (not isinstance(layer, GrowingLayer) or _has_rows(layer, n_past, n_sequences, device))
        and (not isinstance(layer, LinearAttentionLayer) or _has_states(layer, n_sequences, device))
        for layer in layers
    )
    return layers if fits and any(isinstance(layer, GrowingLayer) for layer in layers) else None


def fixed_cache(held: Sequence[HeldLayer], n_past: torch.Tensor) -> DynamicCache:
    """A cache over what is held of another one's layers."""
    cache = DynamicCache()
    cache.layers = [each.fixed(n_past) for each in held]
    return cache


def _has_rows(layer: GrowingLayer, n_past: int, n_sequences: int, device: torch.device) -> bool:
    if not layer.is_initialized or getattr(layer, "record_past", False):
        return False
    if isinstance(layer, GrowingIndexedLayer):
        indexed = not layer.is_indexer_initialized or layer.n_indexed == n_past
        if not indexed or layer.indexer_position_ids is not None:
            return False
    return layer.device == device and layer.get_seq_length() == n_past and layer.n_sequences == n_sequences


def _has_states(layer: Any, n_sequences: int, device: torch.device) -> bool:
    """Whether a layer of linear attention has seen tokens, and writes its states where a graph may write, too."""
    states = states_of(layer)
    return bool(states) and not layer.record_past and all(layer.has_previous_state.values()) and all(
        state.device == device and len(state) == n_sequences
        and (not state.is_inference() or torch.is_inference_mode_enabled())
        for state in states
    )  # fmt: skip


def _with_states(fixed: Any, layer: CacheLayer) -> Any:
    """`fixed` over a layer's states, and with what it knows of them."""
    if isinstance(layer, LinearAttentionLayer):
        own = {name: vars(layer)[name] for name in vars(LinearAttentionLayer(layer.number_of_states))}
        fixed.__dict__.update({name: dict(value) if isinstance(value, dict) else value for name, value in own.items()})
    return fixed
