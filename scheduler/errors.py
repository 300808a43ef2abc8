"""Errors of the pure decision core: one root, so that a caller can catch them all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SchedulerError(ValueError):
    """Root of everything that this package raises on purpose."""


class CostError(SchedulerError):
    """Costs are NaN, infinite, negative, of another shape, or of a type that is no number."""


class DemandError(SchedulerError):
    """A demand or a prediction does not fit the model, or contradicts itself."""


class SlotError(SchedulerError):
    """An illegal transition of a cache slot: evicting what is in use, transferring twice, ..."""


class ProfileError(SchedulerError):
    """A hardware profile or model shape has unknown, missing or impossible values."""


class PolicyError(SchedulerError):
    """An unknown policy or parameter name, or a parameter outside its range: wrong usage."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name if there is one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(names)})"
