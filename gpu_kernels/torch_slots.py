"""Slots in the memory of a torch device: copies into them on a stream of their own, and the order rules that hold them
apart from what reads the slots.

Host records that are page-locked are copied asynchronously; others go through a ring of page-locked staging buffers. On
device "cpu" the same code runs synchronously (for tests).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from cpu_kernels.format.pack import record_tensor
from gpu_kernels.accelerator import ByteArray, Event, Unfold
from gpu_kernels.devices import indexed, memory_info
from gpu_kernels.driver.functions import Driver
from gpu_kernels.driver.queue import Queue
from gpu_kernels.driver.queued import QueuedCopy
from gpu_kernels.errors import ClosedError, LostError, SlotError
from gpu_kernels.slot_events import SlotEvents
from gpu_kernels.streams import clock_us
from gpu_kernels.torch_events import DeviceEvent, DoneEvent, TimeOrigin, on_stream
from gpu_kernels.waiting import new_limit, wait_for_stream

STAGING_BUFFERS = 4
"""Page-locked records under way at once when the host's records are not page-locked."""
ALIGNMENT_BYTES = 256
LANDED = DoneEvent(0.0, 0.0)
"""A copy whose end compiled code has seen."""


class TorchSlots:
    """The slots of one torch device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = indexed(device)
        self.kind = self.device.type
        self._synchronous = self.kind == "cpu"
        self.name = "torch on the host" if self._synchronous else f"{_device_name(self.device)} ({self.device})"
        self.wait_limit = new_limit(self.device, self.name)
        self._copy_stream = None if self._synchronous else torch.Stream(self.device)
        self._origin = None if self._synchronous else TimeOrigin(self.device)
        self._staging: list[tuple[torch.Tensor, Event | None]] = []
        self._next_staging = 0
        self._closed = False
        self._read_by: torch.Stream | None = None
        """What has read slots since the last copy, which the next one waits for."""
        self._set_slots(0, 0)

    @property
    def n_slots(self) -> int:
        """Slots allocated now."""
        return len(self._slots)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self._slot_bytes

    @property
    def staging_bytes(self) -> int:
        """Page-locked host memory of the buffers through which records go that are not page-locked themselves."""
        return sum(buffer.nbytes for buffer, _ in self._staging)

    def allocate(self, n_slots: int, slot_bytes: int) -> None:
        """Replaces the slot memory; contents are lost. Raises SlotError where the device has not enough memory: the
        slots are then as many and as large as before, and keep what they hold if that could be seen beforehand."""
        if n_slots < 0 or slot_bytes < 0:
            raise SlotError(f"cannot allocate {n_slots} slots of {slot_bytes} bytes; both must be 0 or more")
        self._check_open()
        before = self.n_slots, self._slot_bytes
        free_bytes = self.free_bytes()
        too_large = f"{n_slots} slots of {slot_bytes / 2**20:.1f} MiB do not fit {self.name}: ask for fewer"
        if free_bytes is not None and n_slots * _stride(slot_bytes) > free_bytes:
            raise SlotError(f"{too_large} ({free_bytes / 2**20:.0f} MiB are free)")
        self.synchronize()
        self._set_slots(0, 0)
        try:
            self._set_slots(n_slots, slot_bytes)
        except torch.OutOfMemoryError as error:
            self._set_slots(*before)
            raise SlotError(too_large) from error

    def free_bytes(self) -> int | None:
        """Free device memory plus what the slots take now; None on the host."""
        if self._synchronous:
            return None
        free, _ = memory_info(self.device)
        return free + self._slots.numel()

    def needs_pinned_host(self) -> bool:
        """True on a real device."""
        return not self._synchronous

    def copy_to_slot(self, slot: int, record: ByteArray, unfold: Unfold | None = None) -> Event:
        """Submits the copy of `record` (uint8 [n], n <= slot_bytes) into a slot, on the copy stream."""
        self._check_open()
        if record.nbytes > self._slot_bytes:
            raise SlotError(f"a record of {record.nbytes} bytes does not fit a slot of {self._slot_bytes} bytes")
        source = record_tensor(record.nbytes, record)
        if self._synchronous:
            start_us = clock_us()
            self._events.on_write(slot, DoneEvent(start_us, start_us))
            _put(source, self._slots[slot], unfold)
            done = DoneEvent(start_us, clock_us())
            self._events.on_write(slot, done)
            return done
        index = None if source.is_pinned() else self._stage(source)
        event = self._copy_async(slot, source if index is None else self._staging[index][0][: record.nbytes], unfold)
        if index is not None:
            self._staging[index] = (self._staging[index][0], event)
        return event

    def read_slot(self, slot: int, n_bytes: int) -> ByteArray:
        """The first bytes of a slot on the host, which waits for its copy and for the current stream."""
        self._events.write_of(slot).wait()
        wait_for_stream(self.device, "the work before a slot is read back")
        found: ByteArray = self._slots[slot, :n_bytes].to("cpu", copy=True).numpy()
        return found

    def mark(self) -> Event:
        """The end of all that the current stream was given."""
        if self._synchronous:
            return LANDED
        stream, event = torch.accelerator.current_stream(self.device), self._device_event()
        event.start.record(stream)
        event.end.record(stream)
        return event

    def stage(self, first_slot: int, runs: Sequence[tuple[int, ByteArray]], after: Event) -> Event:
        """Submits copies of records into slots from `first_slot` on: uint8 [n, bytes] of the host, page-locked, each so
        many slots behind the first. They wait for `after`, and for nothing else that reads the slots."""
        self._check_open()
        start_us = clock_us()
        done: DeviceEvent | DoneEvent = DoneEvent(start_us, start_us) if self._synchronous else self._device_event()
        for at, records in runs:
            for slot in range(first_slot + at, first_slot + at + len(records)):
                self._events.on_write(slot, done)
        if not isinstance(done, DeviceEvent):
            self._put_runs(first_slot, runs)
            return DoneEvent(start_us, clock_us())
        stream = self._copy_stream
        assert stream is not None
        with on_stream(stream):
            if isinstance(after, DeviceEvent):
                stream.wait_event(after.end)
            done.start.record(stream)
            self._put_runs(first_slot, runs)
            done.end.record(stream)
        return done

    def driver_queue(self, driver: Driver) -> Queue:
        """What compiled code submits copies and launches by, to the slots as they are now. Raises DriverError."""
        copies = 0 if self._copy_stream is None else driver.stream(self._copy_stream)
        with self.current():
            return Queue(driver, copies, self._slots.data_ptr(), _stride(self._slot_bytes))

    def hand_to(self, queue: Queue) -> None:
        """From here on compiled code submits, on the current stream and that of copies, behind all that was; before its
        first copy it has seen the end of all that was launched on the former."""
        if self._copy_stream is None:
            return  # a host does all at once
        stream = torch.accelerator.current_stream(self.device)
        for reader in self._events.take_reads():
            if isinstance(reader, DeviceEvent):
                self._copy_stream.wait_event(reader.end)
        if self._read_by is not None and self._read_by != stream:
            self._copy_stream.wait_stream(self._read_by)
        queue.begin(queue.driver.stream(stream))

    def take_from(self, queue: Queue, under_way: Mapping[int, QueuedCopy]) -> None:
        """Compiled code has ended; under_way: the copies by slot that it left so."""
        for slot in queue.take_written():
            self._events.on_write(slot, under_way.get(slot, LANDED))
        if self._copy_stream is not None:
            self._read_by = torch.accelerator.current_stream(self.device)

    def queued_copy(self, queue: Queue, number: int) -> QueuedCopy:
        """A copy that the queue has under way, `number` places behind the oldest."""
        return QueuedCopy(queue, number, self.device, self._copy_stream)

    def current(self) -> AbstractContextManager[object]:
        """Makes this device torch's current one: Triton and the driver launch on that one's stream, wherever tensors
        are."""
        if self._synchronous:
            return contextlib.nullcontext()
        return torch.accelerator.device_index(self.device.index)

    def synchronize(self) -> None:
        """Blocks until the device is idle. Raises LostError where the device itself has failed, or hangs."""
        if self._synchronous:
            return
        limit = self.wait_limit
        limit.require()
        assert self._copy_stream is not None
        for stream in (self._copy_stream, torch.accelerator.current_stream(self.device)):
            limit.wait(stream, "all work of a stream")
        try:
            torch.accelerator.synchronize(self.device)
        except RuntimeError as error:
            raise limit.failed(error) from error

    def close(self) -> None:
        """Drains the device and frees slots and staging; safe to call twice."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(LostError):  # whoever waited for the failed work was told of it
                self.synchronize()
            if self.wait_limit.lost is None:  # what hangs may still use its slots
                self._set_slots(0, 0)

    def _copy_async(self, slot: int, source: torch.Tensor, unfold: Unfold | None) -> DeviceEvent:
        stream = self._copy_stream
        assert stream is not None
        event = self._device_event()
        reader = self._events.on_write(slot, event)
        with on_stream(stream):
            if isinstance(reader, DeviceEvent):
                stream.wait_event(reader.end)
            if self._read_by is not None:
                stream.wait_stream(self._read_by)
                self._read_by = None  # later copies are behind this one
            event.start.record(stream)
            _put(source, self._slots[slot], unfold)
            event.end.record(stream)
        return event

    def _stage(self, source: torch.Tensor) -> int:
        """Copies a pageable record into the next page-locked buffer, once that one's last copy has ended."""
        if not self._staging:
            for _ in range(STAGING_BUFFERS):
                self._staging.append((torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=True), None))
        index = self._next_staging
        self._next_staging = (index + 1) % STAGING_BUFFERS
        buffer, event = self._staging[index]
        if event is not None:
            event.wait()
        buffer[: source.numel()].copy_(source)
        return index

    def _put_runs(self, first_slot: int, runs: Sequence[tuple[int, ByteArray]]) -> None:
        for at, records in runs:
            n, n_bytes = records.shape
            target = self._slots[first_slot + at : first_slot + at + n, :n_bytes]
            target.copy_(torch.from_numpy(records), non_blocking=True)

    def _device_event(self) -> DeviceEvent:
        assert self._origin is not None
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        return DeviceEvent(self._origin, start, end)

    def _set_slots(self, n_slots: int, slot_bytes: int) -> None:
        self._slots = torch.empty((n_slots, _stride(slot_bytes)), dtype=torch.uint8, device=self.device)
        self._slot_bytes = slot_bytes
        self._staging = []
        self._events: SlotEvents[DeviceEvent | DoneEvent] = SlotEvents(n_slots)
        self._read_by = None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the accelerator is closed; open a new one")


def _device_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _stride(slot_bytes: int) -> int:
    """Bytes from one slot to the next."""
    return -(-slot_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _put(source: torch.Tensor, slot: torch.Tensor, unfold: Unfold | None) -> None:
    """Host bytes into a slot, on the current stream; what `unfold` reads is a copy of them on the device."""
    if unfold is None:
        slot[: source.numel()].copy_(source, non_blocking=True)
    else:
        unfold(source.to(slot.device, non_blocking=True), slot)
