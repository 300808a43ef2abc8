"""Memory budgets that change while a model runs: what `Session.resize` changes, returns, and says where it cannot."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from hybrimoe.amounts import parse_amount
from hybrimoe.errors import BudgetError, HybriMoEError, ModelError
from hybrimoe.runtime.store import ExpertStore
from hybrimoe.runtime.tier.store import TieredStore

Budget = Literal["slots", "host", "kv"]
Setting = int | float | str
"""What a budget is given as: a number of experts, a share, or a size."""
Found = TypeVar("Found")


class ResizeError(BudgetError):
    """A budget that cannot be. budget: which of them; reason: why, without its name."""

    def __init__(self, budget: Budget, reason: str) -> None:
        super().__init__(f"{budget}: {reason}")
        self.budget, self.reason = budget, reason


@dataclass(frozen=True, slots=True)
class Resized:
    """What there is now of each budget that was given, None for the others. n_slots: expert slots of all accelerators;
    n_host: experts that host memory has room for; kv_bytes: for the keys and values of all replies."""

    n_slots: int | None
    n_host: int | None
    kv_bytes: int | None


class KeysAndValues(Protocol):
    """Whoever computes replies and keeps their keys and values."""

    def checked_kv(self, budget: Setting) -> int:
        """Bytes that a budget stands for. Raises BudgetError for less than replies under way need, or more than there
        is."""
        ...

    def set_kv(self, kv_bytes: int) -> None:
        """Keeps to so many bytes from here on."""
        ...


def checked(budget: Budget, given: Setting | None, find: Callable[[Setting], Found]) -> Found | None:
    """What `find` makes of a budget that is given. Raises ResizeError for whatever it refuses."""
    if given is None:
        return None
    try:
        return find(given)
    except HybriMoEError as error:
        raise ResizeError(budget, str(error)) from error


@dataclass(frozen=True, slots=True)
class Budgets:
    """The budgets of one session.

    store, keys_of: what host memory and keys and values belong to, where there is any. check_slots raises for a number
    that cannot be, as far as that can be seen beforehand; replace_slots gives the number that there is then, or raises
    and leaves it as it was.
    """

    store: ExpertStore | None
    keys_of: weakref.ref[KeysAndValues] | None
    check_slots: Callable[[Setting], None]
    replace_slots: Callable[[Setting], int]

    def change(
        self, slots: Setting | None, host: Setting | None, kv: Setting | None, settled: Callable[[], None]
    ) -> Resized:
        """Changes those that are given, or none of them; `settled` is called between the looking and the changing.

        Raises ResizeError, which names the budget that cannot be.
        """
        n_host = checked("host", host, lambda budget: tier_of(self.store).slots_for(parse_amount(budget)))
        checked("slots", slots, self.check_slots)
        n_kv_bytes = checked("kv", kv, lambda budget: keys_of(self.keys_of).checked_kv(budget))
        settled()
        n_host_before = 0 if n_host is None else tier_of(self.store).cache.slots.n_slots
        if n_host is not None:
            checked("host", host, lambda _: tier_of(self.store).resize(n_host))
        try:
            n_slots = checked("slots", slots, self.replace_slots)
        except BudgetError:
            if n_host is not None:
                tier_of(self.store).resize(n_host_before)
            raise
        if n_kv_bytes is not None:
            keys_of(self.keys_of).set_kv(n_kv_bytes)
        return Resized(n_slots, n_host, n_kv_bytes)


def tier_of(store: ExpertStore | None) -> TieredStore:
    """The store, where it has a budget of host memory. Raises ModelError where all experts are in memory anyway."""
    if not isinstance(store, TieredStore):
        raise ModelError(
            "all experts are in host memory, so there is no budget to change: load the model with"
            " memory.host and memory.disk (--host-memory) to have one"
        )
    return store


def keys_of(owner: weakref.ref[KeysAndValues] | None) -> KeysAndValues:
    """Who has keys and values of the model. Raises ModelError where nobody has."""
    found = None if owner is None else owner()
    if found is None:
        raise ModelError(
            "no BatchEngine computes replies with this model, so its keys and values have no budget to change:"
            " make one (hybrimoe.generation.continuous_batching), or serve the model"
        )
    return found
