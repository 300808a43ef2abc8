"""Performs layer plans in simulated time: the counterpart of the runtime's executor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand
from scheduler.errors import SchedulerError
from scheduler.machine.costs import CostModel
from scheduler.plan import LayerPlan, ObservedTask, Transfer, TransferEnded
from scheduler.records import TaskKind, TaskRecord
from scheduler.simulator.host_tier import HostTier
from scheduler.simulator.lanes import run_lanes, run_link

Floats = NDArray[np.float64]
NOT_STARTED = -1.0


class SimulationError(SchedulerError):
    """A plan cannot be performed, or trace, shape and settings do not fit each other."""


class SimulationSettingError(SimulationError):
    """A setting of a simulation that is outside its range: wrong usage."""

    exit_code = 2


@dataclass(slots=True)
class Copy:
    """A transfer on its way through the link. ``fresh``: its layer's plan is the one being performed. ``carried_us``:
    link time of the parts that were carried before others overtook it; the rest starts anew."""

    transfer: Transfer
    step: int
    left_us: float
    from_us: float
    n_bytes: int
    start_us: float = NOT_STARTED
    end_us: float = NOT_STARTED
    fresh: bool = True
    carried_us: float = 0.0


@dataclass(slots=True)
class Busy:
    """Busy time of each lane so far, in us, and the bytes that were put on the link."""

    cpu: float = 0.0
    accel: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    link_bytes: int = 0


@dataclass(slots=True)
class Engine:
    """Lanes and clock. ``costs`` are the true durations; the planner has its own model of them.

    ``handoff_us``: until the CPU can start on a layer's experts, see ``DenseProfile``. ``pieces``: in how many pieces
    the link carries an expert: what a layer needs overtakes prefetches between two of them; 0: whole, in order.
    """

    costs: CostModel
    expert_bytes: int
    keep_records: bool = False
    host: HostTier | None = None
    handoff_us: float = 0.0
    pieces: int = 0
    now_us: float = 0.0
    busy: Busy = field(default_factory=Busy)
    records: list[TaskRecord] = field(default_factory=list)
    _queue: list[Copy] = field(default_factory=list)
    _ended: list[Copy] = field(default_factory=list)

    def link_ready_us(self) -> float:
        """Time from now until the link has carried everything queued."""
        return sum(copy.left_us for copy in self._queue)

    def dense(self, kind: TaskKind, layer: int, n_tokens: int, duration_us: float, step: int) -> None:
        """Dense accelerator work that everything waits for; the link goes on meanwhile."""
        end = self.now_us + duration_us
        self._advance_link(end)
        if self.keep_records and duration_us > 0.0:
            self.records.append(TaskRecord("accel", kind, layer, -1, n_tokens, 0, self.now_us, end, step))
        self.busy.accel += duration_us
        self.now_us = end

    def take_ended(self) -> list[TransferEnded]:
        """Events of the copies that have ended by now, in link order; each is reported once."""
        events = [
            TransferEnded(c.transfer.layer, c.transfer.expert, c.transfer.slot, c.carried_us + c.end_us - c.start_us)
            for c in self._ended_transfers()
        ]
        self._ended.clear()
        return events

    def _ended_transfers(self) -> list[Copy]:
        """Those of the ended copies that a planner hears of."""
        return self._ended

    def run_layer(self, plan: LayerPlan, demand: LayerDemand, shared_us: float) -> tuple[ObservedTask, ...]:
        """Perform one plan; afterwards ``now_us`` is the end of the compute lanes. Returns a sample of durations."""
        tokens = dict(zip(demand.expert_ids.tolist(), demand.n_tokens.tolist(), strict=True))
        if self.host is not None:  # whoever planned it: the CPU computes what is there
            at = {expert: self._host_ready_us(plan.layer, expert, plan.step) for expert in plan.cpu}
            plan = replace(plan, cpu=tuple(sorted(plan.cpu, key=at.__getitem__)))
        for copy in self._queue:
            copy.fresh = False
        self._enqueue(plan)
        if self.pieces:
            self._overtake(plan)
        cpu_us, accel_us = self._compute_us(plan, tokens)
        cpu_from = self._cpu_from(plan)
        began_us = self.now_us
        times = self._run(plan, cpu_us, cpu_from, accel_us, shared_us)
        self._account(plan, tokens, times, began_us, shared_us)
        return self._observe(plan, tokens, times)

    def _compute_us(self, plan: LayerPlan, tokens: dict[int, int]) -> tuple[Floats, Floats]:
        """us of each expert of the CPU lane and of the accelerator."""
        cpu_us = self.costs.cpu_us(plan.layer, np.array([tokens[e] for e in plan.cpu], np.int64))
        return cpu_us, self.costs.accel_us(plan.layer, np.array([tokens[e] for e in plan.accel], np.int64))

    def _transfer_us(self, transfer: Transfer) -> float:
        return self.costs.transfer_us(transfer.layer)

    def _transfer_bytes(self, transfer: Transfer) -> int:
        return self.expert_bytes

    def _enqueue(self, plan: LayerPlan) -> None:
        for transfer in (*plan.transfers, *plan.prefetches):
            self._add(Copy, transfer, plan.step, self._transfer_us(transfer), self._transfer_bytes(transfer))

    def _overtake(self, plan: LayerPlan) -> None:
        """What this layer computes with goes to the head of the link, behind the piece under way; other copies wait.

        Copies that were queued before for this layer come first: a slot that one of the plan's experts hands over to
        another is read in that order.
        """
        needed = set(plan.accel)
        wanted: list[Copy] = []
        waiting: list[Copy] = []
        for copy in self._queue:
            own = copy.transfer.layer == plan.layer and copy.transfer.expert in needed
            (wanted if own else waiting).append(copy)
        if not wanted or not waiting:
            return
        first = self._queue[0]
        if first is not waiting[0]:
            self._queue = [*wanted, *waiting]
            return
        piece_us = self._transfer_us(first.transfer) / self.pieces
        if first.start_us >= 0.0 and first.left_us <= piece_us:  # its last piece
            self._queue = [first, *wanted, *waiting[1:]]
            return
        if first.start_us >= 0.0:
            rest_us = first.left_us % piece_us
            self._pause(first, rest_us)
            wanted[0].from_us = max(wanted[0].from_us, self.now_us + rest_us)
        self._queue = [*wanted, *waiting]

    def _pause(self, copy: Copy, rest_us: float) -> None:
        """A copy under way ends its piece, which takes ``rest_us``, and waits."""
        copy.end_us = self.now_us + rest_us
        self.busy.link += copy.end_us - copy.start_us
        if self.keep_records:
            self._record_copy(copy)
        copy.carried_us += copy.end_us - copy.start_us
        copy.left_us -= rest_us
        copy.start_us = copy.end_us = NOT_STARTED

    def _add(self, kind: type[Copy], transfer: Transfer, step: int, us: float, n_bytes: int) -> None:
        """Puts a copy on the link, which carries it once its bytes are in host memory."""
        ready = self._host_ready_us(transfer.layer, transfer.expert, step)
        self._queue.append(kind(transfer, step, us, ready, n_bytes))
        self.busy.link_bytes += n_bytes

    def _cpu_from(self, plan: LayerPlan) -> Floats:
        begin_us = self.now_us + self.handoff_us
        if self.host is None:
            return np.full(len(plan.cpu), begin_us)
        ready = [self._host_ready_us(plan.layer, e, plan.step) for e in plan.cpu]
        return np.maximum(np.array(ready, np.float64), begin_us)

    def _host_ready_us(self, layer: int, expert: int, step: int) -> float:
        """When an expert is in host memory."""
        if self.host is None:
            return self.now_us
        ready_us = self.host.ready_us(layer * self.host.n_experts + expert, self.now_us)
        self.record_reads(step)
        return ready_us

    def record_reads(self, step: int) -> None:
        """Keeps the reads that the disk has begun."""
        if self.host is None:
            return
        for read in self.host.take_begun():
            if self.keep_records:
                layer, expert = divmod(read.key, self.host.n_experts)
                self.records.append(
                    TaskRecord("disk", "read", layer, expert, 0, self.expert_bytes, read.start_us, read.end_us, step)
                )

    def copying(self) -> list[tuple[int, int]]:
        """(layer, expert) of the copies that are under way or wait for the link."""
        return [(copy.transfer.layer, copy.transfer.expert) for copy in self._queue]

    def _run(
        self, plan: LayerPlan, cpu_us: Floats, cpu_from: Floats, accel_us: Floats, shared_us: float
    ) -> tuple[Floats, Floats, Floats, Floats]:
        queue = self._queue
        arriving = {(c.transfer.layer, c.transfer.expert): i for i, c in enumerate(queue)}
        wait = np.array([arriving.get((plan.layer, e), -1) for e in plan.accel], np.int64)
        position = {expert: i for i, expert in enumerate(plan.accel)}
        after = np.full(len(queue), -1, np.int64)
        for i, copy in enumerate(queue):
            evicted = copy.transfer.evicts
            if copy.fresh and evicted is not None and evicted[0] == plan.layer:
                after[i] = position.get(evicted[1], -1)
        left, start, end, link_from = self._link_arrays()
        cpu_start, cpu_end = np.full(cpu_us.size, NOT_STARTED), np.full(cpu_us.size, NOT_STARTED)
        accel_start, accel_end = np.full(accel_us.size, NOT_STARTED), np.full(accel_us.size, NOT_STARTED)
        finished = run_lanes(
            self.now_us, cpu_us, cpu_from, accel_us, wait, self.now_us + shared_us, left, after, link_from,
            self.costs.cpu_with_link, self.costs.link_with_cpu, cpu_start, cpu_end, accel_start, accel_end, start, end,
        )  # fmt: skip
        if finished < 0.0:
            raise SimulationError(
                f"step {plan.step} layer {plan.layer}: accelerator and link wait for each other: {plan}"
            )
        self._settle(left, start, end)
        self.now_us = max(finished, self.now_us + shared_us)
        self._advance_link(self.now_us, finished)
        return cpu_start, cpu_end, accel_start, accel_end

    def _link_arrays(self) -> tuple[Floats, Floats, Floats, Floats]:
        queue = self._queue
        return (
            np.array([c.left_us for c in queue], np.float64),
            np.array([c.start_us for c in queue], np.float64),
            np.array([c.end_us for c in queue], np.float64),
            np.array([c.from_us for c in queue], np.float64),
        )

    def _advance_link(self, stop_us: float, start_us: float | None = None) -> None:
        if self._queue:
            left, start, end, link_from = self._link_arrays()
            run_link(self.now_us if start_us is None else start_us, stop_us, left, link_from, start, end)
            self._settle(left, start, end)

    def _settle(self, left: Floats, start: Floats, end: Floats) -> None:
        """Write the lane's progress back and move finished copies out of the queue."""
        still = []
        for copy, rest, began, ended in zip(self._queue, left.tolist(), start.tolist(), end.tolist(), strict=True):
            copy.left_us, copy.start_us, copy.end_us = rest, began, ended
            if rest > 0.0:
                still.append(copy)
                continue
            self._ended.append(copy)
            self.busy.link += ended - began
            if self.keep_records:
                self._record_copy(copy)
        self._queue = still

    def _record_copy(self, copy: Copy) -> None:
        kind: TaskKind = "prefetch" if copy.transfer.kind == "prefetch" else "transfer"
        self.records.append(
            TaskRecord(
                "link",
                kind,
                copy.transfer.layer,
                copy.transfer.expert,
                0,
                copy.n_bytes,
                copy.start_us,
                copy.end_us,
                copy.step,
            )
        )

    def _account(
        self, plan: LayerPlan, tokens: dict[int, int], times: tuple[Floats, ...], began_us: float, shared_us: float
    ) -> None:
        cpu_start, cpu_end, accel_start, accel_end = times
        self.busy.cpu += float((cpu_end - cpu_start).sum())
        self.busy.accel += float((accel_end - accel_start).sum()) + shared_us
        if self.host is not None:
            self.busy.disk = self.host.busy_us
            self.host.note_wait(self.now_us, _idle_us(cpu_start, cpu_end, began_us + self.handoff_us))
        if not self.keep_records:
            return
        if shared_us > 0.0:
            end = began_us + shared_us
            self.records.append(TaskRecord("accel", "shared_expert", plan.layer, -1, 0, 0, began_us, end, plan.step))
        for expert, begin, end in zip(plan.cpu, cpu_start.tolist(), cpu_end.tolist(), strict=True):
            self.records.append(
                TaskRecord("cpu", "cpu_expert", plan.layer, expert, tokens[expert], 0, begin, end, plan.step)
            )
        for expert, begin, end in zip(plan.accel, accel_start.tolist(), accel_end.tolist(), strict=True):
            self.records.append(
                TaskRecord("accel", "accel_expert", plan.layer, expert, tokens[expert], 0, begin, end, plan.step)
            )

    @staticmethod
    def _observe(plan: LayerPlan, tokens: dict[int, int], times: tuple[Floats, ...]) -> tuple[ObservedTask, ...]:
        """One task per compute lane: enough for the planner's drift correction, cheap for long traces."""
        cpu_start, cpu_end, accel_start, accel_end = times
        observed = []
        if plan.cpu:
            observed.append(ObservedTask("cpu", plan.layer, tokens[plan.cpu[-1]], float(cpu_end[-1] - cpu_start[-1])))
        if plan.accel:
            observed.append(
                ObservedTask("accel", plan.layer, tokens[plan.accel[-1]], float(accel_end[-1] - accel_start[-1]))
            )
        return tuple(observed)


def _idle_us(start: Floats, end: Floats, began_us: float) -> float:
    """us for which the CPU waited between experts, in the order in which it computed them."""
    return float(np.maximum(start - np.concatenate(([began_us], end[:-1])), 0.0).sum()) if start.size else 0.0
