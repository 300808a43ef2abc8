"""Graphs of a device: work that is recorded once and then launched as a whole, in a few microseconds of the host."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from gpu_kernels.errors import GraphError
from gpu_kernels.waiting import limit_of, wait_for_stream

TIMED_REPLAYS = 5
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
"""Torch's variable, which counts with whatever value."""

__all__ = ["Graph", "RecordsGraphs", "TorchGraphs", "graphs_of", "records_graphs"]


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Launches it on the current stream. It reads and writes the memory that it was recorded with."""


class RecordsGraphs(Protocol):
    """Records what is submitted to a device, piece after piece, without running it.

    pool_bytes: what the pieces of the latest recording take of the device, while one of them is there."""

    pool_bytes: int

    def recording(self) -> AbstractContextManager[object]:
        """Within the block, pieces may be recorded, and what runs between them runs apart from all other work. Nothing
        is under way on the device when the block ends, failed or not."""

    def begin(self) -> None:
        """What is submitted from here on belongs to a new piece. Memory that it takes stays the piece's, and may be
        shared with other pieces where nobody holds on to its tensors: replay them in the order of recording."""

    def end(self) -> Graph:
        """The piece that was begun last. Raises GraphError where the device cannot record what was submitted."""

    def time_us(self, graph: Graph) -> float:
        """What the device takes for a replay, in us: the mean of a few, after one to warm up."""


class TorchGraphs:
    """Graphs of CUDA and ROCm devices, through torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._open: Any = None
        self.pool_bytes = self._reserved_before = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """As `RecordsGraphs.recording`: on a stream of its own, with memory of its own (torch frees a pool with the
        last graph in it), with the garbage collector at rest, whose freeing of events and graphs a device takes for
        part of the work."""
        wait_for_stream(self._device, "the work before a recording")
        torch.cuda.synchronize(self._device)
        self._pool, self.pool_bytes = torch.cuda.graph_pool_handle(), 0
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream), self._random_numbers_apart():
                try:
                    yield
                finally:
                    self._give_up()
        finally:
            if collects:
                gc.enable()
            torch.cuda.synchronize(self._device)

    def begin(self) -> None:
        """As `RecordsGraphs.begin`; other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        self._reserved_before = torch.cuda.memory_reserved(self._device)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = graph

    def end(self) -> Graph:
        """As `RecordsGraphs.end`."""
        graph, self._open = self._open, None
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise GraphError(f"the device cannot record this work: {_first_line(error)}") from error
        self.pool_bytes += torch.cuda.memory_reserved(self._device) - self._reserved_before
        ended: Graph = graph
        return ended

    def time_us(self, graph: Graph) -> float:
        """As `RecordsGraphs.time_us`."""
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED_REPLAYS):
            graph.replay()
        end.record()
        limit_of(self._device).wait(end, "a recorded piece of work")
        return float(start.elapsed_time(end)) * 1e3 / TIMED_REPLAYS

    @contextlib.contextmanager
    def _random_numbers_apart(self) -> Iterator[None]:
        """Another state of torch's generator meanwhile: one whose recording failed gives no more random numbers."""
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(torch.Generator(self._device).graphsafe_get_state())
        try:
            yield
        finally:
            generator.graphsafe_set_state(own)

    def _give_up(self) -> None:
        """Ends a piece that an error has left open, so that the stream can be used again."""
        if self._open is not None:
            graph, self._open = self._open, None
            with contextlib.suppress(RuntimeError):
                graph.capture_end()


def graphs_of(device: torch.device) -> RecordsGraphs | None:
    """What records graphs of a device; None where torch has none for its kind."""
    return TorchGraphs(device) if records_graphs(device) else None


def records_graphs(device: torch.device) -> bool:
    """Whether torch records graphs of a device's kind: not where it takes each tensor from the driver by itself, which
    a driver does not allow within a recording."""
    return device.type == "cuda" and hasattr(torch.cuda, "CUDAGraph") and UNCACHED not in os.environ


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
