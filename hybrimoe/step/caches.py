"""The KV cache of a call as the compiled step sees it: places in the buffers of growing layers."""

from __future__ import annotations

import torch

from cpu_kernels.step.compiled import CachePlace
from cpu_kernels.step.floats import BFLOAT16, FLOAT32
from hybrimoe.generation.growing import Buffers

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
