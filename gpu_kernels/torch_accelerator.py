"""Any torch.accelerator device (CUDA, ROCm, XPU): slots in device memory, a copy stream beside the compute stream.

The compute lane is the stream that is current when experts are submitted, so results are ordered with the model's
own work and the host never waits for an expert. On device "cpu" the same code runs synchronously (for tests).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import ExpertSpec, reference_ffn, unpack_expert
from gpu_kernels.accelerator import Event, LayerWork
from gpu_kernels.exchange import Exchange
from gpu_kernels.fused_choice import Group, RowsOfCall, load_fused
from gpu_kernels.resident import PromptWork, expected_tokens, run_resident, run_resident_prompt
from gpu_kernels.streams import clock_us
from gpu_kernels.torch_events import DeviceEvent, DoneEvent
from gpu_kernels.torch_slots import TorchSlots
from gpu_kernels.uploads import Array, Uploads

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


class TorchAccelerator(TorchSlots):
    """Slots and lanes of one torch device. `fused`: use the Triton kernels, by default where they are installed and the
    device is not the host."""

    def __init__(self, device: torch.device | str, *, fused: bool | None = None) -> None:
        super().__init__(device)
        self._uploads = Uploads(self.device)
        self._fused = load_fused() if (not self._synchronous if fused is None else fused) else None

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

    def sibling(self) -> TorchAccelerator:
        """A second, empty slot memory behind the same streams; staging buffers are its own."""
        self._check_open()
        other = TorchAccelerator.__new__(TorchAccelerator)
        other.__dict__.update(self.__dict__)
        other._next_staging = 0
        other._set_slots(0, 0)
        return other

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
