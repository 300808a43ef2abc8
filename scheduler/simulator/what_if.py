"""What one step would take if the machine had more of something: all earlier steps stay as they were.

The slots' contents, the lanes and everything that was learned are frozen before the step. Each alternative runs the
step twice from there, with the same plans and with new ones; the shorter counts. More of a resource can so never show a
loss: the plans that were made are always among the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from scheduler.demand import LayerDemand
from scheduler.host import HostView
from scheduler.machine.profile import HardwareProfile
from scheduler.plan import Event, LaneState, LayerPlan
from scheduler.planner.explain import Explanation
from scheduler.planner.planner import Planner
from scheduler.simulator.simulator import Simulator

TRIED_EXPERTS = 3
"""Experts that are tried in one more slot: those whose absence looks dearest."""


@dataclass(slots=True)
class _Followed:
    """Stands in a planner's place and gives the plans that were made, layer by layer."""

    planner: Planner
    plans: dict[int, LayerPlan]

    def plan_layer(self, demand: LayerDemand, _lanes: LaneState, _host: HostView | None = None) -> LayerPlan:
        return self.plans[demand.layer]

    def on_event(self, _event: Event) -> None:
        """Nothing is learned: the step is the last one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.planner, name)


def us_with_machine(frozen: Simulator, step: int, plans: Sequence[LayerPlan], profile: HardwareProfile) -> float:
    """us of the step on another machine, from the frozen state before it; ``plans``: those of the real step."""
    planned_anew = frozen.snapshot()
    planned_anew.move_to(profile)
    followed = frozen.snapshot()
    followed.move_to(profile)
    followed.planner = cast(Planner, _Followed(followed.planner, {plan.layer: plan for plan in plans}))
    return min(planned_anew.step_us(step), followed.step_us(step))


def us_with_a_slot(frozen: Simulator, step: int, explanations: Sequence[Explanation]) -> float:
    """us of the step with one more slot, which holds the expert that shortens it most."""
    missing = [
        (decision.cpu_us if decision.lane == "cpu" else decision.transfer_us, explanation.layer, decision.expert)
        for explanation in explanations
        for decision in explanation.decisions
        if not decision.resident
    ]
    found = []
    for _, layer, expert in sorted(missing, reverse=True)[:TRIED_EXPERTS]:
        tried = frozen.snapshot()
        if tried.add_resident(layer, expert):
            found.append(tried.step_us(step))
    return min(found, default=float("inf"))
