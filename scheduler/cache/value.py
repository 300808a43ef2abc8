"""Cache policy ``value`` (ours): one number, the us that an expert's residency is expected to save, decides everything.

Eviction takes the resident with the least of it in the whole pool, admission compares a newcomer with it, and a
prefetch must beat it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy, Scope
from scheduler.compiled import compiled
from scheduler.demand import LayerDemand
from scheduler.setting import Setting, number

Floats = npt.NDArray[np.float64]

FAST, SLOW = 0.15, 0.02
"""Weights of the newest token in the two moving means of use."""


@compiled
def update_rates(
    rates: Floats, keep: Floats, ids: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], n_total: int,
    fast_share: float, saving_us: float,
) -> None:  # fmt: skip
    """rates float64[2, E]: fast and slow moving mean of use; keep float64[E] = saving * mixed rate, in place."""
    total = max(n_total, 1)
    for row in range(2):
        stay = (1.0 - (FAST if row == 0 else SLOW)) ** total
        for e in range(keep.size):
            rates[row, e] *= stay
        for i in range(ids.size):
            rates[row, ids[i]] += (1.0 - stay) * min(n_tokens[i] / total, 1.0)
    for e in range(keep.size):
        keep[e] = saving_us * (fast_share * rates[0, e] + (1.0 - fast_share) * rates[1, e])


class ValueCache(CachePolicy):
    """keep = horizon * (chance of use at the layer's next token) * (cpu_us - accel_us), one pool over all layers.

    The chance mixes a fast and a slow moving mean of use. ``horizon``: tokens over which residency pays.
    """

    scope: Scope = "pool"
    keeps_us = True

    def __init__(self, setting: Setting, fast_share: float = 0.35, horizon: float = 4.0) -> None:
        super().__init__(setting)
        self.fast_share = number("value", "fast_share", fast_share, 0.0, 1.0)
        self.horizon = number("value", "horizon", horizon, 0.0, 1e6)
        self.rates = np.zeros((setting.n_layers, 2, setting.n_experts))

    def saving_us(self, layer: int) -> float:
        """us that one use of a resident saves."""
        costs, kind = self.setting.costs, self.setting.costs.kind[layer]
        cpu, accel = float(costs.cpu_grid[kind, 1]), float(costs.accel_grid[kind, 1])
        return max(cpu * float(costs.drift[0]) - accel * float(costs.drift[1]), 1e-3 * cpu)

    def observe(self, demand: LayerDemand) -> None:
        n = self.setting.n_experts
        keep = self.keep[demand.layer * n : demand.layer * n + n]
        update_rates(
            self.rates[demand.layer], keep, demand.expert_ids, demand.n_tokens, demand.n_tokens_total,
            self.fast_share, self.horizon * self.saving_us(demand.layer),
        )  # fmt: skip

    def warmed(self, frequencies: Floats | None) -> None:
        if frequencies is not None:
            most = np.maximum(frequencies.max(axis=1, keepdims=True), 1e-300)
            self.rates[:] = (frequencies / most)[:, None, :] * 0.5
            for layer in range(self.setting.n_layers):
                self.rows()[layer] = self.horizon * self.saving_us(layer) * self.rates[layer, 1]
