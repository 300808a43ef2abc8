"""Performs a LayerPlan on three concurrent lanes: link and accelerator are streams, the CPU lane is the caller.

Order of submission is what makes a plan safe: every computation is submitted after the transfer that it needs and
before a transfer that rewrites its slot; the accelerator's own rules (see gpu_kernels.accelerator) turn that order
into waits. The CPU lane then runs in the calling thread (its kernels release the GIL), and `combine` waits for the
rest. Rows are added in top-k order, so the result does not depend on which lane ran first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import CpuBackend, ExpertSpec
from gpu_kernels import Accelerator, Event, LayerWork
from gpu_kernels.combining import combine_on_host
from gpu_kernels.streams import clock_us
from hybrimoe.runtime.slots import PlanError, SlotCache
from hybrimoe.runtime.store import ExpertStore
from scheduler import LayerPlan, Transfer
from scheduler.records import TaskRecord

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class AccelGroup:
    """Experts submitted to the accelerator as one piece of work."""

    experts: list[int]
    slots: list[int]
    positions: list[int]
    n_tokens: list[int]
    event: Event | None = None


@dataclass(slots=True)
class LayerRun:
    """What happened in one layer: times in us, and the groups whose times may only be known later."""

    layer: int
    step: int
    traced: bool
    cpu_us: float = 0.0
    cpu_n_tokens: list[int] = field(default_factory=list)
    groups: list[AccelGroup] = field(default_factory=list)
    records: list[TaskRecord] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        """Events of all groups, in order."""
        return [group.event for group in self.groups if group.event is not None]


class Executor:
    """Performs plans; owns no policy and no weights. `accelerator` None: everything runs on the CPU lane."""

    def __init__(self, store: ExpertStore, slots: SlotCache | None) -> None:
        self._store = store
        self.slots = slots

    @property
    def accelerator(self) -> Accelerator | None:
        """The device behind the slots."""
        return None if self.slots is None else self.slots.accelerator

    def run(
        self, plan: LayerPlan, spec: ExpertSpec, backend: CpuBackend, work: LayerWork, *, trace: bool
    ) -> tuple[torch.Tensor, LayerRun]:
        """Runs one layer. Returns its output, float32 [T, H], and what happened.

        `trace`: run experts one by one, so that each gets its own record. Raises LaneError where a lane failed.
        """
        run = LayerRun(plan.layer, plan.step, trace)
        self._submit(plan, spec, work, run)
        work.host_positions = self._run_cpu(plan, spec, backend, work, run)
        if self.accelerator is None or not (run.groups or work.hidden.device.type != "cpu"):
            return combine_on_host(work), run
        return self.accelerator.combine(work, run.events), run

    def start_transfers(self, transfers: Sequence[Transfer], step: int, *, traced: bool = False) -> None:
        """Submits transfers in link order."""
        assert self.slots is not None
        for transfer in transfers:
            record = self._store.record(transfer.layer, transfer.expert)
            self.slots.submit(transfer, record, step, traced=traced)

    def _submit(self, plan: LayerPlan, spec: ExpertSpec, work: LayerWork, run: LayerRun) -> None:
        """Interleaves transfers and computations so that each sees the slot contents that the plan means."""
        if self.slots is None:
            if plan.accel or plan.transfers or plan.prefetches:
                raise PlanError(f"layer {plan.layer}: a plan with accelerator work, but there is no accelerator")
            return
        sent = 0
        arrives = {transfer.expert: i for i, transfer in enumerate(plan.transfers) if transfer.layer == plan.layer}
        group: AccelGroup | None = None
        positions = positions_of(work, plan.accel)
        for expert, slot, position in zip(plan.accel, plan.accel_slots, positions, strict=True):
            needed = arrives.get(expert, -1)
            waits = needed >= 0 or expert in plan.awaited
            if group is not None and (waits or run.traced):
                self._send(spec, group, work, run)
                group = None
            if needed >= sent:
                self.start_transfers(plan.transfers[sent : needed + 1], plan.step, traced=run.traced)
                sent = needed + 1
            self.slots.check(slot, (plan.layer, expert))
            if group is None:
                group = AccelGroup([], [], [], [])
            _append(group, expert, slot, position, work)
        if group is not None:
            self._send(spec, group, work, run)
        self.start_transfers((*plan.transfers[sent:], *plan.prefetches), plan.step, traced=run.traced)

    def _send(self, spec: ExpertSpec, group: AccelGroup, work: LayerWork, run: LayerRun) -> None:
        assert self.slots is not None
        group.event = self.slots.accelerator.run_experts(spec, group.slots, group.positions, work)
        run.groups.append(group)

    def _run_cpu(
        self, plan: LayerPlan, spec: ExpertSpec, backend: CpuBackend, work: LayerWork, run: LayerRun
    ) -> npt.NDArray[np.int32]:
        """The CPU lane: all its experts in one call, or one by one when traced. Returns their positions."""
        positions = positions_of(work, plan.cpu)
        if not plan.cpu:
            return positions
        records = self._store.addresses(plan.layer)[np.asarray(plan.cpu)]
        offsets = work.dispatch.offsets
        run.cpu_n_tokens = (offsets[positions + 1] - offsets[positions]).tolist()
        step = 1 if run.traced else len(positions)
        for first in range(0, len(positions), step):
            chunk = slice(first, first + step)
            start_us = clock_us()
            backend.run(spec, records[chunk], positions[chunk], work.dispatch, work.host_hidden, work.host_rows)
            end_us = clock_us()
            run.cpu_us += end_us - start_us
            if run.traced:
                run.records.append(_cpu_record(plan, first, run.cpu_n_tokens[first], start_us, end_us))
        return positions


def positions_of(work: LayerWork, experts: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """int32 [n]: where each expert id stands in the dispatch."""
    return np.searchsorted(work.dispatch.expert_ids, np.asarray(experts, dtype=np.int32)).astype(np.int32)


def accel_records(run: LayerRun) -> list[TaskRecord]:
    """Timeline entries of a traced run's accelerator work (one expert a group); its events must have ended."""
    records = []
    for group in run.groups:
        assert group.event is not None
        start_us, end_us = group.event.span_us()
        records.append(
            TaskRecord(
                "accel", "accel_expert", run.layer, group.experts[0], group.n_tokens[0], 0, start_us, end_us, run.step
            )
        )
    return records


def share_out(total_us: float, n_tokens: list[int], cost_us: Callable[[Ints], npt.NDArray[np.float64]]) -> float:
    """us of the first of several experts that took `total_us` together, in proportion to predicted costs."""
    if min(n_tokens) == max(n_tokens):
        return total_us / len(n_tokens)
    predicted = cost_us(np.asarray(n_tokens, dtype=np.int64))
    return float(total_us * predicted[0] / predicted.sum())


def _cpu_record(plan: LayerPlan, at: int, n_tokens: int, start_us: float, end_us: float) -> TaskRecord:
    return TaskRecord("cpu", "cpu_expert", plan.layer, plan.cpu[at], n_tokens, 0, start_us, end_us, plan.step)


def _append(group: AccelGroup, expert: int, slot: int, position: int, work: LayerWork) -> None:
    offsets = work.dispatch.offsets
    group.experts.append(expert)
    group.slots.append(slot)
    group.positions.append(int(position))
    group.n_tokens.append(int(offsets[position + 1] - offsets[position]))
