"""One step in detail: what ran when on which lane, and why each expert ran where it did.

A decode step of the replies under way is recorded. While it is, experts run one by one on each lane, so it takes
longer than the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from hybrimoe.server.errors import RequestError
from hybrimoe.server.live.changes import planned_session
from hybrimoe.server.served import Served
from hybrimoe.server.worker import Worker
from scheduler.planner.group import PlannerGroup
from scheduler.planner.planner import Planner

if TYPE_CHECKING:
    from hybrimoe.runtime.session import Session
    from scheduler.graph import PlannedLayer
    from scheduler.records import TaskRecord

__all__ = ["RecordedStep", "record_step"]

MOST_SECONDS = 30.0
"""A step that does not come in this time is given up: nothing is asked, or a long prompt is computed."""
LOOK_SECONDS = 0.01


class StepTask(TypedDict):
    """What ran: times from the step's first task on. expert: -1 for work of no expert."""

    lane: str
    kind: str
    layer: int
    expert: int
    n_tokens: int
    bytes: int
    start_us: float
    end_us: float


class StepDecision(TypedDict):
    """An activated expert: where it ran, and what each alternative was expected to take. resident: it was in a slot.
    wait_us: until it was read from disk into host memory; null for a resident that is not read."""

    expert: int
    n_tokens: int
    resident: bool
    cpu_us: float
    accel_us: float
    transfer_us: float
    wait_us: float | None
    lane: str


class Alternative(TypedDict):
    """How long the layer was expected to take under another balance policy."""

    policy: str
    makespan_us: float


class StepLayer(TypedDict):
    """A layer's plan. prefetched: (layer, expert) pairs whose transfer began with it. alternatives: the best first."""

    layer: int
    expected_us: float
    decisions: list[StepDecision]
    prefetched: list[list[int]]
    alternatives: list[Alternative]


class RecordedStep(TypedDict):
    """POST /hybrimoe/step. kind: whether times are measured or emulated."""

    kind: str
    policy: str
    n_tokens: int
    us: float
    tasks: list[StepTask]
    layers: list[StepLayer]


async def record_step(served: Served) -> RecordedStep:
    """The next decode step but one: recording begins once replies get tokens, so that no prompt is recorded.

    Raises RequestError where no step comes, and as `planned_session`.
    """
    session, worker = planned_session(served), served.worker()
    until = time.monotonic() + MOST_SECONDS
    await _next_step(worker, until)
    await asyncio.wrap_future(worker.between_steps(lambda: session.record_timeline(True)))
    try:
        await _next_step(worker, until)
    finally:
        found = await asyncio.wrap_future(worker.between_steps(lambda: _taken(session)))
    if found is None:
        raise RequestError("the reply ended before a step was recorded; ask for a longer one")
    return found


async def _next_step(worker: Worker, until: float) -> None:
    """Waits for the end of a decode step."""
    before = worker.engine.n_steps
    while worker.engine.n_steps == before:
        if time.monotonic() > until:
            raise RequestError(f"no token came for {MOST_SECONDS:g} s: send a message, and record while it is answered")
        await asyncio.sleep(LOOK_SECONDS)


def _taken(session: Session) -> RecordedStep | None:
    """The last step that was recorded, and its explanation; recording ends. Called between two steps."""
    records, plans = session.timeline, session.plans
    session.record_timeline(False)
    planned = [item for item in plans if item.plan.step == plans[-1].plan.step] if plans else []
    if not planned or planned[-1].demand.phase != "decode":
        return None
    ran = [record for record in records if record.step == planned[-1].plan.step]
    if not ran:
        return None
    began_us = min(record.start_us for record in ran)
    return {
        "kind": "emulated" if any(device.kind == "emulated" for device in session.accelerators) else "measured",
        "policy": session.config.policy,
        "n_tokens": planned[-1].demand.n_tokens_total,
        "us": max(record.end_us for record in ran) - began_us,
        "tasks": [_task(record, began_us) for record in ran],
        "layers": [_layer(session, item) for item in planned],
    }


def _task(record: TaskRecord, began_us: float) -> StepTask:
    return {
        "lane": record.lane_name, "kind": record.kind, "layer": record.layer, "expert": record.expert,
        "n_tokens": record.n_tokens, "bytes": record.bytes, "start_us": record.start_us - began_us,
        "end_us": record.end_us - began_us,
    }  # fmt: skip


def _layer(session: Session, item: PlannedLayer) -> StepLayer:
    planner = session.planner
    assert isinstance(planner, Planner | PlannerGroup), "only a recording for replay has another"
    why = planner.explain(item.plan)
    decisions: Sequence[StepDecision] = [
        {
            "expert": one.expert, "n_tokens": one.n_tokens, "resident": one.resident, "cpu_us": one.cpu_us,
            "accel_us": one.accel_us, "transfer_us": one.transfer_us, "wait_us": one.wait_us,
            "lane": one.lane,
        }
        for one in why.decisions
    ]  # fmt: skip
    return {
        "layer": why.layer,
        "expected_us": why.makespan_us,
        "decisions": list(decisions),
        "prefetched": [[move.layer, move.expert] for move in item.plan.prefetches],
        "alternatives": [{"policy": name, "makespan_us": us} for name, us in why.alternatives],
    }
