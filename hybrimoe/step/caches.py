"""Compiled layers on the KV cache of a call: bound to the buffers of growing layers, and told of the call's rows."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from cpu_kernels.step.compiled import CachePlace, CompiledLayers
from cpu_kernels.step.floats import BFLOAT16, FLOAT32
from hybrimoe.generation.growing import Buffers, GrowingLayer, grow_in_place
from hybrimoe.step.angles import Angles
from hybrimoe.step.calls import StepCall

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
"""Dtypes of caches that the step reads and writes."""


def place_of(buffers: Buffers) -> CachePlace:
    """Where the step finds keys and values, whose rows are contiguous."""
    keys, values = buffers.keys, buffers.values
    return CachePlace(_strides(keys), _strides(values), KINDS[keys.dtype], buffers.first)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    size = tensor.element_size()
    sequence, head, token, _ = tensor.stride()
    return tensor.data_ptr(), size * sequence, size * head, size * token


def fits(cache: DynamicCache, used: set[int], n_past: int, n_sequences: int) -> bool:
    """Whether the layers `used` of a cache are such as the step reads; plain ones are given room to grow."""
    layers = cache.layers
    if used and len(layers) <= max(used):
        return False
    if any(not isinstance(layers[number], GrowingLayer) for number in used):
        grow_in_place(cache)
    return all(_is_readable(layers[number], n_past, n_sequences) for number in used)


def _is_readable(layer: Any, n_past: int, n_sequences: int) -> bool:
    if not isinstance(layer, GrowingLayer) or not layer.is_initialized or layer.get_seq_length() != n_past:
        return False
    if getattr(layer, "record_past", False) or layer.dtype not in KINDS or layer.device.type != "cpu":
        return False
    return layer.n_sequences == n_sequences


class BoundLayers:
    """Compiled layers and where they find their cache; one call runs at a time."""

    def __init__(self, compiled: CompiledLayers, angles: list[Angles]) -> None:
        self.compiled = compiled
        self._angles = angles
        self._bound: list[Any] = [None] * len(compiled.cache_layers)

    def run(self, call: StepCall) -> float:
        """The rows of a call, whose input the layers hold already; the cache has its new tokens afterwards.

        Returns the microseconds of the compiled call.
        """
        compiled, layers = self.compiled, call.cache.layers
        for number, layer in enumerate(compiled.cache_layers):
            buffers = layers[layer].grown(call.n_new)
            if buffers is not self._bound[number]:  # other buffers than in the step before
                compiled.bind(number, place_of(buffers))
                self._bound[number] = buffers
        compiled.give_room(call.n_past + call.n_new)
        compiled.set_rows(call.n_sequences, call.n_new, call.n_past, call.token_ids)
        compiled.set_mask(call.mask)
        for angles, (cos, sin) in zip(self._angles, compiled.angles, strict=True):
            angles.write(call.positions, cos, sin)
        began = time.perf_counter()
        compiled.run()
        us = (time.perf_counter() - began) * 1e6
        for layer in set(compiled.cache_layers):
            layers[layer].advance(call.n_new)
        return us
