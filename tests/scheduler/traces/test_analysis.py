"""Analysis of traces: definitions by hand on small traces, published facts on the real ones."""

import numpy as np
import pytest

from scheduler.errors import SchedulerError
from scheduler.traces.analysis import (
    consecutive_overlap,
    expert_frequencies,
    load_entropy,
    predictor_quality,
    reuse_distance,
    sch,
    srp,
    srp_from_counts,
    window_counts,
)
from scheduler.traces.analysis_cache import hit_rate_curve, layer_hit_rate
from scheduler.traces.predictions import Predictions, TransitionPredictor, by_token, noisy, predictions_for, recorded
from scheduler.traces.trace import Trace


def one_layer(rows, n_experts=4, sequence=None):
    ids = np.array(rows, np.int16)[:, None, :]
    n = len(rows)
    meta = {"model": "toy", "num_layers": 1, "num_experts": n_experts, "top_k": ids.shape[2]}
    return Trace(ids, np.array(sequence or [0] * n, np.int32), np.ones(n, np.uint8), meta)


def test_srp_by_hand():
    # windows of 2: (0,0) (0,1) (1,1): expert 0 counts 2 1 0, expert 1 counts 0 1 2; n_0 = 2, n_1 = 2, n_2 = 2 (4
    # experts: + 6 zeros)
    trace = one_layer([[0], [0], [1], [1]])
    counts = window_counts(trace, 2).sum(axis=(0, 1))
    assert counts.tolist() == [8, 2, 2]
    # A = 6; a = 2: M = 4, P = 4 -> 8/10; a = 1: M = 6, P = 8 -> 12/14; a = 0: P = 24 -> 12/30
    score, share = srp_from_counts(counts)
    assert score == pytest.approx(12 / 14)
    assert share == pytest.approx(8 / 6)


def test_srp_windows_stay_inside_a_sequence():
    split = one_layer([[0], [0], [1], [1]], sequence=[0, 0, 1, 1])
    assert srp(split, [2])[0].srp == pytest.approx(1.0)
    assert srp(split, [3]) == []


def test_sch_by_hand():
    # capacity 1: 0 into a free slot counts (1), 0 hit (2), 1 misses and replaces, 0 misses, 0 hit (3) of 5
    trace = one_layer([[0], [0], [1], [0], [0]])
    assert sch(trace, 1, 2) == pytest.approx(3 / 5)
    # capacity 2: 0 and 1 enter free slots: everything counts
    assert sch(trace, 2, 2) == pytest.approx(1.0)
    # the oracle keeps 0 (used twice ahead) and drops 1 for 2: 0 f, 1 f, 2 miss (drops 1), 0 hit, 0 hit -> 4 of 5
    assert sch(one_layer([[0], [1], [2], [0], [0]]), 2, 3) == pytest.approx(4 / 5)


def test_reuse_distance_entropy_and_overlap_by_hand():
    trace = one_layer([[0, 1], [0, 2], [3, 1]])
    histogram, median = reuse_distance(trace, [1, 2])
    assert histogram.tolist() == [1, 1, 0]
    assert median == pytest.approx(1.5)
    assert consecutive_overlap(trace) == pytest.approx(1 / 4)
    assert expert_frequencies(trace)[0].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])
    even = one_layer([[0], [1], [2], [3]])
    assert load_entropy(even)[0] == pytest.approx(1.0)
    assert load_entropy(one_layer([[2], [2]]))[0] == pytest.approx(0.0)


def test_cache_replays_by_hand():
    trace = one_layer([[0], [1], [2], [0], [1]])
    assert layer_hit_rate(trace, "lru", 2) == 0.0
    assert layer_hit_rate(trace, "belady", 2) == pytest.approx(1 / 5)  # 1 leaves for 2, 0 hits
    assert layer_hit_rate(trace, "lru", 3) == pytest.approx(2 / 5)
    often = one_layer([[0], [0], [0], [1], [2], [0]])
    assert layer_hit_rate(often, "lfu", 2) == pytest.approx(3 / 6)
    assert layer_hit_rate(often, "lru", 2) == pytest.approx(2 / 6)
    # MRS, a = 0.5: after 0 0 0 its score .875 decays to .21875 at token 4, when 2 enters and 1 (.25) is above it: 0
    # leaves
    assert layer_hit_rate(often, "mrs", 2, alpha=0.5) == pytest.approx(2 / 6)
    assert layer_hit_rate(often, "mrs", 2, alpha=0.1) == pytest.approx(3 / 6)


def test_no_policy_beats_belady_and_full_slots_always_hit():
    rng = np.random.default_rng(0)
    rows = [rng.choice(8, 2, replace=False) for _ in range(200)]
    trace = one_layer(rows, n_experts=8)
    best = layer_hit_rate(trace, "belady", 3)
    assert all(layer_hit_rate(trace, policy, 3) <= best for policy in ("lru", "lfu", "mrs"))
    assert layer_hit_rate(trace, "lru", 8) == pytest.approx(1 - 8 / 400)
    curve = hit_rate_curve(trace, "lru", [0.25, 0.5, 1.0])
    assert curve == sorted(curve)


@pytest.mark.parametrize(
    ("policy", "slots", "message"), [("lrru", 2, "did you mean 'lru'"), ("lru", 0, "1..4"), ("lru", 5, "1..4")]
)
def test_bad_arguments(policy, slots, message):
    with pytest.raises(SchedulerError, match=message):
        layer_hit_rate(one_layer([[0]]), policy, slots)


def test_predictor_quality_by_hand():
    ids = np.array([[[0, 1], [2, 3]], [[0, 2], [1, 3]]], np.int16)
    meta = {"model": "toy", "num_layers": 2, "num_experts": 4, "top_k": 2}
    trace = Trace(ids, np.zeros(2, np.int32), np.ones(2, np.uint8), meta)
    guess = np.full((2, 2, 1, 2), -1, np.int16)
    guess[:, 0, 0] = [[2, 0], [1, 3]]
    (quality,) = predictor_quality(trace, Predictions(guess, np.zeros(guess.shape, np.float32), "test"))
    assert (quality.ahead, quality.recall, quality.precision) == (1, 0.75, 0.75)
    with pytest.raises(SchedulerError, match="no predicted_ids"):
        recorded(trace)
    assert recorded(trace.with_predictions(guess)).ids.tolist() == guess.tolist()


def test_predictions_by_token_know_earlier_steps_only():
    """Two sequences: a prompt of two equal tokens and a reply of two. A prompt is one step."""
    ids = np.array([[[0], [1]], [[2], [3]], [[1], [0]], [[3], [2]]] * 2, np.int16)
    meta = {"model": "toy", "num_layers": 2, "num_experts": 4, "top_k": 1}
    trace = Trace(
        ids, np.repeat(np.arange(2, dtype=np.int32), 4), np.array([0, 0, 1, 1] * 2, np.uint8), meta,
        token_ids=np.array([5, 5, 5, 6, 6, 7, 7, 5], np.int32),
    )  # fmt: skip
    found = by_token(trace, horizon=1)
    assert found.ids[:, 0, 0, 0].tolist() == [-1, -1, 3, -1, 2, -1, 3, 0]
    assert (found.ids[:, 1] == -1).all()
    np.testing.assert_array_equal(found.scores[:, 0, 0, 0], found.ids[:, 0, 0, 0] >= 0)
    assert predictions_for(trace, "token").kind == "token"
    with pytest.raises(SchedulerError, match="no token_ids; record it"):
        predictions_for(drifting(), "token")


def drifting(n_tokens=400, seed=0):
    """Layer 1 repeats layer 0's expert, shifted by one: perfectly predictable."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 8, n_tokens)
    ids = np.stack([first, (first + 1) % 8], axis=1)[..., None].astype(np.int16)
    meta = {"model": "toy", "num_layers": 2, "num_experts": 8, "top_k": 1}
    return Trace(ids, np.zeros(n_tokens, np.int32), np.ones(n_tokens, np.uint8), meta)


def test_transition_predictor_learns_from_other_tokens():
    predictor = TransitionPredictor(horizon=1).fit(drifting(seed=1))
    predictions = predictor.predict(drifting(seed=2))
    assert predictor_quality(drifting(seed=2), predictions)[0].recall > 0.99
    assert predictions.scores[:, 0].mean() > 0.9
    assert (predictions.ids[:, 1] == -1).all()


def test_noisy_predictions_have_the_stated_recall():
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((500, 4, 16)), axis=-1)[..., :3].astype(np.int16)
    meta = {"model": "toy", "num_layers": 4, "num_experts": 16, "top_k": 3}
    trace = Trace(ids, np.zeros(500, np.int32), np.ones(500, np.uint8), meta)
    quality = predictor_quality(trace, noisy(trace, (0.9, 0.6, 0.3), seed=5))
    assert [q.recall for q in quality] == pytest.approx([0.9, 0.6, 0.3], abs=0.03)
    again = noisy(trace, (0.9, 0.6, 0.3), seed=5)
    np.testing.assert_array_equal(again.ids, noisy(trace, (0.9, 0.6, 0.3), seed=5).ids)
    assert predictions_for(trace, "none") is None


@pytest.mark.parametrize(
    ("name", "slots", "facts"),
    [
        ("gpt-oss-20b", (8, 16), {("lru", 0.1): (0.706, 0.913), ("mrs", 0.5): (0.715, 0.915), ("mrs", 0.1): (0.741,
        0.922), ("belady", 0.1): (0.831, 0.959)}),
        ("olmoe-1b-7b", (16, 32), {("lru", 0.1): (0.598, 0.799), ("mrs", 0.1): (0.617, 0.818), ("belady", 0.1):
        (0.748, 0.910)}),
    ],
)  # fmt: skip
def test_published_hit_rates(real_traces, name, slots, facts):
    """To 0.8 points: the published replay's ties and start are not stated."""
    trace = Trace.load(real_traces / f"{name}.decode.npz").head(2000)
    for (policy, alpha), expected in facts.items():
        found = [layer_hit_rate(trace, policy, n, alpha) for n in slots]
        assert found == pytest.approx(expected, abs=0.008), policy


def test_transition_predictor_on_unseen_published_sequences(real_traces):
    trace = Trace.load(real_traces / "gpt-oss-20b.decode.npz")
    predictor = TransitionPredictor(horizon=1).fit(trace.select_sequences(list(range(6))))
    unseen = trace.select_sequences([20, 21])
    quality = predictor_quality(unseen, predictor.predict(unseen))[0]
    assert quality.recall > 0.55
