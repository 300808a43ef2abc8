"""Transfers of one planner: which slot each takes, which are under way, and when those in flight arrive."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy
from scheduler.demand import Demand
from scheduler.machine.costs import CostModel
from scheduler.plan import Transfer, TransferKind
from scheduler.planner.decide import REUSE, pick_slot
from scheduler.planner.flight import Flight
from scheduler.planner.plan_view import PlanView
from scheduler.prefetch.base import PrefetchPolicy
from scheduler.slots import SlotTable

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MAX_PREFETCHES: Final = 8
"""Prefetches that one layer may start, however long the link idles: later layers know more."""


class Movement:
    """Starts transfers in the slot table and follows them. ``arrival`` float64[n_slots]: us until each in flight lands.

    ``fixed``: for each layer whether its experts never leave the CPU. Its ``Transfer`` values number layers and
    slots as outside of the planner (``slots.first_layer``, ``slots.first_slot``).
    """

    def __init__(
        self, slots: SlotTable, cache: CachePolicy, prefetch: PrefetchPolicy, costs: CostModel, fixed: list[bool]
    ) -> None:
        self.slots, self.cache, self.prefetch, self.costs, self.fixed = slots, cache, prefetch, costs, fixed
        self.in_flight = Flight(0)
        self._tells_evictions = type(cache).evicted is not CachePolicy.evicted
        self.resized()

    def resized(self) -> None:
        """The number of slots has changed."""
        self.arrival, self.in_flight = np.zeros(self.slots.n_slots), self.in_flight.resized(self.slots.n_slots)
        self._nobody = np.zeros(self.slots.n_slots, np.bool_)

    def start(
        self, slot: int, key: int, kind: TransferKind, gain_us: float, admit: bool, handed_over: bool = False
    ) -> Transfer:
        """Puts ``key`` in flight into ``slot`` and tells the cache policy."""
        slots = self.slots
        old = slots.hand_over(slot, key) if handed_over else slots.begin_transfer(slot, key)
        if self.cache.tracks_slots:
            if old >= 0 and self._tells_evictions:
                self.cache.evicted(old)
            self.cache.inserted(key)
        if old >= 0:
            self.in_flight.drop(old)
        self.in_flight.add(key, slot)
        return self.transfer(slot, key, old, kind, gain_us, admit)

    def transfer(self, slot: int, key: int, old: int, kind: TransferKind, gain_us: float, admit: bool) -> Transfer:
        """A transfer that is under way, as it is told outside; ``old``: the evicted key, -1 for none."""
        slots, n_experts = self.slots, self.slots.n_experts
        evicts = (old // n_experts + slots.first_layer, old % n_experts) if old >= 0 else None
        layer, expert = divmod(key, n_experts)
        return Transfer(layer + slots.first_layer, expert, slot + slots.first_slot, evicts, kind, gain_us, admit)

    def estimate_arrivals(self, link_ready_us: float, transfer_us: float) -> None:
        """The link is in order, so the last transfer in flight lands when the link gets free, the others before."""
        behind = len(self.in_flight)
        for slot in self.in_flight.slots[:behind].tolist():
            behind -= 1
            self.arrival[slot] = max(link_ready_us - behind * transfer_us, 0.0)

    def start_demands(self, demand: Demand, plan: PlanView, slot_of: list[int]) -> bool:
        """Starts the demand transfers of a plan and keeps them in it; ``slot_of``: each position's slot.

        Slots that one expert of the plan hands over to another are pinned turn by turn, in accelerator order. Returns
        whether there are such, and the plan's slots are pinned already.
        """
        evicted = plan.evicted
        if REUSE not in map(evicted.__getitem__, plan.moved):
            for position in plan.moved:
                plan.transfers.append(self._start_demand(demand, position, slot_of[position], False))
            return False
        started = {}
        for position in plan.accel:
            slot = slot_of[position]
            if position in plan.moved:
                started[position] = self._start_demand(demand, position, slot, evicted[position] == REUSE)
            self.slots.pin(slot)
        plan.transfers = [started[position] for position in plan.moved]
        return True

    def _start_demand(self, demand: Demand, position: int, slot: int, handed_over: bool) -> Transfer:
        key = demand.layer * self.slots.n_experts + int(demand.expert_ids[position])
        gain_us = self.costs.gain_us(demand.layer, int(demand.n_tokens[position]))
        return self.start(slot, key, "demand", gain_us, self.cache.admits(key), handed_over)

    def start_prefetches(
        self, demand: Demand, idle_us: float, transfer_us: float, keep: Floats, held: Bools | None = None
    ) -> list[Transfer]:
        """Prefetches that start before the next layer's demand can need the link, which idles for ``idle_us`` > 0.

        keep: the cache policy's, or with the price of the disk. held: what is in host memory, where not all is: what is
        on disk is read before it can go on.
        """
        limit = MAX_PREFETCHES if transfer_us <= 0.0 else min(math.ceil(idle_us / transfer_us), MAX_PREFETCHES)
        keys, gains = self.prefetch.propose(demand, limit)
        if held is not None and keys.size:
            keys, gains = keys[held[keys]], gains[held[keys]]
        if not keys.size:
            return []
        taken = self._nobody if self.cache.keeps_us else self._needed_soon(demand)
        started = []
        for key, gain in zip(keys.tolist(), gains.tolist(), strict=True):
            slot = self._prefetch_slot(key, taken, keep)
            if slot >= 0 and (not self.cache.keeps_us or self._worth_it(slot, key, gain, keep)):
                started.append(self.start(slot, key, "prefetch", gain, True))
        return started

    def _needed_soon(self, demand: Demand) -> Bools:
        """bool[n_slots]: experts that this demand's predictions name; prefetches do not evict them.

        A cache policy that keeps by us has already raised those that the next layer needs.
        """
        taken = np.zeros(self.slots.n_slots, np.bool_)
        for prediction in demand.predictions:
            slots = self.slots.slot_of[prediction.layer * self.slots.n_experts + prediction.expert_ids]
            taken[slots[slots >= 0]] = True
        return taken

    def _prefetch_slot(self, key: int, taken: Bools, keep: Floats) -> int:
        slots, cache = self.slots, self.cache
        layer = key // slots.n_experts
        if self.fixed[layer]:
            return -1
        first_key = layer * slots.n_experts
        capacity = int(cache.capacities[layer]) if cache.scope == "layer" else -1
        return pick_slot(
            slots.key_of, slots.state, slots.pins, keep, taken, first_key, first_key + slots.n_experts,
            capacity,
        )  # fmt: skip

    def _worth_it(self, slot: int, newcomer: int, gain_us: float, keep: Floats) -> bool:
        """Policies whose ``keep`` is in us do not let a prefetch evict what is worth more."""
        key = int(self.slots.key_of[slot])
        return gain_us + float(keep[newcomer]) > (0.0 if key < 0 else float(keep[key]))
