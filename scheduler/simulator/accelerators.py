"""Simulation with several accelerators: a planner and a link each (or one link for all), one CPU.

``planner_group`` says which accelerator has which layers. A layer waits for the one before it, so at any time one
accelerator computes experts, while the others' links finish what they carry. Contention on host memory is that of the
CPU and the computing layer's link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand
from scheduler.graph.tasks import DenseTimes, PlannedLayer
from scheduler.machine.costs import CostModel
from scheduler.plan import LayerPlan
from scheduler.planner.group import PlannerGroup
from scheduler.planner.layer_blocks import Block, blocks
from scheduler.planner.planner import Planner
from scheduler.records import TaskRecord
from scheduler.setting import Scorer
from scheduler.simulator.engine import Copy, Engine
from scheduler.simulator.simulator import Simulator
from scheduler.simulator.stats import PhaseStats


class MultiEngine(Engine):
    """An engine with a link for each accelerator; ``link`` is the link in use."""

    def __init__(self, n_links: int, *args: Any, **kwargs: Any) -> None:
        self._queues: list[list[Copy]] = [[] for _ in range(n_links)]
        self._carried_to = [0.0] * n_links
        self.link = 0
        super().__init__(*args, **kwargs)

    @property
    def _queue(self) -> list[Copy]:
        return self._queues[self.link]

    @_queue.setter
    def _queue(self, queue: list[Copy]) -> None:
        self._queues[self.link] = queue

    def _advance_link(self, stop_us: float, start_us: float | None = None) -> None:
        """Every link goes on until ``stop_us``: this one from ``start_us``, the others from where they are."""
        computing = self.link
        for link in range(len(self._queues)):
            self.link = link
            begin = start_us if link == computing and start_us is not None else self._carried_to[link]
            super()._advance_link(stop_us, begin)
            self._carried_to[link] = stop_us
        self.link = computing


class MultiSimulator(Simulator):
    """A simulator of ``profile.accel.count`` accelerators. Slots are the sum over all of them."""

    planner: PlannerGroup  # type: ignore[assignment]

    def _planner(self, scorer: Scorer | None, prefetch_scorer: Scorer | None) -> PlannerGroup:  # type: ignore[override]
        config, shape = self.config, self.shape
        profile = self.dense.planner_profile(config.context_tokens)
        future = self._future(self.steps[0].sequence)

        def make(part: Block) -> Planner:
            believed = CostModel(profile, replace(shape, n_layers=part.n_layers), config.expert_dtype)
            own = None if future is None else future.layers(part.first_layer, part.n_layers)
            return Planner(
                part.n_layers, shape.n_experts, part.n_slots, believed, policy=config.policy,
                lookahead=config.lookahead, scorer=scorer, prefetch_scorer=prefetch_scorer,
                future=own, first_layer=part.first_layer, first_slot=part.first_slot, **config.params,
            )  # fmt: skip

        return PlannerGroup(blocks(shape.n_layers, self.n_slots, self.profile.accel.count), make)

    def _engine(self, keep_records: bool, frequencies: NDArray[np.float64] | None) -> Engine:
        one = super()._engine(keep_records, frequencies)
        n_links = 1 if self.profile.link.shared else self.profile.accel.count
        return MultiEngine(n_links, one.costs, one.expert_bytes, one.keep_records, one.host, one.handoff_us)

    def _run_layer(self, index: int, demand: LayerDemand, dense: DenseTimes, stats: PhaseStats) -> None:
        assert isinstance(self.engine, MultiEngine)
        self.engine.link = self.link_of(demand.layer)
        super()._run_layer(index, demand, dense, stats)

    def planners(self) -> Sequence[Planner]:
        return self.planner.planners

    def _planned(self, plan: LayerPlan, demand: LayerDemand, dense: DenseTimes) -> PlannedLayer:
        return PlannedLayer(plan, demand, dense, self.planner.accelerator_of(plan.layer), self.link_of(plan.layer))

    def _resident(self, layer: int) -> NDArray[np.bool_]:
        return self.planner.resident_mask(layer)

    def resident_slots(self) -> dict[int, tuple[int, int]]:
        filled = self.planner.contents().items()
        return {slot: key for slot, key in filled if self.planner.resident_mask(key[0])[key[1]]}

    def link_of(self, layer: int) -> int:
        """The link that brings a layer's experts."""
        return 0 if self.profile.link.shared else self.planner.accelerator_of(layer)

    @property
    def records(self) -> list[TaskRecord]:
        indices = {"accel": self.planner.accelerator_of, "link": self.link_of}
        return [
            replace(record, accelerator=indices[record.lane](record.layer)) if record.lane in indices else record
            for record in super().records
        ]
