"""The state of a server as one value: who is answered, what each lane has done, what lies in which memory.

It reads counters that are kept anyway. The counters are sums since the start; whoever asks twice knows what happened
between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import psutil
from typing_extensions import TypedDict

from hybrimoe.machine.memory import available_bytes
from hybrimoe.server.models import Models, ModelState, Progress
from hybrimoe.server.served import State as Status
from scheduler.errors import PolicyError
from scheduler.machine.costs import CostModel
from scheduler.planner.planner import Planner
from scheduler.planner.policies import POLICIES

if TYPE_CHECKING:
    from hybrimoe.generation.continuous_batching import BatchEngine
    from hybrimoe.runtime.session import Session

__all__ = ["State", "offered_beside", "read_state", "session_of"]


class Loading(TypedDict):
    """How far a model is that is being loaded. total: 0 where that is not known."""

    what: str
    done: int
    total: int


class Requests(TypedDict):
    """Who is answered. parallel: replies at once at most; in_turn: why they are not computed in one step, if so."""

    running: int
    waiting: int
    parallel: int
    queue_length: int
    in_turn: str | None


class Tokens(TypedDict):
    """Sums since the start. steps: those that gave a token to each running reply."""

    generated: int
    steps: int


class Lane(TypedDict):
    """What works on experts: the CPU, an accelerator, the link to it, the disk. busy_us: since the start, in emulated
    time where the accelerator is emulated."""

    name: str
    kind: Literal["cpu", "accel", "link", "disk"]
    device: str
    busy_us: float


class Experts(TypedDict):
    """Where experts are and run. Sums since the start: activated experts, of which hits were in a slot."""

    policy: str
    lossy: str | None
    accelerator: str
    accelerator_kind: str
    n_layers: int
    n_experts: int
    n_slots: int
    slots_filled: int
    activated: int
    hits: int
    transfers: int
    prefetches: int
    transfer_bytes: int
    lanes: list[Lane]


class Tier(TypedDict):
    """A place in memory. of_bytes: what there is of it, or what it may take; null where that is not known."""

    name: Literal["slots", "experts", "disk", "keys_and_values", "prefix_cache", "prefix_cache_disk", "process"]
    device: str
    bytes: int
    of_bytes: int | None


class Switches(TypedDict):
    """What may be changed while the model runs; empty or null: nothing. slots: how many experts there are to hold."""

    policies: list[str]
    most_slots: int | None


class State(TypedDict):
    """GET /hybrimoe/state. model: the one in memory, or that is meant where a request names none; models: the state of
    each. time_s: a clock that only goes forward."""

    status: Status
    model: str
    models: dict[str, ModelState]
    time_s: float
    loading: Loading | None
    requests: Requests
    tokens: Tokens
    experts: Experts | None
    memory: list[Tier]
    switches: Switches


def session_of(engine: BatchEngine | None) -> Session | None:
    """The session of the model; None before it is loaded, and where nothing was injected."""
    injection = None if engine is None else getattr(engine.generator.model, "hybrimoe", None)
    return None if injection is None else injection.session


def read_state(models: Models) -> State:
    """The state now. Waits for the layer that runs, so the event loop should not call it."""
    served = models.served
    engine, worker = (None, None) if served is None else (served.engine, served.running_worker)
    session, stats = session_of(engine), models.experts()
    return {
        "status": models.state,
        "model": models.name,
        "models": dict(models.states),
        "time_s": time.monotonic(),
        "loading": _loading(models.loading),
        "requests": {
            "running": models.n_running,
            "waiting": models.n_waiting,
            "parallel": 0 if engine is None else engine.parallel,
            "queue_length": 0 if worker is None else worker.queue_length,
            "in_turn": None if engine is None else engine.in_turn,
        },
        "tokens": {
            "generated": 0 if worker is None else worker.n_generated,
            "steps": 0 if engine is None else engine.n_steps,
        },
        "experts": None if stats is None or session is None else _experts(session, stats),
        "memory": list(_memory(engine, session, stats)),
        "switches": _switches(session),
    }


def _loading(progress: Progress | None) -> Loading | None:
    return None if progress is None else {"done": progress.done, "total": progress.total, "what": progress.what}


def _experts(session: Session, stats: Mapping[str, Any]) -> Experts:
    total = stats["total"]
    return {
        "policy": str(stats["policy"]),
        "lossy": stats["lossy"],
        "accelerator": str(stats["accelerator"]),
        "accelerator_kind": str(stats["accelerator_kind"]),
        "n_layers": len(session.layers),
        "n_experts": int(stats["n_experts"]),
        "n_slots": int(stats["n_slots"]),
        "slots_filled": int(stats["slots_filled"]),
        "activated": int(total["activated"]),
        "hits": int(total["hits"]),
        "transfers": int(total["transfers"]),
        "prefetches": int(total["prefetches"]),
        "transfer_bytes": int(total["transfer_bytes"]),
        "lanes": list(_lanes(stats)),
    }


def _lanes(stats: Mapping[str, Any]) -> Iterator[Lane]:
    """The CPU's, two of each accelerator that has slots, and the disk's where experts are read from it."""
    yield {"name": "cpu", "kind": "cpu", "device": "cpu", "busy_us": float(stats["total"]["cpu_us"])}
    for number, unit in enumerate(stats["accelerators"]):
        if not unit["n_slots"]:
            continue
        kinds: tuple[Literal["accel", "link"], ...] = ("accel", "link")
        for kind in kinds:
            name, busy_us = f"{kind}:{number}" if number else kind, float(unit["total"][f"{kind}_us"])
            yield {"name": name, "kind": kind, "device": str(unit["name"]), "busy_us": busy_us}
    if stats["tier"] is not None:
        yield {"name": "disk", "kind": "disk", "device": "disk", "busy_us": float(stats["total"]["disk_us"])}


def _memory(
    engine: BatchEngine | None, session: Session | None, stats: Mapping[str, Any] | None
) -> Iterator[Tier]:  # fmt: skip
    if session is not None and stats is not None:
        for unit in session.units:
            slots = unit.accelerator
            if slots.n_slots:
                n_bytes = slots.n_slots * slots.slot_bytes
                yield {"name": "slots", "device": slots.name, "bytes": n_bytes, "of_bytes": None}
        tier = stats["tier"]
        if tier is None:
            yield {"name": "experts", "device": "cpu", "bytes": int(stats["store_bytes"]), "of_bytes": None}
        else:
            each, on_disk = tier["slot_bytes"], tier["slot_bytes"] * tier["n_records"]
            yield {"name": "experts", "device": "cpu", "bytes": each * tier["held"], "of_bytes": each * tier["n_slots"]}
            yield {"name": "disk", "device": tier["path"], "bytes": on_disk, "of_bytes": None}
    if engine is not None:
        device, limit = str(engine.generator.model.device), engine.generator.kv_bytes
        yield {"name": "keys_and_values", "device": device, "bytes": engine.kv_bytes, "of_bytes": limit}
        if engine.prefixes is not None:
            kept, most = engine.prefixes.n_bytes, engine.prefixes.max_bytes
            yield {"name": "prefix_cache", "device": "cpu", "bytes": kept, "of_bytes": most}
            disk = engine.prefixes.disk
            if disk is not None:
                kept, most = disk.n_bytes, disk.max_bytes
                yield {"name": "prefix_cache_disk", "device": str(disk.path), "bytes": kept, "of_bytes": most}
    resident = int(psutil.Process().memory_info().rss)
    yield {"name": "process", "device": "cpu", "bytes": resident, "of_bytes": resident + available_bytes()}


def _switches(session: Session | None) -> Switches:
    if session is None or not session.started or not session.accelerators:
        return {"policies": [], "most_slots": None}
    policies = [] if session.planner is None else offered_beside(session.config.policy)
    return {"policies": policies, "most_slots": sum(layer.num_experts for layer in session.layers)}


def offered_beside(present: str) -> list[str]:
    """Policies that may plan a running model: all but those that need to know the future. The present one comes first
    where it is no preset."""
    found = [name for name in POLICIES if _can_plan(name)]
    return found if present in found else [present, *found]


@cache
def _can_plan(name: str) -> bool:
    """Whether a planner of the policy can be made without a recorded future."""
    try:
        Planner(1, 1, 1, CostModel.uniform(1), name)
    except PolicyError:
        return False
    return True
