"""Simulation with a lossy policy: the rewritten routing of each layer, low-precision copies or planes on its lanes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand, Prediction
from scheduler.graph.tasks import DenseTimes
from scheduler.lossy import DEFERRED, FULL, LOW, Lossy, LossySetting, Rewritten, Routing
from scheduler.machine.costs import CostModel
from scheduler.plan import LaneState, LayerEnded, LayerPlan, Transfer, TransferEnded
from scheduler.planner.planner import Planner
from scheduler.simulator.engine import Engine, SimulationError
from scheduler.simulator.pair import PairEngine
from scheduler.simulator.planes import PlaneEngine, planes
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.simulator.stats import PhaseResult, PhaseStats
from scheduler.traces.demands import demand_of
from scheduler.traces.trace import TraceStep

Floats = NDArray[np.float64]


class LossySimulator(Simulator):
    """``Simulator`` with the lossy policy of ``config.lossy``; a trace does not tell what gates say of all experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        lossy, shape = _lossy(self.config), self.shape
        setting = LossySetting(
            shape.n_layers, shape.n_experts, shape.expert_bytes(self.config.expert_dtype),
            low_bytes=0 if lossy.low is None else shape.expert_bytes(lossy.low.low_dtype),
            frequencies=kwargs.get("frequencies", args[5] if len(args) > 5 else None),
        )  # fmt: skip
        self.lossy_policy = lossy.make(setting)
        self.lossy_policy.follow_slots(self.planner.slots.n_slots)
        self._routed, self._changed = Counter[str](), Counter[str]()
        self._whole: NDArray[np.bool_] | None = None

    def _planner(self, *args: Any) -> Planner:
        """The planner of full precision; the low one is made beside it, and takes its part of the slots."""
        config, shape = self.config, self.shape
        lossy, self.low = _lossy(config), cast("Planner | None", None)
        if lossy.low is not None:
            low_dtype = lossy.low.low_dtype
            high_bytes, low_bytes = shape.expert_bytes(config.expert_dtype), shape.expert_bytes(low_dtype)
            if low_bytes >= high_bytes:
                raise SimulationError(
                    f"{lossy.kind}: a copy as {low_dtype} is not smaller than an expert as {config.expert_dtype};"
                    " choose a larger --expert-dtype or a smaller low_dtype"
                )
            if config.host_ratio < 1.0:
                raise SimulationError(f"{lossy.kind}: copies of experts on disk are not simulated; use host ratio 1")
            n_experts = shape.n_layers * shape.n_experts
            self.n_slots, n_low = lossy.low.split(self.n_slots, high_bytes, low_bytes, n_experts)
            believed = CostModel(self.dense.planner_profile(config.context_tokens), shape, low_dtype)
            self.low = Planner(
                shape.n_layers, shape.n_experts, n_low, believed, config.policy, 0,
                future=self._future(self.steps[0].sequence), scorer=args[0], prefetch_scorer=args[1], **config.params,
            )  # fmt: skip
        return super()._planner(*args)

    def _engine(self, keep_records: bool, frequencies: NDArray[np.float64] | None) -> Engine:
        plain, lossy = super()._engine(keep_records, frequencies), _lossy(self.config)
        base = (plain.costs, plain.expert_bytes, keep_records, plain.host)
        n_experts = self.shape.n_experts
        if lossy.uses_planes:
            if self.config.expert_dtype != "int4":
                raise SimulationError(
                    f"{lossy.kind}: bit planes need int4 experts, found {self.config.expert_dtype}; use"
                    " --expert-dtype int4"
                )
            high, low_plane = planes(self.profile, plain.expert_bytes)
            return PlaneEngine(*base, n_experts=n_experts, high=high, low=low_plane)
        if lossy.low is None:
            return PairEngine(*base, n_experts=n_experts)
        low_dtype = lossy.low.low_dtype
        low_costs, low_bytes = CostModel(self.profile, self.shape, low_dtype), self.shape.expert_bytes(low_dtype)
        return PairEngine(*base, low_costs=low_costs, low_bytes=low_bytes, n_experts=n_experts)

    def _warm_up(self, frequencies: NDArray[np.float64] | None) -> None:
        super()._warm_up(frequencies)
        if self.low is not None:
            for transfer in self.low.warm_up(frequencies):
                self.low.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))

    def run(self) -> list[PhaseResult]:
        """Simulate every step; the results say that they are lossy, and how much was changed."""
        name = _lossy(self.config).name
        return [
            replace(result, lossy=name, changed=self._changed[result.phase] / max(self._routed[result.phase], 1))
            for result in super().run()
        ]

    def _run_step(self, index: int, step: TraceStep, stats: PhaseStats) -> None:
        if step.first:
            self.lossy_policy.begin_sequence()
            if self.low is not None:
                self.low.begin_sequence(self._future(step.sequence))
        if self.low is not None:
            self.low.begin_step(step.phase, step.n_tokens)
        self._step = step
        super()._run_step(index, step, stats)

    def _run_layer(self, index: int, demand: LayerDemand, dense: DenseTimes, stats: PhaseStats) -> None:
        engine, layer = cast("PairEngine", self.engine), demand.layer
        engine.dense("attention", layer, demand.n_tokens_total, dense.attention_us, index)
        engine.dense("gate", layer, demand.n_tokens_total, dense.gate_us, index)
        self._report(engine.take_ended())
        full, low, late = self._demands(layer)
        cpu_us = max(engine.late_until_us - engine.now_us, 0.0)
        plan = self._plan(self.planner, full, LaneState(cpu_us, dense.shared_us, engine.link_ready_us()), stats)
        low_plan = None
        if self.low is not None and low.expert_ids.size:
            low_plan = self._plan(self.low, low, self._behind(plan, full, dense.shared_us), stats)
        merged, both = _merged(plan, low_plan, full, low, self.shape.n_experts)
        if isinstance(engine, PlaneEngine):
            engine.wanted = self._whole
        observed = engine.run_layer(merged, both, dense.shared_us)
        if isinstance(engine, PlaneEngine):
            tokens = dict(zip(full.expert_ids.tolist(), full.n_tokens.tolist(), strict=True))
            self._changed[demand.phase] += sum(tokens[expert] for expert in engine.take_rough())
        engine.wait_for_late()
        if late.expert_ids.size:
            engine.start_late(float(engine.costs.cpu_us(layer, late.n_tokens).sum()))
        self._report(engine.take_ended())
        self.planner.on_event(LayerEnded(layer, observed if low_plan is None else ()))
        if self.low is not None and low_plan is not None:
            self.low.on_event(LayerEnded(layer))
        engine.dense("combine", layer, demand.n_tokens_total, dense.combine_us, index)

    def _plan(self, planner: Planner, demand: LayerDemand, lanes: LaneState, stats: PhaseStats) -> LayerPlan:
        stats.count_demand(demand, planner.slots.resident_mask(demand.layer))
        if planner is self.planner:
            self._judge.demand(demand)
        plan = planner.plan_layer(demand, lanes)
        stats.count_plan(plan)
        if planner is self.planner:
            self._judge.planned(plan, demand.phase)
        return plan

    def _demands(self, layer: int) -> tuple[LayerDemand, ...]:
        """Demand of each part after the lossy policy: full precision, low copies, late."""
        step, n_experts = self._step, self.shape.n_experts
        ids, given = self.source.routed(step, layer)
        rewritten: Rewritten = self.lossy_policy.rewrite(
            Routing(layer, step.phase, ids, given.astype(np.float32), self.planner.slots.resident_mask(layer))
        )
        self._whole = rewritten.whole
        self._routed[step.phase] += int((ids >= 0).sum())
        self._changed[step.phase] += rewritten.skipped + rewritten.substituted + rewritten.lowered
        parts = np.full(ids.shape, FULL, np.uint8) if rewritten.parts is None else rewritten.parts
        self._changed[step.phase] += int((parts == DEFERRED).sum())
        predictions = self.lossy_policy.predicted(self.source.predicted(step, layer))
        weights = rewritten.weights.ravel()

        def part(code: int, known: tuple[Prediction, ...] = ()) -> LayerDemand:
            own = np.where(parts == code, rewritten.expert_ids, np.int32(-1)).ravel()
            return demand_of(layer, step.phase, step.n_tokens, own, weights, n_experts, known)

        return part(FULL, predictions), part(LOW), part(DEFERRED)

    def _behind(self, plan: LayerPlan, demand: LayerDemand, shared_us: float) -> LaneState:
        """The lanes behind the work of a plan that is about to run."""
        costs, layer = self.planner.costs, plan.layer
        tokens = dict(zip(demand.expert_ids.tolist(), demand.n_tokens.tolist(), strict=True))
        cpu_us = costs.cpu_us(layer, np.array([tokens[e] for e in plan.cpu], np.int64)).sum()
        accel_us = costs.accel_us(layer, np.array([tokens[e] for e in plan.accel], np.int64)).sum()
        queued = len(plan.transfers) + len(plan.prefetches)
        link_us = self.engine.link_ready_us() + queued * costs.transfer_us(layer, cpu_busy=True)
        return LaneState(float(cpu_us), shared_us + float(accel_us), link_us)

    def _report(self, events: Iterable[TransferEnded]) -> None:
        """Copies that have ended, to the planner that started them."""
        for event in events:
            if event.expert < self.shape.n_experts:
                self.planner.on_event(event)
            elif self.low is not None:
                self.low.on_event(replace(event, expert=event.expert - self.shape.n_experts))


def _lossy(config: SimulationConfig) -> Lossy:
    assert config.lossy is not None
    return config.lossy


def _merged(
    plan: LayerPlan, low: LayerPlan | None, demand: LayerDemand, low_demand: LayerDemand, n_experts: int
) -> tuple[LayerPlan, LayerDemand]:
    """Both plans as one: the lanes run full precision first; copies are experts ``n_experts`` + id."""
    if low is None:
        return plan, demand
    both = LayerPlan(
        plan.step, plan.layer, plan.cpu + _shifted(low.cpu, n_experts), plan.accel + _shifted(low.accel, n_experts),
        plan.accel_slots + low.accel_slots, plan.transfers + _moved(low.transfers, n_experts),
        plan.prefetches + _moved(low.prefetches, n_experts), plan.predicted_makespan_us,
        plan.awaited + _shifted(low.awaited, n_experts),
    )  # fmt: skip
    ids = np.concatenate((demand.expert_ids, low_demand.expert_ids + np.int32(n_experts)))
    return both, replace(demand, expert_ids=ids, n_tokens=np.concatenate((demand.n_tokens, low_demand.n_tokens)))


def _shifted(experts: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple([expert + by for expert in experts])


def _moved(transfers: tuple[Transfer, ...], by: int) -> tuple[Transfer, ...]:
    def moved(item: Transfer) -> Transfer:
        evicts = None if item.evicts is None else (item.evicts[0], item.evicts[1] + by)
        return replace(item, expert=item.expert + by, evicts=evicts)

    return tuple([moved(item) for item in transfers])
