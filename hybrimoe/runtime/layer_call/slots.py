"""SlotCache: what the accelerator's slots hold, and the transfers under way; the planner's SlotTable made real.

The planner decides on its own `scheduler.SlotTable`; this class performs its transfers and knows, in order of
submission, which expert each slot holds, so that a plan which reads a slot that holds something else is refused
instead of computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu_kernels import Accelerator, Event
from hybrimoe.errors import HybriMoEError
from scheduler import Transfer, TransferEnded
from scheduler.records import TaskKind, TaskRecord

Key = tuple[int, int]


class PlanError(HybriMoEError):
    """A plan that cannot be performed as it stands: a defect of a policy, not of the input."""


@dataclass(frozen=True, slots=True)
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
        start_us, end_us = self.event.span_us()
        return (start_us if self.began is None else self.began.span_us()[0]), end_us

    def start_us(self) -> float:
        """When it began on the link; 0 before."""
        return (self.event if self.began is None else self.began).span_us()[0]

    def ended(self) -> TransferEnded:
        """What the planner is told. Raises LaneError if the copy failed."""
        self.event.wait()
        start_us, end_us = self.span_us()
        move = self.transfer
        return TransferEnded(move.layer, move.expert, move.slot, end_us - start_us)

    def record(self) -> TaskRecord:
        """The finished copy as a timeline entry."""
        start_us, end_us = self.span_us()
        kind: TaskKind = "transfer" if self.transfer.kind == "demand" else "prefetch"
        return TaskRecord(
            "link", kind, self.transfer.layer, self.transfer.expert, 0, self.n_bytes, start_us, end_us, self.step,
            self.unit,
        )  # fmt: skip


class SlotCache:
    """Slot contents of one accelerator in order of submission, and the FIFO of transfers under way.

    Slots are numbered as the planner does, from `first_slot` (where there are several accelerators; `unit` is the
    accelerator's number).
    """

    def __init__(self, accelerator: Accelerator, first_slot: int = 0, unit: int = 0) -> None:
        self.accelerator, self.first_slot, self.unit = accelerator, first_slot, unit
        self._holds: list[Key | None] = [None] * accelerator.n_slots
        self._pending: deque[InFlight] = deque()

    @property
    def n_slots(self) -> int:
        """Slots of the accelerator."""
        return len(self._holds)

    def submit(self, transfer: Transfer, record: npt.NDArray[np.uint8], step: int, *, traced: bool = False) -> None:
        """Starts one transfer; it follows all earlier ones."""
        self.check_slot(transfer)
        event = self.accelerator.copy_to_slot(transfer.slot - self.first_slot, record)
        self.began(InFlight(transfer, event, record.nbytes, step, traced, unit=self.unit))

    def check_slot(self, transfer: Transfer) -> None:
        """Raises PlanError where there is no such slot."""
        if not 0 <= transfer.slot - self.first_slot < len(self._holds):
            raise PlanError(f"{transfer} names slot {transfer.slot}, expected {self._numbers()}")

    def began(self, item: InFlight) -> None:
        """Notes a transfer that was submitted to the accelerator."""
        self._holds[item.transfer.slot - self.first_slot] = (item.transfer.layer, item.transfer.expert)
        self._pending.append(item)

    def own(self, slots: Sequence[int]) -> Sequence[int]:
        """The accelerator's own numbers of these slots."""
        return slots if not self.first_slot else [slot - self.first_slot for slot in slots]

    def check(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Raises PlanError unless each slot holds (or will hold, once its copy ends) the layer's expert."""
        holds, n_slots = self._holds, len(self._holds)
        for expert, slot in zip(experts, self.own(slots), strict=True):
            if not 0 <= slot < n_slots or holds[slot] != (layer, expert):
                held = holds[slot] if 0 <= slot < n_slots else f"nothing (the slots here are {self._numbers()})"
                name = slot + self.first_slot
                raise PlanError(f"layer {layer} expert {expert} is planned on slot {name}, which holds {held}")

    def _numbers(self) -> str:
        return f"{self.first_slot}..{self.first_slot + len(self._holds) - 1}" if self._holds else "none"

    def take_ended(self) -> list[InFlight]:
        """Transfers that ended since the last call, in link order."""
        ended = []
        while self._pending and self._pending[0].event.done():
            ended.append(self._pending.popleft())
        return ended

    def link_busy_us(self, now_us: float, transfer_us: Callable[[int], float]) -> float:
        """Expected us until the transfers under way have ended; `transfer_us` maps a layer to its copy time."""
        if not self._pending:
            return 0.0
        total_us = sum(transfer_us(item.transfer.layer) for item in self._pending)
        start_us = self._pending[0].start_us()
        return max(0.0, total_us - (now_us - start_us if start_us else 0.0))

    def contents(self) -> dict[int, Key]:
        """Slot -> (layer, expert) of every filled slot."""
        return {slot: key for slot, key in enumerate(self._holds, self.first_slot) if key is not None}

    def reset(self) -> None:
        """Waits for the lanes, then forgets what the slots hold."""
        self.accelerator.synchronize()
        self._pending.clear()
        self._holds = [None] * self.accelerator.n_slots
