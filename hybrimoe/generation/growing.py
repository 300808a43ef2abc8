"""KV cache layers with room to grow, so that a new token is written and not all before it copied.

transformers' forward calls `update`; the compiled step writes into the buffers itself, between `grown` and `advance`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from cpu_kernels.host.memory import HUGE_PAGE, page_aligned
from cpu_kernels.step.kv_copies import join_tokens

__all__ = [
    "Buffers",
    "GrowingHybridLayer",
    "GrowingHybridWindowLayer",
    "GrowingIndexedLayer",
    "GrowingLayer",
    "GrowingWindowLayer",
    "copy_rows",
    "grow_hybrids_in_place",
    "grow_in_place",
    "growing_cache",
]

Memory = Callable[[int], np.ndarray]
"""uint8 [n] of host memory, page aligned, for n bytes."""
LEAST_ROOM = 256
"""Tokens of room that a new buffer usually has at least."""
ROOM_SHARE = 8
"""A new buffer has room for 1/8 of what it holds: copying stays a constant share, and no more memory lies idle."""


class Buffers(NamedTuple):
    """keys and values [B, heads, capacity, D], of which the first tokens are used; `first`: number of the first one;
    `index_keys` [B, capacity or more, D]: keys by which tokens are found, of layers that have them."""

    keys: torch.Tensor
    values: torch.Tensor
    first: int = 0
    index_keys: torch.Tensor | None = None


class GrowingLayer(DynamicLayer):  # type: ignore[misc] # transformers is not typed
    """`keys` and `values` [B, heads, T, D] are the used beginning of buffers.

    transformers' own layer concatenates: each token copies the whole context, which at 4,000 tokens of a model of 16
    heads takes longer than reading it for attention does. Whatever else replaces `keys` and `values` (a crop, a choice
    of rows) is taken as it is; the next token finds a new buffer where it has to.
    """

    least_room = LEAST_ROOM
    """Tokens of room that a new buffer has at least; more where new buffers are dear."""
    expected = 0
    """Tokens of the prompt that is being computed, for all of which a new buffer has room: else its parts would find
    their buffers too small again and again, and each time all that is held would be copied between two tokens."""
    _buffers: Buffers | None = None
    _n_used = 0
    _set: tuple[torch.Tensor | None, torch.Tensor | None] | None = (None, None)
    """What `keys` and `values` were set to; None: they are the first `_n_used` tokens of the buffers."""

    @property
    def keys(self) -> Any:
        """Tensor [B, heads, T, D]; None before the first token."""
        return self._both()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._set = (value, self._both()[1])

    @property
    def values(self) -> Any:
        """Tensor [B, heads, T, D]; None before the first token."""
        return self._both()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._set = (self._both()[0], value)

    def _both(self) -> tuple[Any, Any]:
        if self._set is None:
            assert self._buffers is not None
            used = slice(self._first_kept(), self._n_used)
            self._set = self._buffers.keys[..., used, :], self._buffers.values[..., used, :]
        return self._set

    def _first_kept(self) -> int:
        """The first token of the buffers that `keys` and `values` show."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, new tokens, D]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states, key_states.shape[-2])
        return self.keys, self.values

    def append(
        self, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], n_expected: int, threads: int | None = None,
        memory: Memory = page_aligned,
    ) -> None:  # fmt: skip
        """Append what `keys` and `values` of such layers held; buffers get room for `n_expected` tokens in all.

        In host memory all parts are copied at once, by so many threads (None for all), into `memory` where what there
        is has no room; elsewhere one after another.
        """
        waiting = iter(parts)
        first = next(waiting, None)
        if first is None:
            return
        if not self.is_initialized:
            self.lazy_initialization(*first)
        if first[0].device.type == "cpu":
            self._join([first, *waiting], n_expected, threads, memory)
            return
        for keys, values in chain([first], waiting):
            self._append(keys, values, max(n_expected - self.get_seq_length(), keys.shape[-2]))

    def _join(
        self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], n_expected: int, threads: int | None, memory: Memory
    ) -> None:
        """As `append`, of parts in host memory."""
        n_new, n_held = sum(keys.shape[-2] for keys, _ in parts), self.get_seq_length()
        buffers = self._with_room(max(n_expected - n_held, n_new), parts[0], memory)
        for buffer, own in zip((buffers.keys, buffers.values), zip(*parts, strict=True), strict=True):
            join_rows(buffer[..., n_held : n_held + n_new, :], own, threads)
        self.advance(n_new)

    def _append(self, keys: torch.Tensor, values: torch.Tensor, n_room: int) -> None:
        """Write keys and values behind those held; buffers have room for `n_room` tokens more."""
        n_new, n_held = keys.shape[-2], self.get_seq_length()
        buffers = self._with_room(n_room, (keys, values))
        copy_rows(buffers.keys[..., n_held : n_held + n_new, :], keys)
        copy_rows(buffers.values[..., n_held : n_held + n_new, :], values)
        self.advance(n_new)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, given as a negative number; their room in the buffers is free again."""
        n_left = self.get_seq_length() + tokens_to_remove
        buffers = self._buffers
        if buffers is None or not 0 <= n_left <= self.get_seq_length() or not self._shows(buffers):
            super().crop(tokens_to_remove)
            return
        self._n_used, self._set = n_left, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with the sequences `beam_idx` [B], as beams do after each token: within the buffers where they are as
        many, so that whatever is bound to the memory (graphs, compiled steps) stays."""
        buffers = self._buffers
        held = buffers is not None and self._holds(buffers) and len(beam_idx) == self.n_sequences
        if buffers is None or not held or (buffers.keys.is_inference() and not torch.is_inference_mode_enabled()):
            super().reorder_cache(beam_idx)
            return
        chosen = beam_idx.to(buffers.keys.device)
        for part in (buffers.keys, buffers.values):
            used = part[..., : self._n_used, :]
            copy_rows(used, used.index_select(0, chosen))
        self._set = None

    def compact(self) -> GrowingLayer:
        """A layer with the same keys and values, whose memory is no larger than they are; they are not copied here."""
        twin = copy.copy(self)
        twin._buffers, twin._n_used, twin._set = None, 0, self._both()
        return twin

    @property
    def buffers(self) -> Buffers | None:
        """The newest buffers, which the layer may have left since (`keys` were set); None before the first token."""
        return self._buffers

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._n_used if self._set is None else int(super().get_seq_length())

    @property
    def n_sequences(self) -> int:
        """Sequences that are held."""
        held = self._buffers.keys if self._set is None and self._buffers is not None else self.keys
        return int(held.shape[0])

    def grown(self, n_new: int) -> Buffers:
        """The buffers with room for n_new more tokens; whoever has written them calls `advance`."""
        return self._with_room(n_new)

    def advance(self, n_new: int) -> None:
        """The next n_new tokens of the buffers are in use."""
        self._n_used += n_new
        self._set = None

    def stepped(self, n_new: int) -> None:
        """A compiled step or a graph has written the next n_new tokens, whatever is kept of them."""
        self.advance(n_new)

    def retract(self, n_last: int) -> None:
        """The last n_last of the tokens that the latest `advance` added are no longer in use: their room is free again.

        A window, too, gives back what one step has added, because its buffers keep what stood before the step.
        """
        self._n_used -= n_last
        self._set = None

    def _shows(self, buffers: Buffers) -> bool:
        """Whether `keys` and `values` are the beginnings of the buffers: seen, not replaced."""
        return self._set is None or (self.get_seq_length() > 0 and _begins(self._set, buffers))

    def _holds(self, buffers: Buffers) -> bool:
        """Whether the tokens held are the first `_n_used` of the buffers."""
        return self._n_used == self.get_seq_length() and self._shows(buffers)

    def _with_room(
        self, n_new: int, like: tuple[torch.Tensor, torch.Tensor] | None = None, memory: Memory = page_aligned
    ) -> Buffers:
        """Buffers that begin with what is held and have room for n_new tokens more. like: keys and values such as they
        are made for; None: such as are held. memory: where new ones of the host find theirs."""
        n_held = self.get_seq_length()
        buffers = self._buffers
        if buffers is not None and self._shows(buffers) and buffers.keys.shape[-2] >= n_held + n_new:
            self._n_used = n_held
            return buffers
        n_tokens = max(n_held + n_new, self.expected)
        room = n_tokens + max(self.least_room, n_tokens // ROOM_SHARE)
        held = self._both()
        new = [_new_rows(part, room, memory) for part in like or held]
        if n_held:
            for buffer, part in zip(new, held, strict=True):
                buffer[..., :n_held, :] = part
        self._buffers, self._n_used = Buffers(new[0], new[1]), n_held
        return self._buffers


class GrowingWindowLayer(GrowingLayer, DynamicSlidingWindowLayer):  # type: ignore[misc] # transformers is not typed
    """A sliding window in buffers: `keys` and `values` are the last `sliding_window - 1` tokens, as transformers keeps.

    transformers' forward updates it as its own layer, by a copy of the window; the compiled step writes in place.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicSlidingWindowLayer` does."""
        result: tuple[torch.Tensor, torch.Tensor] = DynamicSlidingWindowLayer.update(
            self, key_states, value_states, *args, **kwargs
        )
        return result

    def crop(self, tokens_to_remove: int) -> None:
        """As `DynamicSlidingWindowLayer` does."""
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return int(self.cumulative_length)

    def _first_kept(self) -> int:
        return max(0, self._n_used - int(self.sliding_window) + 1)

    def advance(self, n_new: int) -> None:
        """The next n_new tokens of the buffers are in use."""
        self.cumulative_length += n_new
        super().advance(n_new)

    def retract(self, n_last: int) -> None:
        """As of a plain layer."""
        self.cumulative_length -= n_last
        super().retract(n_last)

    def _with_room(
        self, n_new: int, like: tuple[torch.Tensor, torch.Tensor] | None = None, memory: Memory = page_aligned
    ) -> Buffers:
        buffers = self._buffers
        if self._set is None or (buffers is not None and self._is_shown(buffers)):
            assert buffers is not None
            if buffers.keys.shape[-2] >= self._n_used + n_new:
                return buffers
        held = [part.clone() for part in self._both()]  # the last tokens, which may move within their buffer
        n_held = held[0].shape[-2]
        room = self.sliding_window + n_new + max(self.least_room, self.sliding_window // ROOM_SHARE)
        fits = buffers is not None and buffers.keys.shape[:-2] == held[0].shape[:-2] and buffers.keys.shape[-2] >= room
        if buffers is None or not fits or buffers.keys.is_inference() != torch.is_inference_mode_enabled():
            new = [part.new_empty(*part.shape[:-2], room, part.shape[-1]) for part in like or held]
        else:
            new = [buffers.keys, buffers.values]
        for buffer, part in zip(new, held, strict=True):
            buffer[..., :n_held, :] = part
        self._buffers, self._n_used = Buffers(new[0], new[1], self.cumulative_length - n_held), n_held
        return self._buffers

    def _holds(self, buffers: Buffers) -> bool:
        return self._set is None or self._is_shown(buffers)

    def _is_shown(self, buffers: Buffers) -> bool:
        """Whether `keys` and `values` are still those of the buffers: seen, not replaced."""
        assert self._set is not None
        used = slice(self._first_kept(), self._n_used)
        shown = buffers.keys[..., used, :], buffers.values[..., used, :]
        same_tokens = buffers.first + self._n_used == self.cumulative_length
        return same_tokens and all(_same_place(a, b) for a, b in zip(self._set, shown, strict=True))


class GrowingIndexedLayer(DynamicIndexedLayer, GrowingLayer):  # type: ignore[misc] # transformers is not typed
    """Sparse attention that finds its tokens by keys of their own: `indexer_keys` [B, T, D], in a buffer as well."""

    indexer_keys: Any
    _index: torch.Tensor | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append [B, new tokens, D]; returns all of them."""
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(indexer_key_states)
        n_held, n_new = self.n_indexed, indexer_key_states.shape[1]
        index = self._index_with_room(n_new, indexer_key_states)
        index[:, n_held : n_held + n_new] = indexer_key_states
        self.advance_index(n_new)
        written: torch.Tensor = self.indexer_keys
        return written

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As of a plain layer, the index as well."""
        held = self.indexer_keys
        super().reorder_cache(beam_idx)
        writable = held is not None and (not held.is_inference() or torch.is_inference_mode_enabled())
        if writable and self._shows_index(held) and held.shape == self.indexer_keys.shape:
            held.copy_(self.indexer_keys)
            self.indexer_keys = held

    @property
    def n_indexed(self) -> int:
        """Tokens in the index, which are those held but while a step adds its own."""
        held: torch.Tensor | None = self.indexer_keys
        return 0 if held is None or not held.numel() else held.shape[1]

    def grown(self, n_new: int) -> Buffers:
        """As of a plain layer, the index with as much room."""
        buffers = super().grown(n_new)
        if self.is_indexer_initialized:
            index = self._index_with_room(max(n_new, buffers.keys.shape[-2] - self.n_indexed), self.indexer_keys)
            if index is not buffers.index_keys:
                buffers = self._buffers = buffers._replace(index_keys=index)
        return buffers

    def stepped(self, n_new: int) -> None:
        """As of a plain layer."""
        super().stepped(n_new)
        if self.is_indexer_initialized:
            self.advance_index(n_new)

    def retract(self, n_last: int) -> None:
        """As of a plain layer, the index as well."""
        super().retract(n_last)
        if self.is_indexer_initialized and n_last:
            self.indexer_keys = self.indexer_keys[:, :-n_last]

    def advance_index(self, n_new: int) -> None:
        """The next n_new tokens of the index's buffer are in use."""
        assert self._index is not None
        self.indexer_keys = self._index[:, : self.n_indexed + n_new]

    def compact(self) -> GrowingIndexedLayer:
        """As of a plain layer."""
        twin = super().compact()
        twin._index = None
        return twin

    def _index_with_room(self, n_new: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer that begins with what is held and has room for n_new tokens more, such as `like`."""
        n_held, index = self.n_indexed, self._index
        if index is not None and self._shows_index(self.indexer_keys) and index.shape[1] >= n_held + n_new:
            return index
        n_tokens = max(n_held + n_new, self.expected)
        index = like.new_empty(like.shape[0], n_tokens + max(self.least_room, n_tokens // ROOM_SHARE), like.shape[-1])
        if n_held:
            index[:, :n_held] = self.indexer_keys
        self._index = index
        return index

    def _shows_index(self, held: torch.Tensor | None) -> bool:
        """Whether what is held is the beginning of the buffer."""
        if held is None or self._index is None or not held.numel():
            return False
        return _same_place(held, self._index[:, : held.shape[1]])


class GrowingHybridLayer(LinearAttentionAndFullAttentionLayer, GrowingLayer):  # type: ignore[misc] # as above
    """States of linear attention or convolutions beside keys and values of every token."""


class GrowingHybridWindowLayer(
    LinearAttentionAndSlidingWindowAttentionLayer,  # type: ignore[misc] # as above
    GrowingWindowLayer,
):
    """States of linear attention or convolutions beside a sliding window."""


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy rows [..., n, D] of one dtype into rows of a buffer.

    In host memory by a plain copy of bytes: PyTorch would share each of hundreds of small copies among its threads, and
    where these have to wait for a core, waiting for them takes ten times as long as copying.
    """
    in_memory = target.device.type == source.device.type == "cpu" and target.dtype == source.dtype
    if in_memory and target.stride(-1) == source.stride(-1) == 1 and not source.requires_grad:
        target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source)


def join_rows(target: torch.Tensor, parts: Sequence[torch.Tensor], threads: int | None = None) -> None:
    """Copy rows [B, heads, n, D] in host memory, one after another, into rows of a buffer, which are as many."""
    in_rows = (part.stride(-1) == 1 and part.stride(-2) == part.shape[-1] for part in parts)
    if len(parts) > 1 and all(part.dtype == target.dtype for part in parts) and all(in_rows):
        join_tokens(target, parts, threads)
        return
    at = 0
    for part in parts:
        copy_rows(target[..., at : at + part.shape[-2], :], part)
        at += part.shape[-2]


def _new_rows(like: torch.Tensor, n_tokens: int, memory: Memory) -> torch.Tensor:
    """An empty buffer [..., n_tokens, D]; in host memory on huge pages where it is large, so that a copy into it does
    not stop at each page of 4 KiB."""
    shape = (*like.shape[:-2], n_tokens, like.shape[-1])
    n_bytes = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or n_bytes < HUGE_PAGE:
        return like.new_empty(shape)
    return torch.from_numpy(memory(n_bytes)).view(like.dtype).view(shape)


def _begins(held: tuple[Any, Any], buffers: Buffers) -> bool:
    """Whether held keys and values are the beginnings of the buffers, not copies or a choice of their rows."""
    n = held[0].shape[-2]
    return all(
        part is not None and _same_place(part, buffer[..., :n, :])
        for part, buffer in zip(held, (buffers.keys, buffers.values), strict=True)
    )


def _same_place(one: Any, other: torch.Tensor) -> bool:
    return (
        one is not None
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
    )


GROWING = {DynamicLayer: GrowingLayer, DynamicIndexedLayer: GrowingIndexedLayer}
"""What stands for transformers' own layers that keep every token."""


def growing_cache(text_config: Any) -> DynamicCache:
    """transformers' cache for a model, layers that keep every token with room to grow; others (windows, states) as they
    are."""
    cache = DynamicCache(config=text_config)
    cache.layers = [GROWING[type(layer)]() if type(layer) in GROWING else layer for layer in cache.layers]
    return cache


def grow_in_place(cache: DynamicCache) -> None:
    """Gives plain, indexed and windowed layers of a cache that holds tokens already room to grow; others stay as they
    are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) in GROWING:
            cache.layers[index] = _adopted(GROWING[type(layer)](), layer)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _adopted(GrowingWindowLayer(layer.sliding_window), layer)


def grow_hybrids_in_place(cache: DynamicCache) -> None:
    """The same of layers that have states as well: for steps that keep these, as those of compiled layers do not."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionAndFullAttentionLayer:
            cache.layers[index] = _adopted(GrowingHybridLayer(), layer)
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            cache.layers[index] = _adopted(GrowingHybridWindowLayer(layer.sliding_window), layer)


def _adopted(own: GrowingLayer, layer: DynamicLayer) -> GrowingLayer:
    """`own` with all that `layer` holds and knows."""
    known = dict(vars(layer))
    keys, values = known.pop("keys"), known.pop("values")
    own.__dict__.update(known)
    own.keys, own.values = keys, values
    return own
