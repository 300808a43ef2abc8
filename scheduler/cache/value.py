"""Cache policy ``value`` (ours): one number decides everything, the us that an expert's residency should save."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy, Scope
from scheduler.demand import LayerDemand
from scheduler.residency import LIFETIME_SHARE
from scheduler.setting import Setting, number
from scheduler.value_model import ValueModel

WORTHLESS = 0.01
"""Uses to come below which a transferred expert is not admitted."""


class ValueCache(CachePolicy):
    """keep = (uses to come while residency pays) * (cpu_us - accel_us), one pool over all layers.

    Uses to come = sum of c m / (1 - (1 - 1/h) (1 - w)) over three moving means of use m, which have the weights
    w = 0.4, 0.05, 0.02 and the shares c = 0.32, 0.48, 0.20; h = ``lifetime_share`` * slots / transfers a token
    (``residency``). Residents of the next layer add their forecast use. Eviction takes the least; a demand transfer
    (balance ``value``) weighs it against its makespan; a prefetch must beat it and the price of the link.
    """

    scope: Scope = "pool"
    keeps_us = True
    tracks_slots = True

    def __init__(self, setting: Setting, lifetime_share: float = LIFETIME_SHARE) -> None:
        super().__init__(setting)
        self.model = ValueModel.of(setting)
        self.model.residency.lifetime_share = number("value", "lifetime_share", lifetime_share, 0.0, 1e6)
        self.keep = self.model.keep

    def begin_sequence(self) -> None:
        self.model.begin_sequence()

    def observe(self, demand: LayerDemand) -> None:
        self.model.observe(demand)

    def inserted(self, key: int) -> None:
        if self.setting.step >= 0:  # not the warm-up
            self.model.residency.transferred()

    def admits(self, key: int) -> bool:
        """What will hardly be used again leaves after its layer."""
        return float(self.keep[key]) >= WORTHLESS * self.model.saving_us(key // self.setting.n_experts)

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        self.model.warmed(frequencies)
