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
from cpu_kernels.engine.dispatch import records_at
from gpu_kernels import Event, LayerWork
from gpu_kernels.combining import combine_on_host
from gpu_kernels.streams import clock_us
from hybrimoe.runtime.layer_call.slots import PlanError, SlotCache
from hybrimoe.runtime.store import ExpertStore
from scheduler import LayerPlan, Transfer
from scheduler.records import TaskRecord

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AccelGroup:
    """Experts submitted to the accelerator as one piece of work, and its end."""

    experts: tuple[int, ...]
    n_tokens: list[int]
    event: Event


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
    unit: int = 0

    @property
    def events(self) -> list[Event]:
        """Events of all groups, in order."""
        return [group.event for group in self.groups]


class LayerCall:
    """What the lanes of one call share: spec, backend, tensors, and where each active expert stands in them."""

    __slots__ = ("backend", "n_tokens", "position", "spec", "work")

    def __init__(self, spec: ExpertSpec, backend: CpuBackend, work: LayerWork) -> None:
        self.spec, self.backend, self.work = spec, backend, work
        dispatch = work.dispatch
        self.position = {expert: at for at, expert in enumerate(dispatch.expert_ids.tolist())}
        self.n_tokens: list[int] = (dispatch.offsets[1:] - dispatch.offsets[:-1]).tolist()


class Executor:
    """Performs plans; owns no policy and no weights.

    `caches`: the slots of each accelerator; none: everything runs on the CPU lane. `unit_of`: each layer's accelerator.
    """

    def __init__(self, store: ExpertStore, caches: Sequence[SlotCache] = (), unit_of: Sequence[int] = ()) -> None:
        self._store = store
        self.caches = tuple(caches)
        self._slots_of = [self.caches[unit] for unit in unit_of]

    def slots_of(self, layer: int) -> SlotCache | None:
        """The slots of a layer's accelerator."""
        return self._slots_of[layer] if self._slots_of else None

    def addresses(self, layer: int) -> npt.NDArray[np.uint64]:
        """uint64 [num_experts]: where each record of a layer starts in host memory."""
        return self._store.addresses(layer)

    def run(self, plan: LayerPlan, call: LayerCall, *, trace: bool) -> tuple[torch.Tensor, LayerRun]:
        """Runs one layer. Returns its output, float32 [T, H], and what happened.

        `trace`: run experts one by one, so that each gets its own record. Raises LaneError where a lane failed.
        """
        run = self.submit(plan, call, trace=trace)
        self.compute(plan, call, run)
        return self.combine(call, run), run

    def submit(self, plan: LayerPlan, call: LayerCall, *, trace: bool) -> LayerRun:
        """Starts a plan's transfers and its work on the accelerator; `compute` and `combine` must follow."""
        slots = self.slots_of(plan.layer)
        run = LayerRun(plan.layer, plan.step, trace)
        if slots is not None:
            run.unit = slots.unit
            self._submit(plan, call, run, slots)
        elif plan.accel or plan.transfers or plan.prefetches:
            raise PlanError(f"layer {plan.layer}: a plan with accelerator work, but there is no accelerator")
        return run

    def compute(self, plan: LayerPlan, call: LayerCall, run: LayerRun) -> None:
        """The CPU lane's experts, in the calling thread."""
        positions = np.array([call.position[expert] for expert in plan.cpu], dtype=np.int32)
        if plan.cpu:
            self._run_cpu(plan, call, positions, run)
        call.work.host_positions = positions

    def combine(self, call: LayerCall, run: LayerRun) -> torch.Tensor:
        """Waits for the accelerator; the layer's output, float32 [T, H]: on the accelerator's device if that computed
        some of it, else on the host, but for a norm over the experts' outputs, which runs where its weights are."""
        slots = self.slots_of(run.layer)
        on_device = call.work.transform is not None and call.work.hidden.device.type != "cpu"
        if slots is not None and (run.groups or on_device):
            return slots.accelerator.combine(call.work, run.events)
        return combine_on_host(call.work)

    def run_on_cpu(self, layer: int, spec: ExpertSpec, backend: CpuBackend, work: LayerWork) -> torch.Tensor:
        """Every active expert of a layer on the CPU lane, without a plan. Returns the output, float32 [T, H]."""
        ids = work.dispatch.expert_ids
        records = self._store.addresses(layer)[ids]
        backend.run(spec, records, np.arange(len(ids), dtype=np.int32), work.dispatch, work.host_hidden, work.host_rows)
        return combine_on_host(work)

    def start_transfers(self, transfers: Sequence[Transfer], step: int, *, traced: bool = False) -> None:
        """Submits transfers in the order of their links."""
        for transfer in transfers:
            record = self._store.record(transfer.layer, transfer.expert)
            self._slots_of[transfer.layer].submit(transfer, record, step, traced=traced)

    def _submit(self, plan: LayerPlan, call: LayerCall, run: LayerRun, slots: SlotCache) -> None:
        """Interleaves transfers and computations so that each sees the slot contents that the plan means."""
        sent = begun = 0
        if plan.transfers or plan.awaited or run.traced:
            arrives = {transfer.expert: at for at, transfer in enumerate(plan.transfers)}
            for at, expert in enumerate(plan.accel):
                needed = arrives.get(expert, -1)
                if needed >= 0 or run.traced or expert in plan.awaited:
                    _send(plan, call, run, slots, slice(begun, at))
                    begun = at
                if needed >= sent:
                    self.start_transfers(plan.transfers[sent : needed + 1], plan.step, traced=run.traced)
                    sent = needed + 1
        _send(plan, call, run, slots, slice(begun, len(plan.accel)))
        self.start_transfers((*plan.transfers[sent:], *plan.prefetches), plan.step, traced=run.traced)

    def _run_cpu(self, plan: LayerPlan, call: LayerCall, positions: npt.NDArray[np.int32], run: LayerRun) -> None:
        """The CPU lane: all its experts in one call, or one by one when traced."""
        work = call.work
        records = records_at(self._store.addresses(plan.layer), work.dispatch.expert_ids, positions)
        run.cpu_n_tokens = [call.n_tokens[at] for at in positions.tolist()]
        step = 1 if run.traced else len(positions)
        for first in range(0, len(positions), step):
            chunk = slice(first, first + step)
            start_us = clock_us()
            call.backend.run(
                call.spec, records[chunk], positions[chunk], work.dispatch, work.host_hidden, work.host_rows
            )
            end_us = clock_us()
            run.cpu_us += end_us - start_us
            if run.traced:
                run.records.append(_cpu_record(plan, first, run.cpu_n_tokens[first], start_us, end_us))


def _send(plan: LayerPlan, call: LayerCall, run: LayerRun, slots: SlotCache, part: slice) -> None:
    """Submits a part of the plan's accelerator experts as one piece of work."""
    experts = plan.accel[part]
    if not experts:
        return
    held = plan.accel_slots[part]
    slots.check(plan.layer, experts, held)
    positions = [call.position[expert] for expert in experts]
    event = slots.accelerator.run_experts(call.spec, slots.own(held), positions, call.work)
    run.groups.append(AccelGroup(experts, [call.n_tokens[at] for at in positions], event))


def accel_records(run: LayerRun) -> list[TaskRecord]:
    """Timeline entries of a traced run's accelerator work (one expert a group); its events must have ended."""
    return [
        TaskRecord("accel", "accel_expert", run.layer, group.experts[0], group.n_tokens[0], 0, *group.event.span_us(),
                   run.step, run.unit)
        for group in run.groups
    ]  # fmt: skip


def share_out(total_us: float, n_tokens: list[int], cost_us: Callable[[Ints], npt.NDArray[np.float64]]) -> float:
    """us of the first of several experts that took `total_us` together, in proportion to predicted costs."""
    if min(n_tokens) == max(n_tokens):
        return total_us / len(n_tokens)
    predicted = cost_us(np.asarray(n_tokens, dtype=np.int64))
    return float(total_us * predicted[0] / predicted.sum())


def _cpu_record(plan: LayerPlan, at: int, n_tokens: int, start_us: float, end_us: float) -> TaskRecord:
    return TaskRecord("cpu", "cpu_expert", plan.layer, plan.cpu[at], n_tokens, 0, start_us, end_us, plan.step)
