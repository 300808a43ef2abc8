"""A layer's calls where nothing has a slot, from the router's tensors to the output in one compiled call."""

from __future__ import annotations

from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from hybrimoe.runtime.layer_call.layers import Layer


class WholeCalls:
    """One layer's calls of few tokens. `addresses` uint64 [E]: of its packed experts."""

    __slots__ = ("_addresses", "_run", "_spec")

    def __init__(self, layer: Layer, backend: NumbaBackend, addresses: npt.NDArray[np.uint64]) -> None:
        self._spec, self._run, self._addresses = layer.spec, backend.run_routed, addresses

    @classmethod
    def of(cls, layer: Layer, addresses: npt.NDArray[np.uint64]) -> WholeCalls | None:
        """None for layers that only the long way runs: of another backend, or with a norm over the experts' outputs."""
        backend = layer.backend
        if not isinstance(backend, NumbaBackend) or layer.transform() is not None:
            return None
        return cls(layer, backend, addresses)

    def run(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, int, float] | None:
        """The layer's output, the number of active experts, and us in the kernels; None, before anything has happened,
        for calls that the long way runs or refuses."""
        start_ns = perf_counter_ns()
        done = self._run(self._spec, self._addresses, hidden, top_k_index, top_k_weights)
        if done is None:
            return None
        return *done, (perf_counter_ns() - start_ns) * 1e-3
