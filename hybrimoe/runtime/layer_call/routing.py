"""Reading a layer call: from the router's tensors to what kernels and planner take, in memory that calls share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cpu_kernels import Dispatch, build_dispatch
from cpu_kernels.engine.outputs import Outputs
from cpu_kernels.engine.routed import Places, places_of
from gpu_kernels import Event, LayerWork
from gpu_kernels.downloads import Downloads
from gpu_kernels.exchange import Exchange
from gpu_kernels.page_locked import page_locked
from gpu_kernels.uploads import Uploads
from gpu_kernels.waiting import wait_for_stream
from hybrimoe.errors import ModelError
from hybrimoe.runtime.layer_call.compiled import describe_routing, read_and_describe
from hybrimoe.runtime.layer_call.layers import Layer, apply_norm
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.stats import Counters
from scheduler import Phase, Prediction, Transfer
from scheduler.demand import DemandView
from scheduler.planner.plan_view import PlanView
from scheduler.planner.protocol import Costs
from scheduler.records import TaskRecord

SENT_TOGETHER_BYTES = 64 << 20
"""Tensors of a call up to this size come from a device by one wait; those of long prompts one after the other."""
WORKSPACE_BYTES = 64 << 20
"""Result rows up to this size reuse one buffer; larger ones (long prompts) are allocated for the call."""
LOCKED_FROM_BYTES, LOCKED_BYTES = 1 << 20, 256 << 20
"""Rows of these sizes reuse one page-locked buffer where a device reads them by itself: smaller ones are sent, and to
lock pages takes longer than to fill them."""
WIDENED_BYTES = 64 << 10
"""Hidden states above this size become float32 on their device; those of a few tokens where the routing is read."""
NOTHING, NO_ROWS = torch.empty(0), np.empty((0, 0), np.float32)
NOT_COUNTED = Counters()
"""Where a space counts before its first call: nobody reads it."""


Keys = npt.NDArray[np.int64]
NO_KEYS: Keys = np.empty(0, np.int64)
FewTokens = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class Workspace:
    """The reused float32 buffers of inputs and result rows, and the ways from and to the devices of hidden states. One
    layer at a time, so one of each a session. read_by_device: result rows are page-locked, for a device that adds them
    to its own."""

    def __init__(self, *, read_by_device: bool = False) -> None:
        self._read_by_device = read_by_device
        self._rows = np.empty(0, dtype=np.float32)
        self.outputs = Outputs()
        self._few: dict[tuple[int, int, int], FewTokens] = {}
        """Of calls of few tokens, by (tokens, top-k, width)."""
        self._from: dict[torch.device, Downloads] = {}
        self._to: dict[torch.device, Uploads] = {}

    def of_few(self, n_tokens: int, top_k: int, width: int) -> FewTokens:
        """Inputs float32 [n_tokens, width] and result rows float32 [n_tokens * top_k, width] of calls of this shape."""
        shape = n_tokens, top_k, width
        known = self._few.get(shape)
        if known is None:
            inputs, rows = (np.empty((n, width), np.float32) for n in (n_tokens, n_tokens * top_k))
            known = self._few[shape] = inputs, rows
        return known

    def to_host(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """A call's tensors on the host, the hidden states first, valid until the next call: those of a device by one
        wait, unless they are large (these stay where they are). Hidden states of more than a few tokens come as
        float32."""
        device = tensors[0].device
        if device.type == "cpu" or any(tensor.device != device for tensor in tensors):
            return tensors
        if tensors[0].nbytes > WIDENED_BYTES and tensors[0].is_floating_point():
            tensors = tensors[0].detach().float(), *tensors[1:]
        if sum(tensor.nbytes for tensor in tensors) > SENT_TOGETHER_BYTES:
            return tensors
        if device not in self._from:
            self._from[device] = Downloads(device)
        return self._from[device].fetch(*tensors)

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A host tensor on `device`, ready for what its current stream does next; the host does not wait."""
        if device not in self._to:
            self._to[device] = Uploads(device)
        (sent,) = self._to[device].send(tensor.contiguous().view(torch.uint8).numpy())
        return sent.view(tensor.dtype)

    def rows(self, n_rows: int, hidden: int) -> npt.NDArray[np.float32]:
        """float32 [n_rows, hidden], contents undefined."""
        size, n_bytes = n_rows * hidden, n_rows * hidden * 4
        if n_bytes > (LOCKED_BYTES if self._read_by_device else WORKSPACE_BYTES):
            return np.empty((n_rows, hidden), dtype=np.float32)
        if size > self._rows.size:
            self._rows = self._new_rows(n_bytes)
        return self._rows[:size].reshape(n_rows, hidden)

    def _new_rows(self, n_bytes: int) -> npt.NDArray[np.float32]:
        if not self._read_by_device or n_bytes < LOCKED_FROM_BYTES:
            return np.empty(n_bytes // 4, np.float32)
        rows = page_locked(n_bytes, "a prompt's rows").view(np.float32)
        self._read_by_device = torch.from_numpy(rows).is_pinned()  # a system that refuses is not asked again
        return rows


class RunsLanes(Protocol):
    """`lanes.Lanes` of a part's experts."""

    def link_busy_us(self, layer: int) -> float: ...

    def cpu_ready_us(self) -> float: ...

    def took_to_submit(self, space: CallSpace, us: float) -> None: ...

    def submit(self, space: CallSpace) -> None: ...

    def waits_for_disk(self, transfers: Sequence[Transfer]) -> bool: ...

    def place(self, space: CallSpace, exchange: Exchange) -> None: ...

    def launch(
        self, space: CallSpace, call: SentCall, n_accel: int, transfers: Sequence[Transfer] = (),
        awaited: Sequence[int] = (),
    ) -> None: ...  # fmt: skip

    def start_transfers(self, transfers: Sequence[Transfer], step: int, *, traced: bool) -> None: ...

    def compute(self, space: CallSpace) -> None: ...

    def combine(self, space: CallSpace) -> torch.Tensor: ...


class FollowsCalls(Protocol):
    """`reports.Reports` of a part's experts."""

    def finish(self, space: CallSpace) -> None: ...


class RunsParts(Protocol):
    """Experts in one precision, which run their part of a call (`experts.Experts`)."""

    @property
    def costs(self) -> Costs | None: ...

    @property
    def lanes(self) -> RunsLanes: ...

    @property
    def reports(self) -> FollowsCalls: ...

    def plan(
        self, space: CallSpace, phase: Phase, predictions: tuple[Prediction, ...], cpu_ready_us: float,
        accel_ready_us: float, link_ready_us: float,
    ) -> None: ...  # fmt: skip


class CallSpace:
    """One layer's call under way: filled anew by the layer's next call, so nothing is made on the way.

    `work` is what the lanes share, `demand` what the planner sees of it, `plan` its answer; `positions` int32 and
    `records` uint64 [E] are the CPU lane's experts. `ends`: of each piece of work on the accelerator, whose
    experts are at positions `sent`, and whose time stands for that of `stands_for` calls. `ran`: the CPU lane's tasks,
    while `traced`, and `unit`: the accelerator then. `turns`: what is left to submit, once the first transfer of it has
    been read from disk.
    """

    __slots__ = (
        "_dispatches", "_scores", "_width", "_work", "buffers", "counted", "counters", "cpu_us", "demand", "ends",
        "experts", "found", "index", "layer", "n_cpu", "n_tokens", "norm", "plan", "positions", "ran", "recorded",
        "records", "sent", "stands_for", "step", "traced", "turns", "unit", "work",
    )  # fmt: skip

    work: LayerWork
    plan: PlanView

    def __init__(self, experts: RunsParts, index: int, layer: Layer, n_experts: int) -> None:
        """`n_experts`: the planner's number of experts, at least the layer's own."""
        self.experts, self.index, self.layer = experts, index, layer
        self.counters = NOT_COUNTED
        self._scores, self.n_tokens = np.zeros(n_experts, np.float32), np.zeros(n_experts, np.int32)
        self.demand = DemandView(index, "decode", 0, self.n_tokens[:0], self.n_tokens[:0], self._scores)
        self.positions = np.empty(layer.num_experts, np.int32)
        self.records = np.empty(layer.num_experts, np.uint64)
        self.found = np.zeros(2, np.int64)
        self.count_in(np.zeros(n_experts))
        self.ends: list[Event] = []
        self.sent: list[list[int]] = []
        self.ran: list[TaskRecord] = []
        self.step, self.n_cpu, self.cpu_us, self.traced, self.unit = -1, 0, 0.0, False, 0
        self.stands_for, self.recorded = 1, False
        self.turns: tuple[Transfer | None, Iterator[Transfer]] | None = None
        self.norm, self._width = layer.transform(), layer.spec.hidden
        self.buffers = Buffers(0, layer.num_experts)
        self._work = LayerWork(self.buffers.dispatch(0, 1, 0, 0), NOTHING, NO_ROWS, NO_ROWS)
        self._dispatches: dict[tuple[int, int, int, int], Dispatch] = {}

    def count_in(
        self, routing_counts: npt.NDArray[np.float64], first_key: int = 0, slot_of: Keys = NO_KEYS,
        state: Keys = NO_KEYS,
    ) -> None:  # fmt: skip
        """From here on the count of each active expert rises by 1 in `routing_counts` [E] with each call, and `found`
        tells how many of them have their bytes in a slot, and how many are on their way: slot_of and state are a
        `SlotTable`'s, the layer's from `first_key` on; empty where nothing has a slot."""
        self.counted = routing_counts, self.n_tokens, self._scores, first_key, slot_of, state, self.found

    def read(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, workspace: Workspace,
        places: Places | None = None,
    ) -> int:  # fmt: skip
        """Takes a call's tensors, grouped by expert, into `work`, and describes it in `demand`. Returns the number of
        active experts.

        Few tokens are read in one compiled call; see `call_inputs` for what others may be and raise. places: of host
        tensors that are always the same, and are known to be few tokens.
        """
        width, given = self._width, hidden
        if not hidden.is_cpu:
            hidden, top_k_index, top_k_weights = workspace.to_host(hidden, top_k_index, top_k_weights)
        if places is None and not hidden.requires_grad:
            places = places_of(hidden, top_k_index, top_k_weights, width)
        if places is not None and self.norm is None:
            n_tokens, top_k = places[3:5]
            buffers = self.room_for(n_tokens * top_k)
            host_hidden, host_rows = workspace.of_few(n_tokens, top_k, width)
            n_active: int = read_and_describe(
                *places, host_hidden, buffers.weights, buffers.counts, buffers.expert_ids, buffers.offsets,
                buffers.rows, *self.counted,
            )  # fmt: skip
            if n_active >= 0:
                self.filled(n_tokens, top_k, n_active, given, hidden, host_hidden, host_rows)
                return n_active
        inputs = call_inputs(given, top_k_index, top_k_weights, width, hidden)
        return self.take(inputs, inputs.ids, inputs.weights, workspace) and self.describe()

    def filled(
        self, n_tokens: int, top_k: int, n_active: int, given: torch.Tensor, hidden: torch.Tensor,
        host_hidden: npt.NDArray[np.float32], host_rows: npt.NDArray[np.float32],
    ) -> None:  # fmt: skip
        """The space's own arrays hold the routing of a call of few tokens: `work` and `demand` become views of them.

        given: the hidden states where the model has them; hidden: on the host; host_hidden, host_rows: as in `work`.
        """
        buffers = self.buffers
        shape = n_tokens, top_k, n_active, buffers.offsets.item(n_active)
        dispatch = self._dispatches.get(shape)
        if dispatch is None:
            dispatch = self._dispatches[shape] = buffers.dispatch(*shape)
        work, demand = self._work, self.demand
        self.work = work
        work.dispatch, work.hidden, work.like, work.out, work.device_state = dispatch, given, hidden, None, None
        work.host_hidden, work.host_rows, work.in_turn = host_hidden, host_rows, None
        demand.n_tokens_total, demand.expert_ids = n_tokens, dispatch.expert_ids
        demand.n_tokens = self.n_tokens[:n_active]

    def room_for(self, n_rows: int) -> Buffers:
        """The space's own arrays, with room for so many (token, expert) pairs."""
        return self.buffers if self.buffers.weights.size >= n_rows else self._grow(n_rows)

    def inputs(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, workspace: Workspace
    ) -> CallInputs:
        """A call's tensors on the host, in memory that outlives the call. Raises as `call_inputs`."""
        arrived = workspace.to_host(hidden, top_k_index, top_k_weights)
        if arrived[0] is not hidden:
            arrived = [tensor.clone() for tensor in arrived]
        on_host, index, weights = arrived
        return call_inputs(hidden, index, weights, self._width, on_host)

    def take(
        self, inputs: CallInputs, ids: npt.NDArray[np.integer], weights: npt.NDArray[np.float32], workspace: Workspace
    ) -> int:
        """Takes this routing of a call (the router's, or a part of it). Returns the number of active experts."""
        self.work = inputs.work(ids, weights, self.layer.num_experts, workspace)
        if self.norm is not None:
            self._postpone_weights(self.norm)
        return len(self.work.dispatch.expert_ids)

    def awaited_slots(self) -> Sequence[int]:
        """Slots into which the planned call's experts are being copied."""
        plan = self.plan
        if not (plan.awaited or plan.n_moved):
            return ()
        _, _, moved, slot_of, _ = plan.lists()
        return [slot_of[position] for position in (*plan.awaited, *moved[: plan.n_moved])]

    def release(self) -> None:
        """Lets go of the call's tensors and of rows made for it alone; what was counted stays."""
        work = self.work = self._work
        work.hidden, work.like, work.out, work.device_state = NOTHING, None, None, None
        work.transform = work.weights = work.in_turn = None
        work.host_hidden = work.host_rows = NO_ROWS

    def _grow(self, n_rows: int) -> Buffers:
        """Room for more (token, expert) pairs; `read` then makes its views anew."""
        self.buffers = Buffers(n_rows, self.layer.num_experts)
        self._dispatches.clear()
        return self.buffers

    def _postpone_weights(self, norm: nn.Module) -> None:
        """Families with a norm over each expert's output: the routing weights are multiplied in after it."""
        work, dispatch = self.work, self.work.dispatch
        work.transform, work.weights = partial(apply_norm, norm), dispatch.weights
        ones = np.ones_like(dispatch.weights)
        work.dispatch = Dispatch(
            dispatch.top_k, dispatch.n_tokens, dispatch.expert_ids, dispatch.offsets, dispatch.rows, ones
        )

    def describe(self) -> int:
        """Describes what was taken in `demand`, as `read` does. Returns the number of active experts."""
        dispatch, demand = self.work.dispatch, self.demand
        ids = dispatch.expert_ids
        describe_routing(ids, dispatch.offsets, dispatch.rows, dispatch.weights, dispatch.n_tokens, *self.counted)
        demand.n_tokens_total, demand.expert_ids, demand.n_tokens = dispatch.n_tokens, ids, self.n_tokens[: ids.size]
        return int(ids.size)


class Buffers:
    """A call's routing in flat arrays of at most `n_rows` (token, expert) pairs over `num_experts` experts."""

    __slots__ = ("counts", "expert_ids", "offsets", "rows", "weights")

    def __init__(self, n_rows: int, num_experts: int) -> None:
        n_active = min(n_rows, num_experts)
        self.weights = np.empty(n_rows, np.float32)
        self.rows = np.empty(n_rows, np.int32)
        self.counts = np.empty(num_experts, np.int32)
        self.expert_ids = np.empty(n_active, np.int32)
        self.offsets = np.empty(n_active + 1, np.int32)

    def dispatch(self, n_tokens: int, top_k: int, n_active: int, n_present: int) -> Dispatch:
        """A view of what calls of this shape write here."""
        return Dispatch(
            top_k, n_tokens, self.expert_ids[:n_active], self.offsets[: n_active + 1], self.rows[:n_present],
            self.weights[: n_tokens * top_k],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class CallInputs:
    """One call's tensors on the host: host_hidden float32 [T, H], ids integer [T, k], weights float32 [T, k]."""

    hidden: torch.Tensor
    host_hidden: npt.NDArray[np.float32]
    ids: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]

    def work(
        self, ids: npt.NDArray[np.integer], weights: npt.NDArray[np.float32], num_experts: int, workspace: Workspace
    ) -> LayerWork:
        """The work of this routing of the call (the router's, or a part of it), grouped by expert."""
        dispatch = build_dispatch(ids, weights, num_experts)
        rows = workspace.rows(dispatch.n_tokens * dispatch.top_k, self.host_hidden.shape[1])
        return LayerWork(dispatch, self.hidden, self.host_hidden, rows)


def call_inputs(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, hidden_size: int,
    on_host: torch.Tensor | None = None,
) -> CallInputs:  # fmt: skip
    """Checks one call's tensors and brings them to the host.

    hidden: [..., hidden_size] floating, and on_host: the same where it was brought to the host already; top_k_index:
    [T, k] integer; top_k_weights: [T, k] floating. Raises ModelError where shapes do not fit together.
    """
    if hidden.shape[-1] != hidden_size or not hidden.is_floating_point():
        raise ModelError(f"experts expect floating hidden states [T, {hidden_size}], found {_describe(hidden)}")
    hidden = hidden.detach()
    host_hidden = host_floats(hidden if on_host is None else on_host.detach()).reshape(-1, hidden_size)
    top_k = top_k_index.shape[-1]
    if top_k_index.shape != top_k_weights.shape or top_k_index.numel() != len(host_hidden) * top_k:
        raise ModelError(
            f"{len(host_hidden)} tokens need top_k_index and top_k_weights [{len(host_hidden)}, k], found"
            f" {_describe(top_k_index)} and {_describe(top_k_weights)}"
        )
    weights = host_floats(top_k_weights.detach()).reshape(-1, top_k)
    return CallInputs(hidden, host_hidden, host_index(top_k_index).reshape(-1, top_k), weights)


def host_floats(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """C-contiguous float32 values on the host; shares memory where they are so already."""
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        wait_for_stream(tensor.device, "a layer's inputs")
        tensor = tensor.to(torch.float32).to("cpu")  # on its device, which has more threads
    return np.ascontiguousarray(tensor.numpy())


def host_index(tensor: torch.Tensor) -> npt.NDArray[np.integer]:
    """Expert ids on the host."""
    if tensor.device.type != "cpu":
        wait_for_stream(tensor.device, "a layer's routing")
        tensor = tensor.cpu()
    return tensor.numpy()


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
