"""Transfers of one planner: which slot each takes, which are under way, and when those in flight arrive."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy
from scheduler.demand import LayerDemand
from scheduler.machine.costs import CostModel
from scheduler.plan import Transfer, TransferEnded, TransferKind
from scheduler.planner.decide import REUSE, pick_slot
from scheduler.prefetch.base import PrefetchPolicy
from scheduler.slots import SlotTable

MAX_PREFETCHES: Final = 8
"""Prefetches that one layer may start, however long the link idles: later layers know more."""


class Movement:
    """Starts transfers in the slot table and follows them. ``arrival`` float64[n_slots]: us until each in flight lands.

    ``fixed``: for each layer whether its experts never leave the CPU.
    """

    def __init__(
        self, slots: SlotTable, cache: CachePolicy, prefetch: PrefetchPolicy, costs: CostModel, fixed: list[bool]
    ) -> None:
        self.slots, self.cache, self.prefetch, self.costs, self.fixed = slots, cache, prefetch, costs, fixed
        self.in_flight: dict[int, int] = {}
        self.chained = False
        """Whether the latest demand transfers hand slots of their own plan on, which are then claimed already."""
        self.resized()

    def resized(self) -> None:
        """The number of slots has changed."""
        self.arrival = np.zeros(self.slots.n_slots)
        self._nobody = np.zeros(self.slots.n_slots, np.bool_)

    def start(
        self, slot: int, key: int, kind: TransferKind, gain_us: float, admit: bool, chained: bool = False
    ) -> Transfer:
        """Puts ``key`` in flight into ``slot`` and tells the cache policy."""
        n_experts = self.slots.n_experts
        old = self.slots.chain_transfer(slot, key) if chained else self.slots.begin_transfer(slot, key)
        if old >= 0:
            self.in_flight.pop(old, None)
        self.in_flight[key] = slot
        if self.cache.tracks_slots:
            if old >= 0:
                self.cache.evicted(old)
            self.cache.inserted(key)
        layer, expert = divmod(key, n_experts)
        return Transfer(layer, expert, slot, None if old < 0 else divmod(old, n_experts), kind, gain_us, admit)

    def ended(self, event: TransferEnded) -> None:
        """The bytes are there. Raises SlotError if that transfer was not under way."""
        key = event.layer * self.slots.n_experts + event.expert
        self.slots.end_transfer(event.slot, key)
        if self.in_flight.get(key) == event.slot:
            del self.in_flight[key]
        if event.us > 0.0:
            self.costs.observe_transfer(event.layer, event.us)

    def estimate_arrivals(self, link_ready_us: float, transfer_us: float) -> None:
        """The link is in order, so the last transfer in flight lands when the link gets free, the others before."""
        behind = len(self.in_flight)
        for slot in self.in_flight.values():
            behind -= 1
            self.arrival[slot] = max(link_ready_us - behind * transfer_us, 0.0)

    def start_demands(self, demand: LayerDemand, flat: list[int], accel_positions: list[int]) -> dict[int, Transfer]:
        """Starts the demand transfers of a flat plan (see ``decide``), by position. Sets ``chained``.

        Slots that one expert of the plan hands to another are claimed turn by turn, in accelerator order.
        """
        n, first_key = demand.expert_ids.size, demand.layer * self.slots.n_experts
        demanded = flat[3 + 2 * n : 3 + 2 * n + flat[2]]
        self.chained = any(flat[3 + 4 * n + p] == REUSE for p in demanded)
        started = {}
        for position in accel_positions if self.chained else demanded:
            slot = flat[3 + 3 * n + position]
            if not self.chained or position in demanded:
                key = first_key + int(demand.expert_ids[position])
                gain = self.costs.gain_us(demand.layer, int(demand.n_tokens[position]))
                reuse = flat[3 + 4 * n + position] == REUSE
                started[position] = self.start(slot, key, "demand", gain, self.cache.admits(key), reuse)
            if self.chained:
                self.slots.claim(slot)
        return started

    def start_prefetches(self, demand: LayerDemand, link_end_us: float, makespan_us: float) -> tuple[Transfer, ...]:
        """Prefetches that start before the next layer's demand can need the link."""
        idle_us = makespan_us + self.costs.dense_us - link_end_us
        if idle_us <= 0.0 or not self.slots.n_slots:
            return ()
        transfer_us = self.costs.transfer_us(demand.layer, cpu_busy=True)
        limit = MAX_PREFETCHES if transfer_us <= 0.0 else min(math.ceil(idle_us / transfer_us), MAX_PREFETCHES)
        keys, gains = self.prefetch.propose(demand, limit)
        if not keys.size:
            return ()
        taken = self._nobody if self.cache.keeps_us else self._needed_soon(demand)
        started = []
        for key, gain in zip(keys.tolist(), gains.tolist(), strict=True):
            slot = self._prefetch_slot(key, taken)
            if slot >= 0 and self._worth_it(slot, key, gain):
                started.append(self.start(slot, key, "prefetch", gain, True))
        return tuple(started)

    def _needed_soon(self, demand: LayerDemand) -> npt.NDArray[np.bool_]:
        """bool[n_slots]: experts that this demand's predictions name; prefetches do not evict them.

        A cache policy that keeps by us has already raised those that the next layer needs.
        """
        taken = np.zeros(self.slots.n_slots, np.bool_)
        for prediction in demand.predictions:
            slots = self.slots.slot_of[prediction.layer * self.slots.n_experts + prediction.expert_ids]
            taken[slots[slots >= 0]] = True
        return taken

    def _prefetch_slot(self, key: int, taken: npt.NDArray[np.bool_]) -> int:
        slots, cache = self.slots, self.cache
        layer = key // slots.n_experts
        if self.fixed[layer]:
            return -1
        first_key = layer * slots.n_experts
        return pick_slot(
            slots.key_of, slots.state, slots.claims, cache.keep, taken, first_key, first_key + slots.n_experts,
            cache.capacity(layer),
        )  # fmt: skip

    def _worth_it(self, slot: int, newcomer: int, gain_us: float) -> bool:
        """Policies whose ``keep`` is in us do not let a prefetch evict what is worth more."""
        key = int(self.slots.key_of[slot])
        return not self.cache.keeps_us or gain_us + float(self.cache.keep[newcomer]) > (
            0.0 if key < 0 else float(self.cache.keep[key])
        )
