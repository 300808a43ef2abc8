"""Chance that an expert is used by its layer's next tokens, and by the running token in a later layer.

Own use (a fast and a slow moving mean, the share of the sequence's tokens) gives log-odds; what the experts active now
say about those that follow (``affinity``) is added. All of it is learnt while running, nothing is trained ahead.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.demand import Demand
from scheduler.forecast.affinity import MAX_ACTIVE, add_votes, correct, no_routes, no_weights, write_route

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

FAST, SLOW, USES = 0, 1, 2
FAST_WEIGHT: Final = 0.25
SLOW_WEIGHT: Final = 0.03
"""Weights of the newest token in the two moving means of use."""
SEQUENCE_TRUST: Final = 8.0
"""Tokens of even use that a sequence's count of uses starts with."""
OWN_USE: Final = (0.14, 0.056, 0.243)
"""Logistic weights of the log-odds of the fast and the slow mean and of the sequence's share, for the mean use over
the next NEXT_TOKENS tokens (gpt-oss-20b, tuning half; the constant is 0)."""
NEXT_TOKENS: Final = 3
TOKEN_RATE: Final = 0.05
VOTE_SHARE: Final = 0.5
"""Part of the votes for the next tokens that counts: they are learnt from few tokens (tuning half)."""
AHEAD: Final = (0.62, 0.35)
"""Share of an expert's log-odds for the next tokens, and a constant, in those for the running token."""
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
    """rates float64[3, E] of one layer, in place: fast and slow moving mean of use, uses in the sequence."""
    total = max(n_total, 1)
    fast, slow = (1.0 - FAST_WEIGHT) ** total, (1.0 - SLOW_WEIGHT) ** total
    for e in range(rates.shape[1]):
        rates[FAST, e] *= fast
        rates[SLOW, e] *= slow
    for i in range(ids.size):
        share = min(n_tokens[i] / total, 1.0)
        rates[FAST, ids[i]] += (1.0 - fast) * share
        rates[SLOW, ids[i]] += (1.0 - slow) * share
        rates[USES, ids[i]] += total * share


@compiled
def learn_layer(
    layer: int, ids: Ids, now: int, run: int, distance: int, routes: Ids, own: Singles, ahead: Singles,
    next_token: Singles, same_token: Singles,
) -> None:  # fmt: skip
    """The routing of step ``now`` at a layer is known: both regressions learn from it.

    ``run``: steps of this sequence before this one. ``distance`` > 0: ``ahead`` float32[L, E] holds the log-odds that
    were given for this layer so many layers before. own float32[steps, L, E]: log-odds of own use, by step.
    """
    n_experts, n_steps = ahead.shape[1], routes.shape[0]
    moves = np.empty(n_experts, np.float32)
    step = now % n_steps
    if distance > 0:
        for e in range(n_experts):
            moves[e] = -LAYER_RATE * chance_of(ahead[layer, e])
        for expert in ids:
            moves[expert] += LAYER_RATE
        correct(same_token, layer, routes, step, layer - distance, moves)
    write_route(routes, step, layer, ids)
    if run < NEXT_TOKENS:
        return
    old = (now - NEXT_TOKENS) % n_steps
    moves[:] = own[old, layer]
    add_votes(next_token, layer, routes, old, layer, moves)
    for e in range(n_experts):
        moves[e] = -TOKEN_RATE * chance_of(moves[e])
    for later in range(now - NEXT_TOKENS + 1, now + 1):
        for i in range(MAX_ACTIVE):
            expert = routes[later % n_steps, layer, i]
            if expert < 0:
                break
            moves[expert] += TOKEN_RATE / NEXT_TOKENS
    correct(next_token, layer, routes, old, layer, moves)


@compiled
def expect_use(
    layer: int, now: int, seen: float, even: float, rates: Floats, routes: Ids, own: Singles, odds: Singles,
    next_token: Singles, voting: bool,
) -> None:  # fmt: skip
    """odds float32[L, E] of a layer: log-odds of the mean use over its next tokens. ``voting``: routes are known."""
    step, n_experts = now % routes.shape[0], odds.shape[1]
    votes = np.zeros(n_experts, np.float32)
    if voting:
        add_votes(next_token, layer, routes, step, layer, votes)
    for e in range(n_experts):
        in_sequence = (rates[USES, e] + SEQUENCE_TRUST * even) / (seen + SEQUENCE_TRUST)
        own[step, layer, e] = (
            OWN_USE[0] * log_odds(rates[FAST, e])
            + OWN_USE[1] * log_odds(rates[SLOW, e])
            + OWN_USE[2] * log_odds(in_sequence)
        )
        odds[layer, e] = own[step, layer, e] + VOTE_SHARE * votes[e]


@compiled
def observe_use(
    layer: int, ids: Ids, n_tokens: Ids, n_total: int, now: int, run: int, distance: int, seen: float, even: float,
    few: bool, rates: Floats, routes: Ids, own: Singles, odds: Singles, ahead: Singles, next_token: Singles,
    same_token: Singles,
) -> None:  # fmt: skip
    """A layer's routing is known: counts its use, learns if there are ``few`` tokens, forecasts the next ones."""
    count_use(rates, ids, n_tokens, n_total)
    if few:
        learn_layer(layer, ids, now, run, distance, routes, own, ahead, next_token, same_token)
    expect_use(layer, now, seen, even, rates, routes, own, odds, next_token, few)


@compiled
def foretell(
    layer: int, target: int, now: int, routes: Ids, odds: Singles, same_token: Singles, ahead: Singles
) -> None:
    """ahead float32[L, E] of layer ``target``: log-odds that the running step uses its experts, told at ``layer``."""
    row = ahead[target]
    for e in range(row.size):
        row[e] = AHEAD[0] * odds[target, e] + AHEAD[1]
    add_votes(same_token, target, routes, now % routes.shape[0], layer, row)


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


class UseModel:
    """State of one model: ``odds`` float32[L, E] for the next tokens, ``ahead`` float32[L, E] for the running one.

    ``distance``: layers from where a forecast is made to where it is for. ``next_token``, ``same_token``: what was
    learnt (``affinity``). ``now``: number of the step, ``run``: steps of few tokens of this sequence without a break.
    ``seen``, ``even`` float64[L]: tokens of the sequence, and an expert's even chance (0: nothing was active yet).
    """

    def __init__(self, n_layers: int, n_experts: int, distance: int) -> None:
        self.n_layers, self.n_experts, self.distance = n_layers, n_experts, distance
        self.rates = np.zeros((n_layers, 3, n_experts))
        self.seen, self.even = np.zeros(n_layers), np.zeros(n_layers)
        self._shares: Floats | None = None
        self.routes = no_routes(NEXT_TOKENS + 1, n_layers)
        self.own = np.zeros((NEXT_TOKENS + 1, n_layers, n_experts), np.float32)
        self.odds = np.zeros((n_layers, n_experts), np.float32)
        self.ahead = np.zeros((n_layers, n_experts), np.float32)
        self.next_token, self.same_token = (no_weights(n_layers, n_experts) for _ in range(2))
        self.now, self.run = 0, 0
        self.foretold = np.zeros(n_layers, np.int64)

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
            layer, demand.expert_ids, demand.n_tokens, demand.n_tokens_total, now, run, distance, seen, even, few,
            self.rates[layer], self.routes, self.own, self.odds, self.ahead, self.next_token, self.same_token,
        )  # fmt: skip
        if target >= 0:
            foretell(layer, target, now, self.routes, self.odds, self.same_token, self.ahead)
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
