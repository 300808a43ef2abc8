"""The planner: capacity, states, prefill with few slots, prefetch budget, placements, determinism, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import (
    POLICIES,
    CostModel,
    DemandError,
    Future,
    LaneState,
    LayerDemand,
    LayerEnded,
    LayerPlan,
    ObservedTask,
    Planner,
    PolicyError,
    Prediction,
    SlotError,
    SlotState,
    TransferEnded,
    resolve_policy,
)

N_LAYERS, N_EXPERTS = 3, 8


def costs(**kwargs: float) -> CostModel:
    return CostModel.uniform(N_LAYERS, **{"cpu_us": 100, "accel_us": 10, "transfer_us": 60, **kwargs})


def planner(n_slots: int = 6, policy: str = "hybrimoe", given: CostModel | None = None, **kwargs: object) -> Planner:
    return Planner(N_LAYERS, N_EXPERTS, n_slots, given or costs(), policy, **kwargs)  # type: ignore[arg-type]


def demand(
    layer: int, tokens: dict[int, int], predictions: tuple[Prediction, ...] = (), phase: str = "decode"
) -> LayerDemand:
    ids = np.array(sorted(tokens), np.int32)
    n_tokens = np.array([tokens[int(e)] for e in ids], np.int32)
    gate = np.zeros(N_EXPERTS, np.float32)
    gate[ids] = n_tokens / max(n_tokens.sum(), 1)
    total = int(n_tokens.max()) if ids.size else 1
    return LayerDemand(layer, phase, total, ids, n_tokens, gate, predictions)  # type: ignore[arg-type]


def land(target: Planner, transfers: tuple) -> None:
    for t in transfers:
        target.on_event(TransferEnded(t.layer, t.expert, t.slot))


def finish(target: Planner, plan: LayerPlan) -> None:
    land(target, (*plan.transfers, *plan.prefetches))
    target.on_event(LayerEnded(plan.layer))


def check_plan(plan: LayerPlan, wanted: LayerDemand, n_slots: int) -> None:
    assert sorted((*plan.cpu, *plan.accel)) == wanted.expert_ids.tolist(), "each activated expert exactly once"
    assert len(plan.accel) == len(plan.accel_slots)
    assert all(0 <= slot < n_slots for slot in plan.accel_slots)
    slot_of = dict(zip(plan.accel, plan.accel_slots, strict=True))
    for t in plan.transfers:
        assert t.kind == "demand"
        assert t.layer == plan.layer
        assert slot_of[t.expert] == t.slot
    last_reader: dict[int, int] = {}
    for turn, (expert, slot) in enumerate(zip(plan.accel, plan.accel_slots, strict=True)):
        if slot in last_reader:
            transfer = next(t for t in plan.transfers if t.expert == expert)
            assert transfer.evicts == (plan.layer, plan.accel[last_reader[slot]]), "a shared slot is handed on in order"
        last_reader[slot] = turn


def test_zero_slots_plan_everything_on_the_cpu() -> None:
    target = planner(0, "ours")
    assert target.warm_up() == ()
    target.begin_step("decode", 1)
    plan = target.plan_layer(demand(0, {1: 1, 5: 1}))
    assert plan.cpu == (1, 5)
    assert plan.accel == ()
    assert plan.prefetches == ()
    assert plan.predicted_makespan_us == 200.0


def test_more_slots_than_experts_are_cut_and_all_becomes_resident() -> None:
    target = planner(1000, "ours")
    warm = target.warm_up()
    assert len(warm) == N_LAYERS * N_EXPERTS == target.slots.n_slots
    land(target, warm)
    target.begin_step("decode", 1)
    plan = target.plan_layer(demand(2, {0: 1, 7: 1}))
    assert plan.transfers == ()
    assert set(plan.accel) | set(plan.cpu) == {0, 7}


def test_warm_up_prefers_the_frequent_within_each_layers_share() -> None:
    frequencies = np.tile(np.arange(N_EXPERTS, dtype=float), (N_LAYERS, 1))
    layered = {(t.layer, t.expert) for t in planner(6, "hybrimoe").warm_up(frequencies)}
    assert layered == {(layer, e) for layer in range(N_LAYERS) for e in (6, 7)}
    frequencies[0] = 0
    frequencies[0, 3] = 1
    pooled = planner(1, "freetoken").warm_up(frequencies)
    assert [(t.layer, t.expert, t.kind) for t in pooled] == [(0, 3, "warmup")], "all of layer 0 goes to one expert"
    with pytest.raises(DemandError, match="frequencies"):
        planner().warm_up(np.ones((2, 2)))


def test_experts_in_use_or_in_flight_are_never_evicted() -> None:
    target = planner(2, "on_demand/none/lru", scope="pool")
    frequencies = np.zeros((N_LAYERS, N_EXPERTS))
    frequencies[0, :2] = 1
    land(target, target.warm_up(frequencies))
    target.begin_step("decode", 1)
    first = target.plan_layer(demand(0, {0: 1, 1: 1}))
    assert first.transfers == ()
    assert target.slots.counts()[SlotState.PINNED] == 2
    second = target.plan_layer(demand(1, {2: 1}))
    assert second.cpu == (2,), "both slots are in use: nothing to evict, so the CPU computes"
    assert second.transfers == ()
    target.on_event(LayerEnded(0))
    third = target.plan_layer(demand(2, {3: 1}))
    assert len(third.transfers) == 1
    fourth = target.plan_layer(demand(0, {4: 1, 5: 1}))
    assert (2, 3) not in {t.evicts for t in fourth.transfers}


def test_prefill_with_fewer_slots_than_experts_hands_slots_on_in_order() -> None:
    """8 experts, 2 slots, everything transferred: 6 of them reuse the slot of an expert that ran before."""
    target = planner(2, "on_demand/none/lru", scope="pool")
    target.begin_step("prefill", 64)
    wanted = demand(0, dict.fromkeys(range(N_EXPERTS), 8), phase="prefill")
    plan = target.plan_layer(wanted)
    check_plan(plan, wanted, 2)
    assert plan.cpu == ()
    assert len(plan.transfers) == 8
    finish(target, plan)
    assert len(target.slots.resident(0)) == 2
    assert target.slots.counts()[SlotState.RESIDENT] == 2


def test_one_slot_serves_a_whole_prefill() -> None:
    target = planner(1, "accel_only/none/lru", scope="pool")
    target.begin_step("prefill", 8)
    wanted = demand(1, dict.fromkeys(range(5), 2), phase="prefill")
    plan = target.plan_layer(wanted)
    check_plan(plan, wanted, 1)
    assert len(plan.accel) == 5
    assert set(plan.accel_slots) == {0}


def test_placements_force_a_lane() -> None:
    target = planner(9, "hybrimoe", placements=("cpu", "accelerator", "hybrid"))
    warm = target.warm_up()
    assert not [t for t in warm if t.layer == 0]
    land(target, warm)
    target.begin_step("decode", 1)
    assert target.plan_layer(demand(0, {0: 1, 1: 1})).accel == ()
    assert target.plan_layer(demand(1, {6: 1, 7: 1})).cpu == ()
    with pytest.raises(PolicyError, match="placements"):
        planner(placements=("cpu",))


def test_a_prefetch_under_way_is_awaited_not_repeated() -> None:
    target = planner(6, "on_demand/gate_topk/lru", given=costs(transfer_us=300))
    target.begin_step("decode", 1)
    ahead = Prediction(1, np.array([4], np.int32), np.ones(1, np.float32), np.ones(1, np.float32))
    first = target.plan_layer(demand(0, {0: 1}, (ahead,)))
    assert [(t.layer, t.expert) for t in first.prefetches] == [(1, 4)]
    assert first.prefetches[0].kind == "prefetch"
    second = target.plan_layer(demand(1, {4: 1}), LaneState(link_ready_us=250.0))
    assert second.transfers == ()
    assert second.awaited == (4,)
    assert second.accel == (4,)
    assert second.predicted_makespan_us == pytest.approx(260.0), "it lands when the link gets free"
    finish(target, first)
    target.on_event(LayerEnded(1))
    assert target.slots.resident(1) == (4,)


def test_prefetch_starts_only_while_the_link_would_idle() -> None:
    """The layer takes 100 us (CPU) and the link is busy for 250: nothing may start; free at 30: two starts."""
    ahead = Prediction(1, np.arange(5, dtype=np.int32), np.ones(5, np.float32), np.ones(5, np.float32))
    for link_ready, expected in ((250.0, 0), (30.0, 2), (0.0, 2), (99.0, 1)):
        target = planner(9, "static/gate_topk/lru")
        target.begin_step("decode", 1)
        plan = target.plan_layer(demand(0, {0: 1}, (ahead,)), LaneState(link_ready_us=link_ready))
        assert len(plan.prefetches) == expected


def test_prefetches_do_not_evict_what_is_predicted() -> None:
    target = planner(2, "static/gate_topk/lru", scope="pool", depth=1)
    warm = target.warm_up()
    land(target, warm)
    keep = [(t.layer, t.expert) for t in warm]
    assert keep == [(0, 0), (1, 0)]
    ahead = Prediction(1, np.array([0, 3], np.int32), np.ones(2, np.float32), np.ones(2, np.float32))
    target.begin_step("decode", 1)
    plan = target.plan_layer(demand(0, {5: 1}, (ahead,)))
    assert [(t.expert, t.evicts) for t in plan.prefetches] == [(3, (0, 0))]


def test_static_never_moves_anything() -> None:
    target = planner(6, "static")
    land(target, target.warm_up())
    rng = np.random.default_rng(0)
    for _ in range(20):
        target.begin_step("decode", 1)
        for layer in range(N_LAYERS):
            plan = target.plan_layer(demand(layer, dict.fromkeys(rng.choice(8, 2, replace=False).tolist(), 1)))
            assert plan.transfers == ()
            assert plan.prefetches == ()
            finish(target, plan)


def test_events_that_were_never_planned_are_errors() -> None:
    target = planner()
    with pytest.raises(SlotError, match="no transfer"):
        target.on_event(TransferEnded(0, 0, 0))
    with pytest.raises(SlotError, match="no plan of it is open"):
        target.on_event(LayerEnded(0))
    with pytest.raises(SlotError, match="no plan of it is open"):
        target.on_event(LayerEnded(99))
    with pytest.raises(SlotError, match="expected TransferEnded"):
        target.on_event("done")  # type: ignore[arg-type]


def test_observed_times_correct_the_costs() -> None:
    target = planner()
    target.begin_step("decode", 1)
    target.plan_layer(demand(0, {0: 1}))
    target.on_event(LayerEnded(0, (ObservedTask("cpu", 0, 1, 200.0),)))
    assert float(target.costs.cpu_us(0, 1)) == pytest.approx(102.5), "twice as long counts as 1.5 times"
    target.observe(ObservedTask("accel", 0, 1, 11.0))
    assert float(target.costs.accel_us(0, 1)) == pytest.approx(0.95 * 10.0 + 0.05 * 11.0)


def test_bad_demands_are_refused() -> None:
    target = planner()
    for bad, message in [
        (demand(3, {0: 1}), "layer 3 is outside"),
        (
            LayerDemand(0, "decode", 1, np.array([8], np.int32), np.ones(1, np.int32), np.zeros(8, np.float32)),
            "ascend within",
        ),
        (
            LayerDemand(0, "decode", 1, np.array([1], np.int32), np.ones(2, np.int32), np.zeros(8, np.float32)),
            "one n_tokens",
        ),
    ]:
        with pytest.raises(DemandError, match=message):
            target.plan_layer(bad)
    with pytest.raises(DemandError, match="prefill or decode"):
        target.begin_step("warmup", 1)  # type: ignore[arg-type]
    with pytest.raises(DemandError, match="cost model has 3"):
        Planner(2, 8, 4, costs())
    with pytest.raises(PolicyError, match="lookahead"):
        planner(lookahead=-1)


def test_full_validation_of_a_demand() -> None:
    good = demand(0, {1: 1, 4: 2})
    good.validate(N_LAYERS, N_EXPERTS)
    gate = np.zeros(8, np.float32)
    ids, ones = np.array([1, 4], np.int32), np.ones(2, np.int32)
    bad_prediction = (Prediction(0, ids, np.ones(2, np.float32), np.ones(2, np.float32)),)
    for args, message in [
        ((0, "decode", 1, ids[::-1], ones, gate), "ascend"),
        ((0, "chat", 1, ids, ones, gate), "phase"),
        ((0, "decode", 1, ids, ones * 0, gate), "at least 1 token"),
        ((0, "decode", 1, ids, ones, gate[:3]), "gate_scores"),
        ((0, "decode", 1, ids.astype(float), ones, gate), "integer array"),
        ((0, "decode", 1, ids, ones[:1], gate), "n_tokens has shape"),
        ((0, "decode", 1, ids, ones, gate, bad_prediction), "prediction for layer 0"),
    ]:
        with pytest.raises(DemandError, match=message):
            LayerDemand(*args).validate(N_LAYERS, N_EXPERTS)  # type: ignore[arg-type]


def test_policy_names_and_parameters() -> None:
    assert resolve_policy("hybrimoe").name == "hybrimoe/impact/mrs"
    assert resolve_policy("optimal/none/lru", scope="pool").params == {"scope": "pool"}
    for name, params, message in [
        ("hybrimo", {}, "did you mean 'hybrimoe'"),
        ("optimal/none", {}, "balance/prefetch/cache"),
        ("optimal/nope/lru", {}, "unknown prefetch policy 'nope'; did you mean 'none'"),
        ("hybrimoe", {"alfa": 1}, "did you mean 'alpha'"),
        ("hybrimoe", {"alpha": 7}, "alpha must be"),
        ("optimal/none/lru", {"node_limit": -1}, "integer of at least 0"),
        (3, {}, "preset's name"),
    ]:
        with pytest.raises(PolicyError, match=message):
            resolve_policy(name, **params)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="did you mean"):
        planner(policy="ourz")


def walk(name: str, seed: int, n_slots: int) -> list[LayerPlan]:
    """Random prefill and decode steps with predictions; transfers land late, by up to two layers."""
    rng = np.random.default_rng(seed)
    routes = [
        np.stack([[rng.permutation(N_EXPERTS)[:2] for _ in range(N_LAYERS)] for _ in range(n)])
        for n in (6, 1, 1, 1, 5, 1, 1)
    ]
    target = planner(n_slots, name, future=Future(routes, N_LAYERS, N_EXPERTS))
    land(target, target.warm_up())
    target.begin_sequence()
    plans, pending = [], []
    for route in routes:
        target.begin_step("prefill" if len(route) > 1 else "decode", len(route))
        for layer in range(N_LAYERS):
            counts = [np.bincount(route[:, x].ravel(), minlength=N_EXPERTS) for x in range(N_LAYERS)]
            ahead = tuple(
                Prediction(x, np.flatnonzero(c).astype(np.int32), np.float32(c[c > 0]), np.float32(c[c > 0] / c.sum()))
                for x, c in enumerate(counts) if x > layer
            )  # fmt: skip
            wanted = demand(layer, {int(e): int(counts[layer][e]) for e in np.flatnonzero(counts[layer])}, ahead)
            plan = target.plan_layer(wanted, LaneState(link_ready_us=60.0 * len(pending)))
            check_plan(plan, wanted, target.slots.n_slots)
            assert np.all(np.bincount(target.slots.key_of[target.slots.key_of >= 0]) <= 1)
            pending += [*plan.transfers, *plan.prefetches]
            late = int(rng.integers(0, 3)) if not plan.transfers and not plan.awaited else 0
            land(target, tuple(pending[: len(pending) - late]))
            del pending[: len(pending) - late]
            target.on_event(LayerEnded(layer))
            plans.append(plan)
    assert not np.any(target.slots.pins)
    return plans


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("n_slots", [1, 5, 24])
def test_every_preset_walks_and_repeats_itself(name: str, n_slots: int) -> None:
    assert walk(name, 3, n_slots) == walk(name, 3, n_slots)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 24), st.sampled_from(["ours", "hybrimoe", "freetoken", "hobbit"]))
def test_any_walk_keeps_the_rules(seed: int, n_slots: int, name: str) -> None:
    walk(name, seed, n_slots)


def test_explain_names_costs_and_alternatives() -> None:
    target = planner(6, "hybrimoe")
    land(target, target.warm_up())
    target.begin_step("decode", 1)
    plan = target.plan_layer(demand(0, {0: 1, 1: 1, 6: 1}))
    told = target.explain(plan)
    by_expert = {d.expert: d for d in told.decisions}
    assert by_expert[0].resident
    assert not by_expert[6].resident
    assert by_expert[6].lane == ("cpu" if 6 in plan.cpu else "accel")
    assert told.alternatives[0][1] <= plan.predicted_makespan_us
    assert dict(told.alternatives)["cpu_only"] == 300.0
    target.begin_step("decode", 1)
    with pytest.raises(DemandError, match="current step"):
        target.explain(plan)


def test_resize_between_steps() -> None:
    target = planner(6, "ours")
    land(target, target.warm_up())
    target.begin_step("decode", 1)
    plan = target.plan_layer(demand(0, {0: 1, 1: 1}))
    with pytest.raises(SlotError, match="pinned cannot be taken away"):
        target.resize(0)
    finish(target, plan)
    gone = target.resize(2)
    assert len(gone) == 4
    assert all(target.slots.slot(*key) == -1 for key in gone)
    assert target.resize(99) == ()
    assert target.slots.n_slots == N_LAYERS * N_EXPERTS
    assert len(target.warm_up()) == N_LAYERS * N_EXPERTS - 2
    empty = planner(3, "hybrimoe")
    empty.resize(0)
    empty.begin_step("decode", 1)
    assert empty.plan_layer(demand(1, {3: 1})).cpu == (3,)
    with pytest.raises(SlotError, match="n_slots >= 0"):
        empty.resize(-1)


@pytest.mark.parametrize(
    ("policy", "ahead"),
    [("static", 0), ("moe_infinity", 0), ("hybrimoe", 3), ("adapmoe", 1), ("hobbit", 3), ("ours", 1), ("oracle", 0)],
)
def test_layers_ahead_says_which_predictions_are_read(policy: str, ahead: int) -> None:
    assert planner(policy=policy, future=Future([], N_LAYERS, N_EXPERTS)).layers_ahead == ahead


def test_an_empty_demand_gives_an_empty_plan() -> None:
    target = planner()
    target.begin_step("decode", 1)
    plan = target.plan_layer(demand(0, {}))
    assert plan.cpu == plan.accel == ()
    assert plan.predicted_makespan_us == 0.0
    target.on_event(LayerEnded(0))
