"""Chance that an expert is used by its layer's next tokens, by those after them, and by the running token in a later
layer.

Own use (a fast, a slow and a long moving mean, the share of the sequence's tokens) is blended into log-odds; what the
experts active now say about those that follow (``affinity``) is added, as far as it has proved right. All of it, the
blends included, is learnt while running.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.demand import Demand
from scheduler.forecast.affinity import MAX_ACTIVE, add_votes, correct, no_routes, no_weights, write_route

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

FAST, SLOW, LONG, USES, N_RATES = range(5)
FAST_WEIGHT: Final = 0.25
SLOW_WEIGHT: Final = 0.03
LONG_WEIGHT: Final = 0.002
"""Weights of the newest token in the three moving means of use."""
SEQUENCE_TRUST: Final = 8.0
"""Tokens of even use that a sequence's count of uses starts with."""
NEXT_TOKENS: Final = 3
FAR_TOKENS: Final = 12
"""The tokens after NEXT_TOKENS up to this one stand for all later ones."""
N_STEPS: Final = FAR_TOKENS + 1
"""Steps that are remembered until what they were asked about is known."""
NEAR, FAR, AHEAD, VOTES, BLEND_SIZE = 0, 5, 10, 12, 14
"""Places of a layer's blends. NEAR and FAR: logistic weights of the log-odds of the three means and of the sequence's
share, and a constant, for the mean use over the next NEXT_TOKENS tokens and over the far ones. AHEAD: share of an
expert's log-odds for the next tokens, and a constant, in those for the running token. VOTES: trust in what the active
experts say, about the next tokens and about the running one: where they say nothing, their votes are noise."""
LEAST_TRUST: Final = 0.05
"""Votes are trusted at least so far, so that it is seen when they begin to be right."""
WEIGHT, SQUARES = 0, 1
"""Rows of blends: the weights, and the sums of their squared gradients."""
FIRST_BLEND: Final = (0.1, 0.1, 0.1, 0.3, -0.2, 0.15, 0.3, 0.1, 0.35, 0.0, 0.6, 0.2, 1.0, 1.0)
BLEND_RATE: Final = 0.05
TOKEN_RATE: Final = 0.025
LAYER_RATE: Final = 0.1
FEW_TOKENS: Final = 4
"""Above so many tokens a step (prefill) the union of experts says nothing about who follows whom."""


@compiled
def log_odds(chance: float) -> float:
    """Log-odds, chances kept within 0.001..0.999."""
    bounded = min(max(chance, 1e-3), 1.0 - 1e-3)
    return float(np.log(bounded / (1.0 - bounded)))


@compiled
def chance_of(odds: float) -> float:
    """The chance with these log-odds."""
    return float(1.0 / (1.0 + np.exp(-odds)))


@compiled
def count_use(rates: Floats, ids: Ids, n_tokens: Ids, n_total: int) -> None:
    """rates float64[4, E] of one layer, in place: fast, slow and long moving mean of use, uses in the sequence."""
    total = max(n_total, 1)
    fast, slow = (1.0 - FAST_WEIGHT) ** total, (1.0 - SLOW_WEIGHT) ** total
    long = (1.0 - LONG_WEIGHT) ** total
    for e in range(rates.shape[1]):
        rates[FAST, e] *= fast
        rates[SLOW, e] *= slow
        rates[LONG, e] *= long
    for i in range(ids.size):
        share = min(n_tokens[i] / total, 1.0)
        rates[FAST, ids[i]] += (1.0 - fast) * share
        rates[SLOW, ids[i]] += (1.0 - slow) * share
        rates[LONG, ids[i]] += (1.0 - long) * share
        rates[USES, ids[i]] += total * share


@compiled
def adjust(blend: Floats, place: int, gradient: float) -> None:
    """Moves a weight of a blend float64[2, BLEND_SIZE] along its gradient, the less the more it has moved (Adagrad)."""
    if gradient != 0.0:
        blend[SQUARES, place] += gradient * gradient
        blend[WEIGHT, place] += BLEND_RATE * gradient / np.sqrt(blend[SQUARES, place])


@compiled
def adjust_trust(blend: Floats, place: int, gradient: float) -> None:
    """``adjust`` of a trust in votes, which stays positive."""
    adjust(blend, place, gradient)
    blend[WEIGHT, place] = max(blend[WEIGHT, place], LEAST_TRUST)


@compiled
def adjust_own(blend: Floats, first: int, own: Singles, moves: Singles) -> None:
    """Moves the five weights from place ``first`` on; own float32[4, E], moves float32[E]: truth minus chance."""
    constant = 0.0
    for e in range(moves.size):
        constant += moves[e]
    for rate in range(own.shape[0]):
        gradient = 0.0
        for e in range(moves.size):
            gradient += moves[e] * own[rate, e]
        adjust(blend, first + rate, gradient)
    adjust(blend, first + own.shape[0], constant)


@compiled
def blend_own(blend: Floats, first: int, own: Singles, odds: Singles) -> None:
    """odds float32[E]: log-odds by the five weights from place ``first`` on of own use, float32[4, E]."""
    fast, slow, long, uses, constant = blend[WEIGHT, first : first + 5]
    for e in range(odds.size):
        odds[e] = fast * own[FAST, e] + slow * own[SLOW, e] + long * own[LONG, e] + uses * own[USES, e] + constant


@compiled
def misjudged(routes: Ids, layer: int, first: int, last: int, odds: Singles) -> None:
    """odds float32[E], in place: the mean use of each expert over the steps ``first`` to ``last`` minus its chance."""
    for e in range(odds.size):
        odds[e] = -chance_of(odds[e])
    for step in range(first, last + 1):
        for i in range(MAX_ACTIVE):
            expert = routes[step % N_STEPS, layer, i]
            if expert < 0:
                break
            odds[expert] += 1.0 / (last + 1 - first)


@compiled
def learn_layer(
    layer: int, ids: Ids, scores: Singles, now: int, run: int, distance: int, routes: Ids, gates: Singles, own: Singles,
    blend: Floats, odds: Singles, ahead: Singles, next_token: Singles, same_token: Singles,
) -> None:  # fmt: skip
    """The routing of step ``now`` at a layer is known: what was expected of it is corrected.

    scores float32[E]: gate weights. ``run``: steps of this sequence before this one. ``distance`` > 0: ``ahead``
    float32[L, E] holds the log-odds that were given for this layer so many layers before. own float32[steps, L, 4, E]:
    log-odds of own use, by step. blend float64[2, BLEND_SIZE]: the layer's.
    """
    moves, step = np.empty(odds.shape[1], np.float32), now % N_STEPS
    write_route(routes, gates, step, layer, ids, scores)
    votes = np.zeros(odds.shape[1], np.float32)
    if distance > 0:
        moves[:] = ahead[layer]
        misjudged(routes, layer, now, now, moves)
        shared, constant, voted = 0.0, 0.0, 0.0
        for e in range(moves.size):
            shared += moves[e] * odds[layer, e]
            constant += moves[e]
            own_odds = blend[WEIGHT, AHEAD] * odds[layer, e] + blend[WEIGHT, AHEAD + 1]
            voted += moves[e] * (ahead[layer, e] - own_odds)
            moves[e] *= LAYER_RATE
        adjust_trust(blend, VOTES + 1, voted / blend[WEIGHT, VOTES + 1])
        adjust(blend, AHEAD, shared)
        adjust(blend, AHEAD + 1, constant)
        correct(same_token, layer, routes, gates, step, layer - distance, moves)
    if run >= NEXT_TOKENS:
        old = (now - NEXT_TOKENS) % N_STEPS
        blend_own(blend, NEAR, own[old, layer], moves)
        add_votes(next_token, layer, routes, gates, old, layer, votes)
        for e in range(moves.size):
            moves[e] += blend[WEIGHT, VOTES] * votes[e]
        misjudged(routes, layer, now - NEXT_TOKENS + 1, now, moves)
        adjust_own(blend, NEAR, own[old, layer], moves)
        voted = 0.0
        for e in range(moves.size):
            voted += moves[e] * votes[e]
        adjust_trust(blend, VOTES, voted)
        for e in range(moves.size):
            moves[e] *= TOKEN_RATE
        correct(next_token, layer, routes, gates, old, layer, moves)
    if run >= FAR_TOKENS:
        old = (now - FAR_TOKENS) % N_STEPS
        blend_own(blend, FAR, own[old, layer], moves)
        misjudged(routes, layer, now - FAR_TOKENS + NEXT_TOKENS + 1, now, moves)
        adjust_own(blend, FAR, own[old, layer], moves)


@compiled
def expect_use(
    layer: int, now: int, seen: float, even: float, rates: Floats, routes: Ids, gates: Singles, own: Singles,
    blend: Floats, odds: Singles, far: Singles, next_token: Singles, voting: bool,
) -> None:  # fmt: skip
    """odds, far float32[L, E] of a layer: log-odds of the mean use over its next tokens, and over those after them.
    ``voting``: routes are known."""
    step = now % N_STEPS
    rows = own[step, layer]
    for e in range(odds.shape[1]):
        for rate in range(USES):
            rows[rate, e] = log_odds(rates[rate, e])
        rows[USES, e] = log_odds((rates[USES, e] + SEQUENCE_TRUST * even) / (seen + SEQUENCE_TRUST))
    blend_own(blend, NEAR, rows, odds[layer])
    blend_own(blend, FAR, rows, far[layer])
    if voting:
        votes = np.zeros(odds.shape[1], np.float32)
        add_votes(next_token, layer, routes, gates, step, layer, votes)
        for e in range(votes.size):
            odds[layer, e] += blend[WEIGHT, VOTES] * votes[e]


@compiled
def observe_use(
    layer: int, ids: Ids, n_tokens: Ids, scores: Singles, n_total: int, now: int, run: int, distance: int, seen: float,
    even: float, few: bool, rates: Floats, routes: Ids, gates: Singles, own: Singles, blend: Floats, odds: Singles,
    far: Singles, ahead: Singles, next_token: Singles, same_token: Singles,
) -> None:  # fmt: skip
    """A layer's routing is known: counts its use, learns if there are ``few`` tokens, forecasts the next ones."""
    count_use(rates, ids, n_tokens, n_total)
    if few:
        learn_layer(
            layer, ids, scores, now, run, distance, routes, gates, own, blend, odds, ahead, next_token, same_token
        )
    expect_use(layer, now, seen, even, rates, routes, gates, own, blend, odds, far, next_token, few)


@compiled
def foretell(
    layer: int, target: int, now: int, routes: Ids, gates: Singles, blend: Floats, odds: Singles, same_token: Singles,
    ahead: Singles,
) -> None:  # fmt: skip
    """ahead float32[L, E] of layer ``target``: log-odds that the running step uses its experts, told at ``layer``.
    blend float64[2, BLEND_SIZE]: the target's."""
    row, share, constant = ahead[target], blend[WEIGHT, AHEAD], blend[WEIGHT, AHEAD + 1]
    for e in range(row.size):
        row[e] = share * odds[target, e] + constant
    votes = np.zeros(row.size, np.float32)
    add_votes(same_token, target, routes, gates, now % N_STEPS, layer, votes)
    for e in range(row.size):
        row[e] += blend[WEIGHT, VOTES + 1] * votes[e]


@compiled
def take_turn(layer: int, n_tokens: int, few: bool, distance: int, seen: Floats, foretold: Ints) -> tuple[int, int]:
    """A layer's routing is known: counts its tokens in seen float64[L]. foretold int64[L]: 1 where a forecast stands.

    Returns (layers since this one was forecast, 0 if it was not; the layer ``distance`` ahead that is forecast next, -1
    where there is none or where there are not ``few`` tokens).
    """
    seen[layer] += n_tokens
    since = distance if foretold[layer] else 0
    foretold[layer] = 0
    target = layer + distance
    if not few or target >= seen.size:
        return since, -1
    foretold[target] = 1
    return since, target


LEARNT: Final = ("rates", "even", "blends", "odds", "next_token", "same_token")
"""What a ``UseModel`` knows of a model's routing beyond the running sequence; every array has a row a layer."""
Learnt = dict[str, npt.NDArray[Any]]


class UseModel:
    """State of one model: log-odds float32[L, E] ``odds`` for the next tokens, ``far`` for those after them, ``ahead``
    for the running one.

    ``distance``: layers from where a forecast is made to where it is for. ``next_token``, ``same_token`` (``affinity``)
    and ``blends`` float64[L, 2, BLEND_SIZE]: what was learnt. ``now``: number of the step, ``run``: steps of few tokens
    of this sequence without a break.
    ``seen``, ``even`` float64[L]: tokens of the sequence, and an expert's even chance (0: nothing was active yet).
    """

    def __init__(self, n_layers: int, n_experts: int, distance: int) -> None:
        self.n_layers, self.n_experts, self.distance = n_layers, n_experts, distance
        self.rates = np.zeros((n_layers, N_RATES, n_experts))
        self.seen, self.even = np.zeros(n_layers), np.zeros(n_layers)
        self._shares: Floats | None = None
        self.routes, self.gates = no_routes(N_STEPS, n_layers)
        self.own = np.zeros((N_STEPS, n_layers, N_RATES, n_experts), np.float32)
        self.blends = np.zeros((n_layers, 2, BLEND_SIZE))
        self.blends[:, WEIGHT] = FIRST_BLEND
        self.odds, self.far, self.ahead = (np.zeros((n_layers, n_experts), np.float32) for _ in range(3))
        self.next_token, self.same_token = (no_weights(n_layers, n_experts) for _ in range(2))
        self.now, self.run = 0, 0
        self.foretold = np.zeros(n_layers, np.int64)

    def learnt(self) -> Learnt:
        """What another model of the same sizes can begin with, see ``recall``. The arrays are this model's own."""
        return {name: getattr(self, name) for name in LEARNT} | {"distance": np.full(self.n_layers, self.distance)}

    def recall(self, learnt: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Begins with what an earlier model has learnt, before the first step. Returns whether it fits: the same arrays
        of finite numbers, forecast from as many layers before; nothing has changed where it does not."""
        own = self.learnt()
        if learnt.keys() != own.keys():
            return False
        for name, array in own.items():
            given = learnt[name]
            if given.shape != array.shape or given.dtype.kind not in "fi" or not np.isfinite(given).all():
                return False
        if not np.array_equal(learnt["distance"], own["distance"]):
            return False
        for name in LEARNT:
            own[name][...] = learnt[name]
        return True

    def begin_sequence(self) -> None:
        """What was active last no longer precedes what comes, and the sequence's uses are counted from 0."""
        self.rates[:, USES] = 0.0
        self.seen[:] = 0.0
        self.foretold[:] = 0
        self.run = 0

    def warmed(self, shares: Floats) -> None:
        """Known shares of use, float64[L, E], before the first step."""
        self._shares = shares

    def begin_step(self, few: bool) -> None:
        """A step begins; one of many tokens breaks the run of those that are learnt from."""
        self.now += 1
        self.run = self.run + 1 if few else 0

    def turn(self, demand: Demand, few: bool) -> tuple[int, int, int, float, float, int]:
        """What ``observe_use`` and ``foretell`` read of a layer whose routing is known, and have to be told of each.

        (step, steps of this sequence before it, layers since it was forecast or 0, tokens seen, even chance, layer that
        is forecast next or -1).
        """
        layer = demand.layer
        if not self.even[layer]:
            self._first_use(demand)
        since, target = take_turn(layer, demand.n_tokens_total, few, self.distance, self.seen, self.foretold)
        return self.now, self.run - 1, since, float(self.seen[layer]), float(self.even[layer]), target

    def observe(self, demand: Demand, few: bool) -> int:
        """Learns from a layer's routing, and forecasts the layer ``distance`` after it into ``ahead``.

        Returns that layer, -1 where there is none or where there are not ``few`` tokens. Arrays as LayerDemand says
        (int32, contiguous).
        """
        layer = demand.layer
        now, run, distance, seen, even, target = self.turn(demand, few)
        observe_use(
            layer, demand.expert_ids, demand.n_tokens, demand.gate_scores, demand.n_tokens_total, now, run, distance,
            seen, even, few, self.rates[layer], self.routes, self.gates, self.own, self.blends[layer], self.odds,
            self.far, self.ahead, self.next_token, self.same_token,
        )  # fmt: skip
        if target >= 0:
            foretell(
                layer, target, now, self.routes, self.gates, self.blends[target], self.odds, self.same_token, self.ahead
            )
        return target

    def loads(self, layer: int) -> Floats:
        """float64[E]: slow moving mean of use."""
        return np.asarray(self.rates[layer, SLOW])

    def _first_use(self, demand: Demand) -> None:
        """The experts a token that are seen now make rates of known shares, or even ones."""
        layer = demand.layer
        per_token = float(demand.n_tokens.sum()) / max(demand.n_tokens_total, 1)
        if per_token <= 0.0:
            return
        even = per_token / self.n_experts
        self.even[layer] = even
        known = None if self._shares is None else np.minimum(self._shares[layer] * per_token, 1.0)
        self.rates[layer, :USES] = even if known is None else known
