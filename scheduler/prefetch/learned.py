"""Prefetch policy ``learned``: a scorer trained on recorded traces gives the next layer's routing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.demand import Demand
from scheduler.prefetch.base import NOTHING, PrefetchPolicy, Proposals
from scheduler.setting import Setting, number

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
PREFETCH_FEATURES = ("follows", "recent_frequency", "last_step", "gate_prediction")
RECENT_WEIGHT = 0.1
COUNT_DECAY = 0.995
PRIOR_TRUST = 2.0


class LearnedPrefetch(PrefetchPolicy):
    """Scores every expert of the next layer and proposes those with probability >= ``threshold``.

    Features (PREFETCH_FEATURES, in [0, 1]): mean P(expert | this layer's active experts) from running counts; moving
    mean of use; used in the layer's previous step; gate probability predicted for it (0 without predictions). The
    planner's ``prefetch_scorer`` maps float32[n, 4] to probabilities float32[n]; default ``default_scorer``.
    """

    def __init__(self, setting: Setting, threshold: float = 0.6) -> None:
        super().__init__(setting)
        self.threshold = number("learned", "threshold", threshold, 0.0, 1.0)
        self.scorer = setting.prefetch_scorer or default_scorer
        n_layers, n_experts = setting.n_layers, setting.n_experts
        self.counts = np.zeros((n_layers, n_experts, n_experts + 1), np.float32)
        self.recent = np.zeros((n_layers, n_experts))
        self.last = np.zeros((n_layers, n_experts), np.float32)
        self.previous: Demand | None = None

    @property
    def layers_ahead(self) -> int:
        return min(1, self.setting.lookahead)

    def begin_sequence(self) -> None:
        self.previous = None
        self.last[:] = 0.0

    def observe(self, demand: Demand) -> None:
        before = self.previous
        if before is not None and before.layer + 1 == demand.layer:
            count_transitions(self.counts[before.layer], before.expert_ids, demand.expert_ids, COUNT_DECAY)
        self.previous = demand
        self.recent[demand.layer] *= 1.0 - RECENT_WEIGHT
        self.recent[demand.layer, demand.expert_ids] += RECENT_WEIGHT
        self.last[demand.layer] = 0.0
        self.last[demand.layer, demand.expert_ids] = 1.0

    def propose(self, demand: Demand, limit: int) -> Proposals:
        layer = demand.layer + 1
        if layer >= self.setting.n_layers:
            return NOTHING
        absent = np.flatnonzero(self.absent(layer, np.arange(self.setting.n_experts)))
        chances = np.asarray(self.scorer(self.features(demand)[absent]), np.float64)
        order = np.argsort(-chances, kind="stable")[:limit]
        order = order[chances[order] >= self.threshold]
        if not order.size:
            return NOTHING
        return layer * self.setting.n_experts + absent[order], chances[order] * self.saving_us(layer)

    def features(self, demand: Demand) -> npt.NDArray[np.float32]:
        """float32[n_experts, 4] of the next layer's experts, columns as PREFETCH_FEATURES."""
        layer = demand.layer + 1
        gate = np.zeros(self.setting.n_experts, np.float32)
        for prediction in demand.predictions:
            if prediction.layer == layer:
                gate[prediction.expert_ids] = prediction.scores
        follows = follow(self.counts[demand.layer], demand.expert_ids, self.recent[layer], PRIOR_TRUST)
        return np.stack((follows, self.recent[layer], self.last[layer], gate), axis=1).astype(np.float32)


def default_scorer(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logit of use; the weights are set by hand, not trained (`hybrimoe trace train` makes a trained scorer)."""
    logits = features @ np.array([6.0, 2.5, 0.5, 6.0], np.float32) - 3.5
    return np.asarray(1.0 / (1.0 + np.exp(-logits)), np.float32)


@compiled
def count_transitions(counts: Floats, sources: Ids, targets: Ids, decay: float) -> None:
    """counts float32[E, E + 1] of one layer pair: row = source; column E = times the source was active.

    The rows of active sources decay by ``decay`` and count the active targets.
    """
    n = counts.shape[1] - 1
    for source in sources:
        for target in range(n + 1):
            counts[source, target] *= decay
        for target in targets:
            counts[source, target] += 1.0
        counts[source, n] += 1.0


@compiled
def follow(counts: Floats, sources: Ids, prior: npt.NDArray[np.float64], trust: float) -> npt.NDArray[np.float64]:
    """float64[E]: mean over active sources of P(target | source), shrunk to ``prior`` by ``trust`` pseudo-counts."""
    n = prior.size
    chance = np.zeros(n)
    for source in sources:
        scale = 1.0 / (counts[source, n] + trust)
        for target in range(n):
            chance[target] += (counts[source, target] + trust * prior[target]) * scale
    for target in range(n):
        chance[target] /= max(sources.size, 1)
    return chance
