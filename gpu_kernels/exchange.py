"""What host and device hand each other at a layer of a decode step: fixed memory, no objects and no other traffic.

A layer is then: the piece of the model before it ends by sending hidden states and routing to the host (`send`); the
host waits once, plans, and writes where each (token, expert) pair is computed; the device computes those in its slots
(`compute`) while the CPU computes the others into memory that the device reads; the next piece begins by adding up the
rows of both (`combine`). These three can be recorded into graphs of the device; the rest is the host's.
"""

from __future__ import annotations

import torch

from cpu_kernels import ExpertSpec
from cpu_kernels.engine.routed import FLOATS, MAX_TOKENS, NO_PLACE, Places
from gpu_kernels.downloads import starts_of
from gpu_kernels.errors import GraphError
from gpu_kernels.fused_choice import FusedChoice, RowsOfCall
from gpu_kernels.page_locked import page_locked
from gpu_kernels.pairs import Pairs, add_up, run_pairs
from gpu_kernels.waiting import limit_of


class Exchange:
    """Memory for the calls of one shape: T tokens of H values with top_k experts each, so R = T * top_k pairs.

    On the host, page-locked, what the device has sent: `hidden` [T, H], `ids` int64 [T, top_k], `weights` [T, top_k],
    and what it reads: `slots` int32 [R], the slot of each pair's expert, negative where the device does not compute it;
    `rows` float32 [R, H] of the pairs that the CPU computes; `source` int32 [R]: where the row of each pair is: its own
    number where the CPU computes it, negative for the device's own, R for one that adds nothing.

    The host may write them once `wait` has returned, until it launches what reads them. One exchange serves all layers
    of a step, one after the other. Raises GraphError where host memory cannot be page-locked.
    """

    def __init__(
        self, device: torch.device, n_tokens: int, top_k: int, width: int, dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        n_rows = n_tokens * top_k
        form = (
            ((n_tokens, width), dtype), ((n_tokens, top_k), torch.int64), ((n_tokens, top_k), weights_dtype),
            ((n_rows,), torch.int32), ((n_rows,), torch.int32), ((n_rows + 1, width), torch.float32),
        )  # fmt: skip
        starts, n_bytes = starts_of([(torch.Size(shape), dtype) for shape, dtype in form])
        with torch.inference_mode(False):  # later steps write to it in whichever mode
            memory = torch.from_numpy(page_locked(n_bytes))
            places = [
                memory[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
                for start, (shape, dtype) in zip(starts, form, strict=True)
            ]
            self._slots = torch.full((n_rows,), NO_PLACE, dtype=torch.int32, device=device)
            self._rows = torch.zeros((n_rows, width), dtype=torch.float32, device=device)
            self._pairs = Pairs.of(n_tokens, top_k, device)
        self._device = device
        self._synchronous = device.type == "cpu"
        if not self._synchronous and not memory.is_pinned():
            raise GraphError(f"{device} can read and write no memory of the host by itself: it cannot be page-locked")
        self.hidden, self.ids, self.weights, self._given_slots, self._given_source, self._given_rows = places
        self.places: Places | None = None
        """Where a compiled call reads what was sent; None for dtypes that it does not know."""
        if dtype in FLOATS and weights_dtype in FLOATS and n_tokens <= MAX_TOKENS:
            self.places = (
                self.ids.data_ptr(), self.weights.data_ptr(), FLOATS[weights_dtype], n_tokens, top_k,
                self.hidden.data_ptr(), FLOATS[dtype],
            )  # fmt: skip
        self.slots, self.source = self._given_slots.numpy(), self._given_source.numpy()
        self.rows = self._given_rows[:n_rows].numpy()
        self.plan_addresses = self._given_slots.data_ptr(), self._given_source.data_ptr()
        """Where a compiled call writes `slots` and `source`."""
        self._first_rows = slice(0, n_rows, top_k)
        self.slots[:], self._nothing = NO_PLACE, n_rows
        self.put_nothing()

    # Recorded ---------------------------------------------------------------------------------------------------

    def send(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Copies a call's tensors, on the device and of these shapes' sizes, to the host."""
        for place, tensor in ((self.hidden, hidden), (self.ids, ids), (self.weights, weights)):
            place.copy_(tensor.reshape(place.shape), non_blocking=True)

    def compute(
        self, spec: ExpertSpec, slots: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor,
        fused: FusedChoice | None,
    ) -> None:  # fmt: skip
        """The rows of the pairs whose expert is in one of the `slots`, see `pairs.run_pairs`. hidden, weights: as for
        `send`."""
        self._slots.copy_(self._given_slots, non_blocking=True)
        wide, scales = hidden.reshape(self.hidden.shape).float(), weights.reshape(-1).float()
        run_pairs(spec, slots, self._slots, wide, scales, self._pairs, self._rows, fused)

    def combine(self, fused: FusedChoice | None) -> torch.Tensor:
        """[T, H] in the dtype of `hidden`: each token's rows added in top-k order."""
        top_k, dtype = self._pairs.top_k, self.hidden.dtype

        def by_torch() -> torch.Tensor:
            sent = self._given_rows.to(self._device, non_blocking=True)
            source = self._given_source.to(self._device, non_blocking=True)
            sent = sent.index_select(0, source.clamp(min=0))
            return add_up(torch.where((source < 0).unsqueeze(1), self._rows, sent), top_k).to(dtype)

        if fused is None:
            return by_torch()
        return fused.combine(RowsOfCall(self._rows, self._given_rows, self._given_source, top_k, dtype), by_torch)

    # By the host ------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Waits until the current stream has done everything, the sending last. Raises LostError."""
        if not self._synchronous:
            limit_of(self._device).wait(torch.accelerator.current_stream(self._device), "a piece of a decode step")

    def put(self, output: torch.Tensor) -> None:
        """An output of the whole call, [T, H] values on the host or the device, in place of rows."""
        self.put_nothing()
        first = self._first_rows
        if output.device.type == "cpu" and not self._synchronous:
            rows, self.source[first] = self._given_rows, range(first.start, first.stop, first.step)
        else:
            rows, self.source[first] = self._rows, NO_PLACE
        rows[first].copy_(output.reshape(self.hidden.shape))

    def put_nothing(self) -> None:
        """The output of a call without an active expert."""
        self.source[:] = self._nothing
