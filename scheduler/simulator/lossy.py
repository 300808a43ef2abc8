"""The stage of a lossy policy in a simulation: it rewrites the routing of each layer into parts for the one path.

Low-precision copies have a planner of their own and share the lanes; late experts keep the CPU beyond their layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand, Phase, Prediction
from scheduler.future import Future
from scheduler.lossy import DEFERRED, FULL, LOW, Lossy, LossySetting, Routing
from scheduler.machine.costs import CostModel
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LaneState, LayerPlan, Transfer, TransferEnded
from scheduler.planner.planner import Planner
from scheduler.simulator.engine import Engine, SimulationError
from scheduler.simulator.pair import PairEngine
from scheduler.simulator.planes import PlaneEngine, planes
from scheduler.simulator.stats import PhaseResult
from scheduler.traces.demands import DemandSource, demand_of
from scheduler.traces.trace import TraceStep

Part = tuple[Planner, LayerDemand]
"""A demand, and who plans it."""


def share_slots(lossy: Lossy, shape: ModelShape, expert_dtype: str, host_ratio: float, n_slots: int) -> tuple[int, int]:
    """Slots of full precision and of low-precision copies in the memory of ``n_slots``. Raises SimulationError."""
    if lossy.low is None:
        return n_slots, 0
    low_dtype = lossy.low.low_dtype
    high_bytes, low_bytes = shape.expert_bytes(expert_dtype), shape.expert_bytes(low_dtype)
    if low_bytes >= high_bytes:
        raise SimulationError(
            f"{lossy.kind}: a copy as {low_dtype} is not smaller than an expert as {expert_dtype};"
            " choose a larger --expert-dtype or a smaller low_dtype"
        )
    if host_ratio < 1.0:
        raise SimulationError(f"{lossy.kind}: copies of experts on disk are not simulated; use host ratio 1")
    return lossy.low.split(n_slots, high_bytes, low_bytes, shape.n_layers * shape.n_experts)


class LossyStage:
    """Between the routing of ``source`` and the planners: ``planner`` of full precision, ``low`` of copies where there
    are some. A trace does not tell what gates say of all experts.

    ``engine``: the lanes, which know of both precisions. ``frequencies``: as for ``Simulator``.
    """

    def __init__(
        self, lossy: Lossy, shape: ModelShape, expert_dtype: str, source: DemandSource, planner: Planner,
        low: Planner | None, profile: HardwareProfile, plain: Engine, frequencies: NDArray[np.float64] | None,
    ) -> None:  # fmt: skip
        setting = LossySetting(
            shape.n_layers, shape.n_experts, shape.expert_bytes(expert_dtype),
            low_bytes=0 if lossy.low is None else shape.expert_bytes(lossy.low.low_dtype), frequencies=frequencies,
        )  # fmt: skip
        self.policy = lossy.make(setting)
        self.policy.follow_slots(planner.slots.n_slots)
        self.planner, self.low = planner, low
        self.engine = _engine(lossy, shape, expert_dtype, profile, plain)
        self._name, self._source, self._n_experts = lossy.name, source, shape.n_experts
        self._routed, self._changed = Counter[Phase](), Counter[Phase]()

    def warm_up(self, frequencies: NDArray[np.float64] | None) -> None:
        """The copies' initial residents are loaded before the clock starts."""
        for transfer in () if self.low is None else self.low.warm_up(frequencies):
            self._of_low(TransferEnded(transfer.layer, transfer.expert, transfer.slot))

    def begin_step(self, step: TraceStep, future: Future | None) -> None:
        """A step starts; ``future``: the recorded routing of its sequence, for oracles."""
        self._step = step
        if step.first:
            self.policy.begin_sequence()
        if self.low is not None:
            if step.first:
                self.low.begin_sequence(future)
            self.low.begin_step(step.phase, step.n_tokens)

    def parts(self, layer: int) -> list[Part]:
        """What the policy makes of a layer's routing: full precision first, then the copies, where there are some."""
        step = self._step
        ids, given = self._source.routed(step, layer)
        rewritten = self.policy.rewrite(
            Routing(layer, step.phase, ids, given.astype(np.float32), self.planner.slots.resident_mask(layer))
        )
        if isinstance(self.engine, PlaneEngine):
            self.engine.wanted = rewritten.whole
        codes = np.full(ids.shape, FULL, np.uint8) if rewritten.parts is None else rewritten.parts
        self._routed[step.phase] += int((ids >= 0).sum())
        self._changed[step.phase] += rewritten.skipped + rewritten.substituted + rewritten.lowered
        self._changed[step.phase] += int((codes == DEFERRED).sum())

        def part(code: int, known: tuple[Prediction, ...] = ()) -> LayerDemand:
            own = np.where(codes == code, rewritten.expert_ids, np.int32(-1)).ravel()
            return demand_of(layer, step.phase, step.n_tokens, own, rewritten.weights.ravel(), self._n_experts, known)

        found = [(self.planner, part(FULL, self.policy.predicted(self._source.predicted(step, layer))))]
        self._late, low = part(DEFERRED), part(LOW)
        if self.low is not None and low.expert_ids.size:
            found.append((self.low, low))
        return found

    def lanes(self, before: LayerPlan | None, demand: LayerDemand, shared_us: float) -> LaneState:
        """When the lanes get free for a part: behind late experts, or behind the part ``before``, of ``demand``."""
        engine, costs = self.engine, self.planner.costs
        if before is None:
            return LaneState(max(engine.late_until_us - engine.now_us, 0.0), shared_us, engine.link_ready_us())
        layer, tokens = before.layer, _tokens(demand)
        cpu_us = costs.cpu_us(layer, np.array([tokens[e] for e in before.cpu], np.int64)).sum()
        accel_us = costs.accel_us(layer, np.array([tokens[e] for e in before.accel], np.int64)).sum()
        queued = len(before.transfers) + len(before.prefetches)
        link_us = engine.link_ready_us() + queued * costs.transfer_us(layer, cpu_busy=True)
        return LaneState(float(cpu_us), shared_us + float(accel_us), link_us)

    def joined(self, plans: list[LayerPlan], parts: list[Part]) -> tuple[LayerPlan, LayerDemand]:
        """All parts as one plan of one demand."""
        low, low_demand = (plans[1], parts[1][1]) if len(plans) > 1 else (None, parts[0][1])
        return _merged(plans[0], low, parts[0][1], low_demand, self._n_experts)

    def layer_ran(self, demand: LayerDemand) -> None:
        """The lanes have performed a layer whose full-precision part is ``demand``: late experts begin, or are due."""
        engine = self.engine
        if isinstance(engine, PlaneEngine):
            tokens = _tokens(demand)
            self._changed[demand.phase] += sum(tokens[expert] for expert in engine.take_rough())
        engine.wait_for_late()
        if self._late.expert_ids.size:
            engine.start_late(float(engine.costs.cpu_us(demand.layer, self._late.n_tokens).sum()))

    def takes(self, event: TransferEnded) -> bool:
        """Tells the copies' planner of a copy that has ended, if it is one of its own."""
        if event.expert < self._n_experts:
            return False
        self._of_low(replace(event, expert=event.expert - self._n_experts))
        return True

    def labelled(self, result: PhaseResult) -> PhaseResult:
        """The result says that it is lossy, and how much was changed."""
        changed = self._changed[result.phase] / max(self._routed[result.phase], 1)
        return replace(result, lossy=self._name, changed=changed)

    def _of_low(self, event: TransferEnded) -> None:
        if self.low is not None:
            self.low.on_event(event)


def _engine(lossy: Lossy, shape: ModelShape, expert_dtype: str, profile: HardwareProfile, plain: Engine) -> PairEngine:
    """Lanes as in ``plain`` for what the policy makes of experts: two precisions, or bit planes."""
    base = (plain.costs, plain.expert_bytes, plain.keep_records, plain.host, plain.handoff_us)
    if lossy.uses_planes:
        if expert_dtype != "int4":
            raise SimulationError(
                f"{lossy.kind}: bit planes need int4 experts, found {expert_dtype}; use --expert-dtype int4"
            )
        high, low_plane = planes(profile, plain.expert_bytes)
        return PlaneEngine(*base, n_experts=shape.n_experts, high=high, low=low_plane)
    if lossy.low is None:
        return PairEngine(*base, n_experts=shape.n_experts)
    low_dtype = lossy.low.low_dtype
    low_costs, low_bytes = CostModel(profile, shape, low_dtype), shape.expert_bytes(low_dtype)
    return PairEngine(*base, low_costs=low_costs, low_bytes=low_bytes, n_experts=shape.n_experts)


def _tokens(demand: LayerDemand) -> dict[int, int]:
    """Tokens of each active expert."""
    return dict(zip(demand.expert_ids.tolist(), demand.n_tokens.tolist(), strict=True))


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
