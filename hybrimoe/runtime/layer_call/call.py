"""One call of a layer's experts, top to bottom: collect what has ended, read, plan, submit, compute, combine.

Order of submission is what makes a plan safe: every computation is submitted after the transfer that it needs and
before a transfer that rewrites its slot; the accelerator's own rules (see gpu_kernels.accelerator) turn that order into
waits. The CPU lane then runs in the calling thread (its kernels release the GIL), and `combine` waits for the rest.
Rows are added in top-k order, so the result does not depend on which lane ran first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.dispatch import take_records
from gpu_kernels.combining import combine_on_host
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.routing import CallInputs, CallSpace, Workspace, call_inputs, host_index
from hybrimoe.runtime.layer_call.slots import TransferQueue
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.layer_call.steps import Step, StepTracker
from hybrimoe.runtime.store import ExpertStore
from scheduler import ObservedTask, Phase, Prediction, Transfer
from scheduler.balancing.problem import CPU
from scheduler.demand import copied
from scheduler.graph import PlannedLayer
from scheduler.lossy import LossyPolicy
from scheduler.planner.plan_view import PlanView
from scheduler.planner.protocol import Costs, LayerPlanner
from scheduler.records import TaskRecord
from scheduler.slots import SlotTable

RoutingRecorder = Callable[[int, npt.NDArray[np.integer], npt.NDArray[np.float32], tuple[Prediction, ...]], None]

OBSERVE_EVERY = 4
"""Steps from one correction of the costs by observed times to the next."""
MAX_UNREPORTED = 4
"""Layers whose accelerator times are still unknown (real devices run behind the host) before the oldest is dropped."""


class HostBytes(Protocol):
    """Something beside the store that takes host memory."""

    @property
    def nbytes(self) -> int: ...


class LossyStage(Protocol):
    """What rewrites the routing of a call, see `hybrimoe.runtime.lossy.stage`, and what the call tells and asks it."""

    @property
    def policy(self) -> LossyPolicy: ...

    @property
    def low(self) -> Experts | None: ...

    @property
    def gates(self) -> Lookahead | None: ...

    @property
    def planes(self) -> HostBytes | None: ...

    @property
    def router_weights(self) -> npt.NDArray[np.float32]: ...

    def begin_step(self, step: Step) -> None: ...

    def rewrite(self, phase: Phase, index: int, inputs: CallInputs) -> Sequence[CallSpace]: ...

    def lanes(self, space: CallSpace, parts: Sequence[CallSpace]) -> tuple[float, float, float]: ...

    def before_compute(self, index: int, phase: Phase) -> None: ...

    def after_compute(self, index: int, phase: Phase) -> None: ...

    def joined(self, index: int, phase: Phase, outputs: list[torch.Tensor]) -> torch.Tensor: ...

    def take_over(self, previous: LossyStage, lookahead: Lookahead | None) -> None: ...

    def close(self) -> None: ...


class ExpertsCall:
    """Runs the calls of all layers of a started session.

    `experts`: the experts as stored. `lossy`: a stage that rewrites the routing, and may send parts of it to other
    experts (low-precision copies) or to a later layer; None computes what the router asked for.
    """

    def __init__(self, experts: Experts, tracker: StepTracker, lossy: LossyStage | None = None) -> None:
        self.experts, self.tracker, self.lossy = experts, tracker, lossy
        self.every = [experts] if lossy is None or lossy.low is None else [experts, lossy.low]
        self.layers, self.planner, self.costs = experts.layers, experts.planner, experts.costs
        self.lookahead: Lookahead | None = None
        self.routing_recorder: RoutingRecorder | None = None
        for others in self.every[1:]:
            others.timeline = experts.timeline
        self.phase: Phase = "prefill"
        self.consistent = True
        """False while a call runs, and after one that did not end: slots and plans may then disagree."""
        unplanned = experts.planner is None and lossy is None
        self._at_once = [
            unplanned and isinstance(layer.backend, NumbaBackend) and layer.transform() is None for layer in self.layers
        ]

    def run(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One call of layer `index`; see HybridExperts.forward."""
        start_ns = perf_counter_ns()
        if self._at_once[index] and self.routing_recorder is None and not self.experts.tracing:
            output = self._run_at_once(index, hidden, top_k_index, top_k_weights, start_ns)
            if output is not None:
                return output
        parts, n_tokens = self._read(index, hidden, top_k_index, top_k_weights)
        if not n_tokens:
            return torch.zeros_like(hidden)
        lossy, lanes_ns = self.lossy, 0
        for space in parts:
            lanes = (0.0, 0.0, self.experts.link_busy_us(index)) if lossy is None else lossy.lanes(space, parts)
            space.experts.plan(space, self.phase, self._predict(space, top_k_index), *lanes)
            lanes_ns -= perf_counter_ns()
            space.experts.submit(space)
            lanes_ns += perf_counter_ns()
        lanes_ns -= perf_counter_ns()
        if lossy is not None:
            lossy.before_compute(index, self.phase)
        for space in parts:
            space.experts.compute(space)
        if lossy is not None:
            lossy.after_compute(index, self.phase)
        if lossy is None:
            output = parts[0].experts.combine(parts[0])
        else:
            output = lossy.joined(index, self.phase, [space.experts.combine(space) for space in parts])
        lanes_ns += perf_counter_ns()
        for space in parts:
            space.experts.finish(space)
        return self._end(index, output, hidden, start_ns, lanes_ns)

    def _read(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[Sequence[CallSpace], int]:
        """The call's routing: as the router gave it, or the parts that a lossy policy makes of it; and the number of
        tokens, 0 where there is nothing to compute. From here on the call is under way."""
        if self.lossy is not None:
            inputs = call_inputs(hidden, top_k_index, top_k_weights, self.layers[index].spec.hidden)
            n_tokens = len(inputs.ids)
            if n_tokens:
                self._begin(index, n_tokens)
                return self.lossy.rewrite(self.phase, index, inputs), n_tokens
            return (), 0
        space = self.experts.spaces[index]
        if not space.read(hidden, top_k_index, top_k_weights, self.experts.workspace):
            return (), 0
        n_tokens = space.work.dispatch.n_tokens
        self._begin(index, n_tokens)
        return (space,), n_tokens

    def _run_at_once(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, start_ns: int
    ) -> torch.Tensor | None:
        """A call of few tokens without slots, in one compiled call; None, before anything has happened, for others."""
        layer, experts = self.layers[index], self.experts
        assert isinstance(layer.backend, NumbaBackend)
        self.consistent = False
        kernels_ns = perf_counter_ns()
        done = layer.backend.run_routed(layer.spec, experts.addresses[index], hidden, top_k_index, top_k_weights)
        kernels_ns = perf_counter_ns() - kernels_ns
        self.consistent = True
        if done is None:
            return None
        output, n_active = done
        if n_active:
            n_tokens = top_k_index.shape[0]
            step = self.tracker.next(index, n_tokens)
            if step.new:
                self.begin_step(step, n_tokens)
            wall_us = (perf_counter_ns() - start_ns) * 1e-3
            experts.stats.counters[self.phase][index].ran_on_cpu(n_tokens, n_active, kernels_ns * 1e-3, wall_us)
        return output

    def _begin(self, index: int, n_tokens: int) -> None:
        """A call is under way: collects what has ended; the call belongs to the current step or starts one."""
        self.consistent = False
        for experts in self.every:
            experts.collect(self.phase)
        step = self.tracker.next(index, n_tokens)
        if step.new:
            self.begin_step(step, n_tokens)

    def begin_step(self, step: Step, n_tokens: int) -> None:
        """Tells planners and lossy stage of a new step."""
        self.phase = step.phase
        for experts in self.every:
            experts.begin_step(step, n_tokens)
        if self.lossy is not None:
            self.lossy.begin_step(step)

    def _predict(self, space: CallSpace, top_k_index: torch.Tensor) -> tuple[Prediction, ...]:
        """Routing of as many following layers as the policy reads; of all within lookahead for a recorder, who is told.

        Predictions may be a workspace of the lookahead, filled anew by the layer's next call.
        """
        lookahead, planner, depth = self.lookahead, self.planner, None
        if space.experts is not self.experts:
            return ()
        if self.routing_recorder is None:
            if lookahead is None or planner is None or not planner.layers_ahead or planner.all_cached:
                return ()
            depth = planner.layers_ahead
        work = space.work
        predictions: tuple[Prediction, ...] = ()
        if lookahead is not None:
            if not lookahead.knows_all and not lookahead.learned(space.index):
                rows = work.hidden.reshape(work.host_hidden.shape)
                lookahead.learn(space.index, rows, host_index(top_k_index).reshape(len(rows), -1))
            predictions = lookahead.predict(space.index, work.hidden, work.host_hidden, work.dispatch.top_k, depth)
        if self.lossy is not None:
            predictions = self.lossy.policy.predicted(predictions)
        if self.routing_recorder is not None:
            self._record(self.routing_recorder, space, top_k_index, predictions)
        return predictions

    def _record(
        self, recorder: RoutingRecorder, space: CallSpace, top_k_index: torch.Tensor,
        predictions: tuple[Prediction, ...],
    ) -> None:  # fmt: skip
        """Tells the recorder the router's own routing, whatever a lossy policy makes of it."""
        dispatch, weights = space.work.dispatch, space.work.weights
        shape = dispatch.n_tokens, dispatch.top_k
        if self.lossy is not None:
            weights = self.lossy.router_weights
        given = dispatch.weights if weights is None else weights
        recorder(space.index, host_index(top_k_index).reshape(shape), given.reshape(shape).copy(), copied(predictions))

    def _end(
        self, index: int, output: torch.Tensor, hidden: torch.Tensor, start_ns: int, lanes_ns: int
    ) -> torch.Tensor:
        """Counts the call's time; the output as the caller wants it: dtype, device and shape of `hidden`."""
        if output.dtype is not hidden.dtype or output.device != hidden.device or output.shape != hidden.shape:
            output = output.to(hidden.device, hidden.dtype).reshape(hidden.shape)
        took_ns = perf_counter_ns() - start_ns
        counters = self.experts.stats.counters[self.phase][index]
        counters.wall_us += took_ns * 1e-3
        counters.overhead_us += (took_ns - lanes_ns) * 1e-3
        self.consistent = True
        return output

    # What the session asks for ----------------------------------------------------------------------------------

    def take_over(self, previous: ExpertsCall) -> None:
        """Continues another one's records, hooks and counts; its slots and plans are gone."""
        self.routing_recorder = previous.routing_recorder
        for experts, before in zip(self.every, previous.every, strict=False):
            experts.routing_counts, experts.tracing, experts.plans = (
                before.routing_counts, before.tracing, before.plans,
            )  # fmt: skip
            experts.timeline = before.timeline
        if self.lookahead is not None and previous.lookahead is not None:
            self.lookahead = previous.lookahead
        if self.lossy is not None and previous.lossy is not None:
            self.lossy.take_over(previous.lossy, self.lookahead)

    def trace(self, on: bool) -> None:
        """Starts recording (dropping an earlier recording), or stops it. `plans` are those of full precision."""
        self.drain()
        timeline: list[TaskRecord] = []
        for experts in self.every:
            if on:
                experts.timeline, experts.plans = timeline, []
            experts.tracing = on

    @property
    def timeline(self) -> list[TaskRecord]:
        """What ran while recording, in the order in which it became known."""
        return self.experts.timeline

    @property
    def plans(self) -> list[PlannedLayer]:
        """Plans and demands of the recorded calls."""
        return self.experts.plans

    @property
    def routing_counts(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: calls in which each expert was active."""
        return self.experts.routing_counts

    def drain(self) -> None:
        """Waits for the work under way and reports it; completes the timeline."""
        for experts in self.every:
            for queue in experts.queues:
                queue.accelerator.synchronize()
        self.report()

    def report(self) -> None:
        """Reports what has ended so far to planners and counters."""
        for experts in self.every:
            experts.collect(self.phase)

    def release(self) -> None:
        """Lets go of what a call that did not end keeps: its tensors may fill a device."""
        for experts in self.every:
            for space in experts.spaces:
                space.release()

    def slot_contents(self) -> dict[int, tuple[int, int]]:
        """Slot -> (layer, expert) that it holds or will once its copy ends."""
        return {} if self.planner is None else self.planner.contents()

    def close(self) -> None:
        """Ends what only this call path uses: another one follows, or the session is closed."""
        if self.lossy is not None:
            self.lossy.close()


class Experts:
    """The experts of all layers in one precision: records, slots, planner, counters, and the lanes that run them.

    `queues`: one for each accelerator; none: everything runs on the CPU lane. `queue_of`: each layer's. `planner` None:
    no slots. All methods work on the `CallSpace` of a layer's call, in the order in which they stand here.
    """

    def __init__(
        self, layers: Sequence[Layer], store: ExpertStore, planner: LayerPlanner | None, stats: StatsRecorder,
        queues: Sequence[TransferQueue] = (), queue_of: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.layers, self.store, self.planner, self.stats = list(layers), store, planner, stats
        self.costs: Costs | None = None if planner is None else planner.costs
        self.queues = list(queues)
        self._queue_of: list[TransferQueue | None] = [None] * len(self.layers)
        if queues:
            self._queue_of = [self.queues[unit] for unit in queue_of]
        self._slots: list[tuple[SlotTable | None, int]] = [(None, 0)] * len(self.layers)
        if planner is not None:
            tables = [planner.table(index) for index in range(len(self.layers))]
            self._slots = [(table, own * table.n_experts) for table, own in tables]
        self._runs = [_runner_of(layer) for layer in self.layers]
        n_experts = max(layer.num_experts for layer in layers)
        self.spaces = [CallSpace(self, index, layer, n_experts) for index, layer in enumerate(layers)]
        self.addresses = [store.addresses(index) for index in range(len(self.layers))]
        self.workspace = Workspace()
        self.routing_counts = np.zeros((len(self.layers), n_experts), np.float64)
        self.record_bytes = tuple(layer.spec.record_bytes for layer in layers)
        self.tracing, self.step = False, -1
        self.timeline: list[TaskRecord] = []
        self.plans: list[PlannedLayer] = []
        self._unplanned = PlanView()
        self._finished: CallSpace | None = None
        self._unreported: deque[CallSpace] = deque()

    def warm_up(self, transfers: Sequence[Transfer]) -> None:
        """Starts transfers before the first step; no call is charged for their bytes."""
        self._start_transfers(transfers, traced=False)
        self.stats.warmup_transfers += len(transfers)
        for queue in self.queues:
            queue.take_counts()

    def begin_step(self, step: Step, n_tokens: int) -> None:
        """A step starts."""
        self.step += 1
        if self.planner is not None:
            if step.new_sequence:
                self.planner.begin_sequence()
            self.planner.begin_step(step.phase, n_tokens)

    def collect(self, phase: Phase) -> None:
        """What has ended since the last call: copies, then the layer before, then work on accelerators.

        Planner and counters are told, records are kept while tracing. Raises LaneError where a copy failed.
        """
        for queue in self.queues:
            if queue.pending and queue.pending[0].event.done():
                self._end_transfers(queue, phase)
        finished, self._finished = self._finished, None
        if finished is not None and self.planner is not None:
            observing = not finished.step % OBSERVE_EVERY and finished.cpu_us > 0.0
            self.planner.end_layer(finished.index, self._observed_on_cpu(finished) if observing else ())
        unreported = self._unreported
        while unreported and unreported[0].ends[-1].done():  # a lane ends its work in the order of submission
            ended = unreported.popleft()
            accel_us = 0.0
            for end in ended.ends:
                start_us, end_us = end.span_us()
                accel_us += end_us - start_us
            ended.counters.accel_us += accel_us
            if ended.traced or not ended.step % OBSERVE_EVERY:
                self._report(ended, accel_us)
        while len(unreported) > MAX_UNREPORTED and not self.tracing:
            unreported.popleft()

    def plan(
        self, space: CallSpace, phase: Phase, predictions: tuple[Prediction, ...], cpu_ready_us: float,
        accel_ready_us: float, link_ready_us: float,
    ) -> None:  # fmt: skip
        """Where and in which order the call's experts run; the times say when each lane gets free."""
        planner, index, stats = self.planner, space.index, self.stats
        counters = space.counters = stats.counters[phase][index]
        slots, first_key = self._slots[index]
        if slots is None:
            demand = space.describe(phase, predictions, self.routing_counts[index])
        else:
            demand = space.describe(
                phase, predictions, self.routing_counts[index], first_key, slots.slot_of, slots.state
            )
        hits, late = space.found.tolist()
        stats.found(counters, index, demand.expert_ids, demand.n_tokens_total, hits, late)
        if space in self._unreported:
            self._unreported.remove(space)
        space.ends.clear()
        space.sent.clear()
        space.step, space.traced = self.step, self.tracing
        if planner is None:
            space.plan = self._unplanned
            space.plan.run_on_cpu(self.step, index, len(demand.expert_ids))
        else:
            space.plan = planner.decide(demand, cpu_ready_us, accel_ready_us, link_ready_us)
        plan = space.plan
        counters.cpu_experts += len(plan.cpu)
        counters.accel_experts += len(plan.accel)
        if plan.transfers or plan.prefetches:
            stats.moved(counters, plan, self.record_bytes)
        if self.tracing:
            unit = self.unit_of(index)
            self.plans.append(PlannedLayer(plan.plan(demand), demand.frozen(), unit=unit, link_unit=unit))

    def submit(self, space: CallSpace) -> None:
        """Starts the plan's transfers and its work on the accelerator; `compute` and `combine` must follow.

        They are interleaved so that each computation sees the slot contents that the plan means.
        """
        plan, queue = space.plan, self._queue_of[space.index]
        if queue is None:
            return
        sent = begun = 0
        if plan.moved or plan.awaited or space.traced:
            arrives = {position: at for at, position in enumerate(plan.moved)}
            for at, position in enumerate(plan.accel):
                needed = arrives.get(position, -1)
                if needed >= 0 or space.traced or position in plan.awaited:
                    self._send(space, queue, begun, at)
                    begun = at
                if needed >= sent:
                    self._start_transfers(plan.transfers[sent : needed + 1], space.traced)
                    sent = needed + 1
        self._send(space, queue, begun, len(plan.accel))
        if sent < len(plan.transfers):
            self._start_transfers(plan.transfers[sent:], space.traced)
        if plan.prefetches:
            self._start_transfers(plan.prefetches, space.traced)

    def _send(self, space: CallSpace, queue: TransferQueue, first: int, end: int) -> None:
        """Submits a part of the plan's accelerator experts as one piece of work."""
        if first == end:
            return
        plan, work = space.plan, space.work
        positions, slots = plan.accel[first:end], plan.slots[first:end]
        if queue.first_slot:
            slots = [slot - queue.first_slot for slot in slots]
        if queue.prepares:
            queue.before_compute(space.index, space.demand.expert_ids, positions, slots)
        space.ends.append(queue.accelerator.run_experts(space.layer.spec, slots, positions, work))
        space.sent.append(positions)

    def _start_transfers(self, transfers: Sequence[Transfer], traced: bool) -> None:
        """Submits transfers in the order of their links."""
        for transfer in transfers:
            queue = self._queue_of[transfer.layer]
            assert queue is not None
            queue.submit(transfer, self.store.record(transfer.layer, transfer.expert), self.step, traced=traced)

    def compute(self, space: CallSpace) -> None:
        """The CPU lane's experts, in the calling thread: all in one call, or one by one when traced."""
        rows, work, layer = space.plan.rows, space.work, space.layer
        space.cpu_us = 0.0
        space.ran.clear()
        n = space.n_cpu = len(space.plan.cpu)
        positions, records = space.positions[:n], space.records[:n]
        work.host_positions = positions
        if not n:
            return
        take_records(self.addresses[space.index], work.dispatch.expert_ids, rows[CPU, :n], positions, records)
        run, rest = self._runs[space.index], (work.dispatch, work.host_hidden, work.host_rows)
        if space.traced:
            self._compute_one_by_one(
                space, lambda at: run(layer.spec, records[at : at + 1], positions[at : at + 1], *rest)
            )
            return
        start_ns = perf_counter_ns()
        run(layer.spec, records, positions, *rest)
        space.cpu_us = (perf_counter_ns() - start_ns) * 1e-3

    def _compute_one_by_one(self, space: CallSpace, run: Callable[[int], None]) -> None:
        """`compute` with a record for each expert."""
        ids, n_tokens = space.demand.expert_ids, space.demand.n_tokens
        for at, position in enumerate(space.plan.cpu):
            start_us = perf_counter_ns() * 1e-3
            run(at)
            end_us = perf_counter_ns() * 1e-3
            space.cpu_us += end_us - start_us
            space.ran.append(
                TaskRecord("cpu", "cpu_expert", space.index, int(ids[position]), int(n_tokens[position]), 0, start_us,
                           end_us, space.step)
            )  # fmt: skip

    def combine(self, space: CallSpace) -> torch.Tensor:
        """Waits for the accelerator; the layer's output, float32 [T, H] or as the hidden states are.

        It is on the accelerator's device if that computed some of it, else on the host; a norm over the experts'
        outputs runs where its weights are.
        """
        queue, work = self._queue_of[space.index], space.work
        on_device = work.transform is not None and work.hidden.device.type != "cpu"
        if queue is not None and (space.ends or on_device):
            return queue.accelerator.combine(work, space.ends)
        return combine_on_host(work)

    def finish(self, space: CallSpace) -> None:
        """The call's result is there: the next `collect` tells the planner of it."""
        self._finished = space
        space.release()
        space.counters.cpu_us += space.cpu_us
        if space.traced:
            self.timeline += space.ran
        if space.ends:
            self._unreported.append(space)

    # What `collect` does ----------------------------------------------------------------------------------------

    def _end_transfers(self, queue: TransferQueue, phase: Phase) -> None:
        """Copies of a queue that have ended, in its order."""
        for item in queue.take_ended():
            move, us = item.transfer, item.ended_us()
            self.stats.counters[phase][move.layer].link_us += us
            if item.traced:
                self.timeline.append(item.record())
            if self.planner is not None:
                self.planner.end_transfer(move.layer, move.expert, move.slot, us)

    def _observed_on_cpu(self, space: CallSpace) -> tuple[ObservedTask, ...]:
        """The CPU lane's time of one expert, for the steps that correct the costs."""
        assert self.costs is not None
        n_tokens = space.demand.n_tokens[space.positions[: space.n_cpu]].tolist()
        us = share_out(space.cpu_us, n_tokens, partial(self.costs.cpu_us, space.index))
        return (ObservedTask("cpu", space.index, n_tokens[0], us),)

    def _report(self, space: CallSpace, accel_us: float) -> None:
        """A layer's work on the accelerator has ended: recorded if traced, and in some steps it corrects the costs."""
        ids, n_tokens = space.demand.expert_ids, space.demand.n_tokens
        if space.traced:
            unit = self.unit_of(space.index)
            for end, (position,) in zip(space.ends, space.sent, strict=True):
                self.timeline.append(
                    TaskRecord("accel", "accel_expert", space.index, int(ids[position]), int(n_tokens[position]), 0,
                               *end.span_us(), space.step, unit)
                )  # fmt: skip
        if self.costs is not None and self.planner is not None and not space.step % OBSERVE_EVERY:
            counts = n_tokens[[position for positions in space.sent for position in positions]].tolist()
            us = share_out(accel_us, counts, partial(self.costs.accel_us, space.index))
            self.planner.observe(ObservedTask("accel", space.index, counts[0], us))

    def link_busy_us(self, layer: int) -> float:
        """Expected us until the transfers under way have ended on the link of the layer's accelerator."""
        queue = self._queue_of[layer]
        if queue is None or self.costs is None or not queue.pending:
            return 0.0
        return queue.busy_us(perf_counter_ns() * 1e-3, self.costs.transfer_us)

    def unit_of(self, layer: int) -> int:
        """The number of the layer's accelerator."""
        queue = self._queue_of[layer]
        return 0 if queue is None else queue.unit


def _runner_of(layer: Layer) -> Callable[..., None]:
    """`run` of the layer's backend; without its checks where there is such a way: what is given here fits."""
    backend = layer.backend
    if isinstance(backend, NumbaBackend):
        return backend.run_trusted
    return lambda *arguments: None if backend is None else backend.run(*arguments)


def share_out(
    total_us: float, n_tokens: list[int], cost_us: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]
) -> float:
    """us of the first of several experts that took `total_us` together, in proportion to predicted costs."""
    if min(n_tokens) == max(n_tokens):
        return total_us / len(n_tokens)
    predicted = cost_us(np.asarray(n_tokens, np.int64))
    return float(total_us * predicted[0] / predicted.sum())
