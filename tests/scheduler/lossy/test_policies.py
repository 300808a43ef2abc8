"""Lossy policies: each on an example computed by hand, its parameters, and what holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.demand import Prediction
from scheduler.errors import DemandError, PolicyError
from scheduler.lossy import FULL, LOSSY_POLICIES, LOW, LossySetting, LowCopy, Routing, resolve_lossy


def routing(ids, weights, resident, scores=None, norms=None, layer=0):
    made = Routing(
        layer, "decode", np.array(ids, np.int32), np.array(weights, np.float32), np.array(resident, np.bool_),
        None if scores is None else np.array(scores, np.float32),
        None if norms is None else np.array(norms, np.float32),
    )  # fmt: skip
    made.validate()
    return made


def policy_of(kind, n_layers=1, n_experts=4, *, router=None, expert_norms=None, **params):
    setting = LossySetting(n_layers, n_experts, 100, expert_norms, router or (lambda layer: None))
    return resolve_lossy({"kind": kind, **params}).make(setting)


NOBODY = [False] * 4


def test_hobbit_takes_precision_by_the_weight_before_an_expert():
    # In the router's order: .5 (nothing before), .25 (.5 before), .2 (.75 before), .05 (.95 before).
    found = policy_of("hobbit").rewrite(routing([[0, 1, 2, 3]], [[0.5, 0.2, 0.25, 0.05]], NOBODY))
    assert found.expert_ids.tolist() == [[0, 1, 2, -1]]
    assert found.parts.tolist() == [[FULL, LOW, FULL, FULL]]
    assert (found.skipped, found.lowered, found.substituted) == (1, 1, 0)
    assert found.weights.tolist() == np.array([[0.5, 0.2, 0.25, 0.05]], np.float32).tolist()


def test_hobbit_thresholds_are_inclusive_and_weights_are_shares():
    # Shares .5 .25 .25 (weights of a router that does not normalise): .5 before the second is still full precision.
    found = policy_of("hobbit", t1=0.5, t2=0.75).rewrite(routing([[3, 1, 0]], [[1.0, 0.5, 0.5]], NOBODY))
    assert found.parts is not None
    assert found.parts.tolist() == [[FULL, FULL, LOW]]
    assert found.skipped == 0


def test_hobbit_spares_what_is_resident_unless_told_otherwise():
    given_routing = routing([[0, 1, 2, 3]], [[0.5, 0.2, 0.25, 0.05]], [False, True, False, True])
    spared = policy_of("hobbit").rewrite(given_routing)
    assert spared.expert_ids.tolist() == [[0, 1, 2, 3]]
    assert spared.parts is None
    everything = policy_of("hobbit", misses_only=False, renormalise=True).rewrite(given_routing)
    assert everything.expert_ids.tolist() == [[0, 1, 2, -1]]
    np.testing.assert_allclose(everything.weights[0, :3].sum(), 1.0, rtol=1e-6)


def test_skip_leaves_out_light_misses_and_hands_on_their_weight():
    # Shares .5 .3 .15 .05: squares .25 .09 .0225 .0025; expert 3 is resident, expert 2 is not.
    given_routing = routing([[0, 1, 2, 3]], [[0.5, 0.3, 0.15, 0.05]], [False, False, False, True])
    found = policy_of("skip", threshold=0.03).rewrite(given_routing)
    assert found.expert_ids.tolist() == [[0, 1, -1, 3]]
    np.testing.assert_allclose(found.weights[0, [0, 1, 3]], np.array([0.5, 0.3, 0.05]) / 0.85, rtol=1e-6)
    sensitive = policy_of("skip", n_layers=2, threshold=0.03, sensitivity=[2.0, 1.0]).rewrite(given_routing)
    assert sensitive.skipped == 0


def test_skip_never_takes_the_heaviest_expert():
    found = policy_of("skip", threshold=10.0).rewrite(routing([[2, 1, 0, 3]], [[0.1, 0.7, 0.1, 0.1]], NOBODY))
    assert found.expert_ids.tolist() == [[-1, 1, -1, -1]]
    np.testing.assert_allclose(found.weights[0, 1], 1.0, rtol=1e-6)


def test_substitute_takes_the_resident_most_like_it_by_the_router():
    # Rows of the router: expert 1 is almost expert 3, which is resident; expert 2 points elsewhere.
    router = np.array([[1, 0], [0.6, 0.8], [-1, 0], [0.5, 0.9]], np.float32)
    policy = policy_of("substitute", router=lambda layer: router, max_share=0.5)
    found = policy.rewrite(routing([[0, 1]], [[0.7, 0.3]], [False, False, True, True]))
    assert found.expert_ids.tolist() == [[0, 3]]
    assert found.substituted == 1
    assert found.weights.tolist() == np.array([[0.7, 0.3]], np.float32).tolist()


def test_substitute_keeps_heavy_experts_and_those_without_a_stand_in():
    router = np.array([[1, 0], [0, 1], [-1, 0], [1, 0.1]], np.float32)
    policy = policy_of("substitute", router=lambda layer: router, max_share=0.3, min_similarity=0.5)
    # Expert 1 weighs .4 of it; expert 2 is like nobody that is resident.
    found = policy.rewrite(routing([[0, 1, 2]], [[0.45, 0.4, 0.15]], [False, False, False, True]))
    assert found.expert_ids.tolist() == [[0, 1, 2]]
    assert policy_of("substitute").rewrite(routing([[0, 1]], [[0.8, 0.2]], NOBODY)).substituted == 0


def test_substitute_by_coactivation_counts_what_was_routed_together():
    policy = policy_of("substitute", similarity="coactivation", max_share=1.0)
    everyone = [True] * 4
    for pair in ([0, 1], [0, 1], [0, 2]):
        policy.rewrite(routing([pair], [[0.5, 0.5]], everyone))
    # c_01 = 2, c_02 = 1, c_0 = 3, c_1 = 2, c_2 = 1: expert 0 is liker 1 (2/sqrt(6)) than 2 (1/sqrt(3)).
    found = policy.rewrite(routing([[3, 0]], [[0.8, 0.2]], [False, True, True, False]))
    assert found.expert_ids.tolist() == [[3, 1]]


def test_swapmoe_keeps_what_is_important_and_reroutes_the_rest():
    # importance = |x| * p * |E|: 2 * [.4, .3, .2, .1] * [1, 1, 4, 1] = [.8, .6, 1.6, .2]: experts 2 and 0 are kept.
    norms = np.array([[1, 1, 4, 1]], np.float32)
    policy = policy_of("swapmoe", expert_norms=norms, budget=2)
    found = policy.rewrite(routing([[0, 1]], [[4 / 7, 3 / 7]], NOBODY, scores=[[0.4, 0.3, 0.2, 0.1]], norms=[2.0]))
    assert np.flatnonzero(policy.kept[0]).tolist() == [0, 2]
    assert found.expert_ids.tolist() == [[0, 2]]
    # Gate probabilities .4 and .2 over their sum.
    np.testing.assert_allclose(found.weights, [[2 / 3, 1 / 3]], rtol=1e-6)


def test_swapmoe_updates_every_so_many_inputs_and_forgets():
    policy = policy_of("swapmoe", budget=1, frequency=2, forget=0.5)
    first = routing([[0]], [[1.0]], NOBODY, scores=[[0.9, 0.1, 0.0, 0.0]])
    other = routing([[1]], [[1.0]], NOBODY, scores=[[0.1, 0.9, 0.0, 0.0]])
    assert policy.rewrite(first).expert_ids.tolist() == [[0]]
    assert policy.rewrite(other).expert_ids.tolist() == [[0]]
    # Before the third input the sets are chosen from worth [1.0, 1.0], a tie for the lower id, then halved.
    assert policy.rewrite(other).expert_ids.tolist() == [[0]]
    policy.rewrite(other)
    # [.5 + .1 + .1, .5 + .9 + .9]: now expert 1.
    assert policy.rewrite(other).expert_ids.tolist() == [[1]]
    assert policy.as_dict() == {"budget": 1, "kept": 1, "updates": 2}


def test_a_budget_can_change_while_it_runs():
    policy = policy_of("swapmoe", n_layers=2, budget=4)
    for layer in (0, 1):
        policy.rewrite(routing([[0]], [[1.0]], NOBODY, scores=[[0.4, 0.3, 0.2, 0.1]], layer=layer))
    policy.resize(3)
    assert policy.kept.sum(axis=1).tolist() == [2, 1]
    with pytest.raises(PolicyError, match=r"budget of 1 experts; expected one for each of the 2 layers"):
        policy.resize(1)
    with pytest.raises(PolicyError, match="no memory budget"):
        policy_of("hobbit").resize(3)


def test_emoe_predicts_once_in_a_period_of_prompts():
    policy = policy_of("emoe", budget=2, period=2)
    policy.begin_sequence()
    policy.rewrite(routing([[0, 1]], [[0.5, 0.5]], NOBODY))
    policy.begin_sequence()
    # Expert 3 is absent: it falls to the next kept one in the router's order, which is 1.
    scores = [[0.1, 0.2, 0.05, 0.65]]
    assert policy.rewrite(routing([[3]], [[1.0]], NOBODY, scores=scores)).expert_ids.tolist() == [[1]]
    policy.rewrite(routing([[3], [3], [2]], [[1.0], [1.0], [1.0]], NOBODY))
    policy.begin_sequence()  # counts now: 3 three times, 0, 1 and 2 once
    assert np.flatnonzero(policy.kept[0]).tolist() == [0, 3]


def test_predictions_of_kept_sets_name_kept_experts_only():
    policy = policy_of("emoe", n_layers=2, budget=4)
    policy.rewrite(routing([[0, 1]], [[0.5, 0.5]], NOBODY, layer=1))
    ones = np.ones(3, np.float32)
    found = policy.predicted((Prediction(1, np.array([0, 1, 3], np.int32), ones, ones),))
    assert found[0].expert_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given_lossy", "message"),
    [
        ("hobit", r"unknown kind 'hobit'; did you mean 'hobbit'"),
        ({"kind": "hobbit", "t3": 1}, r"unknown parameter 't3'; did you mean 't"),
        ({"kind": "hobbit", "t1": 0.9, "t2": 0.1}, "t1 must not be above t2"),
        ({"kind": "hobbit", "t1": "much"}, "t1 must be a number"),
        ({"kind": "hobbit", "misses_only": 1}, "misses_only must be true or false"),
        ({"kind": "hobbit", "low_dtype": "int7"}, r"low_dtype must be one of .* did you mean 'int"),
        ({"kind": "hobbit", "low_share": 2}, "low_share must be a number"),
        ({"kind": "skip", "low_dtype": "int4"}, "unknown parameter 'low_dtype'"),
        ({"kind": "skip", "threshold": -1}, "threshold must be a number"),
        ({"kind": "skip", "sensitivity": "high"}, "one number a layer"),
        ({"kind": "substitute", "similarity": "colour"}, "similarity must be one of"),
        ({"kind": "swapmoe", "budget": 0}, "budget must be an integer of at least 1"),
        ({"kind": "swapmoe", "budget": 1.5}, "budget must be a number"),
        ({"kind": "swapmoe", "frequency": 0}, "frequency must be an integer"),
        ({"kind": "emoe", "period": 0.5}, "period must be an integer"),
        ({"kind": "bit_width", "budget": 2.0}, "budget must be a number"),
        ({"kind": "bit_width", "budget_bytes": -1}, "budget_bytes must be an integer"),
        ({"t1": 1}, "expected a kind"),
        (3, "expected a kind"),
    ],
)
def test_mistakes_are_named(given_lossy, message):
    with pytest.raises(PolicyError, match=message):
        resolve_lossy(given_lossy)


def test_none_is_lossless_and_a_name_says_what_was_given():
    assert resolve_lossy(None) is resolve_lossy("none") is resolve_lossy({"kind": "none"}) is None
    lossy = resolve_lossy({"kind": "hobbit", "t1": 0.5, "low_dtype": "int8"})
    assert (lossy.name, lossy.low) == ("hobbit (t1=0.5, low_dtype=int8)", LowCopy("int8"))


def test_a_routing_that_does_not_fit_is_refused():
    with pytest.raises(DemandError, match="ids must lie"):
        routing([[4]], [[1.0]], NOBODY)
    with pytest.raises(DemandError, match="scores must be"):
        routing([[0]], [[1.0]], NOBODY, scores=[[1.0]])


def test_bit_width_gives_full_precision_where_it_matters_most():
    # Sensitivity error * use: layer 0 [.2, .9, .1, .4], layer 1 [.6, .4, 0, .3]. 8 experts, 10 or 4 bytes: low all 32;
    # a budget of 51 bytes pays three upgrades of 6: .9, .6, then .4 twice, of which the earlier layer comes first.
    errors = np.array([[0.1, 0.3, 0.1, 0.2], [0.2, 0.2, 0.1, 0.1]])
    used = np.array([[2, 3, 1, 2], [3, 2, 0, 3]], np.float64)
    setting = LossySetting(2, 4, 10, low_bytes=4, low_errors=errors, frequencies=used)
    policy = resolve_lossy({"kind": "bit_width", "budget_bytes": 51}).make(setting)
    assert policy.low.tolist() == [[True, False, True, False], [False, True, True, True]]
    assert policy.as_dict() == {"low_experts": 5, "full_experts": 3}
    found = policy.rewrite(routing([[0, 1, 3]], [[0.5, 0.3, 0.2]], NOBODY))
    assert found.parts.tolist() == [[LOW, FULL, FULL]]
    assert found.lowered == 1
    ones = np.ones(3, np.float32)
    kept = policy.predicted((Prediction(1, np.array([0, 1, 3], np.int32), ones, ones),))
    assert kept[0].expert_ids.tolist() == [0]


def test_bit_width_needs_room_for_the_low_records():
    setting = LossySetting(2, 4, 10, low_bytes=4)
    with pytest.raises(PolicyError, match=r"take 32 bytes, the budget is 31; .* share of 0.40"):
        resolve_lossy({"kind": "bit_width", "budget_bytes": 31}).make(setting)
    everything = resolve_lossy({"kind": "bit_width", "budget": 1.0}).make(setting)
    assert not everything.low.any()


def test_layers_with_fewer_experts_keep_no_bytes_for_the_missing_ones():
    exists = np.array([[True, True, True], [True, False, False]])
    setting = LossySetting(2, 3, 10, low_bytes=4, exists=exists)
    policy = resolve_lossy({"kind": "bit_width", "budget_bytes": 22}).make(setting)
    assert policy.low.tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("share", "given_memory", "expected"),
    [(0.25, (8, 100, 25, 99), (6, 8)), (0.0, (8, 100, 25, 99), (8, 0)), (0.25, (8, 100, 25, 4), (7, 4)),
     (1.0, (1, 100, 25, 99), (1, 0)), (0.5, (0, 100, 25, 99), (0, 0)), (0.33, (10, 100, 30, 99), (6, 11))],
)  # fmt: skip
def test_slot_memory_is_split(share, given_memory, expected):
    assert LowCopy(low_share=share).split(*given_memory) == expected


@st.composite
def routings(draw):
    n_tokens, n_experts, top_k = draw(st.integers(1, 5)), 6, draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.dirichlet(np.ones(n_experts), n_tokens).astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(scores, ids, axis=1)
    ids[rng.random(ids.shape) < 0.1] = -1
    known = scores if draw(st.booleans()) else None
    return Routing(0, "prefill", ids, weights, rng.random(n_experts) < 0.4, known, np.ones(n_tokens, np.float32))


@given(routings(), st.sampled_from(sorted(LOSSY_POLICIES)))
def test_every_policy_gives_a_routing_that_can_run(given_routing, kind):
    before = given_routing.expert_ids.copy(), given_routing.weights.copy()
    found = policy_of(kind, n_experts=6).rewrite(given_routing)
    assert np.array_equal(before[0], given_routing.expert_ids)
    assert np.array_equal(before[1], given_routing.weights)
    assert found.expert_ids.shape == found.weights.shape == before[0].shape
    assert found.expert_ids.dtype == np.int32
    assert found.weights.dtype == np.float32
    assert np.isfinite(found.weights).all()
    assert np.all(found.expert_ids[before[0] < 0] < 0)
    for row, old in zip(found.expert_ids.tolist(), before[0].tolist(), strict=True):
        present = [expert for expert in row if expert >= 0]
        assert len(present) == len(set(present))
        assert bool(present) == any(expert >= 0 for expert in old)
    changed = (found.expert_ids != before[0]) & (before[0] >= 0)
    assert found.skipped == int((changed & (found.expert_ids < 0)).sum())
    assert found.substituted == int((changed & (found.expert_ids >= 0)).sum())
    untouched = ~changed.any(axis=1)
    assert np.array_equal(found.weights[untouched], before[1][untouched])
