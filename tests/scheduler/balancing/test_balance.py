"""Balance: the optimum against exhaustive search and a MILP, the paper's Fig. 5, every peer by hand, bad input."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from scheduler import BALANCE_POLICIES, BalancePlan, CostError, LayerCosts, PolicyError, balance, evaluate


def exhaustive(costs: LayerCosts) -> float:
    """Least makespan over every placement, link order and accelerator order, from the contract's words alone."""
    n, (cpu, accel, transfer, arrival, _), ready = len(costs), costs.table, costs.ready
    best = np.inf
    for mask in range(1 << n):
        on_accel = [i for i in range(n) if mask >> i & 1]
        on_cpu = [i for i in range(n) if not mask >> i & 1]
        moved = [i for i in on_accel if arrival[i] < 0]
        for link_order in itertools.permutations(moved):
            there = {i: arrival[i] for i in on_accel}
            link = ready[2]
            for i in link_order:
                link += transfer[i]
                there[i] = link
            clock = ready[1]
            for i in sorted(on_accel, key=lambda i: there[i]):
                clock = max(clock, there[i]) + accel[i]
            best = min(best, max(clock if on_accel else 0.0, ready[0] + cpu[on_cpu].sum() if on_cpu else 0.0))
    return float(best)


def random_costs(rng: np.random.Generator, n: int, late: bool = False) -> LayerCosts:
    def numbers() -> np.ndarray:
        return rng.integers(0, 7, n).astype(float) if rng.random() < 0.5 else rng.random(n) * 5

    ready = rng.random(3) * rng.choice([0.0, 2.0, 8.0])
    arrival = rng.random(n) * ready[2] if late else None
    return LayerCosts(numbers(), numbers(), numbers(), rng.random(n) < 0.4, *ready, arrival_us=arrival)


def check_valid(costs: LayerCosts, plan: BalancePlan) -> None:
    assert evaluate(costs, plan.cpu, plan.accel, plan.transfers) == pytest.approx(plan.makespan_us, rel=1e-12)


@pytest.mark.parametrize("late", [False, True])
def test_optimal_equals_exhaustive_search(late: bool) -> None:
    rng = np.random.default_rng(7)
    for _ in range(250):
        costs = random_costs(rng, int(rng.integers(1, 6)), late)
        plan = balance(costs, "optimal")
        check_valid(costs, plan)
        assert plan.makespan_us == pytest.approx(exhaustive(costs), rel=1e-8, abs=1e-12)
        assert plan.bound_us == plan.makespan_us


def subset_optimum(costs: LayerCosts) -> float:
    """Least makespan over all placements; orders by arrival, link orders by trying every order of up to 4 transfers."""
    n = len(costs)
    best = np.inf
    johnson = sorted(
        range(n),
        key=lambda i: (0, costs.table[2, i]) if costs.table[2, i] <= costs.table[1, i] else (1, -costs.table[1, i]),
    )
    for mask in range(1 << n):
        accel = [i for i in johnson if mask >> i & 1]
        residents = [i for i in accel if costs.table[3, i] >= 0]
        moved = [i for i in accel if costs.table[3, i] < 0]
        cpu = tuple(i for i in range(n) if not mask >> i & 1)
        best = min(best, evaluate(costs, cpu, (*residents, *moved), tuple(moved)))
    return best


def test_optimal_is_exact_for_nine_and_ten_general_experts() -> None:
    rng = np.random.default_rng(11)
    for n in (8, 9, 10):
        for _ in range(4):
            costs = random_costs(rng, n)
            assert balance(costs).makespan_us == pytest.approx(subset_optimum(costs), rel=1e-8)


def test_optimal_on_thresholds_equals_branch_and_bound() -> None:
    """Equal accelerator and transfer costs take the enumeration; a ripple sends the same instance to the search."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        n = int(rng.integers(2, 13))
        cpu = rng.integers(1, 30, n) * 10.0
        resident = rng.random(n) < 0.5
        ready = rng.random(3) * 100
        plain = balance(LayerCosts(cpu, np.full(n, 20.0), np.full(n, 55.0), resident, *ready))
        ripple = 20.0 + 1e-7 * np.argsort(np.argsort(cpu))
        searched = balance(LayerCosts(cpu, ripple, np.full(n, 55.0), resident, *ready))
        assert plain.makespan_us == pytest.approx(searched.makespan_us, abs=1e-4)


def milp_optimum(costs: LayerCosts) -> float:
    """HiGHS: x = on the accelerator, makespan >= every k's transfer sum + the compute after it, in Johnson's order."""
    n, (cpu, accel, transfer, arrival, _), ready = len(costs), costs.table, costs.ready
    moved = [i for i in range(n) if arrival[i] < 0]
    moved.sort(key=lambda i: (0, transfer[i]) if transfer[i] <= accel[i] else (1, -accel[i]))
    big = ready.sum() + cpu.sum() + accel.sum() + transfer.sum()
    rows, lower = [], []

    def at_least(constant: float, weights: np.ndarray) -> None:
        rows.append(np.concatenate((-weights, [1.0])))
        lower.append(constant)

    at_least(ready[0] + cpu.sum() - 0.0, -cpu)
    for i in range(n):
        lone = accel.copy()
        lone[i] += big
        at_least(ready[1] - big, lone)
    for k, expert in enumerate(moved):
        weights = np.zeros(n)
        for i in moved[: k + 1]:
            weights[i] += transfer[i]
        for i in moved[k:]:
            weights[i] += accel[i]
        weights[expert] += big
        at_least(ready[2] - big, weights)
    result = milp(
        c=np.append(np.zeros(n), 1.0),
        constraints=LinearConstraint(np.array(rows), lb=np.array(lower)),
        integrality=np.append(np.ones(n), 0.0),
        bounds=Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf)),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success
    return float(result.fun)


def test_optimal_agrees_with_a_milp() -> None:
    """14 experts, where not all go to the accelerator (the MILP counts the CPU's ready time always)."""
    rng = np.random.default_rng(5)
    for _ in range(6):
        n = 14
        costs = LayerCosts(
            10 + rng.random(n) * 50, 5 + rng.random(n) * 20, 20 + rng.random(n) * 60, rng.random(n) < 0.4,
            3.0, 7.0, 11.0,
        )  # fmt: skip
        plan = balance(costs)
        assert plan.cpu
        assert plan.makespan_us == pytest.approx(milp_optimum(costs), rel=1e-6)


def test_large_instances_report_a_gap_that_holds() -> None:
    rng = np.random.default_rng(1)
    for n in (40, 256):
        load = np.ceil(rng.pareto(1.2, n) * 8)
        costs = LayerCosts(50 + load * 12, 20 + load * 0.8, np.full(n, 300.0), rng.random(n) < 0.3)
        plan = balance(costs)
        check_valid(costs, plan)
        assert 0.0 < plan.bound_us <= plan.makespan_us <= 1.1 * plan.bound_us
        more = balance(costs, "optimal", node_limit=200_000)
        assert plan.bound_us <= more.makespan_us + 1e-6
        assert more.makespan_us <= plan.makespan_us


def test_no_policy_beats_optimal_and_every_plan_is_valid() -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        costs = random_costs(rng, int(rng.integers(1, 12)))
        best = balance(costs, "optimal").makespan_us
        for policy in BALANCE_POLICIES:
            plan = balance(costs, policy)
            check_valid(costs, plan)
            assert plan.makespan_us >= best - 1e-9


def test_paper_figure_5() -> None:
    """g = 1, c = load, t = 3; A1 B1 C3 not resident, E1 D4 resident (positions A B C E D)."""
    costs = LayerCosts([1, 1, 3, 1, 4], [1] * 5, [3] * 5, [False, False, False, True, True])
    plan = balance(costs, "hybrimoe")
    assert (plan.cpu, plan.accel, plan.transfers) == ((0, 1, 3), (4, 2), (2,))
    assert plan.makespan_us == 4.0


def test_the_released_code_steals_nothing_in_figure_5() -> None:
    """D and E, C and the last of A and B: each to the lane that ends it first."""
    costs = LayerCosts([1, 1, 3, 1, 4], [1] * 5, [3] * 5, [False, False, False, True, True])
    plan = balance(costs, "hybrimoe_released")
    assert (plan.cpu, plan.accel, plan.transfers) == ((1, 0), (4, 3, 2), (2,))
    assert plan.makespan_us == 4.0


# Positions 0, 1 are misses with cpu 10 and 40, position 2 a resident with cpu 30; accelerator 5, transfer 20.
PEER_PLANS = {
    "static": ((0, 1), (2,), ()),
    "on_demand": ((), (2, 1, 0), (1, 0)),
    "accel_only": ((), (2, 1, 0), (1, 0)),
    "cpu_only": ((0, 2, 1), (), ()),
    "layers": ((0, 2, 1), (), ()),
    "fiddler": ((0,), (2, 1), (1,)),
    "monde": ((0,), (2, 1), (1,)),
    "bandwidth": ((1,), (2, 0), (0,)),
    "hybrimoe": ((0,), (2, 1), (1,)),
    "hybrimoe_released": ((0,), (2, 1), (1,)),
    "optimal": ((0,), (2, 1), (1,)),
    "value": ((0,), (2, 1), (1,)),
}


@pytest.mark.parametrize("policy", BALANCE_POLICIES)
def test_peers_by_hand(policy: str) -> None:
    """monde: H = round(3 * 10 / (20 + 10)) = 1, the hottest is 1. bandwidth: c 25, t 20: round(2 * 25 / 45) = 1."""
    plan = balance(LayerCosts([10, 40, 30], [5, 5, 5], [20, 20, 20], [False, False, True]), policy)
    assert (plan.cpu, plan.accel, plan.transfers) == PEER_PLANS[policy]


def test_layers_runs_on_the_accelerator_only_if_all_are_resident() -> None:
    plan = balance(LayerCosts([1, 2], [1, 1], [9, 9], [True, True]), "layers")
    assert plan.cpu == ()
    assert plan.accel == (1, 0)


def test_bandwidth_fetches_the_most_recently_active() -> None:
    costs = LayerCosts([10] * 4, [1] * 4, [30] * 4, [False] * 4)
    plan = balance(costs, "bandwidth", priority=[1, 5, 3, 2])
    assert plan.transfers == (1,), "round(4 * 10 / 40) = 1 fetched, the most recent"
    with pytest.raises(CostError, match="priority"):
        balance(costs, "bandwidth", priority=[1, 2])


def test_fiddler_max_form_balances_the_sums() -> None:
    """Sums: each miss c = 10 < t + g = 12, so all on the CPU (30); max form: two on the CPU 20, one there 12."""
    costs = LayerCosts([10] * 3, [2] * 3, [10] * 3, [False] * 3)
    assert balance(costs, "fiddler").makespan_us == 30.0
    assert balance(costs, "fiddler", form="max").makespan_us == 20.0


def test_monde_with_a_given_number_of_hot_experts() -> None:
    costs = LayerCosts([3, 1, 2], [1] * 3, [1] * 3, [False] * 3)
    assert set(balance(costs, "monde", hot=2).accel) == {0, 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*(st.floats(0, 1e6) for _ in range(3)), st.booleans()), min_size=1, max_size=7
    ),
    st.tuples(*(st.floats(0, 1e6) for _ in range(3))),
)  # fmt: skip
def test_optimal_property(experts: list[tuple[float, float, float, bool]], ready: tuple[float, float, float]) -> None:
    cpu, accel, transfer, resident = zip(*experts, strict=True)
    costs = LayerCosts(cpu, accel, transfer, resident, *ready)
    plan = balance(costs)
    check_valid(costs, plan)
    assert plan.makespan_us == pytest.approx(subset_optimum(costs), rel=1e-8, abs=1e-9)


def test_a_late_resident_is_waited_for() -> None:
    costs = LayerCosts([100.0], [5.0], [50.0], [True], link_ready_us=30.0, arrival_us=[30.0])
    assert balance(costs).makespan_us == 35.0


BAD = [
    ({"cpu_us": []}, "no activated experts"),
    ({"cpu_us": [1.0, np.nan]}, r"cpu_us\[1\]"),
    ({"accel_us": [-1.0, 1.0]}, r"accel_us\[0\]"),
    ({"transfer_us": [np.inf, 1.0]}, r"transfer_us\[0\]"),
    ({"accel_us": [1.0]}, r"accel_us: expected shape \(2,\)"),
    ({"cpu_us": [[1.0, 2.0]]}, "cpu_us: expected shape"),
    ({"cpu_us": ["a", "b"]}, "cpu_us: expected real numbers"),
    ({"accel_us": [1j, 1.0]}, "accel_us: expected real numbers"),
    ({"resident": [True]}, "resident: expected shape"),
    ({"resident": [0.5, 1.0]}, "resident: expected booleans"),
    ({"resident": [2, 1]}, "resident: expected booleans"),
    ({"link_ready_us": -1.0}, "link_ready_us"),
    ({"cpu_ready_us": float("nan")}, "cpu_ready_us"),
    ({"arrival_us": [5.0, 0.0]}, "link is in order"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_costs_say_what_is_wrong(change: dict, message: str) -> None:
    good = {"cpu_us": [1.0, 2.0], "accel_us": [1.0, 1.0], "transfer_us": [3.0, 3.0], "resident": [True, False]}
    with pytest.raises(CostError, match=message):
        LayerCosts(**{**good, **change})


@pytest.mark.parametrize(
    ("policy", "params", "message"),
    [
        ("optimum", {}, "did you mean 'optimal'"),
        ("fiddler", {"from": "max"}, "did you mean 'form'"),
        ("fiddler", {"form": "min"}, "'sum' or 'max'"),
        ("monde", {"hot": -2}, "integer of at least 0"),
        ("static", {"hot": 1}, "unknown parameter"),
    ],
)
def test_bad_policy_or_parameter(policy: str, params: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        balance(LayerCosts([1.0], [1.0], [1.0], [True]), policy, **params)


def test_evaluate_rejects_what_is_no_plan() -> None:
    costs = LayerCosts([1, 2], [1, 1], [3, 3], [True, False])
    assert evaluate(costs, (0,), (1,), (1,)) == 4.0
    with pytest.raises(CostError, match="placed once"):
        evaluate(costs, (0,), (0, 1), (1,))
    with pytest.raises(CostError, match="misses"):
        evaluate(costs, (0,), (1,), ())


def test_the_plain_python_path_gives_the_same_plans() -> None:
    """Compiled and NUMBA_DISABLE_JIT=1, the same digits."""
    script = (
        "import numpy as np\nfrom scheduler import *\nr = np.random.default_rng(4)\n"
        "for n in (1, 3, 8, 12):\n"
        "    c = LayerCosts(r.random(n), r.random(n), r.random(n), r.random(n) < 0.5, *r.random(3))\n"
        "    for p in BALANCE_POLICIES:\n        print(balance(c, p))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "NUMBA_DISABLE_JIT": flag},
            capture_output=True,
            text=True,
        )
        for flag in ("0", "1")
    ]
    assert all(o.returncode == 0 for o in outputs), outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout
    assert outputs[0].stdout
