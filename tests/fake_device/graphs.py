"""Graphs without a device: operations are noted, on the host or on fake cards, and run when the graph is replayed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_kernels.errors import GraphError
from tests.fake_device.cards import Cards, Noted
from tests.fake_device.memory import extent
from tests.fake_device.tensors import DeviceTensor

aten = torch.ops.aten
READ_BY_HOST = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default}
POISON = 77.0


@dataclass(slots=True)
class NotedGraph:
    """Operations with their tensors: a replay writes its results where the recording's were."""

    operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = field(default_factory=list)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                again = tree_leaves(func(*args, **kwargs))
                for old, new in zip(results, again, strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Noting(TorchDispatchMode):
    """Notes operations into a graph. Their results are there at once, as memory, but hold other values."""

    def __init__(self, graph: NotedGraph) -> None:
        super().__init__()
        self._graph = graph

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and torch's compiler takes seconds to import."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READ_BY_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        written = _written(func, args, kwargs)
        before = [tensor.clone() for tensor in written]
        results = func(*args, **kwargs)
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(old)  # nothing runs while it is recorded
        leaves = tree_leaves(results)
        self._graph.operations.append((func, args, kwargs, leaves))
        if not func._schema.is_mutable:
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not _is_view(func):
                    leaf.fill_(POISON)
        return results


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    schema = func._schema.arguments
    named = {**dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}
    changed = [named.get(argument.name) for argument in schema if argument.alias_info and argument.alias_info.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, torch.Tensor)]


def _is_view(func: Any) -> bool:
    """Whether an operation's result may share the memory of its arguments."""
    return any(argument.alias_info is not None for argument in (*func._schema.arguments, *func._schema.returns))


@dataclass
class NotedGraphs:
    """As `gpu_kernels.graphs.RecordsGraphs`, on the host."""

    n_recorded: int = 0
    is_recording: bool = False
    pool_bytes: int = 0
    _open: Noting | None = None
    _graph: NotedGraph = field(default_factory=NotedGraph)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self.is_recording = True
        try:
            yield
        finally:
            self.is_recording = False
            if self._open is not None:
                self._open.__exit__(None, None, None)
                self._open = None

    def begin(self) -> None:
        assert self.is_recording
        assert self._open is None
        self._graph = NotedGraph()
        self._open = Noting(self._graph)
        self._open.__enter__()

    def time_us(self, graph: NotedGraph) -> float:
        start = time.perf_counter()
        graph.replay()
        return (time.perf_counter() - start) * 1e6

    def end(self) -> NotedGraph:
        if self._open is None:
            raise GraphError("nothing was begun")
        self._open.__exit__(None, None, None)
        self._open = None
        self.n_recorded += 1
        return self._graph


class CardGraph:
    """What was noted on fake cards: each replay is judged as the operations would be if they were launched one by one,
    but counts as one launch."""

    def __init__(self, cards: Cards, noted: list[Noted]) -> None:
        self._cards, self._noted = cards, noted

    def replay(self) -> None:
        """As `gpu_kernels.graphs.Graph.replay`."""
        cards = self._cards
        counts, sites = cards.counts.copy(), cards.sites.copy()
        with torch.no_grad():
            for run, results, name in self._noted:
                found = run()
                if found is not results:
                    for old, new in zip(tree_leaves(results), tree_leaves(found), strict=True):
                        if isinstance(old, DeviceTensor) and old.data_ptr() != new.data_ptr():
                            self._settle(old, new, name)
        waits = cards.counts["waits"] - counts["waits"]
        cards.counts, cards.sites = counts, sites
        cards.note("graph launches")
        if waits:
            cards.report(f"a graph cannot make the host wait, as {waits} of its operations do")

    def _settle(self, old: DeviceTensor, new: DeviceTensor, name: str) -> None:
        """A result is where the recording's was."""
        stream = self._cards.stream(old.device.index)
        old.inner.copy_(new.inner)
        old.memory.write(extent(old.inner), stream, stream.operate(0.0), name)


@dataclass
class CardGraphs:
    """As `gpu_kernels.graphs.RecordsGraphs`, on fake cards. Operations run while they are recorded, unlike a card's:
    what comes of it, `recording` keeps apart from all other work by waiting before and after."""

    cards: Cards
    n_recorded: int = 0
    pool_bytes: int = 0
    _used_before: int = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self.cards.synchronize()
        self.cards.is_recording, self.pool_bytes = True, 0
        try:
            yield
        finally:
            self.cards.noted, self.cards.is_recording = None, False
            self.cards.synchronize()

    def begin(self) -> None:
        assert self.cards.noted is None
        self.cards.noted, self._used_before = [], self.cards.used_bytes()

    def end(self) -> CardGraph:
        noted, self.cards.noted = self.cards.noted, None
        if noted is None:
            raise GraphError("nothing was begun")
        self.n_recorded += 1
        self.pool_bytes += self.cards.used_bytes() - self._used_before
        return CardGraph(self.cards, noted)

    def time_us(self, graph: CardGraph) -> float:
        graph.replay()
        return 1.0
