"""The online regression of ``ours``: votes and corrections by hand, and what it learns from routing that has a rule."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import CostModel, LayerDemand, SlotTable
from scheduler.forecast.affinity import (
    MAX_ACTIVE,
    NOBODY,
    SOURCE_LAYERS,
    add_votes,
    correct,
    no_routes,
    no_weights,
    write_route,
)
from scheduler.forecast.use_model import (
    AHEAD,
    FEW_TOKENS,
    LAYER_RATE,
    NEXT_TOKENS,
    OWN_USE,
    SEQUENCE_TRUST,
    UseModel,
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
    """Layer 2 had experts 1 and 3, layer 1 expert 0; layer 0 of the step had nobody."""
    weights, routes = no_weights(4, 4), no_routes(2, 4)
    write_route(routes, 1, 2, ids(1, 3))
    write_route(routes, 1, 1, ids(0))
    assert routes[1, 2, :3].tolist() == [1, 3, NOBODY]
    assert routes.shape[2] == MAX_ACTIVE
    correct(weights, 3, routes, 1, 2, np.array([1, 0, 0, -2], np.float32))
    assert weights[3, 0, 1].tolist() == weights[3, 0, 3].tolist() == weights[3, 1, 0].tolist() == [1, 0, 0, -2]
    assert float(np.abs(weights).sum()) == 9.0, "nobody else moved"
    votes = np.zeros(4, np.float32)
    add_votes(weights, 3, routes, 1, 2, votes)
    assert votes.tolist() == [3, 0, 0, -6], "three sources, all with the same weights"
    assert SOURCE_LAYERS == 3


def test_a_shorter_route_overwrites_a_longer_one() -> None:
    routes = no_routes(1, 1)
    write_route(routes, 0, 0, ids(1, 2, 3))
    write_route(routes, 0, 0, ids(5))
    assert routes[0, 0, :3].tolist() == [5, NOBODY, NOBODY]


def test_own_use_by_hand() -> None:
    """First token of a layer of 8 experts: even use 1 / 8, then fast .25, slow .03, one use in 1 + 8 tokens."""
    model = UseModel(1, 8, 1)
    model.begin_step(True)
    model.observe(demand(0, 5), True)
    used = 0.75 / 8 + 0.25, 0.97 / 8 + 0.03, (1 + SEQUENCE_TRUST / 8) / (1 + SEQUENCE_TRUST)
    unused = 0.75 / 8, 0.97 / 8, (SEQUENCE_TRUST / 8) / (1 + SEQUENCE_TRUST)
    for expert, rates in ((5, used), (0, unused)):
        expected = sum(share * log_odds(rate) for share, rate in zip(OWN_USE, rates, strict=True))
        assert model.odds[0, expert] == pytest.approx(expected, rel=1e-5)


def test_the_first_correction_by_hand() -> None:
    """Layer 1's forecast from layer 0 was the log-odds of own use; expert 2 was used, 3 was not."""
    model = UseModel(2, 8, 1)
    for _ in range(2):
        model.begin_step(True)
        assert model.observe(demand(0, 0), True) == 1
        told = model.ahead[1].copy()
        before = model.odds[1].copy()
        assert model.observe(demand(1, 2), True) == -1, "there is no layer 2"
    moved = LAYER_RATE * (1 - chance_of(told[2])), -LAYER_RATE * chance_of(told[3])
    model.begin_step(True)
    model.observe(demand(0, 0), True)
    first = LAYER_RATE * (1 - chance_of(AHEAD[1])), -LAYER_RATE * chance_of(AHEAD[1])
    assert told[2] == pytest.approx(AHEAD[0] * before[2] + AHEAD[1] + first[0], rel=1e-4)
    before = model.odds[1].copy()
    assert model.ahead[1, 2] == pytest.approx(AHEAD[0] * before[2] + AHEAD[1] + first[0] + moved[0], rel=1e-4)
    assert model.ahead[1, 3] == pytest.approx(AHEAD[0] * before[3] + AHEAD[1] + first[1] + moved[1], rel=1e-4)


@pytest.mark.parametrize("distance", [1, 2])
def test_it_learns_who_follows_whom(distance: int) -> None:
    """A random expert in layer 0, in each later layer the one beside it: own use says nothing, the route all."""
    rng = np.random.default_rng(4)
    model = UseModel(4, 8, distance)
    right = told = 0
    for step in range(300):
        model.begin_step(True)
        first = int(rng.integers(8))
        for layer in range(4):
            target = model.observe(demand(layer, (first + layer) % 8), True)
            if target >= 0 and step >= 200:
                told += 1
                right += int(model.ahead[target].argmax()) == (first + target) % 8
                assert model.ahead[target].max() > 0.0
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


def test_few_means_few_tokens_and_few_experts() -> None:
    model = ValueModel(Setting(1, 64, SlotTable(4, 1, 64), CostModel.uniform(1)))
    assert model.arrive(demand(0, 1))
    assert not model.arrive(demand(0, 1, n_tokens=FEW_TOKENS + 1))
    assert not model.arrive(demand(0, *range(MAX_ACTIVE + 1), n_experts=64))
