"""Routing predictions for traces: recorded ones, ones learned from other sequences (by their routing, or by hidden
states), and ones of a stated recall.

All have one form: for each token and layer, the experts expected 1..horizon layers ahead, best first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scheduler.traces.hidden import HiddenPredictor
from scheduler.traces.trace import Trace, TraceError

PredictionKind = Literal["auto", "recorded", "transition", "token", "hidden", "residual", "noisy", "none"]
DEFAULT_HORIZON = 3
#: Recall assumed 1, 2 and 3 layers ahead by ``noisy``: about what next-layer gates reach on the current hidden state
#: (Eliseev and Mazur, arXiv 2312.17238, figure 2, report 0.8 to 0.9 one layer ahead for as many guesses as experts).
NOISY_RECALL = (0.85, 0.75, 0.65)
#: Forgetting of the usage average: half of its weight lies on the last ten tokens.
USAGE_DECAY = 0.93
NEWTON_STEPS = 12
RIDGE = 1e-3
FIT_TOKENS = 1500
N_FEATURES = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """ids int16 [tokens, layers, horizon, p] (-1: none), scores float32 of the same shape: probability of use."""

    ids: NDArray[np.int16]
    scores: NDArray[np.float32]
    kind: str

    @property
    def horizon(self) -> int:
        return int(self.ids.shape[2])


def recorded(trace: Trace) -> Predictions:
    """The trace's own predictions; rank r of the best ``top_k`` scores (top_k - r) / sum, further ones are dropped."""
    if trace.predicted_ids is None:
        raise TraceError(f"trace {trace.name!r} has no predicted_ids; use predictions 'transition', 'noisy' or 'none'")
    return _ranked(trace.predicted_ids[..., : trace.top_k], "recorded")


def by_token(trace: Trace, horizon: int = DEFAULT_HORIZON) -> Predictions:
    """What each token was routed to when it was last seen in an earlier step; nothing for one that was not.

    How far the token alone decides its routing, whatever stands before it. Ranks score as in ``recorded``.
    """
    if trace.token_ids is None:
        raise TraceError(
            f"trace {trace.name!r} has no token_ids; record it with `hybrimoe trace record`, or use predictions"
            " 'transition', 'noisy' or 'none'"
        )
    latest: dict[int, int] = {}
    before = np.full(trace.n_tokens, -1)
    for step in trace.steps():
        tokens = trace.token_ids[step.start : step.stop].tolist()
        before[step.start : step.stop] = [latest.get(token, -1) for token in tokens]
        latest.update(zip(tokens, range(step.start, step.stop), strict=True))
    n_tokens, n_layers, top_k = trace.expert_ids.shape
    ids = np.full((n_tokens, n_layers, horizon, top_k), -1, np.int16)
    seen = before >= 0
    for ahead in range(1, min(horizon, n_layers - 1) + 1):
        ids[seen, : n_layers - ahead, ahead - 1] = trace.expert_ids[before[seen], ahead:]
    return _ranked(ids, "token")


def _ranked(ids: NDArray[np.int16], kind: str) -> Predictions:
    """Rank r of p guesses, best first, scores (p - r) / sum."""
    rank = np.arange(ids.shape[-1], 0, -1, dtype=np.float32)
    return Predictions(ids, np.where(ids >= 0, rank / rank.sum(), 0.0).astype(np.float32), kind)


def noisy(
    trace: Trace, recall: tuple[float, ...] = NOISY_RECALL, horizon: int = DEFAULT_HORIZON, seed: int = 0
) -> Predictions:
    """The truth, each expert kept with probability ``recall[h]``, else replaced by one that is not used.

    A stand-in for a gate of known quality, for traces without recorded predictions; it reads the future, so say so.
    """
    rng = np.random.default_rng(seed)
    n_tokens, n_layers, top_k = trace.expert_ids.shape
    ids = np.full((n_tokens, n_layers, horizon, top_k), -1, np.int16)
    scores = np.zeros(ids.shape, np.float32)
    for ahead in range(1, min(horizon, n_layers - 1) + 1):
        chance = recall[min(ahead, len(recall)) - 1]
        truth = trace.expert_ids[:, ahead:]
        wrong = _unused(truth, trace.n_experts, rng)
        kept = rng.random(truth.shape) < chance
        ids[:, : n_layers - ahead, ahead - 1] = np.where(truth < 0, -1, np.where(kept, truth, wrong))
        scores[:, : n_layers - ahead, ahead - 1] = chance / top_k
    return Predictions(ids, scores, "noisy")


def _unused(truth: NDArray[np.int16], n_experts: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Distinct experts outside each row of ``truth`` (last axis), as many as the row has; -1 where there are too
    few."""
    noise = rng.random((*truth.shape[:-1], n_experts), dtype=np.float32)
    np.put_along_axis(noise, np.maximum(truth, 0).astype(np.int64), 2.0, axis=-1)
    order = np.argsort(noise, axis=-1)[..., : truth.shape[-1]]
    fits = np.take_along_axis(noise, order, axis=-1) < 2.0
    return np.where(fits, order, -1).astype(np.int16)


class TransitionPredictor:
    """Logistic regression on what a runtime without gate lookahead can see.

    Features of expert e, ``ahead`` layers on: (1) mean over the experts active now of P(e there | expert here),
    (2) the moving average of e's own use at recent tokens, (3) its frequency, (4) a constant. Counts and weights come
    from :meth:`fit`; nothing of the predicted trace's future is read.
    """

    def __init__(self, horizon: int = DEFAULT_HORIZON) -> None:
        self.horizon = horizon
        self._given: list[Floats] = []  # per ahead: [layers, E, E] P(column | row active)
        self._frequency: Floats = np.zeros((0, 0))
        self._weights: list[Floats] = []

    def fit(self, trace: Trace) -> TransitionPredictor:
        """Count transitions of ``trace`` and fit the weights of each distance on its first tokens."""
        active = one_hot(trace)
        self._frequency = active.mean(axis=0)
        for ahead in range(1, min(self.horizon, trace.n_layers - 1) + 1):
            together = np.einsum("tle,tlf->lef", active[:, :-ahead], active[:, ahead:], optimize=True)
            self._given.append(
                (together + 0.5 * self._frequency[ahead:, None]) / (active[:, :-ahead].sum(0)[..., None] + 0.5)
            )
        part = trace.head(FIT_TOKENS)
        usage = usage_average(part)
        shown = active[: part.n_tokens]
        for ahead, _ in enumerate(self._given, start=1):
            features = self._features(shown, usage, ahead).reshape(-1, N_FEATURES)
            self._weights.append(_logistic(features, shown[:, ahead:].reshape(-1)))
        return self

    def predict(self, trace: Trace) -> Predictions:
        """Best ``top_k`` experts for each token, layer and distance with their probabilities."""
        active, usage = one_hot(trace), usage_average(trace)
        n_tokens, n_layers, top_k = trace.expert_ids.shape
        ids = np.full((n_tokens, n_layers, self.horizon, top_k), -1, np.int16)
        scores = np.zeros(ids.shape, np.float32)
        for ahead, weights in enumerate(self._weights, start=1):
            chance = 1.0 / (1.0 + np.exp(-self._features(active, usage, ahead) @ weights))
            best = np.argsort(-chance, axis=-1, kind="stable")[..., :top_k]
            ids[:, : n_layers - ahead, ahead - 1] = best
            scores[:, : n_layers - ahead, ahead - 1] = np.take_along_axis(chance, best, axis=-1)
        return Predictions(ids, scores, "transition")

    def _features(self, active: Floats, usage: Floats, ahead: int) -> Floats:
        """[tokens, layers - ahead, experts, N_FEATURES] in log-odds."""
        width = np.maximum(active[:, :-ahead].sum(-1, keepdims=True), 1.0)
        given = np.einsum("tle,lef->tlf", active[:, :-ahead], self._given[ahead - 1], optimize=True) / width
        frequency = np.broadcast_to(self._frequency[ahead:], given.shape)
        return np.stack([_logit(given), _logit(usage[:, ahead:]), _logit(frequency), np.ones_like(given)], axis=-1)


def one_hot(trace: Trace) -> Floats:
    """float64 [tokens, layers, experts]: 1 where the expert is used."""
    active = np.zeros((trace.n_tokens, trace.n_layers, trace.n_experts + 1))
    np.put_along_axis(active, trace.expert_ids.astype(np.int64), 1.0, axis=-1)  # -1 falls into the extra column
    return active[..., :-1]


def usage_average(trace: Trace) -> Floats:
    """Decayed average of each expert's use at the tokens BEFORE each token of its sequence, [tokens, layers,
    experts]."""
    active = one_hot(trace)
    average = np.empty_like(active)
    for start, stop in trace.sequence_spans():
        state = np.full(active.shape[1:], trace.top_k / trace.n_experts)
        for token in range(start, stop):
            average[token] = state
            state = USAGE_DECAY * state + (1.0 - USAGE_DECAY) * active[token]
    return average


def _logit(chance: Floats) -> Floats:
    bounded = np.clip(chance, 1e-4, 1.0 - 1e-4)
    return np.asarray(np.log(bounded / (1.0 - bounded)))


def _logistic(features: Floats, target: Floats) -> Floats:
    """Weights of a ridge logistic regression by Newton's method."""
    weights = np.zeros(features.shape[1])
    for _ in range(NEWTON_STEPS):
        chance = 1.0 / (1.0 + np.exp(-features @ weights))
        gradient = features.T @ (target - chance) - RIDGE * weights
        hessian = (features * (chance * (1.0 - chance))[:, None]).T @ features + RIDGE * np.eye(features.shape[1])
        weights = weights + np.linalg.solve(hessian, gradient)
    return weights


def predictions_for(
    trace: Trace, kind: PredictionKind = "auto", calibration: Trace | None = None, seed: int = 0
) -> Predictions | None:
    """Predictions of a kind. ``auto``: recorded where the trace has them, else transition where it can be fitted."""
    if kind == "none" or trace.n_layers < 2:
        return None
    if kind == "recorded" or (kind == "auto" and trace.predicted_ids is not None):
        return recorded(trace)
    if kind == "token":
        return by_token(trace)
    if kind == "noisy":
        return noisy(trace, seed=seed)
    if kind == "hidden" or kind == "residual":
        learned = HiddenPredictor(kind, DEFAULT_HORIZON).fit(trace if calibration is None else calibration)
        return Predictions(*learned.predict(trace), kind)
    return TransitionPredictor().fit(trace if calibration is None else calibration).predict(trace)
