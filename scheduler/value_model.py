"""What ``value`` (ours) believes: each expert's chance of use at its layer's next token, and at the layer that is next.

One compiled call a layer. Learnt while running, nothing is trained ahead: moving means of use, which experts of the
next layer follow which of this one, and how far such a forecast (or a gate's prediction) of an ABSENT expert can be
trusted, measured as the share of such forecasts that came true.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.demand import LayerDemand
from scheduler.residency import MIX, WEIGHTS, Residency
from scheduler.setting import Setting
from scheduler.transitions import count_transitions, follow

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

FORECAST = (1.42, 0.38, 1.10)
"""Logistic weights of follow chance, rate of use (both as log-odds) and a constant (gpt-oss-20b, tuning half)."""
COUNT_DECAY, PRIOR_TRUST = 0.998, 8.0
BIN_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Forecasts and gate scores are put into 8 x 8 bins by these edges."""
N_BINS: Final = 8
BIN_TRUST, BIN_DECAY = 6.0, 0.995
"""Pseudo-observations by which a layer's bin is shrunk to that of all layers; forgetting at each observation."""
CANDIDATES: Final = 8
"""Absent experts of the next layer that are proposed and whose fate is watched."""
FOLLOW_TOKENS: Final = 4
"""Above so many tokens a step (prefill) the union of experts says nothing about who follows whom."""


@compiled
def update_rates(
    rates: Floats, keep: Floats, ids: Ids, n_tokens: Ids, n_total: int, saving_us: float, factors: Floats
) -> None:
    """One layer's routing arrives, in place.

    rates float64[3, E]: fast, slow and very slow moving mean of use; keep float64[E] = saving_us * uses to come.
    """
    total = max(n_total, 1)
    for row in range(3):
        stay = (1.0 - WEIGHTS[row]) ** total
        for e in range(keep.size):
            rates[row, e] *= stay
        for i in range(ids.size):
            rates[row, ids[i]] += (1.0 - stay) * min(n_tokens[i] / total, 1.0)
    for e in range(keep.size):
        keep[e] = saving_us * uses_to_come(rates, e, factors)


@compiled
def chance_of_use(rates: Floats, expert: int) -> float:
    """Chance that an expert is used by its layer's next token."""
    return float(MIX[0] * rates[0, expert] + MIX[1] * rates[1, expert] + MIX[2] * rates[2, expert])


@compiled
def uses_to_come(rates: Floats, expert: int, factors: Floats) -> float:
    """Uses expected while an expert's residency pays (``residency``)."""
    return float(factors[0] * rates[0, expert] + factors[1] * rates[1, expert] + factors[2] * rates[2, expert])


@compiled
def log_odds(chance: float) -> float:
    """Log-odds, chances kept within 0.001..0.999."""
    bounded = min(max(chance, 1e-3), 1.0 - 1e-3)
    return float(np.log(bounded / (1.0 - bounded)))


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
def look_ahead(
    ids: Ids, counts: npt.NDArray[np.float32], rates: Floats, keep: Floats, saving_us: float, factors: Floats,
    slots: Ints, given: Ids, scores: npt.NDArray[np.float32], own: Floats, shared: Floats, experts: Ints, cells: Ints,
    chances: Floats,
) -> int:  # fmt: skip
    """Forecast of the next layer: its residents' keep rises by what they will save now, absent ones are listed.

    ``given``, ``scores``: the gate's prediction, empty if there is none. Writes up to CANDIDATES absent experts, their
    bins and calibrated chances, likeliest first (ties: lower id), and returns how many.
    """
    n_experts = slots.size
    prior = np.empty(n_experts)
    gate = np.zeros(n_experts)
    for i in range(given.size):
        gate[given[i]] = scores[i]
    for e in range(n_experts):
        prior[e] = chance_of_use(rates, e)
    following = follow(counts, ids, prior, PRIOR_TRUST)
    n = 0
    for e in range(n_experts):
        odds = FORECAST[0] * log_odds(following[e]) + FORECAST[1] * log_odds(prior[e]) + FORECAST[2]
        forecast = 1.0 / (1.0 + np.exp(-odds))
        if slots[e] >= 0:
            keep[e] = saving_us * (uses_to_come(rates, e, factors) + max(forecast, min(gate[e], 1.0)))
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


class ValueModel:
    """State of one planner; ``observe`` may be called by cache and prefetch policy for the same demand.

    keep float64[n_layers * n_experts]: us saved by residency; candidates of the next layer: ``experts``, ``chances``
    [: n_candidates] of layer ``ahead``.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.residency = setting, Residency(setting.slots.n_slots)
        n_layers, n_experts = setting.n_layers, setting.n_experts
        self.keep = np.zeros(setting.n_keys)
        self.rates = np.zeros((n_layers, 3, n_experts))
        self._shares = np.zeros(n_layers, np.bool_)
        self.counts = np.zeros((n_layers, n_experts, n_experts + 1), np.float32)
        self.own, self.shared = np.zeros((n_layers, 2, N_BINS * N_BINS)), np.zeros((2, N_BINS * N_BINS))
        self.experts, self.cells = np.zeros(CANDIDATES, np.int64), np.zeros(CANDIDATES, np.int64)
        self.chances = np.zeros(CANDIDATES)
        self.n_candidates, self.ahead = 0, -1
        self._seen: LayerDemand | None = None
        self._no_ids, self._no_scores = np.empty(0, np.int32), np.empty(0, np.float32)

    @classmethod
    def of(cls, setting: Setting) -> ValueModel:
        """The setting's model, made on first use."""
        if not isinstance(setting.value, cls):
            setting.value = cls(setting)
        return setting.value

    def saving_us(self, layer: int) -> float:
        """us that one use of a resident saves for one token."""
        costs = self.setting.costs
        cpu, accel = costs.one_token_us(layer)
        return max(cpu - accel, 1e-3 * cpu)

    def begin_sequence(self) -> None:
        """What was active last no longer precedes what comes."""
        self._seen, self.n_candidates, self.ahead = None, 0, -1

    def warmed(self, frequencies: Floats | None) -> None:
        """Known use before the first step."""
        if frequencies is None:
            return
        shares = frequencies / np.maximum(frequencies.sum(axis=1, keepdims=True), 1e-300)
        self.rates[:, 1:] = shares[:, None]
        self._shares[:] = True
        rows = self.keep.reshape(self.setting.n_layers, -1)
        for layer in range(self.setting.n_layers):
            rows[layer] = self.saving_us(layer) * shares[layer]

    def observe(self, demand: LayerDemand) -> None:
        """Learns from a layer's routing and looks at the next one. Arrays as LayerDemand says (int32, contiguous)."""
        before = self._seen
        if before is demand:
            return
        self._seen = demand
        layer, ids, n = demand.layer, demand.expert_ids, self.setting.n_experts
        if self.n_candidates and self.ahead == layer:
            m = self.n_candidates
            learn_fate(self.own[layer], self.shared, self.cells[:m], self.experts[:m], ids)
        few = demand.n_tokens_total <= FOLLOW_TOKENS
        if before is None or before.layer >= layer:
            self.residency.begin_step(self.setting.slots.n_slots, few)
            if not few:
                self._protect_later_layers(demand)
        if few and before is not None and before.layer + 1 == layer:
            count_transitions(self.counts[before.layer], before.expert_ids, ids, COUNT_DECAY)
        keep = self.keep[layer * n : layer * n + n]
        if self._shares[layer]:
            self._to_rates(demand)
        update_rates(
            self.rates[layer], keep, ids, demand.n_tokens, demand.n_tokens_total, self.saving_us(layer),
            self.residency.factors,
        )  # fmt: skip
        self.n_candidates = 0
        if few and layer + 1 < self.setting.n_layers:
            self._look(demand, layer + 1)

    def loads(self, layer: int, demand: LayerDemand) -> Floats:
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
        known = np.array(MIX) @ self.rates[layer]
        total = float(known.sum())
        return even + 0.5 * (known * (activations / total) - even) if total > 0.0 else np.full(known.size, even)

    def load_saving_us(self, layer: int, loads: Floats) -> Floats:
        """us that each resident of a layer saves with so many tokens; what gets none saves nothing."""
        n_tokens, costs = np.ceil(loads).astype(np.int64), self.setting.costs
        return np.asarray(np.maximum(costs.cpu_us(layer, n_tokens) - costs.accel_us(layer, n_tokens), 0.0))

    def _protect_later_layers(self, demand: LayerDemand) -> None:
        """A prefill will use nearly every expert of the layers ahead: they are worth that much until it is their turn.

        What makes room are the layers behind, whose turn comes last.
        """
        rows = self.keep.reshape(self.setting.n_layers, -1)
        for layer in range(demand.layer + 1, self.setting.n_layers):
            rows[layer] += self.load_saving_us(layer, self.loads(layer, demand))

    def _to_rates(self, demand: LayerDemand) -> None:
        """Known shares of use become rates by the experts a token that are seen now."""
        per_token = float(demand.n_tokens.sum()) / max(demand.n_tokens_total, 1)
        np.minimum(self.rates[demand.layer] * per_token, 1.0, out=self.rates[demand.layer])
        self._shares[demand.layer] = False

    def _look(self, demand: LayerDemand, layer: int) -> None:
        n, given, scores = self.setting.n_experts, self._no_ids, self._no_scores
        for prediction in demand.predictions:
            if prediction.layer == layer:
                given, scores = prediction.expert_ids, prediction.scores
        saving, slot_of = self.saving_us(layer), self.setting.slots.slot_of
        part = slice(layer * n, layer * n + n)
        self.ahead = layer
        self.n_candidates = look_ahead(
            demand.expert_ids, self.counts[layer - 1], self.rates[layer], self.keep[part], saving,
            self.residency.factors, slot_of[part], given, scores, self.own[layer], self.shared, self.experts,
            self.cells, self.chances,
        )  # fmt: skip
