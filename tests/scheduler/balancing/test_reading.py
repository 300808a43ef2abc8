"""Balance where experts wait for the disk: against exhaustive search, its bound, every policy, and without a wait."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import BALANCE_POLICIES, CostError, LayerCosts, balance, evaluate
from scheduler.balancing.problem import HOST, NEVER_US


def made_costs(seed: int, n: int, *, alike: bool) -> LayerCosts:
    """Random costs of a layer, about half of whose experts wait. alike: equal times on link and accelerator."""
    rng = np.random.default_rng(seed)
    resident = rng.random(n) < 0.4
    waits = np.where(rng.random(n) < 0.5, rng.integers(0, 9, n).astype(float), 0.0)
    host_us = np.where(resident, np.where(rng.random(n) < 0.5, np.inf, 0.0), waits)
    accel, transfer = (np.full(n, rng.random() * 4) if alike else rng.random(n) * 4 for _ in range(2))
    return LayerCosts(
        rng.random(n) * 5, accel, transfer, resident, *(rng.random(3) * rng.choice([0.0, 3.0])), host_us=host_us
    )


def exhaustive(costs: LayerCosts) -> float:
    """Least makespan over every placement and every order of link and accelerator, from the contract's words alone."""
    n, table = len(costs), costs.table
    host = table[HOST] if len(table) > HOST else np.zeros(n)
    best = np.inf
    for mask in range(1 << n):
        on_accel = [i for i in range(n) if mask >> i & 1]
        on_cpu = sorted((i for i in range(n) if not mask >> i & 1), key=lambda i: host[i])
        if any(host[i] >= NEVER_US for i in on_cpu):
            continue
        cpu = costs.ready[0]
        for i in on_cpu:
            cpu = max(cpu, host[i]) + table[0, i]
        for link_order in itertools.permutations([i for i in on_accel if table[3, i] < 0]):
            there, link = {i: table[3, i] for i in on_accel}, costs.ready[2]
            for i in link_order:
                there[i] = link = max(link, host[i]) + table[2, i]
            clock = costs.ready[1]
            for i in sorted(on_accel, key=lambda i: there[i]):
                clock = max(clock, there[i]) + table[1, i]
            best = min(best, max(clock if on_accel else 0.0, cpu if on_cpu else 0.0))
    return float(best)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_optimal_is_exact_or_says_how_far_it_can_be(seed: int, n: int, alike: bool) -> None:
    costs = made_costs(seed, n, alike=alike)
    plan, least = balance(costs), exhaustive(costs)
    assert evaluate(costs, plan.cpu, plan.accel, plan.transfers) == pytest.approx(plan.makespan_us)
    assert plan.bound_us <= least + 1e-9
    assert plan.makespan_us >= least - 1e-9
    if alike:
        assert plan.makespan_us == pytest.approx(least, rel=1e-8)
        assert plan.bound_us == plan.makespan_us


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_no_policy_is_faster_and_none_computes_what_is_not_there(seed: int, n: int) -> None:
    costs = made_costs(seed, n, alike=True)
    least = balance(costs).makespan_us
    for policy in BALANCE_POLICIES:
        plan = balance(costs, policy)
        took = evaluate(costs, plan.cpu, plan.accel, plan.transfers)  # raises where the plan cannot be
        assert took == pytest.approx(plan.makespan_us)
        assert took >= least - 1e-9


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_a_plan_that_does_not_know_of_the_disk_is_never_faster(seed: int, n: int) -> None:
    """The blind plan is carried out as the lanes do: each starts on an expert once it is there, in the plan's order."""
    costs = made_costs(seed, n, alike=True)
    table, ready = costs.table, costs.ready
    blind = LayerCosts(table[0], table[1], table[2], table[3] >= 0.0, *ready)
    plan = balance(blind)
    if any(len(table) > HOST and table[HOST, e] >= NEVER_US for e in plan.cpu):
        return  # it would have to read what a slot holds
    assert evaluate(costs, plan.cpu, plan.accel, plan.transfers) >= balance(costs).makespan_us - 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_where_nothing_waits_every_plan_is_the_same(seed: int, n: int) -> None:
    """Costs without a wait are those that nobody told of a disk, and so are their plans."""
    rng = np.random.default_rng(seed)
    plain = LayerCosts(rng.random(n) * 5, rng.random(n), rng.random(n) * 3, rng.random(n) < 0.4, *rng.random(3))
    told = LayerCosts(*plain.table[:3], plain.table[3] >= 0.0, *plain.ready, host_us=np.zeros(n))
    assert told.table.shape == plain.table.shape
    for policy in BALANCE_POLICIES:
        assert balance(plain, policy) == balance(told, policy)


@pytest.mark.parametrize(
    ("host_us", "message"),
    [
        ([np.inf, 0.0], r"host_us\[0\]: expected a finite number"),
        ([-1.0, 0.0], r"host_us\[0\]"),
        ([0.0, 3.0], r"host_us\[1\]: expected 0 or inf for a resident"),
        ([np.nan, 0.0], r"host_us\[0\]"),
        ([1.0], "host_us: expected shape"),
    ],
)
def test_waits_that_cannot_be(host_us: list[float], message: str) -> None:
    with pytest.raises(CostError, match=message):
        LayerCosts([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [False, True], host_us=host_us)
    with pytest.raises(CostError, match="stay on the accelerator"):
        evaluate(LayerCosts([1.0], [1.0], [1.0], [True], host_us=[np.inf]), (0,), (), ())
