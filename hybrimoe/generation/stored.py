"""KV cache layers that store keys and values in another dtype than the model computes them in (`memory.kv_dtype`).

What a layer holds are rows, as `cpu_kernels.step.stored` says. The compiled step writes and reads them where they lie;
transformers' forward, which computes prompts, gets `StoredStates`, of which attention reads block after block, and of
which everything else sees floats. All that moves tokens
from cache to cache (the prefix cache, saved sessions, a crop) moves rows, and loses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from cpu_kernels.step.kv_rows import FLOAT_KINDS, store_tokens
from cpu_kernels.step.states.stored import StoredStates
from cpu_kernels.step.stored import KIND_OF, row_bytes
from hybrimoe.generation.growing import GrowingLayer, growing_cache

__all__ = ["ROW_DTYPES", "StoredLayer", "can_hold", "kv_dtype_of", "new_cache"]

ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
"""Of the tensors that hold rows. Those of int8 and int4 hold bytes, the scales among them."""


class StoredLayer(GrowingLayer):
    """`keys` and `values` [B, heads, T, row] are rows, stored as `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As transformers' own, with the dtype of rows."""
        super().lazy_initialization(key_states.to(ROW_DTYPES[self.name]), value_states.to(ROW_DTYPES[self.name]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, new tokens, D]; returns what is stored of all tokens, in the dtype of the states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states[..., :0, :], value_states[..., :0, :])
        n_held, n_new = self.get_seq_length(), key_states.shape[-2]
        buffers = self._with_room(n_new, (self._empty(key_states), self._empty(value_states)))
        for rows, states in ((buffers.keys, key_states), (buffers.values, value_states)):
            self._store(states, rows[..., n_held : n_held + n_new, :])
        self.advance(n_new)
        kind = KIND_OF[self.name]
        return StoredStates.of(self.keys, kind, key_states), StoredStates.of(self.values, kind, value_states)

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        """No rows, of the size that rows of `states` have."""
        dtype = ROW_DTYPES[self.name]
        row = row_bytes(KIND_OF[self.name], states.shape[-1]) // dtype.itemsize
        return torch.empty(*states.shape[:-2], 0, row, dtype=dtype)

    def _store(self, states: torch.Tensor, rows: torch.Tensor) -> None:
        known = states if states.dtype in FLOAT_KINDS else states.float()
        store_tokens(KIND_OF[self.name], known if known.stride(-1) == 1 else known.contiguous(), rows)


def can_hold(layer: GrowingLayer, rows: torch.Tensor) -> bool:
    """Whether a layer could have stored `rows` itself."""
    if isinstance(layer, StoredLayer):
        return rows.dtype == ROW_DTYPES[layer.name]
    return rows.is_floating_point()


def kv_dtype_of(model: Any) -> str:
    """The dtype in which the deployment of `model` stores keys and values where it is another than the model's, else
    "auto"."""
    injection = getattr(model, "hybrimoe", None)
    if injection is None or not injection.active:
        return "auto"
    name: str = injection.config.memory.kv_dtype
    return "auto" if name == "auto" or ROW_DTYPES[name] == model.dtype else name


def new_cache(model: Any) -> DynamicCache:
    """An empty cache of `model`. Layers that keep every token store them as the deployment says; windows and recurrent
    states, which do not grow, stay as the model computes them."""
    cache, name = growing_cache(model.config.get_text_config(decoder=True)), kv_dtype_of(model)
    if name != "auto":
        cache.layers = [StoredLayer(name) if type(layer) is GrowingLayer else layer for layer in cache.layers]
    return cache
