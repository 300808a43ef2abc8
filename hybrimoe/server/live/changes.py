"""What may be changed while a model runs: the policy that plans, the number of slots and of replies at once, the memory
of experts and of keys and values."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from hybrimoe.errors import BudgetError, ConfigError, ModelError
from hybrimoe.server.errors import RequestError
from hybrimoe.server.live.state import session_of
from hybrimoe.server.served import Served
from scheduler.errors import SchedulerError

if TYPE_CHECKING:
    from hybrimoe.runtime.session import Session

__all__ = ["change", "planned_session"]

Result = TypeVar("Result")


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
    """Change what is given, between two steps: replies under way go on.

    What another policy needs is compiled before, beside the replies. Raises RequestError for what cannot be, naming
    the field, and what is named is then as before.
    """
    engine = served.worker().engine
    if parallel is not None:
        await _between_steps(served, "parallel", lambda: engine.resize_parallel(parallel))
    if kv is not None:
        await _between_steps(served, "kv", lambda: engine.resize_kv(kv))
    if host_memory is not None:
        session = _session(served)
        await _between_steps(served, "host_memory", lambda: session.resize_host(host_memory))
    if slots is not None:
        session = _session(served)
        await _between_steps(served, "slots", lambda: session.resize_slots(slots))
    if policy is not None:
        session = planned_session(served)
        await served.encode(lambda: _rehearsed(session, policy))
        await _between_steps(served, "policy", lambda: session.change_policy(policy))


def _session(served: Served) -> Session:
    session = session_of(served.worker().engine)
    if session is None:
        raise RequestError("this model has no experts that HybriMoE runs: there is nothing to change")
    return session


async def _between_steps(served: Served, field: str, errand: Callable[[], Result]) -> Result:
    try:
        return await asyncio.wrap_future(served.worker().between_steps(errand))
    except (SchedulerError, BudgetError, ConfigError, ModelError) as error:
        raise RequestError(f"{field}: {error}", field) from error


def _rehearsed(session: Session, policy: str) -> None:
    """Compiles what the policy runs. Raises RequestError for one that cannot plan here."""
    from scheduler.planner.rehearsal import rehearse

    try:
        rehearse(policy, {}, session.config.lookahead)
    except SchedulerError as error:
        raise RequestError(f"policy: {error}", "policy") from error
