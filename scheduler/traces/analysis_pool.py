"""Hit rates of the planner's own cache policies, with its slot rules, on a trace (all misses brought in, no
prefetch)."""

from __future__ import annotations

from typing import Any

from scheduler.errors import PolicyError
from scheduler.future import Future
from scheduler.machine.costs import CostModel
from scheduler.plan import LayerEnded, LayerPlan, TransferEnded
from scheduler.planner.planner import Planner
from scheduler.slots import SlotState
from scheduler.traces.demands import DemandSource
from scheduler.traces.trace import Trace


def cache_hit_rate(trace: Trace, cache: str, share: float, source: DemandSource | None = None, **params: Any) -> float:
    """Activated experts whose bytes are there over all activated ones, with ``share`` of all experts in slots.

    ``params`` are the cache policy's. The balance is ``on_demand``; the slots start empty. Raises PolicyError for an
    unknown policy or share.
    """
    if not 0.0 < share <= 1.0:
        raise PolicyError(f"the share of experts in slots must lie above 0 and at most at 1, found {share}")
    source = DemandSource(trace) if source is None else source
    n_slots = max(1, round(share * trace.n_layers * trace.n_experts))
    planner = _planner(trace, cache, n_slots, source, params)
    hits = seen = 0
    for step in trace.steps():
        if step.first:
            planner.begin_sequence(_future(trace, source, step.sequence) if cache == "belady" else None)
        planner.begin_step(step.phase, step.n_tokens)
        for demand in source.step(step):
            slots = planner.slots.slot_of[demand.layer * trace.n_experts + demand.expert_ids]
            hits += int(((slots >= 0) & (planner.slots.state[slots] >= SlotState.RESIDENT.value)).sum())
            seen += demand.expert_ids.size
            _perform(planner, planner.plan_layer(demand))
    return hits / max(1, seen)


def _planner(trace: Trace, cache: str, n_slots: int, source: DemandSource, params: dict[str, Any]) -> Planner:
    first = next(iter(trace.steps()))
    future = _future(trace, source, first.sequence) if cache == "belady" else None
    costs = CostModel.uniform(trace.n_layers)
    return Planner(trace.n_layers, trace.n_experts, n_slots, costs, f"on_demand/none/{cache}", future=future, **params)


def _future(trace: Trace, source: DemandSource, sequence: int) -> Future:
    steps = (source.routing(step) for step in trace.steps() if step.sequence == sequence)
    return Future(steps, trace.n_layers, trace.n_experts)


def _perform(planner: Planner, plan: LayerPlan) -> None:
    """Everything that the plan says happens at once."""
    for transfer in (*plan.transfers, *plan.prefetches):
        planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
    planner.on_event(LayerEnded(plan.layer))
