"""The online regression of ``ours``: votes and corrections by hand, and what it learns from routing that has a rule."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import CostModel, LayerDemand, SlotTable
from scheduler.forecast.affinity import (
    LEAST_SOURCES,
    MAX_ACTIVE,
    NOBODY,
    SOURCE_LAYERS,
    add_votes,
    correct,
    no_routes,
    no_weights,
    source_layers,
    write_route,
)
from scheduler.forecast.use_model import (
    AHEAD,
    BLEND_RATE,
    BLEND_SIZE,
    FAR,
    FEW_TOKENS,
    FIRST_BLEND,
    LAYER_RATE,
    LEAST_TRUST,
    NEAR,
    NEXT_TOKENS,
    SEQUENCE_TRUST,
    VOTES,
    WEIGHT,
    UseModel,
    adjust,
    chance_of,
    log_odds,
)
from scheduler.forecast.value_model import ValueModel
from scheduler.setting import Setting


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def demand(layer: int, *experts: int, n_tokens: int = 1, n_experts: int = 8) -> LayerDemand:
    loads = np.full(len(experts), n_tokens, np.int32)
    return LayerDemand(layer, "decode", n_tokens, ids(*experts), loads, np.zeros(n_experts, np.float32))


def test_votes_and_corrections_by_hand() -> None:
    """Layer 2 had experts 1 and 3, of which 1 weighs three times as much, layer 1 expert 0; layer 0 had nobody."""
    weights, (routes, gates) = no_weights(4, 4), no_routes(2, 4)
    write_route(routes, gates, 1, 2, ids(1, 3), np.array([9, 0.6, 9, 0.2], np.float32))
    write_route(routes, gates, 1, 1, ids(0), np.zeros(4, np.float32))
    assert routes[1, 2, :3].tolist() == [1, 3, NOBODY]
    assert gates[1, 2, :2] == pytest.approx([1.5, 0.5])
    assert gates[1, 1, 0] == 1.0, "gates that are not known are alike"
    assert routes.shape[2] == MAX_ACTIVE
    correct(weights, 3, routes, gates, 1, 2, np.array([1, 0, 0, -2], np.float32))
    assert weights[3, 0, 1] == pytest.approx([1.5, 0, 0, -3])
    assert weights[3, 0, 3] == pytest.approx([0.5, 0, 0, -1])
    assert weights[3, 1, 0].tolist() == [1, 0, 0, -2]
    assert float(np.abs(weights).sum()) == pytest.approx(9.0), "nobody else moved"
    votes = np.zeros(4, np.float32)
    add_votes(weights, 3, routes, gates, 1, 2, votes)
    assert votes == pytest.approx([1.5**2 + 0.5**2 + 1, 0, 0, -2 * (1.5**2 + 0.5**2 + 1)])


def test_large_models_have_fewer_source_layers() -> None:
    assert source_layers(24, 32) == source_layers(48, 128) == SOURCE_LAYERS
    assert source_layers(58, 256) == 4
    assert source_layers(48, 512) == LEAST_SOURCES
    assert no_weights(2, 4).shape == (2, SOURCE_LAYERS, 4, 4)


def test_a_shorter_route_overwrites_a_longer_one() -> None:
    routes, gates = no_routes(1, 1)
    for experts in (ids(1, 2, 3), ids(5)):
        write_route(routes, gates, 0, 0, experts, np.ones(8, np.float32))
    assert routes[0, 0, :3].tolist() == [5, NOBODY, NOBODY]


def test_own_use_by_hand() -> None:
    """First token of a layer of 8 experts: even use 1 / 8, then fast .25, slow .03, long .002, one use in 1 + 8."""
    model = UseModel(1, 8, 1)
    model.begin_step(True)
    model.observe(demand(0, 5), True)
    used = 0.75 / 8 + 0.25, 0.97 / 8 + 0.03, 0.998 / 8 + 0.002, (1 + SEQUENCE_TRUST / 8) / (1 + SEQUENCE_TRUST)
    unused = 0.75 / 8, 0.97 / 8, 0.998 / 8, (SEQUENCE_TRUST / 8) / (1 + SEQUENCE_TRUST)
    for expert, rates in ((5, used), (0, unused)):
        own = [*map(log_odds, rates), 1.0]
        for odds, first in ((model.odds, NEAR), (model.far, FAR)):
            expected = np.dot(FIRST_BLEND[first : first + 5], own)
            assert odds[0, expert] == pytest.approx(expected, rel=1e-5)


def test_the_first_correction_by_hand() -> None:
    """Layer 1's forecast from layer 0 was the log-odds of own use; expert 2 was used, 3 was not."""
    model = UseModel(2, 8, 1)
    moved = np.zeros(8)
    for _ in range(2):
        model.begin_step(True)
        assert model.observe(demand(0, 0), True) == 1
        told = model.ahead[1].copy()
        assert model.observe(demand(1, 2), True) == -1, "there is no layer 2"
        moved += LAYER_RATE * (np.eye(8)[2] - [chance_of(odds) for odds in told])
    assert model.same_token[1, 0, 0] == pytest.approx(moved, rel=1e-4)
    model.begin_step(True)
    model.observe(demand(0, 0), True)
    share, constant = model.blends[1, WEIGHT, AHEAD : AHEAD + 2]
    assert model.ahead[1] == pytest.approx(share * model.odds[1] + constant + moved, rel=1e-4)


def test_a_blend_moves_along_its_gradient_the_less_the_more_it_has_moved() -> None:
    blend = np.zeros((2, BLEND_SIZE))
    for place, gradients in ((0, (-2.0,)), (1, (3.0, 4.0)), (2, (0.0,))):
        for gradient in gradients:
            adjust(blend, place, gradient)
    assert blend[WEIGHT, :3] == pytest.approx([-BLEND_RATE, BLEND_RATE * (1 + 4 / 5), 0.0])


def test_trust_in_votes_follows_what_they_are_worth() -> None:
    """Layer 1 has the expert beside layer 0's: its votes are trusted more. Layer 2 is drawn at random: its less."""
    rng = np.random.default_rng(5)
    model = UseModel(3, 8, 1)
    for _ in range(400):
        model.begin_step(True)
        first = int(rng.integers(8))
        for layer, expert in enumerate((first, (first + 1) % 8, int(rng.integers(8)))):
            model.observe(demand(layer, expert), True)
    trust = model.blends[:, WEIGHT, VOTES + 1]
    assert trust[1] > 1.5
    assert LEAST_TRUST <= trust[2] < 0.8


def test_blends_learn_what_own_use_says() -> None:
    """The experts of a sequence are drawn once and stay: its share says all, the blend comes to trust it."""
    rng = np.random.default_rng(2)
    model = UseModel(1, 16, 1)
    for _ in range(12):
        model.begin_sequence()
        experts = np.sort(rng.choice(16, 3, replace=False))
        for _ in range(40):
            model.begin_step(True)
            model.observe(demand(0, *experts, n_experts=16), True)
    for odds in (model.odds, model.far):
        chances = 1 / (1 + np.exp(-odds[0]))
        assert chances[experts].min() > 0.9
        assert np.delete(chances, experts).max() < 0.1


@pytest.mark.parametrize("distance", [1, 2])
def test_it_learns_who_follows_whom(distance: int) -> None:
    """A random expert in layer 0, in each later layer the one beside it: own use says nothing, the route all."""
    rng = np.random.default_rng(4)
    model = UseModel(4, 8, distance)
    right = told = 0
    for step in range(600):
        model.begin_step(True)
        first = int(rng.integers(8))
        for layer in range(4):
            target = model.observe(demand(layer, (first + layer) % 8), True)
            if target >= 0 and step >= 200:
                told += 1
                right += int(model.ahead[target].argmax()) == (first + target) % 8
                assert model.ahead[target].max() > 0.0, "likelier than not"
    assert right > 0.95 * told > 0


def test_it_learns_what_the_next_tokens_use() -> None:
    """One layer in which expert t mod 8 is active at token t: those of the next three tokens are the likeliest."""
    model = UseModel(1, 8, 1)
    for token in range(400):
        model.begin_step(True)
        model.observe(demand(0, token % 8), True)
    likeliest = set(np.argsort(-model.odds[0])[:NEXT_TOKENS].tolist())
    assert likeliest == {(token + ahead) % 8 for ahead in range(1, NEXT_TOKENS + 1)}


def test_prefills_and_new_sequences_are_not_learnt_across() -> None:
    model = UseModel(1, 8, 1)
    for _ in range(NEXT_TOKENS):
        model.begin_step(True)
        model.observe(demand(0, 1), True)
    model.begin_step(False)
    model.observe(demand(0, 1, 2, n_tokens=FEW_TOKENS + 1), False)
    for _ in range(NEXT_TOKENS):
        model.begin_step(True)
        model.observe(demand(0, 1), True)
    assert not model.next_token.any(), "no token has three known successors of its own run"
    model.begin_step(True)
    model.observe(demand(0, 1), True)
    assert model.next_token.any()
    known = model.next_token.copy()
    model.begin_sequence()
    model.begin_step(True)
    model.observe(demand(0, 1), True)
    assert np.array_equal(model.next_token, known)


def test_studied_sequences_are_learnt_without_a_word_on_residents() -> None:
    """A studied step is what ``observe`` learns; nothing is listed, nobody is worth more."""
    rng = np.random.default_rng(7)
    told = ValueModel(Setting(3, 8, SlotTable(4, 3, 8), CostModel.uniform(3)))
    model = UseModel(3, 8, told.distance)
    for step in range(30):
        demands = [demand(layer, int(rng.integers(8))) for layer in range(3)]
        told.study(demands, step == 0)
        if step == 0:
            model.begin_sequence()
        model.begin_step(True)
        for one in demands:
            model.observe(one, True)
    for name in ("next_token", "same_token", "blends", "rates", "odds", "far"):
        np.testing.assert_array_equal(getattr(told.use, name), getattr(model, name))
    assert model.next_token.any()
    assert model.same_token.any()
    assert not told.keep.any()
    assert not told.n_listed.any()


def lived(n_layers: int = 3, distance: int = 1) -> UseModel:
    """A model that has seen 30 tokens."""
    rng, model = np.random.default_rng(3), UseModel(n_layers, 8, distance)
    for _ in range(30):
        model.begin_step(True)
        for layer in range(n_layers):
            model.observe(demand(layer, int(rng.integers(8))), True)
    return model


def test_what_was_learnt_is_recalled_by_models_that_it_fits() -> None:
    known = {name: array.copy() for name, array in lived().learnt().items()}
    begun = UseModel(3, 8, 1)
    assert begun.recall(known)
    for model in (begun, whole := lived()):
        model.begin_sequence()
        for experts in ((1, 2), (3, 4)):
            model.begin_step(True)
            for layer in range(3):
                model.observe(demand(layer, *experts), True)
    np.testing.assert_allclose(begun.odds, whole.odds)
    np.testing.assert_allclose(begun.ahead, whole.ahead)


@pytest.mark.parametrize(
    "changed",
    [
        {"next_token": np.zeros((3, 2, 8, 8), np.float32)}, {"blends": np.full((3, 2, BLEND_SIZE), np.nan)},
        {"distance": np.full(3, 2)}, {"more": np.zeros(3)}, {"even": np.array(["a", "b", "c"])},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_recalled(changed: dict[str, np.ndarray]) -> None:
    begun = UseModel(3, 8, 1)
    assert not begun.recall(lived().learnt() | changed)
    assert not begun.next_token.any()


def test_few_means_few_tokens_and_few_experts() -> None:
    model = ValueModel(Setting(1, 64, SlotTable(4, 1, 64), CostModel.uniform(1)))
    assert model.arrive(demand(0, 1))
    assert not model.arrive(demand(0, 1, n_tokens=FEW_TOKENS + 1))
    assert not model.arrive(demand(0, *range(MAX_ACTIVE + 1), n_experts=64))
