"""Why a plan is as it is: each expert's three costs and choice, and what other balance policies would have made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from scheduler.balancing import BALANCE_POLICIES, LayerCosts, balance
from scheduler.demand import Demand
from scheduler.host import HostView
from scheduler.machine.costs import CostModel
from scheduler.plan import LaneState, LayerPlan
from scheduler.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Decision:
    """One activated expert: its alternatives' own durations and the lane that it got.

    ``wait_us``: until it is in host memory, where CPU and link can start on it; 0 where it was there, None for a
    resident that is not there, and stays on the accelerator.
    """

    expert: int
    n_tokens: int
    resident: bool
    cpu_us: float
    accel_us: float
    transfer_us: float
    lane: Literal["cpu", "accel"]
    wait_us: float | None = 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """``alternatives``: (balance policy, makespan in us) of the same layer, best first; ties by name."""

    layer: int
    makespan_us: float
    decisions: tuple[Decision, ...]
    alternatives: tuple[tuple[str, float], ...]


def explain(
    plan: LayerPlan, demand: Demand, lanes: LaneState, costs: CostModel, slots: SlotTable, host: HostView | None = None
) -> Explanation:
    """Rebuilds the layer's costs as they were before ``plan`` and compares."""
    ids, layer = demand.expert_ids, demand.layer
    moved = {t.expert for t in plan.transfers}
    gone = {t.evicts for t in (*plan.transfers, *plan.prefetches)}
    here = np.array(
        [
            e not in moved and (e in plan.accel or slots.slot(layer, e) >= 0 or (plan.layer, e) in gone)
            for e in ids.tolist()
        ],
        np.bool_,
    )  # fmt: skip
    cpu_us = costs.cpu_us(layer, demand.n_tokens, lanes.link_ready_us > 0)
    accel_us = costs.accel_us(layer, demand.n_tokens)
    transfer_us = costs.transfer_us(layer, cpu_busy=True)
    waits_us = np.zeros(ids.size) if host is None else np.where(here & (host.waits_us > 0.0), np.inf, host.waits_us)
    decisions = tuple(
        Decision(
            int(e), int(demand.n_tokens[i]), bool(here[i]), float(cpu_us[i]), float(accel_us[i]), transfer_us,
            "accel" if int(e) in plan.accel else "cpu", float(waits_us[i]) if waits_us[i] < np.inf else None,
        )
        for i, e in enumerate(ids)
    )  # fmt: skip
    alternatives: list[tuple[str, float]] = []
    if ids.size:
        layer_costs = LayerCosts(
            cpu_us, accel_us, np.full(ids.size, transfer_us), here, lanes.cpu_ready_us, lanes.accel_ready_us,
            lanes.link_ready_us, host_us=waits_us,
        )  # fmt: skip
        alternatives = [(name, balance(layer_costs, name).makespan_us) for name in BALANCE_POLICIES]
    ranked = tuple(sorted(alternatives, key=lambda pair: (pair[1], pair[0])))
    return Explanation(plan.layer, plan.predicted_makespan_us, decisions, ranked)
