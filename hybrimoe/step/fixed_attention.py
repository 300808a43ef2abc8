"""Attention over the buffers of a fixed cache, while a step is recorded, by a kernel that reads only what they hold.

torch's kernels read the whole room, masked, in one program a head, and where heads share keys a copy for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from gpu_kernels.step_kernels import AttendsBuffers, takes
from hybrimoe.dense.attention import REPLACED, UNKNOWN_HERE
from hybrimoe.step.fixed_cache import FixedLayer


@contextmanager
def attention_by(kernel: AttendsBuffers | None, layers: Sequence[FixedLayer]) -> Iterator[None]:
    """Within the block, calls of this thread whose keys are a layer's buffers go to `kernel`, if it takes them; torch's
    keep all others."""
    if kernel is None:
        yield
        return
    passed_on = AttentionInterface()[REPLACED]
    thread, by_address = get_ident(), {layer.keys.data_ptr(): layer for layer in layers}

    def attention_forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        dropout: float = 0.0, scaling: float | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        layer = by_address.get(key.data_ptr()) if get_ident() == thread else None
        known = layer is not None and key.shape == layer.keys.shape and value.shape == layer.values.shape
        plain = not dropout and all(others.get(name) is None for name in UNKNOWN_HERE)
        if layer is None or not known or not plain or not takes(query, key, value, attention_mask):
            return passed_on(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
            )  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel(query, key, value, attention_mask, layer.n_past, layer.first, scale), None

    AttentionInterface.register(REPLACED, attention_forward)
    try:
        yield
    finally:
        if AttentionInterface()[REPLACED] is attention_forward:
            AttentionInterface.register(REPLACED, passed_on)
