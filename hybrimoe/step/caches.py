"""Compiled layers on the KV cache of a call: bound to the buffers of growing layers, and told of the call's rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from cpu_kernels.step.compiled import CachePlace, CompiledLayers
from cpu_kernels.step.program import MAX_ROWS
from cpu_kernels.step.stored import KIND_OF
from hybrimoe.generation.growing import Buffers, GrowingIndexedLayer, GrowingLayer, grow_in_place
from hybrimoe.generation.stored import ROW_DTYPES
from hybrimoe.step.angles import Angles
from hybrimoe.step.calls import StepCall
from hybrimoe.step.states import States, begin_states, place_of_states, put_states, spoil, states_of

KINDS = {dtype: KIND_OF[name] for name, dtype in ROW_DTYPES.items()}
"""How the rows of caches that the step reads and writes are stored, by the dtype of the tensors that hold them."""
INDEX_DTYPES = (torch.float32, torch.bfloat16)
"""Of keys of an index."""
NoRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys and values [1, heads, 0, D] of no token, and the keys of an index [1, 0, D], where there is one."""
Exchange = tuple[int, int, States, States]
"""A layer, the number of a cache, and where its states are read and written."""


def place_of(buffers: Buffers, row: int = 0) -> CachePlace:
    """Where the step finds keys and values of sequence `row` of the buffers; those of a token are contiguous."""
    keys, values, index = buffers.keys, buffers.values, buffers.index_keys
    of_index = (0, 0, 0)
    if index is not None:
        address, _, token = _strides(index[:, None], row)
        of_index = address, token, KINDS[index.dtype]
    return CachePlace(_strides(keys, row), _strides(values, row), KINDS[keys.dtype], buffers.first, of_index)


def _strides(tensor: torch.Tensor, row: int) -> tuple[int, int, int]:
    size = tensor.element_size()
    sequence, head, token, _ = tensor.stride()
    return tensor.data_ptr() + size * sequence * row, size * head, size * token


def fits(
    cache: DynamicCache, used: set[int], indexed: set[int], states: Mapping[int, States], n_past: int, n_sequences: int
) -> bool:
    """Whether the layers `used` of a cache, `indexed` of them with an index, are such as the step reads; plain ones are
    given room to grow.

    states: of layers that keep states, what these are like.
    """
    layers = cache.layers
    if used and len(layers) <= max(used):
        return False
    if any(not isinstance(layers[number], GrowingLayer) for number in used):
        grow_in_place(cache)
    held = [(states_of(cache, number), like) for number, like in states.items()]
    if any(found is None or not found.are_like(like, n_sequences) for found, like in held):
        return False
    return all(_is_readable(layers[number], n_past, n_sequences) for number in used) and all(
        _has_index(layers[number], n_past) for number in indexed
    )


def no_rows_of(layer: GrowingLayer) -> NoRows:
    """Of no token, what a layer keeps of tokens."""
    index = layer.indexer_keys if isinstance(layer, GrowingIndexedLayer) and layer.is_indexer_initialized else None
    none = layer.keys[..., :0, :].clone(), layer.values[..., :0, :].clone()
    return (*none, None if index is None else index[:, :0].clone())


def begin(cache: DynamicCache, no_rows: Mapping[int, NoRows], states: Mapping[int, States]) -> None:
    """Gives layers of a cache without tokens the form that they have after a prompt, with states like `states`."""
    if not all(0 <= number < len(cache.layers) for number in no_rows):
        return
    if any(not isinstance(cache.layers[number], GrowingLayer) for number in no_rows):
        grow_in_place(cache)
    for number, (keys, values, index) in no_rows.items():
        layer = cache.layers[number]
        if not layer.is_initialized:
            layer.update(keys, values)
        if index is not None and isinstance(layer, GrowingIndexedLayer) and not layer.is_indexer_initialized:
            layer.update_indexer(index)
    for number, like in states.items():
        begin_states(cache, number, like)


def _is_readable(layer: Any, n_past: int, n_sequences: int) -> bool:
    if not isinstance(layer, GrowingLayer) or not layer.is_initialized or layer.get_seq_length() != n_past:
        return False
    if getattr(layer, "record_past", False) or layer.dtype not in KINDS or layer.device.type != "cpu":
        return False
    return layer.n_sequences == n_sequences


def _has_index(layer: Any, n_past: int) -> bool:
    """Whether a layer has a key of its index for each of its tokens."""
    if not isinstance(layer, GrowingIndexedLayer) or not layer.is_indexer_initialized:
        return False
    keys: torch.Tensor = layer.indexer_keys
    readable = keys.dtype in INDEX_DTYPES and keys.device.type == "cpu" and layer.indexer_position_ids is None
    return readable and layer.n_indexed == n_past


class BoundLayers:
    """Compiled layers and where they find the caches of a call; one call runs at a time."""

    def __init__(self, compiled: CompiledLayers, angles: list[Angles]) -> None:
        self.compiled = compiled
        self._angles = angles
        self._used = tuple(dict.fromkeys(compiled.cache_layers))
        self._bound: list[list[tuple[Buffers, int] | None]] = [[None] * MAX_ROWS for _ in compiled.cache_layers]
        self._bound_states: list[list[tuple[int, ...]]] = [[()] * MAX_ROWS for _ in compiled.state_layers]
        self._spares: dict[tuple[int, int], States] = {}
        """By layer and number of the cache: what a step of several caches writes in the place of their states."""

    def run(self, call: StepCall) -> float:
        """The rows of a call, whose input the layers hold already; the caches have their new tokens afterwards.

        Returns the microseconds of the compiled call. A run that fails leaves the caches with the tokens they had:
        states of one cache are changed where they lie, and are then NaN; those of several are written elsewhere.
        """
        compiled = self.compiled
        for number, layer in enumerate(compiled.cache_layers):
            self._bind(number, [cache.layers[layer].grown(call.n_new) for cache in call.caches], call)
        n_tokens = max(call.n_past) + call.n_new
        compiled.give_room(call.n_sequences * call.n_new, n_tokens)
        n_logits = call.n_logits if call.n_sequences == 1 else 0
        compiled.set_rows(call.n_past, call.n_new, call.token_ids, n_logits, call.positions)
        compiled.set_mask(call.mask)
        for angles, (cos, sin) in zip(self._angles, compiled.angles, strict=True):
            angles.write(call.positions, cos, sin)
        states = self._bind_states(call)
        began = time.perf_counter()
        try:
            compiled.run()
        except BaseException:
            for _, _, held, written in states:
                if held is written:
                    spoil(held)
            raise
        us = (time.perf_counter() - began) * 1e6
        self._exchange(call, states)
        for cache in call.caches:
            for layer in self._used:
                cache.layers[layer].stepped(call.n_new)
        return us

    def _bind(self, number: int, buffers: list[Buffers], call: StepCall) -> None:
        """Tells attention `number` where the sequences of a call lie, where they lie elsewhere than in the step before.

        buffers: of each of the call's caches.
        """
        bound = self._bound[number]
        n_rows = call.n_sequences // len(call.caches)
        for sequence in range(call.n_sequences):
            held, row = buffers[sequence // n_rows], sequence % n_rows
            known = bound[sequence]
            if known is None or known[0] is not held or known[1] != row:
                self.compiled.bind(number, sequence, place_of(held, row))
                bound[sequence] = held, row

    def _bind_states(self, call: StepCall) -> list[Exchange]:
        """Tells each layer that keeps states where those of the call's sequences lie.

        Returns, of each layer and cache, where they are read and written.
        """
        found, n_rows, alone = [], call.n_sequences // len(call.caches), len(call.caches) == 1
        for number, layer in enumerate(self.compiled.state_layers):
            bound = self._bound_states[number]
            for index, cache in enumerate(call.caches):
                read = states_of(cache, layer)
                assert read is not None
                written = read if alone else self._spare(layer, index, read)
                found.append((layer, index, read, written))
                places = (*read.places(), *written.places())
                for row in range(n_rows):
                    sequence = index * n_rows + row
                    if bound[sequence] != (*places, row):
                        self.compiled.bind_states(number, sequence, place_of_states(read, written, row))
                        bound[sequence] = (*places, row)
        return found

    def _spare(self, layer: int, index: int, read: States) -> States:
        spare = self._spares.get((layer, index))
        if spare is None:
            spare = self._spares[layer, index] = read.spare()
        return spare

    def _exchange(self, call: StepCall, states: list[Exchange]) -> None:
        """Lets caches hold what was written for them; what they held is written next."""
        for layer, index, read, written in states:
            if read is not written:
                put_states(call.caches[index], layer, written)
                del self._spares[layer, index]
                if read.can_be_given_away():
                    self._spares[layer, index] = read
