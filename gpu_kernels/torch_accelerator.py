"""Any torch.accelerator device (CUDA, ROCm, XPU): slots in device memory, a copy stream beside the compute stream.

The compute lane is the stream that is current when experts are submitted, so results are ordered with the model's
own work and the host never waits for an expert. Host records that are page-locked are copied asynchronously; others
go through a ring of page-locked staging buffers. On device "cpu" the same code runs synchronously (for tests).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import ExpertSpec, reference_ffn, unpack_expert
from cpu_kernels.format.pack import record_tensor
from gpu_kernels.accelerator import ByteArray, Event, LayerWork, Unfold
from gpu_kernels.devices import indexed, memory_info
from gpu_kernels.driver.functions import Driver
from gpu_kernels.driver.queue import Queue
from gpu_kernels.driver.queued import QueuedCopy
from gpu_kernels.errors import ClosedError, LostError, SlotError
from gpu_kernels.exchange import Exchange
from gpu_kernels.fused_choice import Group, RowsOfCall, load_fused
from gpu_kernels.resident import PromptWork, expected_tokens, run_resident, run_resident_prompt
from gpu_kernels.slot_events import SlotEvents
from gpu_kernels.streams import clock_us
from gpu_kernels.torch_events import DeviceEvent, DoneEvent, TimeOrigin, on_stream
from gpu_kernels.uploads import Array, Uploads
from gpu_kernels.waiting import new_limit, wait_for_stream

STAGING_BUFFERS = 4
"""Page-locked records under way at once when the host's records are not page-locked."""
ALIGNMENT_BYTES = 256
LANDED = DoneEvent(0.0, 0.0)
"""A copy whose end compiled code has seen."""


SMALL_BYTES = 64 << 10
"""Hidden states up to this size cross the link once more, in float32 beside the routing: that takes less than a launch
that converts those which are on the device."""


@dataclass(slots=True)
class DeviceRows:
    """One call's tensors on the device: hidden float32 [T, H], routing weights float32 [T * top_k], and result rows
    float32 [T * top_k, H], 0 where there is no expert. `row_ids` int64: those with one, expert by expert, once they
    were asked for. `whole`: the group of all experts `LayerWork.in_turn`."""

    hidden: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    row_ids: torch.Tensor | None = None
    whole: Group | None = None


class TorchAccelerator:
    """Slots and lanes of one torch device. `fused`: use the Triton kernels, by default where they are installed and the
    device is not the host."""

    def __init__(self, device: torch.device | str, *, fused: bool | None = None) -> None:
        self.device = indexed(device)
        self.kind = self.device.type
        self._synchronous = self.kind == "cpu"
        self.name = "torch on the host" if self._synchronous else f"{_device_name(self.device)} ({self.device})"
        self.wait_limit = new_limit(self.device, self.name)
        self._copy_stream = None if self._synchronous else torch.Stream(self.device)
        self._origin = None if self._synchronous else TimeOrigin(self.device)
        self._staging: list[tuple[torch.Tensor, Event | None]] = []
        self._next_staging = 0
        self._uploads = Uploads(self.device)
        self._fused = load_fused() if (not self._synchronous if fused is None else fused) else None
        self._closed = False
        self._read_by: torch.Stream | None = None
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

    def run_experts(self, spec: ExpertSpec, slots: Sequence[int], positions: Sequence[int], work: LayerWork) -> Event:
        """Submits experts in order on the current stream; rows go to the call's rows on the device."""
        self._check_open()
        places = [int(position) for position in positions]
        state, group = self._send(spec, slots, places, work)  # before the stream waits for any copy
        start_us = clock_us()
        end = DoneEvent(start_us, start_us) if self._synchronous else self._device_event()
        writes = self._events.on_read(slots, end)
        if not isinstance(end, DeviceEvent):
            with torch.no_grad():
                self._compute(spec, slots, places, work, state, group)
            return DoneEvent(start_us, clock_us())
        stream = torch.accelerator.current_stream(self.device)
        for write in writes:
            if isinstance(write, DeviceEvent) and not write.ended:
                stream.wait_event(write.end)
        with torch.no_grad(), self.current():
            end.start.record(stream)
            self._compute(spec, slots, places, work, state, group)
            end.end.record(stream)
        return end

    def combine(self, work: LayerWork, events: Sequence[Event]) -> torch.Tensor:
        """[T, H] on the device, float32 or in the dtype of `work.like`: rows of the CPU lane are uploaded, then each
        token's rows are added in top-k order."""
        state, _ = self._enter(work)
        dtype = torch.float32 if work.like is None else work.like.dtype
        rows = _rows_of(work, [int(position) for position in work.host_positions])
        with torch.no_grad(), self.current():
            if self._fused is None or work.transform is not None:
                return self._combine_by_torch(work, state, rows).to(dtype)
            host_rows = source = None
            if rows.size:
                host_rows, source = self._host_rows(work, state, rows)
            given = RowsOfCall(state.rows, host_rows, source, work.dispatch.top_k, dtype)
            return self._fused.combine(given, lambda: self._combine_by_torch(work, state, rows).to(dtype))

    def _host_rows(
        self, work: LayerWork, state: DeviceRows, rows: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `FusedChoice.combine` takes of the CPU lane's rows: page-locked ones where they are."""
        places = np.full(len(state.rows), -1, np.int32)
        held = torch.from_numpy(work.host_rows)
        if held.is_pinned():
            places[rows] = rows
            return held, self._uploads.send(places)[0]
        places[rows] = np.arange(rows.size, dtype=np.int32)
        sent, source = self._uploads.send(work.host_rows[rows], places)
        return sent, source

    def _combine_by_torch(self, work: LayerWork, state: DeviceRows, host_rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The sum float32 [T, H]. `host_rows`: the CPU lane's rows, which are filled in first."""
        if host_rows.size:
            row_ids, values = self._uploads.send(host_rows, work.host_rows[host_rows])
            state.rows[row_ids] = values
        if work.transform is not None:
            assert work.weights is not None
            filled = self._row_ids(work, state)
            state.rows[filled] = work.transform(state.rows[filled]).float()
            state.rows *= self._uploads.send(work.weights)[0].unsqueeze(1)
        by_token = state.rows.view(work.dispatch.n_tokens, work.dispatch.top_k, -1)
        out = by_token[:, 0].clone()
        for j in range(1, work.dispatch.top_k):
            out += by_token[:, j]
        return out

    def run_resident(
        self, spec: ExpertSpec, slot_of: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """A layer's output [T, H] where each expert has a slot, on the current stream and without the host; see
        `gpu_kernels.resident.run_resident`. The slots' copies must have ended, and none may follow."""
        with torch.no_grad(), self.current():
            return run_resident(spec, self._slots, slot_of, hidden, ids, weights, self._fused)

    def run_resident_prompt(
        self, spec: ExpertSpec, slot_of: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Event] | None:
        """`run_resident` for many tokens, with its end; see `gpu_kernels.resident.run_resident_prompt`."""
        start_us = clock_us()
        end = None if self._synchronous else self._device_event()
        with torch.no_grad(), self.current():
            stream = None if end is None else torch.accelerator.current_stream(self.device)
            if end is not None:
                end.start.record(stream)
            found = run_resident_prompt(spec, self._slots, slot_of, hidden, ids, weights, self._fused)
            if end is not None:
                end.end.record(stream)
        return None if found is None else (*found, end or DoneEvent(start_us, clock_us()))

    def can_run_prompt(self, spec: ExpertSpec, shape: torch.Size, n_experts: int) -> bool:
        """Whether the kernel for ids of a shape [T, k] was found right before, so that `prompt_work` may be called."""
        return self._fused is not None and self._fused.is_right(spec, expected_tokens(shape, n_experts))

    def prompt_work(
        self, spec: ExpertSpec, n_experts: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[PromptWork, torch.Tensor]:
        """The rows of a call of many tokens sorted by experts, and `PromptWork.scores`, on the current stream;
        `run_part` and `prompt_output` follow."""
        with torch.no_grad(), self.current():
            work = PromptWork.of(spec, n_experts, hidden, ids, weights)
            return work, work.scores(n_experts, ids)

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

    def _put_runs(self, first_slot: int, runs: Sequence[tuple[int, ByteArray]]) -> None:
        for at, records in runs:
            n, n_bytes = records.shape
            target = self._slots[first_slot + at : first_slot + at + n, :n_bytes]
            target.copy_(torch.from_numpy(records), non_blocking=True)

    def run_part(self, work: PromptWork, begin: int, slot_of: Array, filled: Sequence[Event]) -> Event:
        """Submits the experts from `begin` on, each from its slot (int32 [n]), behind the copies `filled`; its end."""
        start_us = clock_us()
        assert self._fused is not None
        with torch.no_grad(), self.current():
            (places,) = self._uploads.send(slot_of)
            if self._synchronous:
                work.run(self._slots, places, begin, begin + len(slot_of), self._fused)
                return DoneEvent(start_us, clock_us())
            stream, end = torch.accelerator.current_stream(self.device), self._device_event()
            for write in filled:
                if isinstance(write, DeviceEvent) and not write.ended:
                    stream.wait_event(write.end)
            end.start.record(stream)
            work.run(self._slots, places, begin, begin + len(slot_of), self._fused)
            end.end.record(stream)
            self._read_by = stream
            return end

    def prompt_output(self, work: PromptWork) -> torch.Tensor:
        """`PromptWork.output` on the current stream."""
        assert self._fused is not None
        with torch.no_grad(), self.current():
            return work.output(self._fused)

    def tune(self, spec: ExpertSpec, seconds: float) -> bool:
        """Chooses how the fused kernels are cut for such experts, in so many seconds at most; see `FusedChoice.tune`.
        Reads slots, whatever they hold."""
        if self._fused is None or not self.n_slots or spec.record_bytes > self._slot_bytes:
            return False
        with torch.no_grad(), self.current():
            return self._fused.tune(spec, self._slots, seconds)

    def exchange(
        self, n_tokens: int, top_k: int, width: int, dtype: torch.dtype, weights_dtype: torch.dtype
    ) -> Exchange:
        """Memory of the host and of this device for calls of one shape. Raises GraphError where there is none."""
        return Exchange(self.device, n_tokens, top_k, width, dtype, weights_dtype)

    def compute_exchanged(
        self, spec: ExpertSpec, exchange: Exchange, hidden: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """`Exchange.compute` from this accelerator's slots, on the current stream: to be recorded for `launch`."""
        with torch.no_grad(), self.current():
            exchange.compute(spec, self._slots, hidden, weights, self._fused)

    def combine_exchanged(self, exchange: Exchange) -> torch.Tensor:
        """`Exchange.combine` on the current stream."""
        with torch.no_grad(), self.current():
            return exchange.combine(self._fused)

    def launch(self, replay: Callable[[], None], awaited: Sequence[int], *, timed: bool = False) -> Event | None:
        """Launches recorded work that reads slots, on the current stream: after the last copies into the `awaited` of
        them, and before every copy that is submitted later. What the host knows to have ended need not be awaited.

        Returns the end of the work if it is `timed`.
        """
        if self._synchronous:
            start_us = clock_us() if timed else 0.0
            replay()
            return DoneEvent(start_us, clock_us()) if timed else None
        stream = torch.accelerator.current_stream(self.device)
        self._read_by = stream
        for slot in awaited:
            write = self._events.write_of(slot)
            if isinstance(write, DeviceEvent) and not write.ended:
                stream.wait_event(write.end)
        if not timed:
            replay()
            return None
        event = self._device_event()
        event.start.record(stream)
        replay()
        event.end.record(stream)
        return event

    def current(self) -> AbstractContextManager[object]:
        """Makes this device torch's current one: Triton and the driver launch on that one's stream, wherever tensors
        are."""
        if self._synchronous:
            return contextlib.nullcontext()
        return torch.accelerator.device_index(self.device.index)

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

    def sibling(self) -> TorchAccelerator:
        """A second, empty slot memory behind the same streams; staging buffers are its own."""
        self._check_open()
        other = TorchAccelerator.__new__(TorchAccelerator)
        other.__dict__.update(self.__dict__)
        other._next_staging = 0
        other._set_slots(0, 0)
        return other

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

    def _compute(
        self, spec: ExpertSpec, slots: Sequence[int], positions: list[int], work: LayerWork, state: DeviceRows,
        group: Group | None,
    ) -> None:  # fmt: skip
        """Rows of a group: by the fused kernels where there is one for them, else dequantised, expert by expert."""

        def by_torch() -> None:
            for slot, position in zip(slots, positions, strict=True):
                self._run_expert(spec, slot, position, work, state)

        if self._fused is not None and group is not None:
            self._fused.run(spec, self._slots, group, by_torch)
        else:
            by_torch()

    def _run_expert(self, spec: ExpertSpec, slot: int, position: int, work: LayerWork, state: DeviceRows) -> None:
        offsets = work.dispatch.offsets
        rows = self._row_ids(work, state)[int(offsets[position]) : int(offsets[position + 1])]
        weights = unpack_expert(spec, self._slots[slot, : spec.record_bytes])
        result = reference_ffn(spec, weights, state.hidden[rows // work.dispatch.top_k])
        state.rows[rows] = result * state.weights[rows].unsqueeze(1)

    def _send(
        self, spec: ExpertSpec, slots: Sequence[int], positions: list[int], work: LayerWork
    ) -> tuple[DeviceRows, Group | None]:
        """The call's tensors, and what the fused kernels need (None where they are not to run), by one upload: of all
        experts that come in turn, with the first of them."""
        n_tokens = _tokens_of(work, positions)
        if self._fused is None or not self._fused.accepts(spec, n_tokens):
            return self._enter(work)[0], None
        if work.in_turn is None:
            return self._upload(work, slots, positions, n_tokens)
        all_slots, everyone = work.in_turn
        state = self._enter(work)[0]
        if state.whole is None:
            state, whole = self._upload(work, all_slots, everyone, _tokens_of(work, everyone))
            state.whole = replace(whole, prepared={})
        return state, state.whole.part(everyone.index(positions[0]), len(positions))

    def _upload(
        self, work: LayerWork, slots: Sequence[int], positions: Sequence[int], n_tokens: list[int]
    ) -> tuple[DeviceRows, Group]:
        """A group of experts on the device."""
        state, (slot_ids, offsets, rows) = self._enter(
            work, np.array(slots, np.int32), np.array([0, *accumulate(n_tokens)], np.int32), _rows_of(work, positions)
        )
        group = Group(slot_ids, offsets, rows, n_tokens, state.hidden, state.weights, work.dispatch.top_k, state.rows)
        return state, group

    def _enter(self, work: LayerWork, *more: Array) -> tuple[DeviceRows, list[torch.Tensor]]:
        """The call's device tensors, made on first use, and `more` arrays, all sent together."""
        state = work.device_state
        if isinstance(state, DeviceRows):
            return state, self._uploads.send(*more) if more else []
        dispatch, shape = work.dispatch, work.host_hidden.shape
        is_here = work.hidden.device == self.device
        if is_here and (work.hidden.dtype is torch.float32 or work.host_hidden.nbytes > SMALL_BYTES):
            weights, *sent = self._uploads.send(dispatch.weights, *more)
            hidden = work.hidden.to(torch.float32).reshape(shape)
        else:
            weights, hidden, *sent = self._uploads.send(dispatch.weights, work.host_hidden, *more)
        make = torch.zeros if dispatch.has_absent else torch.empty
        rows = make((dispatch.n_tokens * dispatch.top_k, shape[1]), dtype=torch.float32, device=self.device)
        work.device_state = state = DeviceRows(hidden, weights, rows)
        return state, sent

    def _row_ids(self, work: LayerWork, state: DeviceRows) -> torch.Tensor:
        if state.row_ids is None:
            (state.row_ids,) = self._uploads.send(work.dispatch.rows.astype(np.int64))
        return state.row_ids

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


def _tokens_of(work: LayerWork, positions: Sequence[int]) -> list[int]:
    """How many tokens the experts at `positions` have."""
    starts = work.dispatch.offsets
    return [int(starts[position + 1] - starts[position]) for position in positions]


def _rows_of(work: LayerWork, positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """The rows of the experts at `positions`, expert by expert."""
    rows, offsets = work.dispatch.rows, work.dispatch.offsets
    if not positions:
        return np.empty(0, np.int64)
    return np.concatenate([rows[offsets[p] : offsets[p + 1]] for p in positions], dtype=np.int64)


def _put(source: torch.Tensor, slot: torch.Tensor, unfold: Unfold | None) -> None:
    """Host bytes into a slot, on the current stream; what `unfold` reads is a copy of them on the device."""
    if unfold is None:
        slot[: source.numel()].copy_(source, non_blocking=True)
    else:
        unfold(source.to(slot.device, non_blocking=True), slot)
