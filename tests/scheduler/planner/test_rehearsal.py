"""A rehearsal goes through everything that a step calls, for every policy that needs no recorded routing."""

from __future__ import annotations

import pytest

from scheduler import PolicyError
from scheduler.planner.decide import assign, decide_by_value, fill_table
from scheduler.planner.rehearsal import rehearse


@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "static", "freetoken"])
def test_a_rehearsal_runs_and_compiles_the_hot_path(policy: str) -> None:
    rehearse(policy)
    for function in (decide_by_value,) if policy == "ours" else (fill_table, assign):
        assert getattr(function, "signatures", ["interpreted"]), f"{function} was not reached"


def test_wrong_names_are_refused() -> None:
    with pytest.raises(PolicyError, match="ours"):
        rehearse("ourz")
