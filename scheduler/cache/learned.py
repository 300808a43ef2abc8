"""Cache policy ``learned``: a scorer trained on recorded traces says how soon an expert is needed (FlashMoE)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy
from scheduler.demand import Demand
from scheduler.setting import Setting

CACHE_FEATURES = ("inverse_age", "frequency", "recent_frequency", "last_score")
RECENT_WEIGHT = 0.1


class Learned(CachePolicy):
    """keep = scorer(features of the expert), per layer, refreshed for a layer when its routing is known.

    Features (CACHE_FEATURES, all in [0, 1]): 1 / (steps since the last use + 1); uses / most uses in the layer;
    moving mean of use (weight 0.1); gate score at the last use. The planner's ``scorer`` maps float32[n, 4] to
    float32[n] (`hybrimoe trace train` makes one); without it ``default_scorer``, weights set by hand, is used.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.scorer = setting.scorer or default_scorer
        self.age = np.full((setting.n_layers, setting.n_experts), 1e6, np.float32)
        self.uses, self.recent, self.last_score = (np.zeros_like(self.age) for _ in range(3))

    def observe(self, demand: Demand) -> None:
        layer, ids = demand.layer, demand.expert_ids
        self.age[layer] += 1.0
        self.age[layer, ids] = 0.0
        self.uses[layer, ids] += 1.0
        self.recent[layer] *= 1.0 - RECENT_WEIGHT
        self.recent[layer, ids] += RECENT_WEIGHT
        self.last_score[layer, ids] = demand.gate_scores[ids]
        scores = np.asarray(self.scorer(self.features(layer)), np.float64)
        self.rows()[layer] = np.where(np.isfinite(scores), scores, 0.0)

    def features(self, layer: int) -> npt.NDArray[np.float32]:
        """float32[n_experts, 4], columns as CACHE_FEATURES."""
        most = max(float(self.uses[layer].max()), 1.0)
        columns = (1.0 / (self.age[layer] + 1.0), self.uses[layer] / most, self.recent[layer], self.last_score[layer])
        return np.stack(columns, axis=1)


def default_scorer(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logit of use at the next step; the weights are set by hand, not trained."""
    return np.asarray(features @ np.array([0.6, 1.0, 4.0, 0.8], np.float32), np.float32)
