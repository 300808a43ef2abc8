"""What ``value`` (ours) believes in us: what each expert's residency saves, and which absent ones are worth bringing.

Chances come from ``use_model``. How far a forecast (or a gate's prediction) of an ABSENT expert can be trusted is
measured: the share of such forecasts that came true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, CPU
from scheduler.compiled import compiled
from scheduler.demand import Demand
from scheduler.forecast.affinity import MAX_ACTIVE
from scheduler.forecast.residency import Residency
from scheduler.forecast.use_model import FEW_TOKENS, NEXT_TOKENS, UseModel, chance_of, foretell, observe_use
from scheduler.setting import Setting

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

BIN_EDGES = (0.02, 0.08, 0.2, 0.35, 0.5, 0.7, 0.85)
"""Forecasts and gate scores are put into 8 x 8 bins by these edges."""
N_BINS: Final = 8
BIN_TRUST, BIN_DECAY = 6.0, 0.995
"""Pseudo-observations by which a layer's bin is shrunk to that of all layers; forgetting at each observation."""
CANDIDATES: Final = 8
"""Absent experts of a layer ahead that are listed and whose fate is watched."""
MAX_SURE: Final = 16
"""Most absent experts that are offered for prefetching at once."""


@compiled
def cell(forecast: float, score: float) -> int:
    """Bin of a forecast and a gate score (0: no gate prediction)."""
    row, column = 0, 0
    for edge in BIN_EDGES:
        row += forecast >= edge
        column += score >= edge
    return row * N_BINS + column


@compiled
def calibrated(own: Floats, shared: Floats, forecast: float, score: float) -> float:
    """Measured chance of such a forecast of an absent expert; before any observation half its own claim."""
    at = cell(forecast, score)
    claim = 0.5 * max(forecast, min(score, 1.0))
    prior = (shared[1, at] + BIN_TRUST * claim) / (shared[0, at] + BIN_TRUST)
    return float((own[1, at] + BIN_TRUST * prior) / (own[0, at] + BIN_TRUST))


@compiled
def learn_fate(own: Floats, shared: Floats, cells: Ints, experts: Ints, ids: Ids) -> None:
    """own, shared float64[2, 64]: decayed counts of forecasts and of those that came true, by bin."""
    for i in range(cells.size):
        came = 0.0
        for expert in ids:
            if expert == experts[i]:
                came = 1.0
        at = cells[i]
        for table in (own, shared):
            table[0, at] = table[0, at] * BIN_DECAY + 1.0
            table[1, at] = table[1, at] * BIN_DECAY + came


@compiled
def sure_absent(
    layer: int, last: int, certainty: float, n_listed: Ints, listed: Ints, expected: Floats, slot_of: Ints,
    n_experts: int, keys: Ints, chances: Floats,
) -> int:  # fmt: skip
    """Absent listed experts of the layers after ``layer`` up to ``last`` whose chance is at least ``certainty``.

    Writes their keys and chances, nearest layer first, likeliest first within it, and returns how many.
    """
    n = 0
    for target in range(layer + 1, last + 1):
        for i in range(n_listed[target]):
            key = target * n_experts + listed[target, i]
            if expected[target, i] < certainty or n == keys.size:
                break
            if slot_of[key] < 0:
                keys[n], chances[n] = key, expected[target, i]
                n += 1
    return n


@compiled
def keep_by_use(
    keep: Floats, first_key: int, odds: Singles, far: Singles, layer: int, horizon: float, saving_us: float
) -> None:
    """keep float64[L * E] of a layer: uses within ``horizon`` tokens, by the forecasts of near and far ones."""
    n_near, n_far = min(horizon, NEXT_TOKENS), max(horizon - NEXT_TOKENS, 0.0)
    for e in range(odds.shape[1]):
        keep[first_key + e] = saving_us * (n_near * chance_of(odds[layer, e]) + n_far * chance_of(far[layer, e]))


@compiled
def rank_absent(
    keep: Floats, layer: int, told: Singles, saving_us: float, slot_of: Ints, given: Ids, scores: Singles,
    own_bins: Floats, shared: Floats, listed: Ints, bins: Ints, expected: Floats,
) -> int:  # fmt: skip
    """A layer ahead: its residents are worth at least what they will save now, absent ones are listed.

    ``given``, ``scores``: the gate's prediction, empty if there is none. Writes up to CANDIDATES absent experts, their
    bins and calibrated chances, likeliest first (ties: lower id), and returns how many.
    """
    ahead, own, experts, cells, chances = told[layer], own_bins[layer], listed[layer], bins[layer], expected[layer]
    first_key = layer * ahead.size
    gate = np.zeros(ahead.size)
    for i in range(given.size):
        gate[given[i]] = min(scores[i], 1.0)
    n = 0
    for e in range(ahead.size):
        forecast = chance_of(ahead[e])
        if slot_of[first_key + e] >= 0:
            keep[first_key + e] = max(keep[first_key + e], saving_us * max(forecast, gate[e]))
            continue
        chance = calibrated(own, shared, forecast, gate[e])
        i = n
        while i > 0 and chances[i - 1] < chance:
            if i < CANDIDATES:
                experts[i], cells[i], chances[i] = experts[i - 1], cells[i - 1], chances[i - 1]
            i -= 1
        if i < CANDIDATES:
            experts[i], cells[i], chances[i] = e, cell(forecast, gate[e]), chance
            n = min(n + 1, CANDIDATES)
    return n


@compiled
def saving_us(cpu: Floats, accel: Floats, kind: int, drift: Floats) -> float:
    """us that one use of a resident saves for one token; ``cpu``, ``accel``: the cost model's grids [kinds, tokens]."""
    cpu_us, accel_us = cpu[kind, 1] * drift[CPU], accel[kind, 1] * drift[ACCEL]
    return float(max(cpu_us - accel_us, 1e-3 * cpu_us))


@compiled
def follow_layer(
    layer: int, target: int, ids: Ids, n_tokens: Ids, gate_scores: Singles, n_total: int, now: int, run: int,
    distance: int, seen: float, even: float, few: bool, horizon: float, cpu: Floats, accel: Floats, kind: Ints,
    drift: Floats, slot_of: Ints, given: Ids, scores: Singles, keep: Floats, rates: Floats, routes: Ids, gates: Singles,
    own_odds: Singles, blends: Floats, odds: Singles, far: Singles, ahead: Singles, next_token: Singles,
    same_token: Singles, own: Floats, shared: Floats, n_listed: Ints, listed: Ints, cells: Ints, chances: Floats,
) -> None:  # fmt: skip
    """A layer's routing is known: learns from it (``observe_use``), judges what was listed for it, scores its experts.

    Then forecasts layer ``target`` (-1: none) and lists what that will miss; ``given``, ``scores``: the gate's
    prediction for it.
    """
    observe_use(
        layer, ids, n_tokens, gate_scores, n_total, now, run, distance, seen, even, few, rates, routes, gates, own_odds,
        blends[layer], odds, far, ahead, next_token, same_token,
    )  # fmt: skip
    n = n_listed[layer]
    if n > 0:
        learn_fate(own[layer], shared, cells[layer, :n], listed[layer, :n], ids)
        n_listed[layer] = 0
    n_experts = odds.shape[1]
    keep_by_use(keep, layer * n_experts, odds, far, layer, horizon, saving_us(cpu, accel, kind[layer], drift))
    if target >= 0:
        foretell(layer, target, now, routes, gates, blends[target], odds, same_token, ahead)
        n_listed[target] = rank_absent(
            keep, target, ahead, saving_us(cpu, accel, kind[target], drift), slot_of, given, scores, own, shared,
            listed, cells, chances,
        )  # fmt: skip


class ValueModel:
    """The forecast of one planner, which tells it of every demand once, before cache and prefetch policies are asked.

    keep float64[n_layers * n_experts]: us saved by residency. ``distance``: layers from a forecast to what it is for,
    as many as pass while a transfer runs, at most the setting's lookahead.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.residency = setting, Residency(setting.slots.n_slots)
        n_layers = setting.n_layers
        self.distance = _layers_of_a_transfer(setting)
        self.use = UseModel(n_layers, setting.n_experts, self.distance)
        self.keep = np.zeros(setting.n_keys)
        self.own, self.shared = np.zeros((n_layers, 2, N_BINS * N_BINS)), np.zeros((2, N_BINS * N_BINS))
        self.listed, self.cells = (np.zeros((n_layers, CANDIDATES), np.int64) for _ in range(2))
        self.chances, self.n_listed = np.zeros((n_layers, CANDIDATES)), np.zeros(n_layers, np.int64)
        self.sure_keys, self.sure_chances = np.zeros(MAX_SURE, np.int64), np.zeros(MAX_SURE)
        self.last_layer = n_layers
        """Where the latest demand was from: one that is not from a later layer begins a step."""
        self.few = True
        """Whether the latest demand had so few tokens that it says who follows whom."""
        self._no_ids, self._no_scores = np.empty(0, np.int32), np.empty(0, np.float32)

    @classmethod
    def of(cls, setting: Setting) -> ValueModel:
        """The setting's forecast, made on first use."""
        if not isinstance(setting.forecast, cls):
            setting.forecast = cls(setting)
        return setting.forecast

    def saving_us(self, layer: int) -> float:
        """us that one use of a resident saves for one token."""
        costs = self.setting.costs
        return saving_us(costs.cpu_grid, costs.accel_grid, int(costs.kind[layer]), costs.drift)

    def savings_us(self) -> Floats:
        """float64[n_layers]: ``saving_us`` of each."""
        costs = self.setting.costs
        return np.array([saving_us(costs.cpu_grid, costs.accel_grid, k, costs.drift) for k in costs.kind.tolist()])

    def begin_sequence(self) -> None:
        """What was active last no longer precedes what comes."""
        self.last_layer = self.setting.n_layers
        self.n_listed[:] = 0
        self.use.begin_sequence()

    def warmed(self, frequencies: Floats | None) -> None:
        """Known use before the first step."""
        if frequencies is None:
            return
        shares = frequencies / np.maximum(frequencies.sum(axis=1, keepdims=True), 1e-300)
        self.use.warmed(shares)
        rows = self.keep.reshape(self.setting.n_layers, -1)
        for layer in range(self.setting.n_layers):
            rows[layer] = self.saving_us(layer) * shares[layer]

    def study(self, demands: Sequence[Demand], begins: bool) -> None:
        """One step of an earlier sequence, the demands of all layers: who follows whom is learnt, nothing else.

        ``begins``: it is the sequence's first.
        """
        if begins:
            self.use.begin_sequence()
        for demand in demands:
            few = _is_few(demand)
            if demand is demands[0]:
                self.use.begin_step(few)
            self.use.observe(demand, few)

    def arrive(self, demand: Demand) -> bool:
        """A layer's routing is about to be followed: it may begin a step. Returns whether a step has so few tokens that
        it says who follows whom."""
        few = _is_few(demand)
        if few:
            self.arrive_few(demand.layer)
        elif self.last_layer >= demand.layer:
            self._begin_step(few)
            self._protect_later_layers(demand)
        self.few, self.last_layer = few, demand.layer
        return few

    def arrive_few(self, layer: int) -> None:
        """``arrive`` of a layer's routing of few tokens that has at least one active expert."""
        if self.last_layer >= layer:
            self._begin_step(True)
        self.few, self.last_layer = True, layer

    def follow(self, demand: Demand) -> None:
        """Learns from a layer's routing and looks at the next one. Arrays as Demand says (int32, contiguous)."""
        layer, setting, costs, few = demand.layer, self.setting, self.setting.costs, self.few
        use = self.use
        now, run, distance, seen, even, target = use.turn(demand, few)
        given, scores = self._no_ids, self._no_scores
        for prediction in demand.predictions:
            if prediction.layer == target:
                given, scores = prediction.expert_ids, prediction.scores
        follow_layer(
            layer, target, demand.expert_ids, demand.n_tokens, demand.gate_scores, demand.n_tokens_total, now, run,
            distance, seen, even, few, self.residency.horizon, costs.cpu_grid, costs.accel_grid, costs.kind,
            costs.drift, setting.slots.slot_of, given, scores, self.keep, use.rates[layer], use.routes, use.gates,
            use.own, use.blends, use.odds, use.far, use.ahead, use.next_token, use.same_token, self.own, self.shared,
            self.n_listed, self.listed, self.cells, self.chances,
        )  # fmt: skip

    def observe(self, demand: Demand) -> None:
        """``arrive`` and ``follow``."""
        self.arrive(demand)
        self.follow(demand)

    def sure(self, layer: int, certainty: float) -> tuple[Ints, Floats]:
        """(keys, chances) of absent experts of the layers after ``layer`` with a chance of at least ``certainty``."""
        last = min(layer + self.distance, self.setting.n_layers - 1)
        n = sure_absent(
            layer, last, certainty, self.n_listed, self.listed, self.chances, self.setting.slots.slot_of,
            self.setting.n_experts, self.sure_keys, self.sure_chances,
        )  # fmt: skip
        return self.sure_keys[:n], self.sure_chances[:n]

    def loads(self, layer: int, demand: Demand) -> Floats:
        """float64[E]: tokens that each expert of a layer will get from the tokens of ``demand`` (a prefill's).

        The gates' prediction where there is one, else its rate of use, halfway to all experts alike.
        """
        for prediction in demand.predictions:
            if prediction.layer == layer:
                named = np.zeros(self.setting.n_experts)
                named[prediction.expert_ids] = prediction.n_tokens
                return named
        activations = float(demand.n_tokens.sum())
        even = activations / self.setting.n_experts
        known = self.use.loads(layer)
        total = float(known.sum())
        return even + 0.5 * (known * (activations / total) - even) if total > 0.0 else np.full(known.size, even)

    def load_saving_us(self, layer: int, loads: Floats) -> Floats:
        """us that each resident of a layer saves with so many tokens; what gets none saves nothing."""
        n_tokens, costs = np.ceil(loads).astype(np.int64), self.setting.costs
        return np.asarray(np.maximum(costs.cpu_us(layer, n_tokens) - costs.accel_us(layer, n_tokens), 0.0))

    def _begin_step(self, few: bool) -> None:
        self.residency.begin_step(self.setting.slots.n_slots, few)
        self.use.begin_step(few)

    def _protect_later_layers(self, demand: Demand) -> None:
        """A prefill will use nearly every expert of the layers ahead: they are worth that much until it is their turn.

        What makes room are the layers behind, whose turn comes last.
        """
        rows = self.keep.reshape(self.setting.n_layers, -1)
        for layer in range(demand.layer + 1, self.setting.n_layers):
            rows[layer] += self.load_saving_us(layer, self.loads(layer, demand))


def _is_few(demand: Demand) -> bool:
    """Whether a demand has so few tokens and experts that it says who follows whom."""
    return demand.n_tokens_total <= FEW_TOKENS and demand.expert_ids.size <= MAX_ACTIVE


def _layers_of_a_transfer(setting: Setting) -> int:
    """Layers that pass while one expert is transferred, if each computes one on the CPU: 1 to the lookahead."""
    costs = setting.costs
    layer_us = costs.dense_us + costs.one_token_us(0)[0]
    passing = math.ceil(costs.transfer_us(0, cpu_busy=True) / layer_us) if layer_us > 0.0 else 1
    return max(min(passing, setting.lookahead, setting.n_layers - 1), 1)
