"""Host memory that holds some of the experts, in simulated time: the counterpart of the runtime's cache of the file.

What stays and what is read ahead is decided by what the runtime asks as well (``forecast.host_worth``,
``forecast.read_ahead``). The disk is a lane in order. All reads of a call begin at once: they share its rate, so the
first of them waits for the disk's latency and each ends one read after the one before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand, Prediction
from scheduler.forecast.host_worth import Worth
from scheduler.forecast.read_ahead import LAYERS_AHEAD, MAX_AHEAD, ReadAhead
from scheduler.host import HostView

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Read(NamedTuple):
    """A read that has begun. key = layer * n_experts + expert."""

    key: int
    start_us: float
    end_us: float


class HostTier:
    """Which of the experts are in the ``capacity`` places of host memory. read_us: of one read alone, without latency.

    A prompt that needs more experts of a layer than there are places has them read in turns; that a place is free only
    once its expert has been computed is left out then. ``held`` bool[n_layers * n_experts]: what is in memory.
    """

    def __init__(self, n_layers: int, n_experts: int, capacity: int, read_us: float, latency_us: float = 0.0) -> None:
        self.capacity, self.read_us, self.latency_us = capacity, read_us, latency_us
        self.held = np.zeros(n_layers * n_experts, np.bool_)
        self.busy_us, self.reads = 0.0, 0
        self._n_layers, self.n_experts = n_layers, n_experts
        self._worth, self._ahead = Worth(n_layers, n_experts, capacity), ReadAhead(n_layers, n_experts)
        self._free_us = 0.0
        self._running: deque[Read] = deque()
        self._queued: deque[tuple[int, float]] = deque()
        """Reads ahead that the disk has not come to, and since when they wait."""
        self._taken = np.zeros(n_layers * n_experts, np.bool_)
        """Keys that have a place: held, being read, or queued."""
        self._call: dict[int, float] = {}
        """Of the current call's experts that were not there: when each is."""
        self._many_from = n_layers
        self._begun: list[Read] = []
        self._planned: list[tuple[int, int]] = []

    def preload(self, keys: Iterable[int], frequencies: NDArray[np.float64] | None = None) -> None:
        """Fills the memory before the run, without cost."""
        if frequencies is not None:
            self._worth.warmed(frequencies)
        for key in keys:
            if int(self._taken.sum()) < self.capacity:
                self.held[key] = self._taken[key] = True

    def begin_sequence(self) -> None:
        """A new sequence starts."""
        self._worth.begin_sequence()

    def demand(self, demand: LayerDemand, now_us: float, in_slots: Bools, copying: Sequence[int]) -> HostView:
        """A layer's routing is known: what it needs and no slot holds begins to be read, the heaviest load first; then
        what later layers will likely need. in_slots bool[n_layers * n_experts]: what accelerators hold or receive;
        copying: keys whose bytes the link still reads."""
        self.settle(now_us)
        layer, first_key = demand.layer, demand.layer * self.n_experts
        self._call.clear()
        keys = first_key + demand.expert_ids.astype(np.int64)
        needed = keys[~in_slots[keys]]
        self._ahead.judge(layer, demand.expert_ids)
        self._cancel_layer(layer, needed)
        missing = keys[np.argsort(-demand.n_tokens, kind="stable")]
        missing = missing[~in_slots[missing] & ~self.held[missing]]
        staying = set(needed.tolist()) | set(copying)
        for key in missing.tolist():
            self._call[key] = self._need(key, now_us, in_slots, staying)
        forecast = self._worth.observe(demand)
        self._many_from = layer + 1 if demand.phase == "prefill" and forecast is None else self._n_layers
        self._read_ahead(demand, forecast, now_us, in_slots, staying)
        reads, self._planned = tuple(self._planned), []
        return HostView(self._waits_us(keys, now_us), self.held, reads)

    def ready_us(self, key: int, now_us: float) -> float:
        """When an expert is in memory; its read begins now where it was not asked for before."""
        if key in self._call:
            return self._call[key]
        self.settle(now_us)
        if self.held[key]:
            return now_us
        for read in self._running:
            if read.key == key:
                return read.end_us
        return self._need(key, now_us, np.zeros_like(self.held), {key})

    def settle(self, now_us: float) -> None:
        """What the disk has done by now."""
        while self._queued and max(self._free_us, self._queued[0][1]) <= now_us:
            key, since_us = self._queued.popleft()
            self._start(key, since_us)
        while self._running and self._running[0].end_us <= now_us:
            self.held[self._running.popleft().key] = True

    def note_wait(self, now_us: float, waited_us: float) -> None:
        """A layer has ended, and its CPU has waited so long for the disk."""
        self._ahead.note_time(now_us, waited_us)

    def take_begun(self) -> list[Read]:
        """The reads that have begun since the last call of this."""
        begun, self._begun = self._begun, []
        return begun

    def _waits_us(self, keys: Ints, now_us: float) -> NDArray[np.float64]:
        waits = np.where(self.held[keys], 0.0, np.inf)
        for i, key in enumerate(keys.tolist()):
            if key in self._call:
                waits[i] = max(self._call[key] - now_us, 0.0)
        return waits

    def _need(self, key: int, now_us: float, in_slots: Bools, staying: set[int]) -> float:
        """When a missing expert is there, whose read was queued, runs, or begins now."""
        for read in self._running:
            if read.key == key:
                return read.end_us
        if self._taken[key]:
            self._queued = deque(item for item in self._queued if item[0] != key)
        else:
            self._make_room(np.inf, in_slots, staying)
            self._taken[key] = True
            self._planned.append(divmod(key, self.n_experts))
        self._worth.read()
        return self._start(key, now_us)

    def _start(self, key: int, since_us: float) -> float:
        start_us = max(self._free_us, since_us)
        self._free_us = max(self._free_us, since_us + self.latency_us) + self.read_us
        read = Read(key, start_us, self._free_us)
        self._running.append(read)
        self._begun.append(read)
        self.busy_us += read.end_us - read.start_us
        self.reads += 1
        return read.end_us

    def _make_room(self, bar: float, in_slots: Bools, staying: set[int]) -> bool:
        """A place is free, or becomes so: that of a queued read, or of the expert with the least expected uses below
        ``bar``; where every one is needed now, of the one that came first."""
        if int(self._taken.sum()) < self.capacity:
            return True
        if bar == np.inf and self._queued:
            self._taken[self._queued.pop()[0]] = False
            return True
        keys = np.flatnonzero(self.held)
        worth = self._worth.keep[keys] + self._ahead.expected[keys]
        worth += keys >= self._many_from * self.n_experts
        worth[in_slots[keys]] = 0.0
        worth[[key in staying for key in keys.tolist()]] = np.inf
        least = int(np.argmin(worth)) if keys.size else -1
        if least >= 0 and worth[least] < bar:
            self._vacate(int(keys[least]))
            return True
        if bar == np.inf and (keys.size or self._running):
            self._vacate(int(keys[0]) if keys.size else self._running.popleft().key)
        return False

    def _vacate(self, key: int) -> None:
        self.held[key] = self._taken[key] = False

    def _cancel_layer(self, layer: int, needed: Ints) -> None:
        """Queued reads for a layer whose turn has come without them."""
        kept = deque[tuple[int, float]]()
        for key, since_us in self._queued:
            if key // self.n_experts == layer and key not in needed:
                self._taken[key] = False
            else:
                kept.append((key, since_us))
        self._queued = kept

    def _read_ahead(
        self, demand: LayerDemand, forecast: tuple[int, NDArray[np.float32]] | None, now_us: float, in_slots: Bools,
        staying: set[int],
    ) -> None:  # fmt: skip
        there = self._taken | in_slots
        told: list[Prediction] = [p for p in demand.predictions if p.layer <= demand.layer + LAYERS_AHEAD]
        if told:
            self._ahead.by_gates(demand.layer, sorted(told, key=lambda p: p.layer), there)
        elif forecast is not None:
            self._ahead.by_odds(*forecast, there)
        while len(self._queued) < MAX_AHEAD:
            wish = self._ahead.take()
            if wish is None:
                return
            key, gain = wish
            if self._taken[key]:
                continue
            if not self._make_room(gain, in_slots, staying):
                self._ahead.forget()
                return
            self._taken[key] = True
            self._worth.read()
            self._queued.append((key, now_us))
            self._planned.append(divmod(key, self.n_experts))
