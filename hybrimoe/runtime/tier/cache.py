"""HostCache: which experts are in host memory, which are being read, and which leave for them.

One thread uses it at a time (the session's lock); only the reader's threads run beside it. A slot is free, being read
into, or holds an expert. What a call needs, what a copy to an accelerator still reads, and what is being read never
leaves. Of the rest the expert with the least expected uses does (`scheduler.forecast.host_worth`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import ByteArray
from hybrimoe.runtime.tier.reader import Read, RecordReader, Urgency
from hybrimoe.runtime.tier.slots import HostSlots, RecordPlaces
from scheduler.demand import Demand, Prediction
from scheduler.forecast.host_worth import Worth
from scheduler.forecast.read_ahead import MAX_AHEAD, ReadAhead
from scheduler.host import HostView

Ids = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

FREE, READING, HELD, GONE = 0, 1, 2, 3
MAX_BEGUN = 16
"""Reads of earlier calls that a planner is still told of; without one nobody asks."""


class Copies(Protocol):
    """Copies from host memory to accelerators that are under way."""

    def being_copied(self) -> Collection[tuple[int, int]]:
        """(layer, expert) of each."""
        ...

    def wait_for_one(self) -> None:
        """Until one of them has ended. There must be one."""
        ...

    def in_slots(self) -> Bools:
        """bool [layers * experts]: an accelerator holds the expert, and does not need the host's copy."""
        ...


@dataclass(frozen=True, slots=True)
class EndedRead:
    """A read that has ended well, for counters and timelines."""

    layer: int
    expert: int
    n_bytes: int
    start_us: float
    end_us: float
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class TierState:
    """What a host cache is and holds. gbps: 1e9 bytes/s while reads were running; 0 before the first."""

    path: str
    direct: bool
    n_slots: int
    n_records: int
    slot_bytes: int
    held: int
    gbps: float
    busy_us: float
    failed: int


class HostCache:
    """addresses[layer] uint64 [E]: where each record is in memory; 0 where it is not. `uses` float64 [layers, experts]:
    calls in which each was needed, of this run."""

    def __init__(self, places: RecordPlaces, reader: RecordReader, n_slots: int, *, pinned: bool = False) -> None:
        n_layers, n_experts = len(places.layers), places.n_experts
        n_keys = n_layers * n_experts
        self.places, self.reader = places, reader
        self.slots = HostSlots(n_slots, places.slot_bytes, pinned=pinned)
        self.worth = Worth(n_layers, n_experts, n_slots)
        self.addresses = [np.zeros(layer.num_experts, np.uint64) for layer in places.layers]
        self.uses = np.zeros((n_layers, n_experts))
        self.copies: Copies | None = None
        self.failed, self.latest_failure = 0, ""
        """Reads that did not succeed, and what was wrong with the latest."""
        self._slot_of = np.full(n_keys, -1, np.int64)
        self._key_of = np.full(n_slots, -1, np.int64)
        self._state = np.full(n_slots, FREE, np.uint8)
        self._free = list(reversed(range(n_slots)))
        self._reading: dict[int, Read] = {}
        self._needed = np.zeros(n_keys, np.bool_)
        self._waiting: list[int] = []
        """Keys that are needed and have found no slot yet."""
        self._lent: set[int] = set()
        self.ahead = ReadAhead(n_layers, places.n_experts)
        self._n_ahead = 0
        self._many_from = n_layers
        """In a step of many tokens: the first layer whose turn is still to come, which will need nearly all experts."""
        self.is_called_again = False
        """Whether the layer that is called next will be called again before any later one."""
        self._ended: list[EndedRead] = []
        self._begun: list[tuple[int, int]] = []
        """(layer, expert) of the reads that have begun since a planner was told of them."""
        self._rated = 0.0, 0
        self._earlier: set[int] = set()
        """Keys whose reads were under way when the call began."""
        self._waited_us = 0.0

    # A call -----------------------------------------------------------------------------------------------------

    def demand(self, demand: Demand, ids: Ids) -> int:
        """The call of a layer begins: its experts `ids` are needed in host memory, and all that are missing are read,
        before anything else. Returns how many are missing."""
        layer = demand.layer
        self._forget_call()
        self._settle()
        keys = layer * self.places.n_experts + ids.astype(np.int64)
        self._needed[keys] = True
        self.uses[layer, demand.expert_ids] += 1.0
        self._judge_forecasts(layer, demand.expert_ids)
        loads = demand.n_tokens[np.searchsorted(demand.expert_ids, ids)]
        missing = keys[np.argsort(-loads, kind="stable")]
        missing = missing[~self._held(missing)]
        for key in missing.tolist():
            read = self._reading.get(key)
            if read is not None:
                self._hurry(read)
            elif not self._begin(key, Urgency.NEEDED):
                self._waiting.append(key)
        self.ahead.note_time(perf_counter_ns() * 1e-3, self._waited_us)
        self._waited_us = 0.0
        forecast = self.worth.observe(demand)
        to_come = layer if self.is_called_again else layer + 1
        self._many_from = to_come if demand.phase == "prefill" and forecast is None else len(self.addresses)
        if forecast is not None:
            target, odds = forecast
            self.ahead.by_odds(target, odds[: self.places.layers[target].num_experts], self._slot_of >= 0)
        return len(missing)

    def view(self, layer: int, ids: Ids, read_us: float) -> HostView | None:
        """What a planner is told of the call's experts, whose reads `demand` has begun; None where all of the model's
        are in memory. read_us: for which one expert keeps the disk."""
        held = np.zeros(self._slot_of.size, np.bool_)
        held[self._key_of[self._state == HELD]] = True
        reads, self._begun = tuple(self._begun), []
        if held.all():
            return None
        waits_us = np.where(held[layer * self.places.n_experts + ids.astype(np.int64)], 0.0, np.inf)
        needed = [key for key, read in self._reading.items() if read.urgency is Urgency.NEEDED]
        at = {key: turn * read_us for turn, key in enumerate([*needed, *self._waiting], 1)}
        for i in np.flatnonzero(waits_us).tolist():
            waits_us[i] = at.get(layer * self.places.n_experts + int(ids[i]), np.inf)
        return HostView(waits_us, held, reads)

    def has(self, layer: int, expert: int) -> bool:
        """Whether an expert is in memory."""
        return bool(self.addresses[layer][expert])

    def read_took_us(self) -> float:
        """us for which each read since the last call of this has kept the disk; 0 where none has ended."""
        busy_us, n_bytes = self.reader.rate
        took_us, came = busy_us - self._rated[0], (n_bytes - self._rated[1]) / self.slots.slot_bytes
        if came <= 0.0 or took_us <= 0.0:
            return 0.0
        self._rated = busy_us, n_bytes
        return took_us / came

    def foretell(self, layer: int, predictions: Sequence[Prediction]) -> None:
        """What gates say of the layers behind `layer`, nearest first: replaces other forecasts for these layers."""
        if predictions:
            self.ahead.by_gates(layer, predictions, self._slot_of >= 0)
            self._read_ahead()

    def ready(self, layer: int, ids: Ids) -> Bools:
        """Which of the call's experts `ids` are in memory; waits until one is. Raises CheckpointError where one of them
        cannot be read."""
        keys = layer * self.places.n_experts + ids.astype(np.int64)
        while True:
            self._raise_of(self._settle(), keys.tolist())
            there = self._held(keys)
            self._needed[keys] = True
            self._begin_waiting(keys[~there])
            if there.any():
                return there
            self._wait_for(keys.tolist())

    def done(self, layer: int, ids: Ids) -> None:
        """Experts of the call have been computed, and may leave."""
        self._needed[layer * self.places.n_experts + ids.astype(np.int64)] = False
        self._settle()
        self._begin_waiting(())
        self._read_ahead()

    # Single records ---------------------------------------------------------------------------------------------

    def record(self, layer: int, expert: int) -> ByteArray:
        """uint8 [record_bytes]: a view of one expert, read now if it is not there. It stays until copies of it that
        `copies` tells of have ended, or without those until the next `hold` or call. Raises CheckpointError."""
        key = layer * self.places.n_experts + expert
        if self.copies is not None:
            self._lent.clear()  # the copy of the one before is under way
        self._lent.add(key)
        while not self._held(np.array([key]))[0]:
            read = self._reading.get(key)
            if read is not None:
                self._hurry(read)
            elif not self._begin(key, Urgency.NEEDED):
                self._make_way()
                continue
            self._wait_for([key])
            self._raise_of(self._settle(), [key])
        slot = int(self._slot_of[key])
        lead = int(self.addresses[layer][expert]) - self.slots.address(slot)
        return self.slots.view(slot)[lead : lead + self.places.record(layer, expert)[1]]

    def hold(self, layer: int, experts: Iterable[int]) -> npt.NDArray[np.uint64]:
        """Addresses of some experts, which all stay until this or `demand` is called again."""
        self._lent.clear()
        self._earlier = set(self._reading)
        for expert in experts:
            self.record(layer, expert)
        return self.addresses[layer][list(experts)]

    # Before and after -------------------------------------------------------------------------------------------

    def preheat(self, uses: npt.NDArray[np.float64]) -> int:
        """Begins to read the experts that were used most (uses [layers, experts] of earlier runs), behind everything
        else. Returns how many."""
        self.worth.warmed(uses)
        flat = uses.reshape(-1)
        order = np.argsort(-flat, kind="stable")[: len(self._free)]
        chosen = np.sort(order[(flat[order] > 0.0) & (self._slot_of[order] < 0)])
        for key in chosen.tolist():
            self._begin(key, Urgency.PREHEAT)
        return len(chosen)

    def begin_sequence(self) -> None:
        """A new sequence starts."""
        self.worth.begin_sequence()

    def take_ended(self) -> list[EndedRead]:
        """The reads that have ended since the last call of this."""
        self._settle()
        ended, self._ended = self._ended, []
        return ended

    def state(self) -> TierState:
        """What it is and holds now."""
        busy_us, n_bytes = self.reader.rate
        held = int((self._state == HELD).sum())
        return TierState(
            str(self.reader.path), self.reader.direct, self.slots.n_slots, self.places.n_records,
            self.slots.slot_bytes, held, n_bytes * 1e-3 / busy_us if busy_us else 0.0, busy_us, self.failed,
        )  # fmt: skip

    def resize(self, n_slots: int) -> None:
        """Changes how many experts fit, between two calls; those with the least expected uses leave. Raises BudgetError
        where the system has no memory for more: there are then as many as before."""
        self._forget_call()
        before = self.slots.n_slots
        if n_slots > before:
            self._grow(n_slots - before)
        else:
            self._shrink(before - n_slots)
        self.worth.resized(n_slots)

    def close(self) -> None:
        """Ends the reads. What is held stays readable."""
        self.reader.close()

    # Inside -----------------------------------------------------------------------------------------------------

    def _held(self, keys: npt.NDArray[np.int64]) -> Bools:
        slots = self._slot_of[keys]
        return np.asarray((slots >= 0) & (self._state[slots] == HELD))

    def _forget_call(self) -> None:
        """The call before has ended, or failed."""
        self._earlier = set(self._reading)
        del self._begun[:-MAX_BEGUN]
        self._needed[:] = False
        self._waiting.clear()
        self._lent.clear()

    def _settle(self) -> dict[int, CheckpointError]:
        """What has been read is there from now on. Returns why others are not: their slots are free again, and they are
        read anew when they are needed."""
        failures: dict[int, CheckpointError] = {}
        for read in self.reader.take_ended():
            key = read.key
            del self._reading[key]
            self._n_ahead -= read.urgency is Urgency.AHEAD
            if read.error is not None:
                failures[key] = read.error
                self.latest_failure = str(read.error)
                self._vacate(key)
                continue
            layer, expert = divmod(key, self.places.n_experts)
            slot = int(self._slot_of[key])
            self._state[slot] = HELD
            lead = self.places.window(layer, expert)[2]
            self.addresses[layer][expert] = self.slots.address(slot) + lead
            self._ended.append(EndedRead(layer, expert, read.n_bytes, read.start_us, read.end_us, read.urgency))
        self.failed += len(failures)
        return failures

    def _raise_of(self, failures: dict[int, CheckpointError], keys: Iterable[int]) -> None:
        """Raises the error of the first of `keys` that could not be read. What was begun before this call is read again
        instead: its error may be of a file that has been mended since."""
        known, self._earlier = self._earlier, self._earlier.difference(failures) if failures else self._earlier
        for key in keys if failures else ():
            if key in failures and key not in known:
                raise failures[key]

    def _begin(self, key: int, urgency: Urgency, bar: float = np.inf) -> bool:
        """Begins a read if there is a slot for it: a free one, or that of an expert worth less than `bar` uses."""
        slot = self._room(urgency, bar)
        if slot < 0:
            return False
        layer, expert = divmod(key, self.places.n_experts)
        offset, n_bytes, lead = self.places.window(layer, expert)
        into = self.slots.view(slot)[:n_bytes].data
        needed_bytes = lead + self.places.record(layer, expert)[1]
        read = Read(key, into, offset, needed_bytes, urgency, self.places.name(layer, expert))
        self._slot_of[key], self._key_of[slot], self._state[slot] = slot, key, READING
        self._reading[key] = read
        self._n_ahead += urgency is Urgency.AHEAD
        if urgency is not Urgency.PREHEAT:
            self.worth.read()
            self._begun.append((layer, expert))
        self.reader.submit(read)
        return True

    def _hurry(self, read: Read) -> None:
        self._n_ahead -= read.urgency is Urgency.AHEAD
        self.reader.hurry(read)

    def _room(self, urgency: Urgency, bar: float) -> int:
        """A slot that is free now; -1 where there is none."""
        if not self._free:
            if urgency is Urgency.NEEDED and self._cancel_one(Urgency.PREHEAT):
                return self._free.pop()
            victim = self._victim(bar)
            if victim >= 0:
                self._vacate(victim)
            elif urgency is not Urgency.NEEDED or not self._cancel_one(Urgency.AHEAD):
                return -1
        return self._free.pop()

    def _victim(self, bar: float) -> int:
        """The held expert with the least expected uses, fewer than `bar`, that may leave; -1 where there is none."""
        slots = np.flatnonzero(self._state == HELD)
        keys = self._key_of[slots]
        may_leave = ~self._needed[keys]
        staying = self._staying()
        if staying:
            may_leave &= ~np.isin(keys, staying)
        keys = keys[may_leave]
        if not keys.size:
            return -1
        worth = self.worth.keep[keys] + self.ahead.expected[keys]
        worth += keys >= self._many_from * self.places.n_experts
        if self.copies is not None:
            worth[self.copies.in_slots()[keys]] = 0.0
        least = int(np.argmin(worth))
        return int(keys[least]) if worth[least] < bar else -1

    def _staying(self) -> list[int]:
        """Keys that somebody reads outside of the call."""
        if self.copies is None:
            return list(self._lent)
        n = self.places.n_experts
        return [layer * n + expert for layer, expert in self.copies.being_copied()] + list(self._lent)

    def _vacate(self, key: int) -> None:
        """The slot of an expert is free, and the expert no longer there."""
        slot = int(self._slot_of[key])
        layer, expert = divmod(key, self.places.n_experts)
        self._slot_of[key], self._key_of[slot], self._state[slot] = -1, -1, FREE
        self.addresses[layer][expert] = 0
        self._free.append(slot)

    def _cancel_one(self, urgency: Urgency) -> bool:
        """Takes the slot of the latest queued read of this urgency; False where none is queued."""
        for read in reversed(self._reading.values()):
            if read.urgency is urgency and self.reader.cancel(read):
                self._cancelled(read)
                return True
        return False

    def _cancelled(self, read: Read) -> None:
        del self._reading[read.key]
        self._n_ahead -= read.urgency is Urgency.AHEAD
        self._vacate(read.key)

    def _begin_waiting(self, missing: Iterable[int]) -> None:
        """Begins reads of what is needed and was not begun, as far as there are slots."""
        known = dict.fromkeys([*self._waiting, *map(int, missing)])
        self._waiting = [key for key in known if self._slot_of[key] < 0 and not self._begin(key, Urgency.NEEDED)]

    def _wait_for(self, keys: Sequence[int]) -> None:
        """Until something has changed that may bring one of these experts."""
        if not any(key in self._reading for key in keys):
            self._make_way()
            return
        start_ns = perf_counter_ns()
        self.reader.wait()
        self._waited_us += (perf_counter_ns() - start_ns) * 1e-3

    def _make_way(self) -> None:
        """Every slot is in use: one is to become free. Copies end; then what is lent to nobody any more goes, and at
        last what this call needs later, which is read again then."""
        self._settle()
        if self.copies is not None and self.copies.being_copied():
            self.copies.wait_for_one()
        elif self._reading:
            self.reader.wait()
        else:
            held = self._key_of[self._state == HELD]
            self._vacate(int(next(key for key in held if int(key) not in self._lent)))

    # Forecasts --------------------------------------------------------------------------------------------------

    def _judge_forecasts(self, layer: int, active: Ids) -> None:
        """A layer's turn has come: what was foretold of it is compared, and queued reads for nothing are cancelled."""
        self.ahead.judge(layer, active)
        for key, read in list(self._reading.items()):
            of_layer = key // self.places.n_experts == layer
            for_nothing = read.urgency is Urgency.AHEAD and of_layer and not self._needed[key]
            if for_nothing and self.reader.cancel(read):
                self._cancelled(read)

    def _read_ahead(self) -> None:
        """Begins reads for later layers that are worth it."""
        while self._n_ahead < MAX_AHEAD and not self._waiting:
            wish = self.ahead.take()
            if wish is None:
                return
            key, gain = wish
            if self._slot_of[key] < 0 and not self._begin(key, Urgency.AHEAD, gain):
                self.ahead.forget()  # the likeliest come first

    # More and fewer slots ---------------------------------------------------------------------------------------

    def _grow(self, n_more: int) -> None:
        added = self.slots.add(n_more)
        n_new = max(max(added) + 1 - len(self._state), 0)
        self._key_of = np.concatenate([self._key_of, np.full(n_new, -1, np.int64)])
        self._state = np.concatenate([self._state, np.full(n_new, GONE, np.uint8)])
        self._state[added] = FREE
        self._free += reversed(added)

    def _shrink(self, n_less: int) -> None:
        """Gives back slots that are free, then those of the experts that are worth least. What accelerators copy stays,
        so that nobody waits for a link with much to do, unless nothing else is left."""
        while self._cancel_one(Urgency.PREHEAT) or self._cancel_one(Urgency.AHEAD):
            pass
        while self._reading:
            self.reader.wait()
            self._settle()
        while len(self._free) < n_less:
            victim = self._victim(np.inf)
            if victim >= 0:
                self._vacate(victim)
            else:
                self._make_way()
        gone, self._free = self._free[:n_less], self._free[n_less:]
        self._state[gone] = GONE
        self.slots.give_back(gone)
