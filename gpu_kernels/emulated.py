"""An accelerator made of host threads: the same asynchrony, order rules and hazards, no device needed.

Records live in an arena of their own. While a copy is in flight its slot is filled with 0xFF bytes, which read as
NaN in every float32, bfloat16 and float16 (so also in the scales of int8 and int4 records): a computation that does
not wait for its transfer gives NaN, not a plausible number. Experts are computed by the CPU kernels, so results do
not depend on where an expert ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns

import numpy as np
import torch

from cpu_kernels import CpuBackend, ExpertSpec, get_backend
from gpu_kernels.accelerator import ByteArray, LayerWork, Unfold
from gpu_kernels.combining import combine_on_host
from gpu_kernels.errors import ClosedError, SlotError
from gpu_kernels.pacing import Pacing
from gpu_kernels.slot_events import SlotEvents
from gpu_kernels.streams import HostEvent, HostStream, Pacer, clock_us
from gpu_kernels.waiting import LEAST_HOST_WAIT_S, WaitLimit

POISON_BYTE = 0xFF
ALIGNMENT_BYTES = 64


class EmulatedAccelerator:
    """Slots in host memory, one thread per lane. `pacing` slows link and compute down to a device's rates."""

    kind = "emulated"
    device = torch.device("cpu")

    def __init__(self, backend: CpuBackend | None = None, pacing: Pacing | None = None, *, poison: bool = True) -> None:
        self.name = "emulated accelerator" if pacing is None else "emulated accelerator (paced)"
        self._backend = backend if backend is not None else get_backend("auto", threads=1)
        self._fallback = get_backend("torch", threads=1)
        self._backend_of: dict[int, tuple[CpuBackend, ExpertSpec]] = {}
        """By the id of the spec, which is kept beside it: hashing one for each piece of work takes longer."""
        self._pacing = pacing
        self._poison = poison
        self.wait_limit = limit = WaitLimit(self.name, LEAST_HOST_WAIT_S)
        self._copy = HostStream("hybrimoe-copy", precise_sleep=pacing is not None, limit=limit)
        self._compute = HostStream("hybrimoe-compute", precise_sleep=pacing is not None, limit=limit)
        self._copy_pacer, self._compute_pacer = Pacer(), Pacer()
        self._host_copy_us = 0.0
        self._closed = False
        self._slot_bytes = 0
        self._set_arena(0, 0)

    @property
    def n_slots(self) -> int:
        """Slots allocated now."""
        return len(self._arena)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self._slot_bytes

    def allocate(self, n_slots: int, slot_bytes: int) -> None:
        """Replaces the slot memory; contents are lost. Raises SlotError for negative sizes, ClosedError after close."""
        if n_slots < 0 or slot_bytes < 0:
            raise SlotError(f"cannot allocate {n_slots} slots of {slot_bytes} bytes; both must be 0 or more")
        self._check_open()
        self.synchronize()
        self._set_arena(n_slots, slot_bytes)

    def free_bytes(self) -> int | None:
        """None: slots take host memory, which this class does not limit."""
        return None

    def needs_pinned_host(self) -> bool:
        """False: copies are made by a host thread."""
        return False

    def copy_to_slot(self, slot: int, record: ByteArray, unfold: Unfold | None = None) -> HostEvent:
        """Submits the copy of `record` (uint8 [n], n <= slot_bytes) into a slot, through `unfold` if given.

        A slot that is unfolded into is not poisoned: `unfold` may need what it holds.
        """
        if self._closed:
            self._check_open()
        if record.nbytes > self._slot_bytes:
            raise SlotError(f"a record of {record.nbytes} bytes does not fit a slot of {self._slot_bytes} bytes")
        event = HostEvent()
        event.limit, event.label = self.wait_limit, f"copy into slot {slot}"
        reader = self._events.on_write(slot, event)
        target, submitted_us = self._arena[slot], perf_counter_ns() * 1e-3

        def job(event: HostEvent) -> None:
            if reader is not None:
                reader.wait(also_failed=True)
            event.begin()
            ready_us = submitted_us if reader is None else max(submitted_us, reader.span_us[1])
            self._transfer(target, record, event, ready_us, unfold)

        self._copy.put((job, event))
        return event

    def read_slot(self, slot: int, n_bytes: int) -> ByteArray:
        """The first bytes of a slot, a copy of them."""
        self._events.write_of(slot).wait()
        found: ByteArray = self._arena[slot][:n_bytes].copy()
        return found

    def run_experts(
        self, spec: ExpertSpec, slots: Sequence[int], positions: Sequence[int], work: LayerWork
    ) -> HostEvent:
        """Submits experts in order; their rows are written into `work.host_rows`."""
        if self._closed:
            self._check_open()
        event = HostEvent()
        event.limit, event.label = self.wait_limit, "experts on the emulated accelerator"
        writes = []
        for write in self._events.on_read(slots, event):
            if not write.succeeded:
                writes.append(write)
        known = self._backend_of.get(id(spec))
        if known is None:
            supported = self._backend.supports(spec) is None
            known = self._backend_of[id(spec)] = self._backend if supported else self._fallback, spec
        backend = known[0]
        addresses, submitted_us = self._addresses, perf_counter_ns() * 1e-3

        def job(event: HostEvent) -> None:
            records, where = addresses[list(slots)], np.array(positions, dtype=np.int32)
            for write in writes:
                write.wait()
            event.begin()
            backend.run(spec, records, where, work.dispatch, work.host_hidden, work.host_rows)
            if self._pacing is not None:
                ready_us = max([submitted_us, *(write.span_us[1] for write in writes)])
                self._pace_compute(spec, where, work, event, ready_us)

        self._compute.put((job, event))
        return event

    combine = staticmethod(combine_on_host)
    """[T, H] float32, or like `work.like`: waits for the events, then adds each token's rows in top-k order."""

    def sibling(self) -> EmulatedAccelerator:
        """A second, empty arena behind the same streams and pacers."""
        self._check_open()
        other = EmulatedAccelerator.__new__(EmulatedAccelerator)
        other.__dict__.update(self.__dict__)
        other._set_arena(0, 0)
        return other

    def synchronize(self) -> None:
        """Blocks until both lanes are empty."""
        self._compute.drain()
        self._copy.drain()
        self._compute.drain()

    def close(self) -> None:
        """Drains and stops the lanes, frees the arena; safe to call twice."""
        self._closed = True
        self._copy.close()
        self._compute.close()
        self._set_arena(0, 0)

    def _transfer(
        self, target: ByteArray, record: ByteArray, event: HostEvent, ready_us: float, unfold: Unfold | None
    ) -> None:
        if self._poison and unfold is None:
            target.fill(POISON_BYTE)
        if self._pacing is not None:
            link_us = self._pacing.transfer_us(record.nbytes)
            self._copy_pacer.pace(event, ready_us, link_us, self._host_copy_us)
        began_us = clock_us()
        if unfold is None:
            np.copyto(target[: record.nbytes], record)
        else:
            unfold(torch.from_numpy(record), torch.from_numpy(target))
        self._host_copy_us = 0.5 * (self._host_copy_us + clock_us() - began_us)

    def _pace_compute(
        self, spec: ExpertSpec, where: np.ndarray, work: LayerWork, event: HostEvent, ready_us: float
    ) -> None:
        assert self._pacing is not None
        counts = np.diff(work.dispatch.offsets)[where]
        device_us = sum(self._pacing.expert_us(spec, int(n)) for n in counts)
        self._compute_pacer.pace(event, ready_us, device_us)

    def _set_arena(self, n_slots: int, slot_bytes: int) -> None:
        stride = -(-slot_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        raw = np.empty(n_slots * stride + ALIGNMENT_BYTES, dtype=np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT_BYTES
        self._arena = raw[offset : offset + n_slots * stride].reshape(n_slots, stride)[:, :slot_bytes]
        self._addresses = raw.ctypes.data + offset + np.arange(n_slots, dtype=np.uint64) * np.uint64(stride)
        self._slot_bytes = slot_bytes
        self._events: SlotEvents[HostEvent] = SlotEvents(n_slots)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the accelerator is closed; open a new one")
