"""Cache policy ``activation_matrix`` (MoE-Infinity)."""

from __future__ import annotations

import numpy as np

from scheduler.cache.base import CachePolicy, Scope
from scheduler.demand import Demand
from scheduler.forecast.activation_matrix import EPSILON, ActivationMatrices
from scheduler.setting import Setting


class ActivationMatrixCache(CachePolicy):
    """MoE-Infinity (arXiv 2401.14361, section 6), one pool: evict the lowest (p + 1e-8) * (1 - l / L).

    p = the expert's share of its layer's row in the running sequence's activation matrix, l its layer.
    """

    scope: Scope = "pool"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.matrices = ActivationMatrices(setting.n_layers, setting.n_experts, capacity=1)
        self.nearness = 1.0 - np.arange(setting.n_layers) / setting.n_layers
        self.rows()[:] = EPSILON * self.nearness[:, None]

    def begin_sequence(self) -> None:
        self.matrices.begin_sequence()

    def observe(self, demand: Demand) -> None:
        self.matrices.add(demand)
        row = self.matrices.current[demand.layer]
        self.rows()[demand.layer] = (row / max(row.sum(), 1e-300) + EPSILON) * self.nearness[demand.layer]
