"""The stage of a lossy policy in an experts call: it rewrites the routing into parts, which the one path then runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.lookahead import LinearGate, Lookahead
from hybrimoe.runtime.layer_call.routing import CallInputs, CallSpace
from hybrimoe.runtime.layer_call.stages import LossyStage as Stage
from hybrimoe.runtime.layer_call.stats import Counters
from hybrimoe.runtime.layer_call.steps import Step
from hybrimoe.runtime.lossy.deferral import DeferredLane
from hybrimoe.runtime.lossy.planes import PlaneQueue, PlaneStore
from scheduler import Phase
from scheduler.lossy import DEFERRED, FULL, LOW, LossyPolicy, Rewritten, Routing

Floats = npt.NDArray[np.float32]


class LossyStage:
    """Between router and planner. `experts` are those as stored, `low` their low-precision copies (None: not used).

    Both have slots, planner and costs of their own and share the lanes: the low part is planned behind the other one's
    work, both are submitted, the CPU lane runs both, then their outputs are added. Deferred experts have a CPU lane of
    their own: it goes on while the model does, and the next layer adds their output after its own CPU experts have run.
    `gates` tell the scores of all experts; None where the model's routers cannot be asked.
    """

    def __init__(self, policy: LossyPolicy, experts: Experts, low: Experts | None, gates: Lookahead | None) -> None:
        self.policy, self.experts, self.low, self.gates = policy, experts, low, gates
        self.deferred = DeferredLane(experts)
        self.router_weights: Floats = np.empty(0, np.float32)
        """The router's own weights [T * k] of the call under way, which the policy may have changed."""
        self._plane_queues = [queue for queue in experts.lanes.queues if isinstance(queue, PlaneQueue)]
        if self._plane_queues:  # which count themselves what crosses the link
            experts.record_bytes = (0,) * len(experts.layers)
        self._inputs: CallInputs | None = None
        self._rewritten: Rewritten | None = None
        self._from_before: torch.Tensor | None = None
        self._calls_before = 0, 0

    @property
    def planes(self) -> PlaneStore | None:
        """The experts' bit planes; None where they cross the link as they are."""
        return self._plane_queues[0].planes if self._plane_queues else None

    def begin_step(self, step: Step) -> None:
        """A step starts: what an unfinished one deferred is dropped."""
        self.deferred.drop()
        if step.new_sequence:
            self.policy.begin_sequence()

    def rewrite(self, phase: Phase, index: int, inputs: CallInputs) -> Sequence[CallSpace]:
        """The parts of a call that run now, each with the routing that the policy left it; without those of nobody."""
        counters = self.experts.stats.counters[phase][index]
        self._calls_before = counters.calls, counters.tokens
        rewritten = self._ask_policy(phase, index, inputs, counters)
        self._inputs, self._rewritten = inputs, rewritten
        for queue in self._plane_queues:
            queue.want(rewritten.whole)
        parts = []
        for experts, ids in self._parts(rewritten):
            space = experts.spaces[index]
            if space.take(inputs, ids, rewritten.weights, experts.workspace) and space.describe():
                parts.append(space)
        return parts

    def _ask_policy(self, phase: Phase, index: int, inputs: CallInputs, counters: Counters) -> Rewritten:
        layer, planner = self.experts.layers[index], self.experts.planner
        n_experts = layer.num_experts
        ids = np.where(inputs.ids < n_experts, inputs.ids, -1).astype(np.int32)
        self.router_weights = inputs.weights
        norms = np.linalg.norm(inputs.host_hidden, axis=1) if self.policy.needs_norms else None
        resident = np.zeros(n_experts, np.bool_) if planner is None else planner.resident_mask(index)[:n_experts]
        routing = Routing(index, phase, ids, inputs.weights, resident, self._scores(index, inputs), norms)
        rewritten = self.policy.rewrite(routing)
        if rewritten.parts is not None and layer.placement == "accelerator":  # its experts have no CPU lane
            now = np.where(rewritten.parts == DEFERRED, np.uint8(FULL), rewritten.parts)
            rewritten = dataclasses.replace(rewritten, parts=now)
        counters.routed += int((ids >= 0).sum())
        counters.skipped += rewritten.skipped
        counters.substituted += rewritten.substituted
        counters.lowered += rewritten.lowered
        return rewritten

    def _scores(self, index: int, inputs: CallInputs) -> Floats | None:
        """Gate probabilities float32 [T, E] of all experts of the layer."""
        if self.gates is None or not self.policy.needs_scores:
            return None
        if not self.gates.learned(index):
            self.gates.learn(index, inputs.hidden.reshape(inputs.host_hidden.shape), inputs.ids)
        gate = self.gates.gate(index)
        return gate.scores(inputs.host_hidden @ gate.weight.T)[1] if isinstance(gate, LinearGate) else None

    def _parts(self, rewritten: Rewritten) -> list[tuple[Experts, npt.NDArray[np.int32]]]:
        """Experts and their ids [T, k] of each part; entries of other parts are absent."""
        if rewritten.parts is None:
            return [(self.experts, rewritten.expert_ids)]
        every = [(FULL, self.experts)] if self.low is None else [(FULL, self.experts), (LOW, self.low)]
        return [
            (experts, np.where(rewritten.parts == part, rewritten.expert_ids, np.int32(-1))) for part, experts in every
        ]

    def lanes(self, space: CallSpace, parts: Sequence[CallSpace]) -> tuple[float, float, float]:
        """When CPU, accelerator and link get free for a part, in us from now.

        That is after both parts' transfers, and the work of the parts before (waiting inside it is left out).
        """
        index = space.index
        link_us = self.experts.lanes.link_busy_us(index)
        if self.low is not None:
            link_us += self.low.lanes.link_busy_us(index)
        cpu_us, accel_us = self.deferred.remaining_us(), 0.0
        for before in parts:
            if before is space:
                break
            cpu, accel = _predicted_us(before)
            cpu_us, accel_us = cpu_us + cpu, accel_us + accel
        return cpu_us, accel_us, link_us

    def before_compute(self, index: int, phase: Phase) -> None:
        """The parts are submitted: counts planes on the link, and waits for what the layer before deferred."""
        space = self.experts.spaces[index]
        for queue in self._plane_queues:
            n_bytes, rough = queue.take_counts()
            space.counters.transfer_bytes += n_bytes
            space.counters.lowered += sum(int(space.demand.n_tokens[position]) for position in rough)
        assert self._inputs is not None
        self._from_before = self.deferred.take(len(self._inputs.ids), self.experts.stats.counters[phase])

    def after_compute(self, index: int, phase: Phase) -> None:
        """The CPU lane is free: begins what this layer defers, counted as CPU experts that were not resident."""
        inputs, rewritten, experts = self._inputs, self._rewritten, self.experts
        assert inputs is not None
        assert rewritten is not None
        if rewritten.parts is None:
            return
        ids = np.where(rewritten.parts == DEFERRED, rewritten.expert_ids, np.int32(-1))
        space = self.deferred.space(inputs, index, ids, rewritten.weights)
        if space is None:
            return
        counters, demand = experts.stats.counters[phase][index], space.demand
        table = None if experts.planner is None else experts.planner.table(index)
        experts.stats.demand(counters, index, demand.expert_ids, len(inputs.ids), table)
        counters.cpu_experts += len(demand.expert_ids)
        counters.deferred += int((ids >= 0).sum())
        costs = experts.costs
        expected_us = 0.0 if costs is None else float(costs.cpu_us(index, demand.n_tokens).sum())
        self.deferred.start(space, expected_us)

    def joined(self, index: int, phase: Phase, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The outputs of all parts and of what was deferred to this layer, added: float32 [T, H]."""
        inputs, before = self._inputs, self._from_before
        assert inputs is not None
        counters = self.experts.stats.counters[phase][index]
        n_calls, n_tokens = self._calls_before
        counters.calls, counters.tokens = n_calls + 1, n_tokens + len(inputs.ids)
        self._inputs = self._rewritten = self._from_before = None
        if before is not None:
            outputs = [*outputs, before]
        if not outputs:
            return torch.zeros(inputs.host_hidden.shape)
        outputs = self._on_one_device(outputs)
        out = outputs[0]
        for more in outputs[1:]:
            out = out + more
        return out

    def _on_one_device(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs that can be added: a part whose experts all ran on the CPU has its own on the host."""
        devices = [output.device for output in outputs if output.device.type != "cpu"]
        if not devices:
            return outputs
        move, device = self.experts.workspace.to_device, devices[0]
        return [move(output, device) if output.device.type == "cpu" else output.to(device) for output in outputs]

    def take_over(self, previous: Stage, lookahead: Lookahead | None) -> None:
        """Continues a stage that ends here: its gates know the routers already."""
        previous.close()
        self.gates = previous.gates if lookahead is None else lookahead

    def close(self) -> None:
        """Ends the deferred lane."""
        self.deferred.close()


def _predicted_us(space: CallSpace) -> tuple[float, float]:
    """Predicted work of a planned part on the CPU and on the accelerator, waiting left out."""
    costs, plan, n_tokens = space.experts.costs, space.plan, space.demand.n_tokens
    if costs is None:
        return 0.0, 0.0
    cpu, accel = costs.cpu_us(space.index, n_tokens[plan.cpu]), costs.accel_us(space.index, n_tokens[plan.accel])
    return float(cpu.sum()), float(accel.sum())
