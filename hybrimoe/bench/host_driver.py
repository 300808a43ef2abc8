"""A device that is not there, for measuring what a host does beside one: its driver's functions do next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.jit.primitives import bytes_at, int64s_at
from gpu_kernels.driver.functions import AWAIT, COPY, ELAPSED, LAUNCH, N_FUNCTIONS, QUERY, QUERY_STREAM, RECORD

TARGET, SOURCE, N_BYTES, COPY_SIZE = range(4)
"""Of a copy of a `HostPiece`."""


class HostPiece:
    """A recorded piece of work that copies tensors within host memory, in the place of a model's work."""

    def __init__(self, targets: Sequence[torch.Tensor] = (), sources: Sequence[torch.Tensor] = ()) -> None:
        self._pairs = list(zip(targets, sources, strict=True))
        self.words = np.zeros(1 + COPY_SIZE * len(self._pairs), np.int64)
        self.words[0] = len(self._pairs)
        for number, (target, source) in enumerate(self._pairs):
            start = 1 + COPY_SIZE * number
            self.words[start : start + COPY_SIZE] = target.data_ptr(), source.data_ptr(), target.nbytes

    def replay(self) -> None:
        """As `gpu_kernels.graphs.Graph.replay`."""
        for target, source in self._pairs:
            target.copy_(source)


class HostDriver:
    """As `gpu_kernels.driver.functions.Driver`: launches copy what a `HostPiece` says, copies into slots are left out,
    and all has ended at once."""

    def __init__(self) -> None:
        self.addresses: npt.NDArray[np.int64] = np.zeros(N_FUNCTIONS, np.int64)
        self._functions = {place: _function(place) for place in range(N_FUNCTIONS)}
        for place, function in self._functions.items():
            self.addresses[place] = function.address

    def stream(self, stream: torch.Stream | None) -> int:
        """As `Driver.stream`."""
        return 0

    def graph(self, graph: Any) -> int:
        """As `Driver.graph`."""
        address: int = graph.words.ctypes.data
        return address

    def new_event(self) -> int:
        """As `Driver.new_event`."""
        return 0

    def free_event(self, event: int) -> None:
        """As `Driver.free_event`."""

    def call(self, function: int, *arguments: int) -> int:
        """As `Driver.call`."""
        return int(self._functions[function].ctypes(*arguments))

    def told(self, code: int) -> str:
        """As `Driver.told`."""
        return f"error {code}"


def _launch(graph: int, stream: int) -> int:
    words = int64s_at(graph, 1)
    for number in range(words[0]):
        copy = int64s_at(graph + 8 * (1 + COPY_SIZE * number), COPY_SIZE)
        bytes_at(copy[TARGET], copy[N_BYTES])[:] = bytes_at(copy[SOURCE], copy[N_BYTES])
    return 0


def _query(what: int) -> int:
    return 0


def _two(a: int, b: int) -> int:
    return 0


def _three(a: int, b: int, c: int) -> int:
    return 0


def _four(a: int, b: int, c: int, d: int) -> int:
    return 0


@cache
def _function(place: int) -> Any:
    """The C function of a place of `Driver.addresses`."""
    n, function = {
        LAUNCH: (2, _launch), QUERY_STREAM: (1, _query), QUERY: (1, _query), RECORD: (2, _two), AWAIT: (3, _three),
        COPY: (4, _four), ELAPSED: (3, _three),
    }[place]  # fmt: skip
    return numba.cfunc(numba.int32(*[numba.int64] * n), nopython=True)(function)
