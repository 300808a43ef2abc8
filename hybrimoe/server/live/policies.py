"""Policies that may plan a running model: all but those that need to know the future."""

from __future__ import annotations

from functools import cache

from scheduler.errors import PolicyError
from scheduler.machine.costs import CostModel
from scheduler.planner.planner import Planner
from scheduler.planner.policies import POLICIES

__all__ = ["offered_beside"]


def offered_beside(present: str) -> list[str]:
    """Names to choose from; the present one first where it is no preset."""
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
