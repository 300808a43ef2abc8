"""Alternating rounds and medians with their spread: the same for every benchmark."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

__all__ = ["alternate", "busy_warning", "spread"]

Subject = TypeVar("Subject")

IDLE_LOAD_SHARE = 0.3
"""A load average above this share of the cores before a measurement is told: somebody else uses the machine."""


def alternate(
    subjects: Mapping[str, Subject],
    measure: Callable[[Subject], float],
    rounds: int,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    until: float = math.inf,
) -> dict[str, list[float]]:
    """Measure every subject once a round, in turn, so that a slow minute of the machine hits all alike.

    One round before the counted ones warms up and is thrown away. Each round begins with another subject. After `until`
    (s of time.monotonic) no round begins, but for the first counted one.
    """
    names = list(subjects)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() >= until:
            break
        shift = number % len(names)
        for index, name in enumerate(names[shift:] + names[:shift]):
            progress(number * len(names) + index, (rounds + 1) * len(names), "measuring")
            value = measure(subjects[name])
            if number > 0:
                values[name].append(value)
    return values


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of the rounds, and the rounds themselves."""
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def busy_warning() -> str | None:
    """A remark where the machine is not idle before a measurement; None where it is."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= IDLE_LOAD_SHARE * cores:
        return None
    return f"the machine is busy (load {load:.1f} on {cores} cores): expect a wide spread"
