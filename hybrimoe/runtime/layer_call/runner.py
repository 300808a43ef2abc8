"""The path of one layer call: tensors -> demand -> plan -> lanes -> output; what was observed goes to the planner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cpu_kernels import Dispatch
from cpu_kernels.backends.numba_backend import NumbaBackend
from gpu_kernels import LayerWork
from gpu_kernels.streams import clock_us
from hybrimoe.runtime.layer_call.executor import Executor, LayerCall, LayerRun
from hybrimoe.runtime.layer_call.layers import Layer, apply_norm
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.observer import Observer
from hybrimoe.runtime.layer_call.routing import Workspace, host_index, layer_demand, layer_work
from hybrimoe.runtime.layer_call.stats import Counters, StatsRecorder
from hybrimoe.runtime.layer_call.steps import Step, StepTracker
from scheduler import (
    LaneState,
    LayerDemand,
    LayerEnded,
    LayerPlan,
    Phase,
    Prediction,
    Transfer,
)
from scheduler.graph import PlannedLayer
from scheduler.planner.protocol import Costs, LayerPlanner
from scheduler.records import TaskRecord

RoutingRecorder = Callable[[int, npt.NDArray[np.integer], npt.NDArray[np.float32], tuple[Prediction, ...]], None]


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One layer call that was planned and not yet performed."""

    demand: LayerDemand
    plan: LayerPlan
    call: LayerCall


class Runner:
    """Runs layer calls of a started session. `planner` None: no slots, every expert runs on the CPU lane."""

    def __init__(
        self, layers: Sequence[Layer], executor: Executor, planner: LayerPlanner | None, stats: StatsRecorder,
        tracker: StepTracker,
    ) -> None:  # fmt: skip
        self.layers = list(layers)
        self.executor = executor
        self.planner = planner
        self.costs: Costs | None = None if planner is None else planner.costs
        self._stats = stats
        self.tracker = tracker
        self.workspace = Workspace()
        self._norms = [layer.transform() for layer in layers]
        self._n_experts = max(layer.num_experts for layer in layers)
        self._record_bytes = tuple(layer.spec.record_bytes for layer in layers)
        self._step_index = -1
        self.phase: Phase = "prefill"
        self.lookahead: Lookahead | None = None
        self.routing_recorder: RoutingRecorder | None = None
        self.tracing = False
        self.clean = True
        """False while a call runs, and after one that did not end: slots and plans may then disagree."""
        self.observer = Observer(executor.caches, planner, stats)
        self.plans: list[PlannedLayer] = []
        self.activations = np.zeros((len(layers), self._n_experts), dtype=np.float64)

    def run(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One call of layer `index`; see HybridExperts.forward."""
        began_us = clock_us()
        layer = self.layers[index]
        alone = self.planner is None and self.routing_recorder is None and not self.tracing
        if alone and self._norms[index] is None:
            done = self._run_routed(index, layer, hidden, top_k_index, top_k_weights, began_us)
            if done is not None:
                return done
        work = layer_work(hidden, top_k_index, top_k_weights, layer.num_experts, layer.spec.hidden, self.workspace)
        if not len(work.dispatch.expert_ids):
            return torch.zeros_like(hidden)
        self.clean = False
        norm = self._norms[index]
        if norm is not None:
            postpone_weights(work, norm)
        self.begin_step(self.tracker.next(index, work.dispatch.n_tokens), work.dispatch.n_tokens)
        counters = self._stats.of(self.phase, index)
        if alone:
            out, lanes_us = self._run_on_cpu(index, layer, work, counters)
        else:
            out, lanes_us = self._run_planned(index, layer, work, top_k_index, counters)
        ready = out.dtype is hidden.dtype and out.shape == hidden.shape and out.device == hidden.device
        result = out if ready else out.to(hidden.device, hidden.dtype).reshape(hidden.shape)
        took_us = clock_us() - began_us
        counters.wall_us += took_us
        counters.overhead_us += took_us - lanes_us
        self.clean = True
        return result

    def _run_routed(
        self, index: int, layer: Layer, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
        began_us: float,
    ) -> torch.Tensor | None:  # fmt: skip
        """The short way of a call of few tokens without slots; None where it does not apply: nothing has happened."""
        backend = layer.backend
        if not isinstance(backend, NumbaBackend):
            return None
        self.clean = False
        start_us = clock_us()
        done = backend.run_routed(layer.spec, self.executor.addresses(index), hidden, top_k_index, top_k_weights)
        cpu_us = clock_us() - start_us
        self.clean = True
        if done is None:
            return None
        out, n_active = done
        if n_active:
            n_tokens = len(top_k_index)
            self.begin_step(self.tracker.next(index, n_tokens), n_tokens)
            self.counters(index).ran_on_cpu(n_tokens, n_active, cpu_us, clock_us() - began_us)
        return out

    def _run_on_cpu(self, index: int, layer: Layer, work: LayerWork, counters: Counters) -> tuple[torch.Tensor, float]:
        """Without slots there is nothing to plan. Returns the output and the lanes' us."""
        ids = work.dispatch.expert_ids
        self._stats.demand(counters, index, ids, work.dispatch.n_tokens, None)
        counters.cpu_experts += len(ids)
        assert layer.backend is not None
        start_us = clock_us()
        out = self.executor.run_on_cpu(index, layer.spec, layer.backend, work)
        us = clock_us() - start_us
        counters.cpu_us += us
        return out, us

    def _run_planned(
        self, index: int, layer: Layer, work: LayerWork, top_k_index: torch.Tensor, counters: Counters
    ) -> tuple[torch.Tensor, float]:
        """Demand, plan, lanes, observation. Returns the output and the lanes' us."""
        opened = self.plan_call(index, layer, work, top_k_index, counters)
        start_us = clock_us()
        out, run = self.executor.run(opened.plan, opened.call, trace=self.tracing)
        us = clock_us() - start_us
        self.finish_call(opened.plan, opened.demand, run, counters)
        return out, us

    def plan_call(
        self, index: int, layer: Layer, work: LayerWork, top_k_index: torch.Tensor, counters: Counters,
        lanes: LaneState | None = None,
    ) -> PlannedCall:  # fmt: skip
        """Demand and plan of one call, counted. `lanes`: when they get free; None: only the link's queue is known."""
        self.observer.transfers(self.phase)
        demand = self._demand(index, work, top_k_index)
        table = None if self.planner is None else self.planner.table(index)
        self._stats.demand(counters, index, demand.expert_ids, demand.n_tokens_total, table)
        plan = self._plan(index, demand, lanes)
        self._stats.plan(counters, plan, self._record_bytes)
        assert layer.backend is not None
        return PlannedCall(demand, plan, LayerCall(layer.spec, layer.backend, work))

    def counters(self, index: int) -> Counters:
        """What calls of this layer are counted in, in the phase under way."""
        return self._stats.of(self.phase, index)

    def predicted_us(self, opened: PlannedCall) -> tuple[float, float]:
        """Predicted work of a planned call on the CPU and on the accelerator, waiting left out."""
        costs, plan, call = self.costs, opened.plan, opened.call
        if costs is None:
            return 0.0, 0.0
        cpu = [call.n_tokens[call.position[expert]] for expert in plan.cpu]
        accel = [call.n_tokens[call.position[expert]] for expert in plan.accel]
        return float(costs.cpu_us(plan.layer, np.array(cpu, np.int64)).sum()), float(
            costs.accel_us(plan.layer, np.array(accel, np.int64)).sum()
        )

    @property
    def timeline(self) -> list[TaskRecord]:
        """What ran while recording, in the order in which it became known."""
        return self.observer.timeline

    @timeline.setter
    def timeline(self, records: list[TaskRecord]) -> None:
        self.observer.timeline = records

    def warm_up(self, transfers: Sequence[Transfer]) -> None:
        """Starts transfers before the first step."""
        if transfers:
            self.executor.start_transfers(transfers, self._step_index)
            self._stats.warmup_transfers += len(transfers)

    def take_over(self, previous: Runner) -> None:
        """Continues another runner's records, hooks and counts (its slots and plans are gone)."""
        self.routing_recorder, self.activations = previous.routing_recorder, previous.activations
        self.tracing, self.timeline, self.plans = previous.tracing, previous.timeline, previous.plans
        if self.lookahead is not None and previous.lookahead is not None:
            self.lookahead = previous.lookahead

    def trace(self, on: bool) -> None:
        """Starts recording (dropping an earlier recording), or stops it."""
        self.drain()
        if on:
            self.timeline, self.plans = [], []
        self.tracing = on

    def drain(self) -> None:
        """Waits for the work under way and reports it; completes the timeline."""
        for slots in self.executor.caches:
            slots.accelerator.synchronize()
        self.report()

    def close(self) -> None:
        """Ends what only this runner uses: another one follows, or the session is closed."""

    def report(self) -> None:
        """Reports what has ended so far to planner and counters."""
        self.observer.transfers(self.phase)
        self.observer.runs(self.phase, keep=self.tracing)

    def slot_contents(self) -> dict[int, tuple[int, int]]:
        """Slot -> (layer, expert) that it holds or will once its copy ends."""
        return {slot: key for slots in self.executor.caches for slot, key in slots.contents().items()}

    def begin_step(self, step: Step, n_tokens: int) -> None:
        """Tells the planner where this call belongs, if it is the first of a step."""
        self.phase = step.phase
        if not step.new:
            return
        self._step_index += 1
        if self.planner is not None:
            if step.new_sequence:
                self.planner.begin_sequence()
            self.planner.begin_step(step.phase, n_tokens)

    def _demand(self, index: int, work: LayerWork, top_k_index: torch.Tensor) -> LayerDemand:
        dispatch = work.dispatch
        predictions: tuple[Prediction, ...] = ()
        if self.lookahead is not None:
            predictions = self._predict(self.lookahead, index, work, top_k_index)
        if self.routing_recorder is not None:
            shape = (dispatch.n_tokens, dispatch.top_k)
            self.routing_recorder(
                index,
                host_index(top_k_index).reshape(shape),
                self._router_weights(dispatch).reshape(shape),
                predictions,
            )
        return layer_demand(index, self.phase, dispatch, predictions, self.activations[index])

    def _router_weights(self, dispatch: Dispatch) -> npt.NDArray[np.float32]:
        """The router's weights float32 [T * k] of the call under way."""
        return dispatch.weights

    def _predict(
        self, lookahead: Lookahead, index: int, work: LayerWork, top_k_index: torch.Tensor
    ) -> tuple[Prediction, ...]:
        """Routing of as many following layers as the policy reads; of all within lookahead for a recorder."""
        planner, depth = self.planner, None
        if self.routing_recorder is None:
            if planner is None or not planner.layers_ahead or planner.all_cached:
                return ()
            depth = planner.layers_ahead
        if not lookahead.learned(index):
            hidden = work.hidden.reshape(work.host_hidden.shape)
            lookahead.learn(index, hidden, host_index(top_k_index).reshape(len(hidden), -1))
        return lookahead.predict(index, work.hidden, work.host_hidden, work.dispatch.top_k, depth)

    def _plan(self, index: int, demand: LayerDemand, lanes: LaneState | None) -> LayerPlan:
        if self.planner is None:
            return LayerPlan(self._step_index, index, tuple(demand.expert_ids.tolist()), (), (), (), (), 0.0)
        if lanes is None:
            lanes = LaneState(link_ready_us=self.link_busy_us(index))
        return self.planner.plan_layer(demand, lanes)

    def link_busy_us(self, layer: int) -> float:
        """Expected us until this runner's transfers under way have ended on the link of the layer's accelerator."""
        slots = self.executor.slots_of(layer)
        if slots is None or self.costs is None:
            return 0.0
        return slots.link_busy_us(clock_us(), self.costs.transfer_us)

    def finish_call(self, plan: LayerPlan, demand: LayerDemand, run: LayerRun, counters: Counters) -> None:
        """Tells planner and counters what a performed plan took."""
        counters.cpu_us += run.cpu_us
        self.observer.began(run)
        if plan.transfers:  # an expert that is not to stay leaves when its layer has ended
            self.observer.transfers(self.phase)
        if self.planner is not None:
            self.planner.on_event(LayerEnded(plan.layer, self.observer.cpu_tasks(run)))
        if self.tracing:
            self.plans.append(PlannedLayer(plan, demand, unit=run.unit, link_unit=run.unit))
            self.timeline += run.records
        self.observer.runs(self.phase, keep=self.tracing)


def postpone_weights(work: LayerWork, norm: nn.Module) -> None:
    """Families with a norm over each expert's output: the routing weights are multiplied in after it."""
    dispatch = work.dispatch
    work.transform, work.weights = partial(apply_norm, norm), dispatch.weights
    ones = np.ones_like(dispatch.weights)
    work.dispatch = Dispatch(
        dispatch.top_k, dispatch.n_tokens, dispatch.expert_ids, dispatch.offsets, dispatch.rows, ones
    )
