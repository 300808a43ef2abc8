"""The experts of all layers in one precision: what they are read from, planned by, run on and counted in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hybrimoe.runtime.layer_call.lanes import Lanes
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.reports import Reports
from hybrimoe.runtime.layer_call.routing import CallSpace, Workspace
from hybrimoe.runtime.layer_call.slots import TransferQueue
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.layer_call.steps import Step
from hybrimoe.runtime.store import ExpertStore
from scheduler import Phase, Prediction, Transfer
from scheduler.graph import PlannedLayer
from scheduler.planner.plan_view import PlanView
from scheduler.planner.protocol import Costs, LayerPlanner


class Experts:
    """`lanes` run a call, `reports` follow it to its end, `spaces` hold one layer's call each.

    `queues`: one for each accelerator; none: everything runs on the CPU lane. `queue_of`: each layer's. `planner` None:
    no slots. `plans`: of the calls that were traced.
    """

    def __init__(
        self, layers: Sequence[Layer], store: ExpertStore, planner: LayerPlanner | None, stats: StatsRecorder,
        queues: Sequence[TransferQueue] = (), queue_of: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.layers, self.store, self.planner, self.stats = list(layers), store, planner, stats
        self.costs: Costs | None = None if planner is None else planner.costs
        self.lanes = Lanes(self.layers, store, planner, queues, queue_of)
        self.reports = Reports(planner, stats, queues, self.lanes.tier)
        n_experts = max(layer.num_experts for layer in layers)
        self.spaces = [CallSpace(self, index, layer, n_experts) for index, layer in enumerate(layers)]
        self.workspace = Workspace(read_by_device=any(queue.accelerator.needs_pinned_host() for queue in queues))
        self.count_in(np.zeros((len(self.layers), n_experts), np.float64))
        self.record_bytes = tuple(layer.spec.record_bytes for layer in layers)
        self.tracing, self.step = False, -1
        self.plans: list[PlannedLayer] = []
        self._unplanned = PlanView()

    def count_in(self, routing_counts: npt.NDArray[np.float64]) -> None:
        """Counts uses of experts in routing_counts float64 [layers, experts] from here on."""
        self.routing_counts = routing_counts
        for index, space in enumerate(self.spaces):
            if self.planner is None:
                space.count_in(routing_counts[index])
            else:
                table, own = self.planner.table(index)
                space.count_in(routing_counts[index], own * table.n_experts, table.slot_of, table.state)

    def warm_up(self, transfers: Sequence[Transfer]) -> None:
        """Starts transfers before the first step; no call is charged for their bytes."""
        self.lanes.start_transfers(transfers, self.step, traced=False)
        self.stats.warmup_transfers += len(transfers)
        for queue in self.lanes.queues:
            queue.take_counts()

    def begin_step(self, step: Step, n_tokens: int) -> None:
        """A step starts."""
        self.step += 1
        if self.lanes.tiered is not None:
            self.lanes.tiered.begin_step(new_sequence=step.new_sequence)
        if self.planner is not None:
            if step.new_sequence:
                self.planner.begin_sequence()
            self.planner.begin_step(step.phase, n_tokens)

    def plan(
        self, space: CallSpace, phase: Phase, predictions: tuple[Prediction, ...], cpu_ready_us: float,
        accel_ready_us: float, link_ready_us: float,
    ) -> None:  # fmt: skip
        """Where and in which order the described call's experts run; the times say when each lane gets free."""
        planner, index = self.planner, space.index
        self.expect(space, phase, predictions)
        if planner is None:
            space.plan = self._unplanned
            space.plan.run_on_cpu(self.step, index, len(space.demand.expert_ids))
        else:
            host, tier = None, self.lanes.tier
            if tier is not None:
                host = tier.view(index, space.demand.expert_ids, planner.costs.read_us(index))
            space.plan = planner.decide(space.demand, cpu_ready_us, accel_ready_us, link_ready_us, host)
        demand, plan = space.demand, space.plan
        hits, late = space.found.tolist()
        self.stats.found(
            space.counters, index, demand.expert_ids, demand.n_tokens_total, hits, late, plan, self.record_bytes
        )
        if self.tracing:
            space.unit = self.lanes.unit_of(index)
            self.plans.append(PlannedLayer(plan.plan(demand), demand.frozen(), accelerator=space.unit, link=space.unit))

    def expect(self, space: CallSpace, phase: Phase, predictions: tuple[Prediction, ...]) -> None:
        """A described call is about to be planned."""
        demand = space.demand
        demand.phase, demand.predictions = phase, predictions
        space.counters = self.stats.counters[phase][space.index]
        if space.ends:
            self.reports.forget(space)
        space.step, space.traced, space.stands_for, space.recorded = self.step, self.tracing, 1, False
        space.turns = None
