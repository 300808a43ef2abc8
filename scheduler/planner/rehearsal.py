"""Compiles what a policy needs before the first token: a small planner of the same policy lives through a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scheduler.balancing.problem import HOST, new_plan
from scheduler.balancing.timeline import keep_in_slots, plan_makespan
from scheduler.demand import LayerDemand, Phase, Prediction
from scheduler.host import HostView
from scheduler.machine.costs import CostModel
from scheduler.plan import LayerEnded, LayerPlan, TransferEnded
from scheduler.planner.decide import pick_slot
from scheduler.planner.planner import Planner
from scheduler.planner.policies import Policy

LAYERS, EXPERTS, SLOTS = 3, 8, 6


def rehearse(policy: str | Policy, params: Mapping[str, Any] | None = None, lookahead: int = 3) -> None:
    """Plans a prefill and two decode steps of a made-up model, and the same where a planner is told what is in host
    memory (all, some of the experts), so that later plans find everything compiled.

    Takes about 20 s with an empty cache of compiled code and 1 s with a filled one. Raises PolicyError as `Planner`.
    """
    costs = CostModel.uniform(LAYERS, cpu_us=50.0, accel_us=10.0, transfer_us=20.0, dense_us=100.0)
    planner = Planner(LAYERS, EXPERTS, SLOTS, costs, policy, lookahead, **(params or {}))
    _settle(planner, LayerPlan(0, 0, (), (), (), planner.warm_up(), (), 0.0))
    planner.begin_sequence()
    steps: tuple[tuple[Phase, int], ...] = (("prefill", 6), ("decode", 1), ("decode", 1))
    for turn, (phase, n_tokens) in enumerate(steps * 3):
        planner.begin_step(phase, n_tokens)
        for layer in range(LAYERS):
            demand = _demand(layer, phase, n_tokens, turn)
            plan = planner.plan_layer(demand, host=_host(demand, turn // len(steps)))
            _settle(planner, plan)
            planner.on_event(LayerEnded(layer, ()))
    _call_what_is_seldom(planner)


def _call_what_is_seldom(planner: Planner) -> None:
    """What a plan comes to only where something happens, whatever the policy: an expert that found no slot, a disk that
    is waited for, a prefetch."""
    slots, plan = planner.slots, new_plan(1)
    taken = np.zeros(slots.n_slots, np.bool_)
    pick_slot(slots.key_of, slots.state, slots.pins, planner.cache.keep, taken, 0, EXPERTS, -1)
    keep_in_slots(np.zeros((HOST + 1, 1)), plan)
    plan_makespan(np.zeros((HOST + 1, 1)), np.zeros(3), plan)


def _demand(layer: int, phase: Phase, n_tokens: int, turn: int) -> LayerDemand:
    active = np.sort((np.arange(4 if n_tokens > 1 else 2) * 2 + layer + turn) % EXPERTS).astype(np.int32)
    loads = np.full(active.size, n_tokens, np.int32)
    scores = np.zeros(EXPERTS, np.float32)
    scores[active] = 1.0 / active.size
    ahead = tuple(
        Prediction(later, active, loads.astype(np.float32), scores[active]) for later in range(layer + 1, LAYERS)
    )
    return LayerDemand(layer, phase, n_tokens, active, loads, scores, ahead)


def _host(demand: LayerDemand, period: int) -> HostView | None:
    """Of period 0 nothing; in host memory are then all experts, and at last every second one."""
    if not period:
        return None
    held = np.arange(LAYERS * EXPERTS) % period == 0
    return HostView(np.where(held[demand.layer * EXPERTS + demand.expert_ids], 0.0, 30.0), held)


def _settle(planner: Planner, plan: LayerPlan) -> None:
    for transfer in (*plan.transfers, *plan.prefetches):
        planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot, 20.0))
