"""The low-precision copy of the experts: a second store, and slots of its own behind the same lanes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import ExpertDtype, reference_ffn
from gpu_kernels import Accelerator
from hybrimoe.errors import ConfigError
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.startup.backends import backend_for
from hybrimoe.runtime.store import ExpertStore

PACKING_THREADS = 2
"""Packing takes a few times an expert's float32 size for a while; two at a time stay far below one layer."""

ERROR_TOKENS = 16
"""Inputs on which the error of a copy is measured."""


@dataclass(slots=True)
class LowCopy:
    """Layers as the low part sees them (spec and backend of the copy), their bytes, and the slot memory for them on
    each accelerator."""

    layers: list[Layer]
    store: ExpertStore
    accelerators: tuple[Accelerator, ...]


def make_low_copy(
    layers: Sequence[Layer], store: ExpertStore, dtype: ExpertDtype, accelerators: Sequence[Accelerator], backend: str,
    threads: int | None,
) -> LowCopy:  # fmt: skip
    """Packs a copy of every expert of a complete store as `dtype`.

    Raises ConfigError where a copy would not be smaller than the expert, and where the backend cannot run it,
    BudgetError where the host has no memory for it.
    """
    low_layers = [_low_layer(layer, dtype, backend, threads) for layer in layers]
    for layer, low in zip(layers, low_layers, strict=True):
        if low.spec.record_bytes >= layer.spec.record_bytes:
            raise ConfigError(
                f"{layer.path}: a low-precision copy as {dtype} is not smaller than the expert as {layer.spec.dtype};"
                " choose a larger expert_dtype (--dtype int8 or bfloat16) or a smaller low_dtype"
            )
    pinned = any(accelerator.needs_pinned_host() for accelerator in accelerators)
    copy = ExpertStore([layer.layer_spec for layer in low_layers], pinned=pinned)

    def pack(at: tuple[int, int]) -> None:
        copy.write(*at, store.read(*at))

    places = [(index, expert) for index, layer in enumerate(layers) for expert in range(layer.num_experts)]
    with ThreadPoolExecutor(PACKING_THREADS) as pool:
        for _ in pool.map(pack, places):
            pass
    return LowCopy(low_layers, copy, tuple(accelerator.sibling() for accelerator in accelerators))


def copy_errors(store: ExpertStore, copy: ExpertStore) -> npt.NDArray[np.float64]:
    """float64 [layers, experts]: how far the output of each expert's copy is from the expert's own, relative to it.

    On seeded normal inputs, which is what a normalised hidden state looks like; 0 for experts that do not exist.
    """
    errors = np.zeros((len(store.layers), max(layer.num_experts for layer in store.layers)))
    for index, layer in enumerate(store.layers):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(ERROR_TOKENS, layer.spec.hidden, generator=generator)
        for expert in range(layer.num_experts):
            own = reference_ffn(layer.spec, store.read(index, expert), x)
            low = reference_ffn(copy.layers[index].spec, copy.read(index, expert), x)
            errors[index, expert] = float((low - own).norm() / own.norm().clamp_min(1e-30))
    return errors


def _low_layer(layer: Layer, dtype: ExpertDtype, backend: str, threads: int | None) -> Layer:
    spec = dataclasses.replace(layer.spec, dtype=dtype)
    return dataclasses.replace(layer, spec=spec, layout=None, backend=backend_for(backend, threads, spec))
