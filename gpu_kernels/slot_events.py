"""Per slot: the last copy into it and the last computation that reads it. The order rules of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from gpu_kernels.errors import SlotError

EventT = TypeVar("EventT")


class SlotEvents(Generic[EventT]):
    """Last write and last read of every slot, in order of submission."""

    def __init__(self, n_slots: int) -> None:
        self._writes: list[EventT | None] = [None] * n_slots
        self._reads: dict[int, EventT] = {}

    def on_write(self, slot: int, event: EventT) -> EventT | None:
        """Notes a copy into `slot`; returns the read that it has to wait for, if any."""
        if not 0 <= slot < len(self._writes):
            self._check(slot)
        self._writes[slot] = event
        return self._reads.pop(slot, None)

    def on_read(self, slots: Sequence[int], event: EventT) -> list[EventT]:
        """Notes a computation that reads `slots`; returns the writes that it has to wait for."""
        n_slots, writes = len(self._writes), []
        for slot in slots:
            if not 0 <= slot < n_slots:
                self._check(slot)
            write = self._writes[slot]
            if write is None:
                raise self._never_filled(slot)
            writes.append(write)
        for slot in slots:
            self._reads[slot] = event
        return writes

    def take_reads(self) -> set[EventT]:
        """The last reads of all slots: who takes them makes every later copy wait for them."""
        reads = set(self._reads.values())
        self._reads.clear()
        return reads

    def write_of(self, slot: int) -> EventT:
        """The last copy into `slot`. Raises SlotError where there was none."""
        if not 0 <= slot < len(self._writes):
            self._check(slot)
        write = self._writes[slot]
        if write is None:
            raise self._never_filled(slot)
        return write

    @staticmethod
    def _never_filled(slot: int) -> SlotError:
        return SlotError(f"slot {slot} was never filled; submit a copy into it before work that reads it")

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._writes):
            raise SlotError(f"slot {slot} does not exist: {len(self._writes)} slots are allocated (0-based)")
