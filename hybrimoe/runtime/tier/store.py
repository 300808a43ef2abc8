"""TieredStore: the experts of a packed file of which host memory holds some, as an ExpertStore."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import monotonic

import numpy as np
import numpy.typing as npt

from cpu_kernels import ExpertWeights, unpack_expert
from hybrimoe.amounts import Amount, size_text
from hybrimoe.errors import BudgetError, ModelError
from hybrimoe.machine.disks import calibrated_disk
from hybrimoe.machine.memory import available_bytes
from hybrimoe.runtime.store import ByteArray, ExpertStore, LayerSpec
from hybrimoe.runtime.tier.cache import HostCache
from hybrimoe.runtime.tier.reader import LEAST_IN_FLIGHT, READS_IN_FLIGHT, RecordReader
from hybrimoe.runtime.tier.slots import RecordPlaces
from hybrimoe.runtime.tier.usage import UsageFile

SAVE_EVERY_S = 60.0
"""From one save of the usage to the next while the session runs: what a killed process loses at most."""


class TieredStore(ExpertStore):
    """`cache` holds the experts that are in memory; `record`, `hold` and `addresses` are its own.

    path, offset_bytes: the packed file and where its records begin. budget_bytes: what the memory of experts never
    exceeds. usage_folders: where the usage is kept. Raises BudgetError for a budget that is too small, CheckpointError
    where the file cannot be opened, ProfileError where this machine's calibration is damaged.
    """

    in_memory = False

    def __init__(
        self, layers: Sequence[LayerSpec], path: Path, offset_bytes: int, budget_bytes: int, *,
        usage_folders: Sequence[Path] = (), pinned: bool = False,
    ) -> None:  # fmt: skip
        places = RecordPlaces.of(path, layers, offset_bytes)
        n_slots = places.slots_for(budget_bytes)
        self.cache = HostCache(places, RecordReader(path, n_threads=_reads_in_flight(path)), n_slots, pinned=pinned)
        self._layers, self.complete = places.layers, True
        self.released_bytes, self._released = 0, set()
        self._finalizer = weakref.finalize(self, self.cache.reader.close)  # of a store that nobody closes
        self._usage = UsageFile(path, usage_folders, self.cache.uses.shape)
        self._saved_at, self._saving, self._closed = monotonic(), threading.Lock(), False
        if self._usage.earlier is not None:
            self.cache.preheat(self._usage.earlier)

    @property
    def earlier_uses(self) -> npt.NDArray[np.float64] | None:
        """float64 [layers, experts]: uses in earlier runs; None where they are not known."""
        return self._usage.earlier

    @property
    def is_locked(self) -> bool:
        return self.cache.slots.is_locked

    def record(self, layer: int, expert: int) -> ByteArray:
        return self.cache.record(layer, expert)

    def addresses(self, layer: int) -> npt.NDArray[np.uint64]:
        """uint64 [num_experts]: where each record of a layer starts now, 0 where it is not in memory."""
        return self.cache.addresses[layer]

    def hold(self, layer: int, experts: Iterable[int]) -> npt.NDArray[np.uint64]:
        return self.cache.hold(layer, experts)

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """The weights of one expert, dequantised, read from the file beside the cache. Raises CheckpointError."""
        places = self.cache.places
        record = self.cache.reader.now(*places.record(layer, expert), places.name(layer, expert))
        return unpack_expert(self._layers[layer].spec, record)

    def write(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Raises ModelError: the file is not written to."""
        raise ModelError("experts that are read from a packed file cannot be written")

    def drop(self, gone: npt.NDArray[np.bool_]) -> None:
        """Raises ModelError: only a store that is wholly in memory gives records up."""
        raise ModelError("experts that are read from a packed file cannot be given up")

    @property
    def buffer(self) -> ByteArray:
        """Raises ModelError: there is no memory with all records."""
        raise ModelError("experts that are read from a packed file are not in memory together")

    @property
    def nbytes(self) -> int:
        """Bytes of the records that host memory has room for."""
        return self.cache.slots.nbytes

    def slots_for(self, budget: Amount) -> int:
        """How many records a budget has room for. Raises BudgetError for too small a one, and for more memory than is
        available."""
        cache = self.cache
        places, slot_bytes = cache.places, cache.slots.slot_bytes
        n_bytes = int(budget.value)
        if budget.kind != "bytes":
            n_bytes = slot_bytes * budget.to_experts(places.n_records, slot_bytes, auto=cache.slots.n_slots)
        n_slots = places.slots_for(n_bytes)
        missing, available = (n_slots - cache.slots.n_slots) * slot_bytes, available_bytes()
        if missing > available:
            raise BudgetError(
                f"{n_slots} experts need {size_text(missing)} more host memory, {size_text(available)} are available"
            )
        return n_slots

    def resize(self, n_slots: int) -> int:
        """Room for another number of records, in place; gives that number back. Raises BudgetError where the system
        has no memory for more, and leaves it as it is."""
        self.cache.resize(n_slots)
        return n_slots

    @property
    def failed_reads(self) -> str | None:
        cache = self.cache
        if not cache.failed:
            return None
        return f"{cache.failed} reads of experts have failed since the start, the latest: {cache.latest_failure}"

    def expect_again(self, again: bool) -> None:
        self.cache.is_called_again = again

    def begin_step(self, *, new_sequence: bool) -> None:
        """A step begins: now and then the usage is saved, beside it."""
        if new_sequence:
            self.cache.begin_sequence()
        now = monotonic()
        if now - self._saved_at >= SAVE_EVERY_S:
            self._saved_at = now
            threading.Thread(target=self._save, args=(self.cache.uses.copy(),), daemon=True).start()

    def close(self) -> None:
        """Ends the reads and saves the usage. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.cache.close()
        self._save(self.cache.uses)

    def _save(self, uses: npt.NDArray[np.float64]) -> None:
        with self._saving:
            self._usage.save(uses)


def _reads_in_flight(path: Path) -> int:
    """As many as saturate the disk, where `hybrimoe calibrate` has measured it."""
    disk = calibrated_disk(path)
    if disk is None or not disk.reads_in_flight:
        return READS_IN_FLIGHT
    return max(LEAST_IN_FLIGHT, int(disk.reads_in_flight))
