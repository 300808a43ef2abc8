"""A runner with a lossy policy: relaxes the routing, then runs its parts side by side (full, low copy, late)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import Dispatch
from gpu_kernels.streams import clock_us
from hybrimoe.runtime.layer_call.executor import LayerCall, LayerRun
from hybrimoe.runtime.layer_call.lookahead import LinearGate, Lookahead
from hybrimoe.runtime.layer_call.routing import CallInputs, call_inputs
from hybrimoe.runtime.layer_call.runner import PlannedCall, Runner, postpone_weights
from hybrimoe.runtime.layer_call.stats import Counters
from hybrimoe.runtime.layer_call.steps import Step
from hybrimoe.runtime.lossy.deferral import DeferredLane
from hybrimoe.runtime.lossy.planes import PlaneSlots, PlaneStore
from scheduler import LaneState, LayerPlan, Prediction, Transfer
from scheduler.lossy import FULL, LATE, LOW, Relaxation, Relaxed, Routing

Floats = npt.NDArray[np.float32]


class RelaxedRunner(Runner):
    """Runs the relaxed routing of each layer. `low`: the runner of the low-precision copies, None where none are used.

    Both parts have slots, planner and costs of their own and share the lanes: the low part is planned behind the other
    one's work, both are submitted, the CPU lane runs both, then their outputs are added. Late experts have a CPU lane
    of their own: it goes on while the model does, and the next layer adds their output before its own CPU experts run.
    `gates` tell the scores of all experts; None where the model's routers cannot be asked.
    """

    def __init__(self, *args: Any, relaxation: Relaxation, low: Runner | None, gates: Lookahead | None) -> None:
        super().__init__(*args)
        self.relaxation, self.low, self.gates = relaxation, low, gates
        self._given: Floats = np.empty(0, np.float32)
        self.late = DeferredLane(self.executor)
        self._planes = [slots for slots in self.executor.caches if isinstance(slots, PlaneSlots)]
        if self._planes:  # which count what crosses the link themselves
            self._record_bytes = (0,) * len(self.layers)
        if low is not None:
            low.timeline = self.timeline

    def run(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One call of layer `index`; see HybridExperts.forward."""
        began_us = clock_us()
        inputs = call_inputs(hidden, top_k_index, top_k_weights, self.layers[index].spec.hidden)
        n_tokens = len(inputs.ids)
        if not n_tokens:
            return torch.zeros_like(hidden)
        self.clean = False
        self.begin_step(self.tracker.next(index, n_tokens), n_tokens)
        counters = self.counters(index)
        calls, tokens = counters.calls, counters.tokens
        relaxed = self._relax(index, inputs, counters)
        out, lanes_us = self._run_parts(index, inputs, relaxed, top_k_index)
        counters.calls, counters.tokens = calls + 1, tokens + n_tokens
        result = out.to(hidden.device, hidden.dtype).reshape(hidden.shape)
        took_us = clock_us() - began_us
        counters.wall_us += took_us
        counters.overhead_us += took_us - lanes_us
        self.clean = True
        return result

    @property
    def planes(self) -> PlaneStore | None:
        """The experts' bit planes; None where they cross the link as they are."""
        return self._planes[0].planes if self._planes else None

    def begin_step(self, step: Step, n_tokens: int) -> None:
        """Tells both planners and the relaxation where this call belongs."""
        super().begin_step(step, n_tokens)
        if step.new:
            self.late.drop()  # of a step that did not go on
        if self.low is not None:
            self.low.begin_step(step, n_tokens)
        if step.new and step.new_sequence:
            self.relaxation.begin_sequence()

    def warm_up(self, transfers: Sequence[Transfer]) -> None:
        """Starts transfers before the first step; no call is charged for their bytes."""
        super().warm_up(transfers)
        for slots in self._planes:
            slots.take_counts()

    def take_over(self, previous: Runner) -> None:
        """Continues another runner's records, hooks and counts."""
        super().take_over(previous)
        if self.low is not None:
            self.low.timeline = self.timeline
        if isinstance(previous, RelaxedRunner):
            previous.close()
            self.gates = previous.gates if self.lookahead is None else self.lookahead

    def close(self) -> None:
        """Ends the lane of the late experts."""
        self.late.close()

    def trace(self, on: bool) -> None:
        """Starts recording (dropping an earlier recording), or stops it. `plans` are those of full precision."""
        super().trace(on)
        if self.low is not None:
            self.low.trace(on)
            self.low.timeline = self.timeline

    def report(self) -> None:
        """Reports what has ended so far to planners and counters."""
        super().report()
        if self.low is not None:
            self.low.report()

    def _relax(self, index: int, inputs: CallInputs, counters: Counters) -> Relaxed:
        n_experts = self.layers[index].num_experts
        ids = np.where(inputs.ids < n_experts, inputs.ids, -1).astype(np.int32)
        self._given = inputs.weights
        norms = np.linalg.norm(inputs.host_hidden, axis=1) if self.relaxation.needs_norms else None
        routing = Routing(
            index, self.phase, ids, inputs.weights, self._resident(index, n_experts), self._scores(index, inputs), norms
        )
        relaxed = self.relaxation.relax(routing)
        if relaxed.parts is not None and self.layers[index].placement == "accelerator":  # its experts have no CPU lane
            relaxed = dataclasses.replace(relaxed, parts=np.where(relaxed.parts == LATE, np.uint8(FULL), relaxed.parts))
        counters.routed += int((ids >= 0).sum())
        counters.skipped += relaxed.skipped
        counters.substituted += relaxed.substituted
        counters.lowered += relaxed.lowered
        return relaxed

    def _resident(self, index: int, n_experts: int) -> npt.NDArray[np.bool_]:
        """bool [n_experts]: bytes of the full-precision expert are in a slot now."""
        if self.planner is None:
            return np.zeros(n_experts, np.bool_)
        return self.planner.resident_mask(index)[:n_experts]

    def _scores(self, index: int, inputs: CallInputs) -> Floats | None:
        """Gate probabilities float32 [T, E] of all experts of the layer."""
        if self.gates is None or not self.relaxation.needs_scores:
            return None
        if not self.gates.learned(index):
            self.gates.learn(index, inputs.hidden.reshape(inputs.host_hidden.shape), inputs.ids)
        gate = self.gates.gate(index)
        return gate.scores(inputs.host_hidden @ gate.weight.T)[1] if isinstance(gate, LinearGate) else None

    def _run_parts(
        self, index: int, inputs: CallInputs, relaxed: Relaxed, top_k_index: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The output, float32 [T, H], and the lanes' us."""
        running: list[tuple[Runner, PlannedCall, LayerRun]] = []
        lanes_us = 0.0
        for slots in self._planes:
            slots.want(relaxed.whole)
        for runner, ids in self._parts(relaxed):
            opened = self._plan_part(runner, index, inputs, ids, relaxed.weights, top_k_index, running)
            if opened is not None:
                start_us = clock_us()
                running.append((runner, opened, runner.executor.submit(opened.plan, opened.call, trace=runner.tracing)))
                lanes_us += clock_us() - start_us
                for slots in self._planes:
                    self._count_planes(slots, opened, self.counters(index))
        start_us = clock_us()
        before = self._take_late(len(inputs.ids))
        for runner, opened, run in running:
            runner.executor.compute(opened.plan, opened.call, run)
        if relaxed.parts is not None:
            self._start_late(index, inputs, np.where(relaxed.parts == LATE, relaxed.expert_ids, -1), relaxed.weights)
        outputs = [runner.executor.combine(opened.call, run) for runner, opened, run in running]
        lanes_us += clock_us() - start_us
        for runner, opened, run in running:
            runner.finish_call(opened.plan, opened.demand, run, runner.counters(index))
        if before is not None:
            outputs.append(before.to(outputs[0].device) if outputs else before)
        if not outputs:
            return torch.zeros(inputs.host_hidden.shape), lanes_us
        out = outputs[0]
        for more in outputs[1:]:
            out = out + more
        return out, lanes_us

    @staticmethod
    def _count_planes(slots: PlaneSlots, opened: PlannedCall, counters: Counters) -> None:
        """Bytes that this call put on the link, and pairs that are computed without their expert's low bits."""
        n_bytes, rough = slots.take_counts()
        counters.transfer_bytes += n_bytes
        call = opened.call
        counters.lowered += sum(call.n_tokens[call.position[expert]] for expert in rough)

    def _take_late(self, n_tokens: int) -> torch.Tensor | None:
        """The output of the late experts of the layer before; None where there were none."""
        late = self.late.take(n_tokens)
        if late is None:
            return None
        self.counters(late.run.layer).cpu_us += late.run.cpu_us
        if late.run.traced:
            self.timeline += late.run.records
        return late.output

    def _start_late(self, index: int, inputs: CallInputs, ids: npt.NDArray[np.integer], weights: Floats) -> None:
        """Begins the layer's late experts on copies of its inputs; counted as CPU experts that were not resident."""
        own = dataclasses.replace(inputs, host_hidden=inputs.host_hidden.copy())
        layer = self.layers[index]
        work = own.work(ids, weights.copy(), layer.num_experts, self.late.workspace)
        experts = work.dispatch.expert_ids
        if not len(experts):
            return
        norm = layer.transform()
        if norm is not None:
            postpone_weights(work, norm)
        counters = self.counters(index)
        table = None if self.planner is None else self.planner.table(index)
        self._stats.demand(counters, index, experts, work.dispatch.n_tokens, table)
        counters.cpu_experts += len(experts)
        counters.deferred += int((ids >= 0).sum())
        assert layer.backend is not None
        plan = LayerPlan(self._step_index, index, tuple(experts.tolist()), (), (), (), (), 0.0)
        call = LayerCall(layer.spec, layer.backend, work)
        costs = self.costs
        expected_us = 0.0 if costs is None else float(costs.cpu_us(index, np.array(call.n_tokens)).sum())
        self.late.start(plan, call, trace=self.tracing, expected_us=expected_us)

    def _parts(self, relaxed: Relaxed) -> list[tuple[Runner, npt.NDArray[np.int32]]]:
        """Runner and expert ids [T, k] of each part; entries of other parts are absent."""
        if relaxed.parts is None:
            return [(self, relaxed.expert_ids)]
        ids = relaxed.expert_ids
        absent = np.int32(-1)
        runners = [(FULL, self)] if self.low is None else [(FULL, self), (LOW, self.low)]
        return [(runner, np.where(relaxed.parts == part, ids, absent)) for part, runner in runners]

    def _plan_part(
        self, runner: Runner, index: int, inputs: CallInputs, ids: npt.NDArray[np.int32], weights: Floats,
        top_k_index: torch.Tensor, before: list[tuple[Runner, PlannedCall, LayerRun]],
    ) -> PlannedCall | None:  # fmt: skip
        """Plans one part behind those that were submitted; None where it has no expert."""
        layer = runner.layers[index]
        work = inputs.work(ids, weights, layer.num_experts, runner.workspace)
        if not len(work.dispatch.expert_ids):
            return None
        norm = layer.transform()
        if norm is not None:
            postpone_weights(work, norm)
        return runner.plan_call(index, layer, work, top_k_index, runner.counters(index), self._lanes(index, before))

    def _lanes(self, index: int, before: list[tuple[Runner, PlannedCall, LayerRun]]) -> LaneState:
        """When the lanes get free: both parts' transfers, and the predicted work of the parts before."""
        link_us = self.link_busy_us(index) + (0.0 if self.low is None else self.low.link_busy_us(index))
        cpu_us, accel_us = self.late.remaining_us(), 0.0
        for runner, opened, _ in before:
            cpu, accel = runner.predicted_us(opened)
            cpu_us, accel_us = cpu_us + cpu, accel_us + accel
        return LaneState(cpu_us, accel_us, link_us)

    def _predict(
        self, lookahead: Lookahead, index: int, work: Any, top_k_index: torch.Tensor
    ) -> tuple[Prediction, ...]:
        """Predicted demand after the relaxation."""
        return self.relaxation.predicted(super()._predict(lookahead, index, work, top_k_index))

    def _router_weights(self, dispatch: Dispatch) -> Floats:
        """The router's own weights, which the relaxation may have changed."""
        return self._given.reshape(-1)
