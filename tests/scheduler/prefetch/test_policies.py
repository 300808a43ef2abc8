"""Every prefetch policy against a hand-computed example."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import (
    CostModel,
    Future,
    LayerDemand,
    LayerEnded,
    Planner,
    PolicyError,
    Prediction,
    SlotTable,
    TransferEnded,
)
from scheduler.prefetch import PREFETCH_POLICIES, PrefetchPolicy
from scheduler.setting import Setting, make


def setting(
    n_layers: int = 4, n_experts: int = 4, n_slots: int = 4, held: tuple[int, ...] = (), **extra: object
) -> Setting:
    slots = SlotTable(n_slots, n_layers, n_experts)
    for slot, key in enumerate(held):
        slots.begin_transfer(slot, key)
        slots.end_transfer(slot, key)
    costs = CostModel.uniform(n_layers, cpu_us=100, accel_us=20, transfer_us=50, cpu_us_per_token=100)
    return Setting(n_layers, n_experts, slots, costs, **extra)  # type: ignore[arg-type]


def demand(layer: int, ids: list[int], *predictions: Prediction, n_experts: int = 4) -> LayerDemand:
    gate = np.zeros(n_experts, np.float32)
    gate[ids] = 1 / max(len(ids), 1)
    return LayerDemand(
        layer, "decode", 1, np.array(ids, np.int32), np.ones(len(ids), np.int32), gate, tuple(predictions)
    )


def predicted(layer: int, ids: list[int], n_tokens: list[float], scores: list[float] | None = None) -> Prediction:
    return Prediction(
        layer, np.array(ids, np.int32), np.array(n_tokens, np.float32), np.array(scores or [0.5] * len(ids), np.float32)
    )


def policy(name: str, given: Setting, **params: object) -> PrefetchPolicy:
    return make("prefetch", name, PREFETCH_POLICIES, given, params)


def test_none_proposes_nothing() -> None:
    keys, _ = policy("none", setting()).propose(demand(0, [0], predicted(1, [1], [1])), 5)
    assert keys.size == 0


def test_impact_takes_the_largest_makespan_gain_first() -> None:
    """Layer 1: one expert of 2 tokens, CPU 200. Resident it takes 20: gain 180. Layer 2: one of 1 token: gain 80.

    Layer 3: expert 0 resident (20 us), expert 1 missing with 1 token: 100 against 40 with both there: gain 60.
    """
    given = setting(held=(12,))
    proposals = policy("impact", given).propose(
        demand(0, [0], predicted(1, [2], [2]), predicted(2, [1], [1]), predicted(3, [0, 1], [1, 1])), 8
    )
    assert proposals[0].tolist() == [4 + 2, 8 + 1, 12 + 1]
    assert proposals[1].tolist() == pytest.approx([180, 80, 60])


def test_impact_looks_only_so_far_and_not_at_what_is_there() -> None:
    given = setting(held=(4 + 2,), lookahead=1)
    keys, _ = policy("impact", given).propose(demand(0, [0], predicted(1, [2], [1]), predicted(2, [1], [1])), 8)
    assert keys.size == 0


def test_impact_gains_are_taken_anew_after_each_choice() -> None:
    """Three misses: CPU 100 | link 50, 100 and accelerator 70, 120. With one there 100; a second changes nothing."""
    keys, gains = policy("impact", setting()).propose(demand(0, [0], predicted(1, [0, 1, 2], [1, 1, 1])), 8)
    assert keys.tolist() == [4]
    assert gains.tolist() == pytest.approx([20.0])


def test_misses_bring_what_this_layer_lacked() -> None:
    """Of experts 0, 1, 3 in layer 1 the first is there; gate scores say 3 before 1; each saves 80 us."""
    given = setting(held=(4,))
    asked = demand(1, [0, 1, 3])
    asked.gate_scores[[1, 3]] = 0.2, 0.5
    keys, gains = policy("misses", given).propose(asked, 8)
    assert keys.tolist() == [4 + 3, 4 + 1]
    assert gains.tolist() == [80.0, 80.0]
    assert policy("misses", given).propose(asked, 1)[0].tolist() == [4 + 3]
    assert policy("misses", given).propose(demand(1, [0]), 8)[0].size == 0


def test_misses_fill_a_cache_while_the_cpu_computes() -> None:
    planner = Planner(1, 4, 2, CostModel.uniform(1, 100.0, 10.0, 60.0), "static/misses/lru")
    for transfer in planner.warm_up():
        planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
    planner.begin_step("decode", 1)
    plan = planner.plan_layer(demand(0, [2, 3]))
    assert (plan.cpu, plan.transfers) == ((2, 3), ())
    assert [t.expert for t in plan.prefetches] == [2, 3]
    for transfer in plan.prefetches:
        planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
    planner.on_event(LayerEnded(0))
    assert planner.plan_layer(demand(0, [2, 3])).accel == (2, 3)


def test_gate_topk_nearest_layer_first_high_score_first() -> None:
    given = setting(held=(4 + 3,))
    ahead = (predicted(2, [0], [1]), predicted(1, [0, 2, 3], [1, 1, 1], [0.2, 0.5, 0.3]))
    assert policy("gate_topk", given, depth=2).propose(demand(0, [1], *ahead), 8)[0].tolist() == [6, 4, 8]
    assert policy("gate_topk", given, depth=1).propose(demand(0, [1], *ahead), 8)[0].tolist() == [6, 4]
    assert policy("gate_topk", given, depth=2).propose(demand(0, [1], *ahead), 1)[0].tolist() == [6]


def test_gate_topk_goes_deeper_only_while_all_predicted_are_cached() -> None:
    ahead = (predicted(1, [3], [1]), predicted(2, [0], [1]), predicted(3, [0], [1]))
    hobbit = {"depth": 3, "only_if_cached": True}
    assert policy("gate_topk", setting(held=(7,)), **hobbit).propose(demand(0, [1], *ahead), 8)[0].tolist() == [8]
    assert policy("gate_topk", setting(), **hobbit).propose(demand(0, [1], *ahead), 8)[0].tolist() == [7]


def test_gate_topk_over_fetches_above_the_percentile() -> None:
    """75th percentile of 8 experts: the upper 2, whatever top-k is."""
    ahead = predicted(1, [0, 3, 5, 6], [1, 0, 0, 0], [0.5, 0.1, 0.3, 0.05])
    keys, _ = policy("gate_topk", setting(n_experts=8), share=0.75).propose(demand(0, [1], ahead, n_experts=8), 8)
    assert keys.tolist() == [8 + 0, 8 + 5]


def test_history_proposes_what_was_used_lately() -> None:
    """weight 0.5: expert 2 of layer 1 used twice: .75; expert 1 once, first: .25, below the threshold .3."""
    history = policy("history", setting(), weight=0.5, threshold=0.3)
    history.observe(demand(1, [1, 2]))
    history.observe(demand(1, [2, 3]))
    keys, gains = history.propose(demand(0, [0]), 8)
    assert keys.tolist() == [4 + 2, 4 + 3]
    assert gains.tolist() == pytest.approx([0.75 * 80, 0.5 * 80])
    history.begin_sequence()
    assert history.propose(demand(0, [0]), 8)[0].size == 0


def test_activation_matrix_follows_the_nearest_sequence() -> None:
    """Two stored sequences that differ in layer 0; the running one looks like the second."""
    matrix = policy("activation_matrix", setting())
    for first, later in ((0, 1), (2, 3)):
        matrix.begin_sequence()
        matrix.observe(demand(0, [first]))
        matrix.observe(demand(1, [later]))
    matrix.begin_sequence()
    now = demand(0, [2])
    assert matrix.propose(now, 4)[0].size == 0, "nothing of the running sequence is known yet"
    matrix.observe(now)
    keys, gains = matrix.propose(now, 2)
    assert keys[0] == 4 + 3
    assert gains[0] == pytest.approx((1 + 1e-8) * (1 - 1 / 5) * 80)
    assert keys[1] == 4 + 0, "then by layer, then by id"
    assert gains[1] == pytest.approx(1e-8 * 0.8 * 80)


def test_expert_maps_follow_the_most_alike_earlier_step() -> None:
    """Two stored steps; the running one begins like the second, with cosine 1: the least that a layer uses."""
    maps = policy("expert_maps", setting(lookahead=2))
    for first, second, third in ((0, 1, 1), (2, 3, 0)):
        for layer, expert in enumerate((first, second, third)):
            maps.observe(demand(layer, [expert]))
    now = demand(0, [2])
    maps.observe(now)
    keys, gains = maps.propose(now, 4)
    assert keys.tolist() == [4 + 3, 8 + 0]
    assert gains.tolist() == pytest.approx([80, 40]), "probability 1, at distances 1 and 2"


def test_expert_maps_take_more_where_nothing_is_alike_and_keep_the_newest() -> None:
    maps = policy("expert_maps", setting(lookahead=1), capacity=1)
    assert maps.propose(demand(0, [1]), 4)[0].size == 0, "no map yet"
    for expert in (0, 1):
        maps.observe(demand(0, [expert]))
        maps.observe(demand(1, [expert, 3]))
    now = demand(0, [2])
    maps.observe(now)
    assert maps.propose(now, 4)[0].tolist() == [4 + 1, 4 + 3], "cosine 0: all of the probability"
    alike = demand(0, [1])
    maps.begin_sequence()
    maps.observe(alike)
    assert maps.propose(alike, 4)[0].size == 0, "the one map is of the latest step, which had one layer"


def test_perfect_reads_the_trace_and_wraps_to_the_next_step() -> None:
    steps = [np.array([[[0], [1], [2], [3]]]), np.array([[[3], [2], [1], [0]]])]
    given = setting(future=Future(steps, 4, 4), step=0, lookahead=3, held=(8 + 2,))
    perfect = policy("perfect", given)
    assert perfect.propose(demand(0, [0]), 8)[0].tolist() == [4 + 1, 12 + 3]
    assert perfect.propose(demand(3, [3]), 8)[0].tolist() == [3, 4 + 2, 8 + 1]
    with pytest.raises(PolicyError, match="oracle"):
        policy("perfect", setting())


def test_perfect_proposes_an_expert_once_however_far_it_looks() -> None:
    """Six layers ahead of a model of four are the same layers again: their experts would be on their way already."""
    steps = [np.array([[[0], [1], [2], [3]]])] * 3
    perfect = policy("perfect", setting(future=Future(steps, 4, 4), step=0, lookahead=6))
    assert perfect.propose(demand(0, [0]), 8)[0].tolist() == [4 + 1, 8 + 2, 12 + 3, 0]


def test_learned_features_and_threshold() -> None:
    """Layer 1's expert 3 followed layer 0's expert 0 twice; the scorer just reads that feature."""
    given = setting(prefetch_scorer=lambda features: features[:, 0])
    learned = policy("learned", given, threshold=0.4)
    for _ in range(2):
        learned.observe(demand(0, [0]))
        learned.observe(demand(1, [3]))
    now = demand(0, [0])
    learned.observe(now)
    row = learned.features(now)[3]  # type: ignore[attr-defined]
    assert row[0] == pytest.approx((2 + 2 * 0.19) / (2 + 2), abs=0.01)
    assert row[2] == 1.0
    assert row[3] == 0.0
    assert learned.propose(now, 8)[0].tolist() == [4 + 3]
    last = demand(3, [0])
    learned.observe(last)
    assert learned.propose(last, 8)[0].size == 0, "no layer comes after the last"


@pytest.mark.parametrize(
    ("name", "params"),
    [("gate_topk", {"depth": 0}), ("gate_topk", {"share": 2}), ("history", {"weight": -1}),
     ("learned", {"threshold": 2}),
     ("activation_matrix", {"capacity": 0}), ("value", {"certainty": 1.5})],
)  # fmt: skip
def test_bad_parameters(name: str, params: dict) -> None:
    with pytest.raises(PolicyError, match=next(iter(params))):
        policy(name, setting(), **params)
