"""``ours``: contention and worth in the balance, calibrated forecasts, prefetching that stops where it does not pay."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import (
    CostModel,
    LaneState,
    LayerCosts,
    LayerDemand,
    LayerEnded,
    LayerPlan,
    Planner,
    PolicyError,
    Prediction,
    TransferEnded,
    balance,
)
from scheduler.balancing.problem import COUNT, PRIORITY, TRANSFER, new_plan
from scheduler.balancing.valued import shared_memory_end, valued
from scheduler.forecast.value_model import BIN_TRUST, N_BINS, calibrated, cell, learn_fate


def test_without_contention_worth_or_price_it_is_the_optimum() -> None:
    rng = np.random.default_rng(9)
    for _ in range(50):
        n = int(rng.integers(1, 10))
        costs = LayerCosts(rng.random(n) * 9, rng.random(n) * 3, rng.random(n) * 9, rng.random(n) < 0.4, *rng.random(3))
        assert balance(costs, "value").makespan_us == pytest.approx(balance(costs, "optimal").makespan_us, rel=1e-9)


def test_cpu_work_beside_the_link() -> None:
    """100 us of work at half rate while the link is busy for 80: 40 done by 80, the other 60 until 140."""
    assert shared_memory_end(0.0, 100.0, 80.0, 0.5) == pytest.approx(140.0)
    assert shared_memory_end(0.0, 30.0, 80.0, 0.5) == pytest.approx(60.0)
    assert shared_memory_end(90.0, 30.0, 80.0, 0.5) == pytest.approx(120.0), "the link was done before"


def plan_of(worth: list[float], victims: list[float], price: float, cpu_rate: float) -> tuple[int, ...]:
    """Transfers for two misses with cpu 100, accelerator 10, transfer 120."""
    costs = LayerCosts([100, 100], [10, 10], [120, 120], [False, False])
    costs.table[PRIORITY] = worth
    plan = new_plan(2)
    valued(costs.table, costs.ready, np.array(victims), price, cpu_rate, plan)
    return tuple(plan[TRANSFER, : plan[TRANSFER, COUNT]].tolist())


def test_worth_victims_price_and_contention_decide_transfers() -> None:
    """One transfer: makespan 130 against 200, with the link at half the CPU's rate 160: 100 = 60 + 40 * 1 until 160."""
    assert plan_of([0, 0], [0, 0], 0.0, 1.0) == (0,)
    assert plan_of([0, 50], [0, 0], 0.0, 1.0) == (1,), "the one that will be worth more goes"
    assert plan_of([0, 0], [80, 80], 0.0, 1.0) == (), "70 us gained do not pay for a victim worth 80"
    assert plan_of([0, 0], [0, 0], 71.0, 1.0) == ()
    assert plan_of([0, 0], [45, 45], 0.0, 0.5) == (), "contention leaves 40 us"
    assert plan_of([500, 500], [0, 0], 0.0, 1.0) == (0, 1), "both are worth waiting for"


def test_calibration_by_hand() -> None:
    """Bin of forecast .3 and score .9; 3 of 4 came true: shared (3 + 6 * .45) / 10, own (3 + 6 * shared) / 10."""
    own, shared = np.zeros((2, N_BINS * N_BINS)), np.zeros((2, N_BINS * N_BINS))
    at = cell(0.3, 0.9)
    assert at == 3 * N_BINS + 7
    assert cell(0.0, 0.0) == 0
    for came in (1, 1, 1, 0):
        learn_fate(own, shared, np.array([at]), np.array([5]), np.array([5] if came else [6], np.int32))
    expected = (3 + BIN_TRUST * 0.45) / (4 + BIN_TRUST)
    expected = (3 + BIN_TRUST * expected) / (4 + BIN_TRUST)
    assert calibrated(own, shared, 0.3, 0.9) == pytest.approx(expected, abs=0.01)


def run_predicted(right: float, n_steps: int = 120) -> tuple[int, int]:
    """(prefetches, useful ones) in the last half, with gate predictions of which a share ``right`` is true."""
    rng = np.random.default_rng(1)
    n_layers, n_experts = 4, 32
    planner = Planner(n_layers, n_experts, 24, CostModel.uniform(n_layers, 100, 10, 90, dense_us=200), "ours")
    made = useful = 0
    for step in range(n_steps):
        planner.begin_step("decode", 1)
        routes = [np.sort(rng.choice(n_experts, 2, replace=False)).astype(np.int32) for _ in range(n_layers)]
        expected: set[tuple[int, int]] = set()
        for layer, ids in enumerate(routes):
            if step >= n_steps // 2:
                made += len([k for k in expected if k[0] == layer])
                useful += len([k for k in expected if k[0] == layer and k[1] in ids])
            ahead = ()
            if layer + 1 < n_layers:
                truth = routes[layer + 1]
                named = truth if rng.random() < right else (truth + 1) % n_experts
                ahead = (
                    Prediction(layer + 1, named.astype(np.int32), np.ones(2, np.float32), np.full(2, 0.9, np.float32)),
                )
            gate = np.zeros(n_experts, np.float32)
            gate[ids] = 0.5
            plan = planner.plan_layer(
                LayerDemand(layer, "decode", 1, ids, np.ones(2, np.int32), gate, ahead), LaneState()
            )
            expected = {(t.layer, t.expert) for t in plan.prefetches}
            for t in (*plan.transfers, *plan.prefetches):
                planner.on_event(TransferEnded(t.layer, t.expert, t.slot))
            planner.on_event(LayerEnded(layer))
    return made, useful


def test_good_predictions_are_prefetched_and_bad_ones_are_not() -> None:
    made, useful = run_predicted(right=0.95)
    assert made > 60
    assert useful > 0.85 * made
    made, _ = run_predicted(right=0.1)
    assert made <= 6, "prefetching stops by itself where the gates ahead do not predict"


def prefill(planner: Planner, layer: int, loads: dict[int, int], ahead: dict[int, float] | None = None) -> LayerPlan:
    """One layer of a prefill of 64 tokens, everything done at once."""
    named = ()
    if ahead is not None:
        ids = np.array(sorted(ahead), np.int32)
        tokens = np.array([ahead[e] for e in ids.tolist()], np.float32)
        named = (Prediction(layer + 1, ids, tokens, tokens / 64),)
    counts = np.array([loads[e] for e in sorted(loads)], np.int32)
    demand = LayerDemand(
        layer, "prefill", 64, np.array(sorted(loads), np.int32), counts, np.zeros(8, np.float32), named
    )
    plan = planner.plan_layer(demand)
    for t in (*plan.transfers, *plan.prefetches):
        planner.on_event(TransferEnded(t.layer, t.expert, t.slot))
    planner.on_event(LayerEnded(layer))
    return plan


def prefilling(n_slots: int, transfer_us: float) -> Planner:
    """3 layers of 8 experts: 100 us on the CPU, 10 on the accelerator, the link idles for long between layers."""
    planner = Planner(3, 8, n_slots, CostModel.uniform(3, 100.0, 10.0, transfer_us, 1.0, 0.0, 5000.0), "ours")
    for t in planner.warm_up(np.ones((3, 8))):
        planner.on_event(TransferEnded(t.layer, t.expert, t.slot))
    planner.begin_step("prefill", 64)
    return planner


def test_a_prefill_streams_the_next_layer_by_expected_load() -> None:
    planner = prefilling(12, 300.0)
    prefill(planner, 0, dict.fromkeys(range(8), 16), dict.fromkeys(range(8), 0.0))
    here = set(planner.slots.resident(2))
    absent = sorted(set(range(8)) - here)
    ahead = {e: float(10 + e) for e in absent} | dict.fromkeys(here, 5.0)
    plan = prefill(planner, 1, dict.fromkeys(range(8), 16), ahead)
    brought = [(t.layer, t.expert) for t in plan.prefetches]
    assert brought == [(2, e) for e in reversed(absent)][: len(brought)]
    assert len(brought) >= 3
    assert all(t.evicts is None or t.evicts[0] == 0 for t in plan.prefetches), "the layer behind makes room"


def test_a_prefill_does_not_stream_what_gets_no_tokens_or_costs_more_than_it_saves() -> None:
    planner = prefilling(12, 300.0)
    absent = sorted(set(range(8)) - set(planner.slots.resident(1)))
    plan = prefill(planner, 0, dict.fromkeys(range(8), 16), {absent[0]: 9.0})
    assert [t.expert for t in plan.prefetches] == [absent[0]]
    dear = prefilling(12, 300.0)
    dear.prefetch.link_share = 9.0
    assert prefill(dear, 0, dict.fromkeys(range(8), 16)).prefetches == ()
    assert prefill(prefilling(12, 300.0), 2, dict.fromkeys(range(8), 16)).prefetches == (), "there is no next layer"


def test_bad_parameters() -> None:
    costs = LayerCosts([1.0], [1.0], [1.0], [True])
    for params, message in (
        ({"cpu_rate": 0.0}, "cpu_rate"),
        ({"link_price": -1}, "link_price"),
        ({"hot": 1}, "unknown"),
    ):
        with pytest.raises(PolicyError, match=message):
            balance(costs, "value", **params)
