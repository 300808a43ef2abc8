"""Discrete simulation of a trace on a hardware profile: the runtime's planner, with time instead of an executor.

    result = Simulator(trace, profile, shape, SimulationConfig(policy="ours", cache_ratio=0.25)).run()

Deterministic: equal inputs give equal results. Times are simulated, never measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand, Phase
from scheduler.future import Future
from scheduler.graph.tasks import DenseTimes, PlannedLayer
from scheduler.host import HostView
from scheduler.lossy import Lossy
from scheduler.machine.costs import CostModel
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LaneState, LayerEnded, LayerPlan, TransferEnded
from scheduler.planner.explain import Explanation
from scheduler.planner.planner import Planner
from scheduler.planner.policies import resolve_policy
from scheduler.records import TaskRecord
from scheduler.setting import Scorer
from scheduler.simulator.dense import DenseCosts
from scheduler.simulator.engine import Engine, SimulationError, SimulationSettingError
from scheduler.simulator.host_tier import HostTier
from scheduler.simulator.lossy import LossyStage, Part, share_slots
from scheduler.simulator.stats import PhaseResult, PhaseStats, PrefetchJudge
from scheduler.simulator.streamed import Streamer
from scheduler.slots import SlotState
from scheduler.streaming import Streaming
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import Predictions
from scheduler.traces.trace import Trace, TraceStep

__all__ = ["PhaseResult", "SimulationConfig", "SimulationError", "Simulator", "check_fit", "slots_for"]


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What is simulated. ``cache_ratio`` is the share of all experts that has a slot; ``n_slots`` overrides it.

    ``host_ratio``: the share of all experts that host memory holds; the others are on disk. ``disk_blind``: the planner
    is not told of that, and plans as if all were in memory. ``streaming``: a prompt's experts go past slots and
    planner; None: the policy plans prompts, too.
    ``lossy``: a lossy policy between router and planner, see ``scheduler.lossy``. ``label``: the policy's name in
    results, where that is not ``policy``.
    """

    policy: str = "ours"
    cache_ratio: float = 0.25
    n_slots: int | None = None
    expert_dtype: str = "int4"
    dense_dtype: str = "int8"
    lookahead: int = 3
    context_tokens: int = 512
    host_ratio: float = 1.0
    disk_blind: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    lossy: Lossy | None = None
    label: str = ""
    streaming: Streaming | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.cache_ratio <= 1.0:
            raise SimulationSettingError(
                f"cache ratio must lie in 0..1 (a share of all experts), found {self.cache_ratio}"
            )
        if not 0.0 < self.host_ratio <= 1.0:
            raise SimulationSettingError(f"host ratio must lie above 0 and at most at 1, found {self.host_ratio}")
        if self.n_slots is not None and self.n_slots < 0:
            raise SimulationSettingError(f"number of slots must not be negative, found {self.n_slots}")
        if self.streaming is not None and (self.host_ratio < 1.0 or self.lossy is not None):
            raise SimulationSettingError(
                "prompts are streamed from host memory, unchanged: not with experts on disk, not with a lossy policy"
            )


def slots_for(config: SimulationConfig, shape: ModelShape) -> int:
    """Slots of the pool; raises when there are more than experts."""
    total = shape.n_layers * shape.n_experts
    n_slots = round(config.cache_ratio * total) if config.n_slots is None else config.n_slots
    if n_slots > total:
        raise SimulationError(f"{n_slots} slots for {total} experts of {shape.name}: use at most {total}")
    return n_slots


def check_fit(trace: Trace, shape: ModelShape) -> None:
    """Raise :class:`SimulationError` unless the trace was recorded on a model of this shape."""
    for what, of_trace, of_shape in (
        ("MoE layers", trace.n_layers, shape.n_layers),
        ("experts a layer", trace.n_experts, shape.n_experts),
        ("experts a token (top-k)", trace.top_k, shape.top_k),
    ):
        if of_trace != of_shape:
            raise SimulationError(
                f"trace {trace.name!r} ({trace.meta.get('model')}) has {of_trace} {what}, model shape {shape.name!r} "
                f"has {of_shape}; choose the shape of the traced model, or a synthetic trace of this shape"
            )


class Simulator:
    """Drives one :class:`Planner` over all steps of a trace.

    ``frequencies`` float [layers, experts] is what a profile of other sequences says about use (for the warm-up);
    None leaves the start to the policy. ``earlier`` is the routing of other sequences, from which a policy's forecast
    learns before the first step. ``predictions`` are what gate lookahead would give. ``source`` reuses another
    simulator's demands of the same trace and predictions. ``steps`` replaces the trace's own (see
    ``scheduler.batching.routes.batched``). The scorers are what ``learned`` policies ask. With
    ``keep_records`` the executed tasks and the planned layers are kept (for one step, not for long traces).
    """

    def __init__(
        self,
        trace: Trace,
        profile: HardwareProfile,
        shape: ModelShape,
        config: SimulationConfig = SimulationConfig(),
        predictions: Predictions | None = None,
        frequencies: NDArray[np.float64] | None = None,
        phase: Phase | None = None,
        keep_records: bool = False,
        source: DemandSource | None = None,
        scorer: Scorer | None = None,
        prefetch_scorer: Scorer | None = None,
        steps: Sequence[TraceStep] | None = None,
        earlier: DemandSource | None = None,
    ) -> None:
        check_fit(trace, shape)
        self.trace, self.profile, self.shape, self.config = trace, profile, shape, config
        self.source = DemandSource(trace, predictions) if source is None else source
        self.steps: Sequence[TraceStep] = list(trace.steps(phase) if steps is None else steps)
        self.dense = DenseCosts(profile, shape, config.dense_dtype)
        self.n_slots, n_low = slots_for(config, shape), 0
        if config.lossy is not None:
            self.n_slots, n_low = share_slots(config.lossy, shape, config.expert_dtype, config.host_ratio, self.n_slots)
        self.planner = self._planner(scorer, prefetch_scorer)
        self.engine = self._engine(keep_records, frequencies)
        self.stage: LossyStage | None = None
        if config.lossy is not None:
            self.stage = self._lossy_stage(config.lossy, n_low, scorer, prefetch_scorer, frequencies)
            self.engine = self.stage.engine
        self.engine.pieces = self.planners()[0].prefetch.pieces
        self.layers: list[PlannedLayer] = []
        self.explanations: list[Explanation] = []
        self._judge, self._step = PrefetchJudge(trace.n_layers, trace.n_experts), 0
        self.streamer = None if config.streaming is None else Streamer(config.streaming, self.engine)
        self._costs: dict[int, CostModel] = {}
        self._study(earlier)
        self._warm_up(frequencies)

    def _planner(self, scorer: Scorer | None, prefetch_scorer: Scorer | None) -> Planner:
        config = self.config
        return self._planner_of(self.n_slots, config.expert_dtype, config.lookahead, scorer, prefetch_scorer)

    def _planner_of(
        self, n_slots: int, dtype: str, lookahead: int, scorer: Scorer | None, prefetch_scorer: Scorer | None
    ) -> Planner:
        """A planner of all layers' experts in one precision."""
        config = self.config
        believed = CostModel(self.dense.planner_profile(config.context_tokens), self.shape, dtype)
        return Planner(
            self.shape.n_layers, self.shape.n_experts, n_slots, believed, policy=config.policy,
            lookahead=lookahead, scorer=scorer, prefetch_scorer=prefetch_scorer,
            future=self._future(self.steps[0].sequence), **config.params,
        )  # fmt: skip

    def _lossy_stage(
        self, lossy: Lossy, n_low: int, scorer: Scorer | None, prefetch_scorer: Scorer | None,
        frequencies: NDArray[np.float64] | None,
    ) -> LossyStage:  # fmt: skip
        """The stage of a lossy policy; ``n_low``: slots of low-precision copies."""
        low, dtype = None, self.config.expert_dtype
        if lossy.low is not None:
            low = self._planner_of(n_low, lossy.low.low_dtype, 0, scorer, prefetch_scorer)
        return LossyStage(
            lossy, self.shape, dtype, self.source, self.planner, low, self.profile, self.engine, frequencies
        )

    def _future(self, sequence: int) -> Future | None:
        """Recorded routing of one sequence, for policies that are oracles; the others get none to look at."""
        policy = resolve_policy(self.config.policy, **self.config.params)
        if policy.cache != "belady" and policy.prefetch != "perfect":
            return None
        steps = (self.source.routing(step) for step in self.steps if step.sequence == sequence)
        return Future(steps, self.trace.n_layers, self.trace.n_experts)

    def _engine(self, keep_records: bool, frequencies: NDArray[np.float64] | None) -> Engine:
        config, shape = self.config, self.shape
        expert_bytes = shape.expert_bytes(config.expert_dtype)
        host, costs = None, CostModel(self.profile, shape, config.expert_dtype)
        if config.host_ratio < 1.0:
            if self.profile.disk is None:
                raise SimulationError(f"profile {self.profile.name!r} has no disk; host ratio must be 1")
            capacity = max(1, round(config.host_ratio * shape.n_layers * shape.n_experts))
            host = HostTier(shape.n_layers, shape.n_experts, capacity, costs.read_us(0), costs.read_latency_us)
            host.preload(_most_used(frequencies, shape), frequencies)
        return Engine(costs, expert_bytes, keep_records, host, self.profile.dense.handoff_us)

    def _study(self, earlier: DemandSource | None) -> None:
        """The forecasts live through earlier sequences."""
        if earlier is not None:
            for step in earlier.trace.steps():
                self.planner.study(list(earlier.step(step)), step.first)

    def _warm_up(self, frequencies: NDArray[np.float64] | None) -> None:
        """Initial residents are loaded before the clock starts."""
        for transfer in self.planner.warm_up(frequencies):
            self.planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
        if self.stage is not None:
            self.stage.warm_up(frequencies)

    def run(self) -> list[PhaseResult]:
        """Simulate every step; one result for each phase that occurs, prefill first."""
        stats: dict[Phase, PhaseStats] = {}
        for index, step in enumerate(self.steps):
            self._run_step(index, step, stats.setdefault(step.phase, PhaseStats()))
        self._judge.settle_into(stats)
        order: tuple[Phase, ...] = ("prefill", "decode")
        results = [
            stats[phase].result(self.config.label or self.config.policy, self.config.cache_ratio, phase, self.n_slots)
            for phase in order
            if phase in stats
        ]
        return results if self.stage is None else list(map(self.stage.labelled, results))

    def advance_to(self, index: int) -> None:
        """Simulate the steps before step ``index``."""
        if not 0 <= index < len(self.steps):
            raise SimulationError(f"step {index} is not there: the trace has steps 0..{len(self.steps) - 1}")
        for earlier in range(index):
            self._run_step(earlier, self.steps[earlier], PhaseStats())

    def step_us(self, index: int, explained: bool = False) -> float:
        """Simulate one step, after those before it. Returns its latency in us; ``explained``: it is recorded, too."""
        self.engine.keep_records = explained
        began_us = self.engine.now_us
        self._run_step(index, self.steps[index], PhaseStats())
        self.engine.keep_records = False
        return self.engine.now_us - began_us

    def snapshot(self) -> Self:
        """An independent copy of this simulator as it is now. Trace, demands, profile and settings are shared."""
        shared = (self.trace, self.source, self.profile, self.shape, self.config, self.steps)
        return deepcopy(self, {id(part): part for part in shared})

    def move_to(self, profile: HardwareProfile) -> None:
        """From now on the steps run on another machine, and the planner knows its costs."""
        self.profile, self.dense = profile, replace(self.dense, profile=profile)
        self.engine.costs = CostModel(profile, self.shape, self.config.expert_dtype)
        self._costs.clear()
        self.engine.handoff_us = profile.dense.handoff_us
        if self.engine.host is not None:
            self.engine.host.read_us = self.engine.costs.read_us(0)
        believed = self.dense.planner_profile(self.config.context_tokens)
        for planner in self.planners():
            shape = replace(self.shape, n_layers=planner.n_layers)
            planner.believe(CostModel(believed, shape, self.config.expert_dtype))

    def add_resident(self, layer: int, expert: int) -> bool:
        """One more slot, with this expert in it; False where the slot of that accelerator is not the last one."""
        planner = self.planners()[-1]
        own, n_slots = layer - planner.first_layer, planner.slots.n_slots
        key = own * planner.n_experts + expert
        if own < 0 or planner.slots.slot_of[key] >= 0:
            return False
        planner.resize(n_slots + 1)
        planner.slots.begin_transfer(n_slots, key)
        planner.slots.end_transfer(n_slots, key)
        return True

    def planners(self) -> Sequence[Planner]:
        """The planner of each accelerator."""
        return (self.planner,)

    def _run_step(self, index: int, step: TraceStep, stats: PhaseStats) -> None:
        engine = self.engine
        if self.stage is not None:
            self.stage.begin_step(step, self._future(step.sequence) if step.first else None)
        if step.first:
            self.planner.begin_sequence(self._future(step.sequence))
            if engine.host is not None:
                engine.host.begin_sequence()
        stats.begin(engine.now_us, engine.busy)
        engine.costs = self.costs_of(step.n_tokens)
        if self.streamer is not None:
            self.streamer.begin_step()
        self._step = index
        self.planner.begin_step(step.phase, step.n_tokens)
        dense = self.dense_times(step)
        for demand in self.source.step(step):
            self._run_layer(index, demand, dense, stats)
        engine.dense("attention", self.shape.n_layers, 1, self.dense.head_us(step.n_sequences), index)
        stats.end(engine.now_us, engine.busy, step.n_tokens, step.phase == "prefill" and not step.first)

    def dense_times(self, step: TraceStep) -> DenseTimes:
        """What surrounds the experts of each layer. The step attends to the tokens before it in its sequence, in decode
        at least to the configured ones."""
        context = max(step.position, self.config.context_tokens if step.phase == "decode" else 0)
        return DenseTimes(
            self.dense.attention_us(step.n_tokens, context, step.n_sequences), self.dense.gate_us(step.n_tokens),
            self.dense.shared_us(step.n_tokens), self.dense.combine_us(),
        )  # fmt: skip

    def _run_layer(self, index: int, demand: LayerDemand, dense: DenseTimes, stats: PhaseStats) -> None:
        engine, stage, layer = self.engine, self.stage, demand.layer
        engine.dense("attention", layer, demand.n_tokens_total, dense.attention_us, index)
        engine.dense("gate", layer, demand.n_tokens_total, dense.gate_us, index)
        self._report(engine.take_ended())
        if self.streamer is not None and self.streamer.takes(demand):
            self._stream_layer(index, demand, dense, stats)
            return
        parts = [(self.planner, demand)] if stage is None else stage.parts(layer)
        plans = self._plan_parts(parts, dense.shared_us, stats)
        plan, wanted = (plans[0], demand) if stage is None else stage.joined(plans, parts)
        explanation = self.planner.explain(plan) if engine.keep_records and stage is None else None
        observed = engine.run_layer(plan, wanted, dense.shared_us)
        if stage is not None:
            stage.layer_ran(parts[0][1])
        if explanation is not None:
            self.layers.append(self._planned(plan, demand, dense))
            self.explanations.append(explanation)
        self._report(engine.take_ended())
        for planner, _ in parts:
            planner.on_event(LayerEnded(layer, observed if len(parts) == 1 else ()))
        engine.dense("combine", layer, demand.n_tokens_total, dense.combine_us, index)

    def _stream_layer(self, index: int, demand: LayerDemand, dense: DenseTimes, stats: PhaseStats) -> None:
        """One layer of a streamed prompt: the planner is not asked, and slots stay as they are."""
        assert self.streamer is not None
        layer, resident = demand.layer, self._resident(demand.layer)
        stats.count_demand(demand, resident)
        last = layer + 1 == self.shape.n_layers
        following = np.empty(0, np.int64) if last else np.flatnonzero(~self._resident(layer + 1))
        stats.transfers += self.streamer.run(demand, ~resident, following, dense.shared_us, index)
        self.engine.dense("combine", layer, demand.n_tokens_total, dense.combine_us, index)

    def costs_of(self, n_tokens: int) -> CostModel:
        """The true costs of a step of so many tokens: the engine's, unless tiles follow from the step."""
        if self.profile.accel.tile_tokens == 0:
            return self.engine.costs
        if n_tokens not in self._costs:
            self._costs[n_tokens] = CostModel(self.profile, self.shape, self.config.expert_dtype, step_tokens=n_tokens)
        return self._costs[n_tokens]

    def _plan_parts(self, parts: Sequence[Part], shared_us: float, stats: PhaseStats) -> list[LayerPlan]:
        """The plan of each part of a layer, each behind the work of those before it."""
        plans: list[LayerPlan] = []
        for planner, demand in parts:
            own = planner is self.planner
            stats.count_demand(demand, self._resident(demand.layer) if own else planner.resident_mask(demand.layer))
            if own:
                self._judge.demand(demand)
            if self.stage is None:
                lanes = LaneState(0.0, shared_us, self.engine.link_ready_us())
            else:
                lanes = self.stage.lanes(plans[-1] if plans else None, parts[0][1], shared_us)
            plan = planner.plan_layer(demand, lanes, self._host_view(demand) if own else None)
            stats.count_plan(plan)
            if own:
                self._judge.planned(plan, demand.phase)
            plans.append(plan)
        return plans

    def _host_view(self, demand: LayerDemand) -> HostView | None:
        """The reads of a layer begin; what its planner is told of host memory."""
        host, width = self.engine.host, self.shape.n_experts
        if host is None:
            return None
        copying = [layer * width + expert for layer, expert in self.engine.copying()]
        in_slots = np.concatenate([planner.slots.slot_of >= 0 for planner in self.planners()])
        view = host.demand(demand, self.engine.now_us, in_slots, copying)
        self.engine.record_reads(self._step)
        return None if self.config.disk_blind else view

    def _report(self, events: Iterable[TransferEnded]) -> None:
        """Copies that have ended, to the planner that started them."""
        for event in events:
            if self.stage is None or not self.stage.takes(event):
                self.planner.on_event(event)

    def _planned(self, plan: LayerPlan, demand: LayerDemand, dense: DenseTimes) -> PlannedLayer:
        return PlannedLayer(plan, demand, dense)

    def _resident(self, layer: int) -> NDArray[np.bool_]:
        """bool [experts]: bytes are in a slot now."""
        table, width = self.planner.slots, self.shape.n_experts
        slots = table.slot_of[layer * width : (layer + 1) * width]
        if table.n_slots == 0:
            return np.zeros(width, np.bool_)
        return (slots >= 0) & (table.state[slots] >= SlotState.RESIDENT)

    def resident_slots(self) -> dict[int, tuple[int, int]]:
        """slot -> (layer, expert) of everything whose bytes are there now."""
        table = self.planner.slots
        held = (
            (slot, table.occupant(slot)) for slot in range(table.n_slots) if table.state[slot] >= SlotState.RESIDENT
        )
        return {slot: key for slot, key in held if key is not None}

    @property
    def records(self) -> list[TaskRecord]:
        """Executed tasks in start order (``keep_records``)."""
        return sorted(self.engine.records, key=lambda r: (r.start_us, r.end_us))


def _most_used(frequencies: NDArray[np.float64] | None, shape: ModelShape) -> list[int]:
    """Keys, layer * n_experts + expert."""
    if frequencies is None:
        return list(range(shape.n_layers * shape.n_experts))
    return [int(key) for key in np.argsort(-np.ravel(frequencies), kind="stable")]
