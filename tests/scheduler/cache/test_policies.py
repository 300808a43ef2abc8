"""Every cache policy against a hand-computed example; the original release's bugs that concern caching."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import CostModel, Future, LayerDemand, PolicyError, SlotTable
from scheduler.cache import CACHE_POLICIES, CachePolicy
from scheduler.cache.allocation import by_dynamic_programming, gains_of, shallow_first
from scheduler.forecast.use_model import FAR, FAST, FIRST_BLEND, NEAR, SLOW
from scheduler.setting import Setting, make


def setting(n_layers: int = 2, n_experts: int = 4, n_slots: int = 4, **extra: object) -> Setting:
    costs = CostModel.uniform(n_layers, cpu_us=100, accel_us=20, transfer_us=50)
    return Setting(n_layers, n_experts, SlotTable(n_slots, n_layers, n_experts), costs, **extra)  # type: ignore[arg-type]


def demand(
    layer: int, scores: dict[int, float], n_experts: int = 4, n_tokens: int = 1, phase: str = "decode"
) -> LayerDemand:
    """One layer in which the given experts are active, with these mean gate probabilities."""
    ids = np.array(sorted(scores), np.int32)
    gate = np.zeros(n_experts, np.float32)
    gate[ids] = [scores[int(e)] for e in ids]
    return LayerDemand(layer, phase, n_tokens, ids, np.ones(ids.size, np.int32), gate)  # type: ignore[arg-type]


def policy(name: str, given: Setting | None = None, **params: object) -> CachePolicy:
    return make("cache", name, CACHE_POLICIES, given or setting(), params)


def test_mrs_formula_and_decay_of_every_expert() -> None:
    """S <- a TopP(s) + (1 - a) S with a = 0.5, p = 2: s = .5 .1 .3 .1, then s = 0 .2 .0 .8."""
    mrs = policy("mrs", alpha=0.5, top_p=2)
    first = LayerDemand(
        0, "decode", 1, np.array([0, 2], np.int32), np.ones(2, np.int32), np.array([0.5, 0.1, 0.3, 0.1], np.float32)
    )
    mrs.observe(first)
    assert mrs.keep[:4].tolist() == pytest.approx([0.25, 0.0, 0.15, 0.0])
    mrs.observe(demand(0, {1: 0.2, 3: 0.8}))
    assert mrs.keep[:4].tolist() == pytest.approx([0.125, 0.1, 0.075, 0.4])
    assert mrs.keep[4:].tolist() == [0.0] * 4, "other layers are untouched"


def test_mrs_default_p_is_twice_the_experts_a_token() -> None:
    mrs = policy("mrs", setting(n_experts=8), alpha=1.0)
    gate = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05], np.float32)
    mrs.observe(LayerDemand(0, "decode", 1, np.array([0, 1], np.int32), np.ones(2, np.int32), gate))
    assert np.flatnonzero(mrs.keep[:8]).tolist() == [0, 1, 2, 3]


def test_release_bug_scores_belong_to_their_own_experts() -> None:
    """The release paired sorted scores with unsorted ids. Here the highest score sits at the highest id."""
    mrs = policy("mrs", alpha=1.0, top_p=1)
    mrs.observe(demand(0, {0: 0.1, 1: 0.2, 3: 0.7}))
    assert mrs.keep[:4].tolist() == pytest.approx([0, 0, 0, 0.7])


def test_release_bug_prefill_counts_every_token_of_the_chunk() -> None:
    """The release looked at a chunk's first token only: expert 0 there, expert 2 in the other three."""
    mrs = policy("mrs", alpha=1.0)
    per_token = np.array([[0.9, 0, 0.1, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]], np.float32)
    mrs.observe(
        LayerDemand(0, "prefill", 4, np.array([0, 2], np.int32), np.array([1, 4], np.int32), per_token.mean(axis=0))
    )
    assert mrs.keep[2] == pytest.approx(0.775)
    assert mrs.keep[0] == pytest.approx(0.225)


def test_release_bug_decay_reaches_experts_outside_top_p() -> None:
    mrs = policy("mrs", alpha=0.5, top_p=1)
    mrs.observe(demand(0, {0: 1.0}))
    for _ in range(3):
        mrs.observe(demand(0, {1: 1.0}))
    assert mrs.keep[0] == pytest.approx(0.5 * 0.5**3)


def test_lru_and_lfu() -> None:
    lru, lfu = policy("lru"), policy("lfu")
    for scores in ({0: 1.0, 1: 1.0}, {1: 1.0, 2: 1.0}, {1: 1.0, 3: 1.0}, {0: 1.0, 3: 1.0}):
        lru.observe(demand(0, scores))
        lfu.observe(demand(0, scores))
    assert np.argsort(lru.keep[:4], kind="stable").tolist() == [2, 1, 0, 3]
    assert lfu.keep[:4].tolist() == [2, 3, 1, 2]


def test_hobbit_formula() -> None:
    """T = 2; expert 0 of layer 0: R 2, F 2, H 2; expert 1: R 1, F 1, H 0 (0.7 lies before it). Layer at work: 0."""
    hobbit = policy("hobbit", w_lru=1.0, w_lfu=1.0, w_lhu=1.0, w_fld=1.0)
    hobbit.observe(demand(0, {0: 0.7, 1: 0.3}))
    hobbit.observe(demand(0, {0: 1.0}))
    hobbit.refresh(0)
    assert hobbit.keep[0] == pytest.approx(2 / 2 + 2 / 2 + 2 / 2 + 1.0)
    assert hobbit.keep[1] == pytest.approx(1 / 2 + 1 / 2 + 0 / 2 + 1.0)
    assert hobbit.keep[4] == pytest.approx(1.0 - 1 / 2), "layer 1 is one of two layers ahead"
    hobbit.refresh(1)
    assert hobbit.keep[4] == pytest.approx(1.0)


def test_activation_matrix_formula() -> None:
    """(p + 1e-8) * (1 - l / L): layer 1 of 2 counts half."""
    cache = policy("activation_matrix")
    cache.observe(demand(1, {0: 1.0, 2: 1.0}))
    assert cache.keep[4:].tolist() == pytest.approx([0.25, 0.5e-8, 0.25, 0.5e-8], rel=1e-6)
    cache.begin_sequence()
    cache.observe(demand(1, {3: 1.0}))
    assert cache.keep[7] == pytest.approx(0.5), "a new sequence starts from an empty matrix"


def test_belady_keeps_what_is_needed_soonest() -> None:
    """After (step 0, layer 0): layer 1's expert 3 at time 1, layer 0's expert 0 at 2, expert 1 never."""
    steps = [np.array([[[1], [3]]]), np.array([[[0], [2]]])]
    given = setting(future=Future(steps, 2, 4), step=0)
    belady = policy("belady", given)
    belady.refresh(0)
    order = np.argsort(-belady.keep, kind="stable")[:3].tolist()
    assert order == [4 + 3, 0, 4 + 2]
    assert belady.keep[1] == belady.keep[2] < -(10**6)


def test_belady_needs_a_future_that_fits() -> None:
    with pytest.raises(PolicyError, match="oracle"):
        policy("belady")
    with pytest.raises(PolicyError, match="2 x 5"):
        policy("belady", setting(future=Future([], 2, 5)))


def test_arc_moves_its_target_towards_the_list_that_was_missed() -> None:
    """Capacity 2: 0 twice (T2), 1 once (T1). 2 evicts 1 (|T1| = 1 > target 0) into B1; 1 again: target 1, T2."""
    given = setting(n_layers=1, n_slots=2)
    arc = policy("arc", given, n_shallow=0)
    arc.observe(demand(0, {0: 1.0}))
    arc.inserted(0)
    arc.observe(demand(0, {0: 1.0}))
    arc.observe(demand(0, {1: 1.0}))
    arc.inserted(1)
    arc.refresh(0)
    assert arc.keep[1] < arc.keep[0]
    arc.evicted(1)
    arc.inserted(2)
    arc.evicted(2)
    arc.inserted(1)
    assert arc.target[0] == 1.0
    assert arc.list_of[1] == 2


def test_learned_features_by_hand_and_scorer_is_used() -> None:
    """Expert 0 used at steps 1 and 2, expert 1 at step 1 only; weight 0.1 in the moving mean."""
    seen = []

    def scorer(features: np.ndarray) -> np.ndarray:
        seen.append(features)
        return features[:, 0]

    learned = policy("learned", setting(scorer=scorer))
    learned.observe(demand(0, {0: 0.6, 1: 0.4}))
    learned.observe(demand(0, {0: 1.0}))
    assert seen[-1][0].tolist() == pytest.approx([1.0, 1.0, 0.19, 1.0])
    assert seen[-1][1].tolist() == pytest.approx([0.5, 0.5, 0.09, 0.4])
    assert learned.keep[:2].tolist() == pytest.approx([1.0, 0.5])


def test_value_counts_us() -> None:
    """80 us a use. Expert 1 of 4 was used once: forecast for three tokens, then the slow mean .97 / 4 + .03."""
    for scale, near, far in ((0.0, 1.0, 0.0), (5.0, 3.0, 7.0)):
        value = policy("value", setting(n_slots=4), horizon_scale=scale)
        value.model.observe(demand(0, {1: 1.0}))
        rates = 0.75 / 4 + 0.25, 0.97 / 4 + 0.03, 0.998 / 4 + 0.002, (1 + 8 / 4) / (1 + 8)
        own = np.array([*(np.log(r / (1 - r)) for r in rates), 1.0])
        chances = [1 / (1 + np.exp(-np.dot(FIRST_BLEND[first : first + 5], own))) for first in (NEAR, FAR)]
        expected = 80.0 * (near * chances[0] + far * chances[1])
        assert value.keep[1] == pytest.approx(expected, rel=1e-5)
        assert value.keep[0] < value.keep[1]


def test_value_turns_known_shares_into_rates() -> None:
    """Half of layer 0's activations go to expert 1; two experts a token: it is used by every token."""
    value = policy("value")
    value.warmed(np.array([[1.0, 2.0, 1.0, 0.0]] * 2))
    value.model.observe(demand(0, {0: 0.5, 2: 0.5}))
    rates = value.model.use.rates[0]
    assert rates[FAST, 1] == pytest.approx(0.75)
    assert rates[SLOW, 1] == pytest.approx(0.97)
    assert rates[SLOW, 0] == pytest.approx(0.5 * 0.97 + 0.03)


def test_fixed_keeps_the_first_and_turns_visitors_over() -> None:
    """Four slots a layer, one for visitors: experts 0 to 2 of the warm-up stay, 3 and then 5 are visitors."""
    given = setting(n_layers=1, n_experts=8, n_slots=4)
    fixed = policy("fixed", given, visitors=1)
    for key in range(4):
        fixed.inserted(key)
    assert np.isinf(fixed.keep[:4]).tolist() == [True, True, True, False]
    given.step = 0
    fixed.inserted(5)
    assert fixed.keep[3] < fixed.keep[5] < np.inf, "first in, first out"
    before = fixed.keep.copy()
    fixed.observe(demand(0, {3: 1.0}, n_experts=8))
    assert fixed.keep.tolist() == before.tolist()


def test_dynamic_programming_gives_slots_where_they_hit_most() -> None:
    """Layer 0: 0.9 in one expert; layer 1: 0.4 0.35 0.25. Two slots: .9 + .4; three: .9 + .4 + .35."""
    gains = gains_of(np.array([[9.0, 1.0, 0.0], [8.0, 7.0, 5.0]]))
    assert gains[1].tolist() == pytest.approx([0, 0.4, 0.75, 1.0])
    assert by_dynamic_programming(gains, 2).tolist() == [1, 1]
    assert by_dynamic_programming(gains, 3).tolist() == [1, 2]
    assert by_dynamic_programming(gains, 99).tolist() == [3, 3]
    with pytest.raises(ValueError, match="gains"):
        by_dynamic_programming(np.zeros(3), 1)


def test_lru_sizes_by_dynamic_programming_and_shallow_first() -> None:
    lru = policy("lru", setting(n_slots=3), sizes="dp")
    lru.warmed(np.array([[9.0, 1, 0, 0], [4.0, 3.5, 2.5, 0]]))
    assert lru.capacities.tolist() == [1, 2]
    assert shallow_first(7, 3, 4, n_shallow=1).tolist() == [4, 2, 1]
    assert policy("shallow_first", setting(n_slots=6)).capacities.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mrs", {"alpha": 1.5}, r"alpha must be a number in \[0.0, 1.0\]"),
        ("mrs", {"top_p": 0}, "top_p must be an integer"),
        ("lru", {"scope": "pol"}, "did you mean 'pool'"),
        ("lru", {"sizes": "odd"}, "sizes must be one of"),
        ("hobbit", {"w_lru": -1}, "w_lru"),
        ("arc", {"n_shallow": -1}, "n_shallow"),
        ("value", {"horizon_scale": "long"}, "horizon_scale"),
        ("fixed", {"visitors": 0}, "visitors must be an integer of at least 1"),
        ("lrv", {}, "did you mean"),
    ],
)
def test_bad_parameters(name: str, params: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy(name, None, **params)
