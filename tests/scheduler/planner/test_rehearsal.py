"""A rehearsal goes through everything that a step calls, for every policy that needs no recorded routing."""

from __future__ import annotations

import pytest

from scheduler import PolicyError
from scheduler.planner.decide import assign, decide_by_value, fill_table
from scheduler.planner.policies import PRESETS
from scheduler.planner.rehearsal import rehearse
from tests.forked import Forked


@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "static", "freetoken"])
def test_a_rehearsal_runs_and_compiles_the_hot_path(policy: str) -> None:
    rehearse(policy)
    for function in (decide_by_value,) if policy == "ours" else (fill_table, assign):
        assert getattr(function, "signatures", ["interpreted"]), f"{function} was not reached"


NOT_OURS = (
    "scheduler.balancing.peers", "scheduler.cache.simple", "scheduler.prefetch.gates", "scheduler.prefetch.learned",
    "scheduler.planner.decide.fill_table", "scheduler.planner.decide.assign",
)  # fmt: skip
"""What `ours` does not call, which decides in one call."""
OURS = (
    "scheduler.forecast.use_model", "scheduler.forecast.value_model", "scheduler.planner.at_once",
    "scheduler.prefetch.value", "scheduler.planner.decide.decide_by_value", "scheduler.host.price_of_absence",
)  # fmt: skip
"""What no other policy calls."""
PARTS_OF_OTHERS = NOT_OURS[:4]
ELSEWHERE = (
    "scheduler.balancing.problem.accept", "scheduler.forecast.use_model.observe_use",
    "scheduler.forecast.use_model.foretell", "scheduler.forecast.value_model.keep_by_use",
    "scheduler.batching.", "scheduler.recording.", "scheduler.simulator.", "scheduler.traces.",
)  # fmt: skip
"""What no plan calls: a check of costs that somebody gives, what host memory is worth (`host_worth.make_ready`), and
what asks traces, which a process has imported if it was forked from one that does."""

UNPREPARED = """
import ast
import sys
from pathlib import Path
from numba.core.dispatcher import Dispatcher
from scheduler.planner.policies import PRESETS
from scheduler.planner.rehearsal import rehearse
from tests.forked import Forked

rehearse(sys.argv[1])
for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "scheduler"]:
    for function in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(function, ast.FunctionDef) and not isinstance(vars(module).get(function.name), Dispatcher):
            for name in ast.walk(function):
                called = vars(module).get(name.id) if isinstance(name, ast.Name) else None
                if isinstance(called, Dispatcher) and not called.signatures:
                    print(f"{called.py_func.__module__}.{called.py_func.__name__}")
"""


@pytest.mark.parametrize("policy", [policy for policy in PRESETS if policy != "oracle"])
def test_whatever_happens_a_plan_calls_nothing_that_is_not_compiled(policy: str) -> None:
    """Some functions are called only where an expert finds no slot, or a prefetch is worth it: each function of the
    scheduler that its Python code names is compiled by a rehearsal, or belongs to a part of other policies."""
    with Forked(UNPREPARED, policy) as program:
        found, errors = program.communicate()
        assert program.returncode == 0, errors
    others = (*ELSEWHERE, *(NOT_OURS if policy == "ours" else (*PARTS_OF_OTHERS, *OURS)))
    assert [name for name in sorted(set(found.split())) if not name.startswith(others)] == []


def test_wrong_names_are_refused() -> None:
    with pytest.raises(PolicyError, match="ours"):
        rehearse("ourz")
