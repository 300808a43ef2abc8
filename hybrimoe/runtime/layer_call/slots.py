"""The copies that an accelerator's link carries, in order. Which slot holds what is the planner's to know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gpu_kernels import Accelerator, Event
from hybrimoe.errors import HybriMoEError
from scheduler import Transfer
from scheduler.planner.protocol import LayerPlanner
from scheduler.records import TaskKind, TaskRecord


class PlanError(HybriMoEError):
    """A plan that cannot be performed as it stands: a defect of a policy, not of the input."""


@dataclass(slots=True, eq=False)
class InFlight:
    """A transfer that was submitted and whose end was not reported yet. `began`: its first copy, where it has two."""

    transfer: Transfer
    event: Event
    n_bytes: int
    step: int
    traced: bool
    began: Event | None = None
    unit: int = 0

    def span_us(self) -> tuple[float, float]:
        """Start and end of the whole transfer; only after it has ended."""
        start_us, end_us = self.event.span_us
        return (start_us if self.began is None else self.began.span_us[0]), end_us

    def record(self) -> TaskRecord:
        """The finished copy as a timeline entry."""
        start_us, end_us = self.span_us()
        kind: TaskKind = "transfer" if self.transfer.kind == "demand" else "prefetch"
        return TaskRecord(
            "link", kind, self.transfer.layer, self.transfer.expert, 0, self.n_bytes, start_us, end_us, self.step,
            self.unit,
        )  # fmt: skip


class CopiesUnderWay:
    """What a cache in host memory asks about copies from it (`tier.cache.Copies`): those of all queues."""

    def __init__(self, queues: Sequence[TransferQueue], planner: LayerPlanner) -> None:
        self._queues, self._planner = queues, planner

    def being_copied(self) -> Collection[tuple[int, int]]:
        """(layer, expert) of each copy that has not ended."""
        return {(item.transfer.layer, item.transfer.expert) for item in self._pending()}

    def wait_for_one(self) -> None:
        """Until the first of them has ended. Raises LaneError where it failed."""
        for item in self._pending():
            item.event.wait()
            return

    def in_slots(self) -> npt.NDArray[np.bool_]:
        """bool [layers * experts]: an accelerator holds the expert."""
        planner = self._planner
        return np.concatenate([planner.resident_mask(layer) for layer in range(planner.n_layers)])

    def _pending(self) -> list[InFlight]:
        return [item for queue in self._queues for item in queue.pending if not item.event.ended]


class TransferQueue:
    """The FIFO of transfers under way into one accelerator's slots.

    `prepares`: whether `before_compute` does something.

    Slots are numbered as the planner does, from `first_slot` (where there are several accelerators; `unit` is the
    accelerator's number).
    """

    prepares: ClassVar[bool] = False

    def __init__(self, accelerator: Accelerator, first_slot: int = 0, unit: int = 0) -> None:
        self.accelerator, self.first_slot, self.unit = accelerator, first_slot, unit
        self.pending: deque[InFlight] = deque()
        self._n_slots = accelerator.n_slots

    def submit(self, transfer: Transfer, record: npt.NDArray[np.uint8], step: int, *, traced: bool = False) -> None:
        """Starts one transfer; it follows all earlier ones. Raises PlanError where there is no such slot."""
        slot = transfer.slot - self.first_slot
        if not 0 <= slot < self._n_slots:
            self.own_slot(transfer)
        event = self.accelerator.copy_to_slot(slot, record)
        self.pending.append(InFlight(transfer, event, record.nbytes, step, traced, unit=self.unit))

    def own_slot(self, transfer: Transfer) -> int:
        """The accelerator's own number of a transfer's slot. Raises PlanError where there is no such slot."""
        slot = transfer.slot - self.first_slot
        if not 0 <= slot < self._n_slots:
            last = self.first_slot + self._n_slots - 1
            raise PlanError(f"{transfer} names slot {transfer.slot}, expected {self.first_slot}..{last}")
        return slot

    def own_slots(self, slots: list[int]) -> list[int]:
        """The accelerator's own numbers of slots that the planner has named."""
        return [slot - self.first_slot for slot in slots]

    def before_compute(
        self, layer: int, expert_ids: npt.NDArray[np.int32], positions: Sequence[int], slots: Sequence[int]
    ) -> None:
        """Experts `expert_ids[positions[i]]` are about to be computed from the accelerator's own `slots[i]`."""

    def take_counts(self) -> tuple[int, list[int]]:
        """Since the last call: bytes on the link beside the records, and experts computed with less than all bits."""
        return 0, []

    def busy_us(self, now_us: float, transfer_us: Callable[[int], float]) -> float:
        """Expected us until the transfers under way have ended; `transfer_us` maps a layer to its copy time."""
        if not self.pending:
            return 0.0
        total_us, layer, one_us = 0.0, -1, 0.0
        for item in self.pending:
            if item.transfer.layer != layer:
                layer = item.transfer.layer
                one_us = transfer_us(layer)
            total_us += one_us
        first = self.pending[0]
        start_us = (first.event if first.began is None else first.began).span_us[0]
        return max(0.0, total_us - (now_us - start_us if start_us else 0.0))
