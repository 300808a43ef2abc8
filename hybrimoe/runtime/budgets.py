"""Memory budgets that change while a model runs: what `Session.resize` changes, returns, and says where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from hybrimoe.errors import BudgetError, HybriMoEError

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
