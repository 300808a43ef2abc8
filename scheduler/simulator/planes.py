"""Experts that cross the simulated link as bit planes: high bits first, low bits where they are wanted (``d2moe``).

The rules are those of the runtime's slots (``hybrimoe.runtime.lossy.planes``), in the same order of submission: every
transfer brings the high plane; a demand transfer of a wanted expert the low one behind it; a wanted expert whose slot
has only the high bits gets the low ones before its computation. The device writes the slot from what came over the
link, behind the copy on the same stream: that takes device memory's time and a launch, and the link waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.machine.profile import HardwareProfile
from scheduler.plan import LayerPlan, Transfer
from scheduler.simulator.engine import Copy
from scheduler.simulator.pair import PairEngine

HIGH_SHARE: Final = 320 / 576
"""Part of an int4 record that the high plane has: half of each code, and the scales (``cpu_kernels.format.planes``)."""


@dataclass(slots=True)
class Plane:
    """How long one plane takes from host memory into its slot, and its bytes."""

    us: float
    n_bytes: int


def planes(profile: HardwareProfile, record_bytes: int) -> tuple[Plane, Plane]:
    """The high and the low plane of a record. Both write the whole record; the low one also reads it."""
    high = round(record_bytes * HIGH_SHARE)
    low = record_bytes - high
    touched = (high + record_bytes, low + 2 * record_bytes)
    link, accel = profile.link, profile.accel

    def plane(n_bytes: int, on_device: int) -> Plane:
        copy_us = link.latency_us + n_bytes / (link.gbps * 1e3)
        return Plane(copy_us + accel.launch_us + on_device / (accel.mem_gbps * 1e3), n_bytes)

    return plane(high, touched[0]), plane(low, touched[1])


class LowPlane(Copy):
    """A copy of the low bits alone, which no planner asked for: its end is no event."""


@dataclass(slots=True)
class PlaneEngine(PairEngine):
    """``wanted`` bool [experts]: those of the layer about to run that need all bits; None: all of them."""

    high: Plane = field(default_factory=lambda: Plane(0.0, 0))
    low: Plane = field(default_factory=lambda: Plane(0.0, 0))
    wanted: NDArray[np.bool_] | None = None
    rough: list[int] = field(default_factory=list)
    _rough_slots: set[int] = field(default_factory=set)

    def take_rough(self) -> list[int]:
        """Experts that were computed without their low bits since the last call."""
        taken, self.rough = self.rough, []
        return taken

    def _whole(self, transfer: Transfer) -> bool:
        """Whether a transfer brings both planes."""
        return transfer.kind == "demand" and self._wants(transfer.expert)

    def _wants(self, expert: int) -> bool:
        return self.wanted is None or bool(self.wanted[expert])

    def _transfer_us(self, transfer: Transfer) -> float:
        return self.high.us + (self.low.us if self._whole(transfer) else 0.0)

    def _transfer_bytes(self, transfer: Transfer) -> int:
        return self.high.n_bytes + (self.low.n_bytes if self._whole(transfer) else 0)

    def _enqueue(self, plan: LayerPlan) -> None:
        """Transfers in link order; the low bits of what is computed next come before what follows (the executor's)."""
        arrives = {transfer.expert: at for at, transfer in enumerate(plan.transfers)}
        sent = begun = 0
        for at, expert in enumerate(plan.accel):
            needed = arrives.get(expert, -1)
            if needed >= 0 or expert in plan.awaited:
                self._complete(plan, slice(begun, at))
                begun = at
            if needed >= sent:
                self._submit(plan.transfers[sent : needed + 1], plan.step)
                sent = needed + 1
        self._complete(plan, slice(begun, len(plan.accel)))
        self._submit((*plan.transfers[sent:], *plan.prefetches), plan.step)

    def _submit(self, transfers: Sequence[Transfer], step: int) -> None:
        for transfer in transfers:
            self._add(Copy, transfer, step, self._transfer_us(transfer), self._transfer_bytes(transfer))
            if self._whole(transfer):
                self._rough_slots.discard(transfer.slot)
            else:
                self._rough_slots.add(transfer.slot)

    def _complete(self, plan: LayerPlan, part: slice) -> None:
        """Brings the low bits of the experts about to be computed that want them and lack them; notes the others."""
        for expert, slot in zip(plan.accel[part], plan.accel_slots[part], strict=True):
            if slot not in self._rough_slots:
                continue
            if not self._wants(expert):
                self.rough.append(expert)
                continue
            move = Transfer(plan.layer, expert, slot, None, "demand", 0.0, True)
            self._add(LowPlane, move, plan.step, self.low.us, self.low.n_bytes)
            self._rough_slots.discard(slot)

    def _ended_transfers(self) -> list[Copy]:
        return [copy for copy in self._ended if not isinstance(copy, LowPlane)]
