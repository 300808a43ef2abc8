"""What may be changed while a model runs: the policy that plans, the number of slots and of replies at once, the memory
of experts and of keys and values."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from hybrimoe.errors import BudgetError, ConfigError, ModelError
from hybrimoe.runtime.budgets import ResizeError, checked
from hybrimoe.server.errors import RequestError
from hybrimoe.server.live.state import session_of
from hybrimoe.server.served import Served
from scheduler.errors import SchedulerError

if TYPE_CHECKING:
    from hybrimoe.generation.continuous_batching import BatchEngine
    from hybrimoe.runtime.session import Session

__all__ = ["change", "planned_session"]

Result = TypeVar("Result")
FIELDS = {"host": "host_memory"}
"""What requests call a budget of `Session.resize`, where that is another name."""


def planned_session(served: Served) -> Session:
    """The session of the loaded model. Raises RequestError where nothing is planned, and as `Served.worker`."""
    session = _session(served)
    if session.planner is None:
        raise RequestError("no expert has a slot, so nothing is planned: start with an accelerator, and give it slots")
    return session


async def change(
    served: Served, policy: str | None, slots: int | None, host_memory: str | None = None, kv: str | None = None,
    parallel: int | None = None,
) -> None:  # fmt: skip
    """Change all that is given, between two steps, or nothing: replies under way go on.

    What another policy needs is compiled before, beside the replies. Raises RequestError for what cannot be, naming
    the field.
    """
    engine = served.worker().engine
    budgets: dict[str, int | float | str] = {
        name: value for name, value in (("slots", slots), ("host", host_memory), ("kv", kv)) if value is not None
    }
    if policy is not None or budgets.keys() - {"kv"}:  # keys and values are there without experts of ours, too
        session: Session | None = _session(served)
    else:
        session = session_of(engine)
    if session is not None and policy is not None:
        await served.encode(lambda: _rehearsed(session, policy))
    await _between_steps(served, "parallel", lambda: _change_all(engine, session, budgets, policy, parallel))


def _change_all(
    engine: BatchEngine, session: Session | None, budgets: dict[str, int | float | str], policy: str | None,
    parallel: int | None,
) -> None:  # fmt: skip
    """On the thread that steps. Whatever can be refused is refused before the next thing changes, or undone."""
    if parallel is not None:
        engine.check_parallel(parallel)
    if session is None:
        checked("kv", budgets.get("kv"), engine.resize_kv)
    elif policy is None:
        session.resize(**budgets)
    else:
        _resize_and_plan(engine, session, budgets, policy)
    if parallel is not None:
        engine.resize_parallel(parallel)


def _resize_and_plan(engine: BatchEngine, session: Session, budgets: dict[str, int | float | str], policy: str) -> None:
    """Budgets first: with slots that come a policy can plan that could not without."""
    tier, kv_bytes = session.stats().tier, engine.generator.kv_bytes
    before = {"slots": session.n_slots, "host": None if tier is None else tier.n_slots}
    session.resize(**budgets)
    try:
        session.change_policy(policy)
    except (SchedulerError, ModelError) as error:
        session.resize(**{name: value for name, value in before.items() if name in budgets})
        engine.generator.kv_bytes = kv_bytes
        raise RequestError(f"policy: {error}", "policy") from error


def _session(served: Served) -> Session:
    session = session_of(served.worker().engine)
    if session is None:
        raise RequestError("this model has no experts that HybriMoE runs: there is nothing to change")
    return session


async def _between_steps(served: Served, field: str, errand: Callable[[], Result]) -> Result:
    try:
        return await asyncio.wrap_future(served.worker().between_steps(errand))
    except ResizeError as error:
        named = FIELDS.get(error.budget, error.budget)
        raise RequestError(f"{named}: {error.reason}", named) from error
    except (SchedulerError, BudgetError, ConfigError, ModelError) as error:
        raise RequestError(f"{field}: {error}", field) from error


def _rehearsed(session: Session, policy: str) -> None:
    """Compiles what the policy runs. Raises RequestError for one that cannot plan here."""
    from scheduler.planner.rehearsal import rehearse

    try:
        rehearse(policy, {}, session.config.lookahead)
    except SchedulerError as error:
        raise RequestError(f"policy: {error}", "policy") from error
