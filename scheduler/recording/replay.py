"""Exact replay: a recorded run's planner calls on a new planner, answer by answer (times: ``retiming``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from scheduler.errors import SchedulerError
from scheduler.plan import LayerPlan
from scheduler.planner.protocol import LayerPlanner
from scheduler.recording.recording import Call, Recording, resident_hits


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first answer that differed. ``what``: a field of the plan, ``hits``, ``warm_up``, or a refused call."""

    step: int
    layer: int
    what: str
    recorded: Any
    replayed: Any
    why: str


@dataclass(frozen=True, slots=True)
class Replay:
    """Counts over the plans that agreed. ``exact``: every plan, transfer and hit was reproduced."""

    plans: int
    calls: int
    transfers: int
    prefetches: int
    hits: int
    activated: int
    divergence: Divergence | None

    @property
    def exact(self) -> bool:
        """Nothing differed."""
        return self.divergence is None

    @property
    def hit_rate(self) -> float:
        """Share of activated experts whose bytes were in a slot."""
        return self.hits / max(self.activated, 1)


def replay(recording: Recording) -> Replay:
    """Gives a new planner every recorded call, up to the first answer that differs from the recorded one."""
    planner = recording.planner()
    plans = transfers = prefetches = hits = activated = 0
    for at, call in enumerate(recording.calls):
        found = _answer(planner, call)
        if isinstance(found, Divergence):
            return Replay(plans, at, transfers, prefetches, hits, activated, found)
        if call.name == "plan_layer":
            plans += 1
            transfers += len(call.answer.transfers)
            prefetches += len(call.answer.prefetches)
            hits += call.hits
            activated += int(call.args[0].expert_ids.size)
    return Replay(plans, len(recording.calls), transfers, prefetches, hits, activated, None)


def _answer(planner: LayerPlanner, call: Call) -> Divergence | None:
    """Performs one call; what differed, or None."""
    step = -1
    layer = getattr(call.args[0], "layer", -1) if call.args else -1
    if isinstance(call.answer, LayerPlan):
        step = call.answer.step
        hits = resident_hits(planner, call.args[0])
        if hits != call.hits:
            return Divergence(step, layer, "hits", call.hits, hits, "other experts are in the slots than in the run")
    try:
        answer = getattr(planner, call.name)(*call.args)
    except SchedulerError as error:
        return Divergence(step, layer, call.name, "done", "refused", str(error))
    if call.answer is None or answer == call.answer:
        return None
    if not isinstance(answer, LayerPlan):
        return Divergence(step, layer, call.name, call.answer, answer, "the warm-up chose other experts")
    return _difference(call.answer, answer)


def _difference(recorded: LayerPlan, replayed: LayerPlan) -> Divergence:
    """The first field that differs, in the order in which a plan is decided."""
    names = [field.name for field in fields(LayerPlan)]
    what = next(name for name in names if getattr(recorded, name) != getattr(replayed, name))
    moved = sorted(set(recorded.cpu) ^ set(replayed.cpu))
    if moved:
        lanes = ", ".join(
            f"expert {e} on the {'CPU' if e in recorded.cpu else 'accelerator'} in the run, "
            f"on the {'CPU' if e in replayed.cpu else 'accelerator'} now"
            for e in moved
        )
        why = (
            f"{lanes}; predicted {recorded.predicted_makespan_us:.1f} us then, {replayed.predicted_makespan_us:.1f} now"
        )
    else:
        why = f"same lanes, other {what.replace('_', ' ')}"
    return Divergence(recorded.step, recorded.layer, what, getattr(recorded, what), getattr(replayed, what), why)
