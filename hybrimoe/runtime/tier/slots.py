"""Where the records of a packed file lie in it, and the host memory into which some of them are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.amounts import size_text
from hybrimoe.errors import BudgetError
from hybrimoe.runtime.store import ByteArray, LayerSpec, host_bytes, is_locked
from hybrimoe.runtime.tier.reader import BLOCK_BYTES

LEAST_SLOTS = 8
"""Experts that must fit host memory at once: what is measured together, and reads in flight beside experts in use."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RecordPlaces:
    """Records of `layers`, one behind the other from `offset_bytes` on. key = layer * n_experts + expert.

    first int64 [layers]: where each layer's records start in the file.
    """

    path: Path
    layers: tuple[LayerSpec, ...]
    first: Ints
    n_experts: int

    @classmethod
    def of(cls, path: Path, layers: Sequence[LayerSpec], offset_bytes: int) -> RecordPlaces:
        """Of a packed file whose records begin at `offset_bytes`."""
        sizes = [layer.nbytes for layer in layers]
        first = offset_bytes + np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        return cls(path, tuple(layers), first, max(layer.num_experts for layer in layers))

    def record(self, layer: int, expert: int) -> tuple[int, int]:
        """Offset in the file and size of a record, in bytes."""
        size = self.layers[layer].spec.record_bytes
        return int(self.first[layer]) + expert * size, size

    def window(self, layer: int, expert: int) -> tuple[int, int, int]:
        """The blocks of the file that hold a record: their offset and length in bytes, and where in them it begins."""
        offset, size = self.record(layer, expert)
        lead = offset % BLOCK_BYTES
        return offset - lead, -(-(lead + size) // BLOCK_BYTES) * BLOCK_BYTES, lead

    def name(self, layer: int, expert: int) -> str:
        """What a record is called in errors."""
        return f"{self.layers[layer].path}, expert {expert}"

    @property
    def slot_bytes(self) -> int:
        """Memory that any record fits into with the blocks of the file around it."""
        return max(
            self.window(layer, expert)[1]
            for layer, spec in enumerate(self.layers)
            for expert in range(spec.num_experts)
        )

    @property
    def n_records(self) -> int:
        """Experts of all layers."""
        return sum(layer.num_experts for layer in self.layers)

    def slots_for(self, budget_bytes: int) -> int:
        """Records that `budget_bytes` hold at once. Raises BudgetError where they are too few to run at all."""
        slot_bytes, least = self.slot_bytes, min(LEAST_SLOTS, self.n_records)
        n_slots = min(budget_bytes // slot_bytes, self.n_records)
        if n_slots < least:
            raise BudgetError(
                f"memory.host allows {size_text(budget_bytes)} for experts, which holds {max(n_slots, 0)} of"
                f" {self.n_records}; at least {least} must be in memory at once: give {least * slot_bytes}B"
                f" ({size_text(least * slot_bytes)}) or more, or a smaller expert_dtype"
            )
        return int(n_slots)


class HostSlots:
    """Memory for so many records, page aligned and never moved. Slots can be added, and any of them given back."""

    def __init__(self, n_slots: int, slot_bytes: int, *, pinned: bool) -> None:
        self.slot_bytes, self._pinned = slot_bytes, pinned
        self._views: list[ByteArray] = []
        self._addresses: list[int] = []
        self._gone: list[int] = []
        self.add(n_slots)

    @property
    def n_slots(self) -> int:
        """Slots that there are."""
        return len(self._views) - len(self._gone)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.n_slots * self.slot_bytes

    @property
    def is_locked(self) -> bool:
        """Whether all of them are page-locked."""
        return all(is_locked(view) for view in self._views[:1])

    def view(self, slot: int) -> ByteArray:
        """uint8 [slot_bytes] of a slot."""
        return self._views[slot]

    def address(self, slot: int) -> int:
        """Where a slot begins in memory."""
        return self._addresses[slot]

    def add(self, n_slots: int) -> list[int]:
        """So many more slots; gives their numbers, first of those that were given back. Raises BudgetError where the
        system has no memory for them; there are then as many as before."""
        missing = n_slots - len(self._gone)
        if missing > 0:
            memory = host_bytes(missing * self.slot_bytes, self._pinned)
            self._gone += range(len(self._views), len(self._views) + missing)
            for start in range(0, memory.nbytes, self.slot_bytes):
                self._views.append(memory[start : start + self.slot_bytes])
                self._addresses.append(memory.ctypes.data + start)
        added, self._gone = self._gone[:n_slots], self._gone[n_slots:]
        return added

    def give_back(self, slots: Iterable[int]) -> None:
        """These slots, which hold nothing that is needed, are no more: their memory is the system's."""
        for slot in slots:
            _give_back(self._views[slot])
            self._gone.append(slot)


def _give_back(view: ByteArray) -> None:
    """Returns the pages of a slot to the system, which gives new ones when it is written to again."""
    memory: Any = view
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    owner = memory.base.obj if isinstance(memory.base, memoryview) else memory.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED, view.ctypes.data - memory.ctypes.data, view.nbytes)
