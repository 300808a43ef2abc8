"""Cache policy ``value`` (ours): one number decides everything, the us that an expert's residency should save."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy, Scope
from scheduler.demand import LayerDemand
from scheduler.setting import Setting, number
from scheduler.value_model import DEFAULT_HORIZON, ValueModel

WORTHLESS = 0.01
"""Chance of use at the next token below which a transferred expert is not admitted."""


class ValueCache(CachePolicy):
    """keep = horizon * (chance of use at the layer's next token) * (cpu_us - accel_us), one pool over all layers.

    chance = 0.32 fast + 0.48 slow + 0.20 warm-up rate, moving means of use with weights 0.4 and 0.05. Residents of the
    next layer add the saving of their forecast use. Eviction takes the least of it; a demand transfer (balance
    ``value``) weighs it against its makespan; a prefetch must beat it and the price of the link. ``horizon``: tokens
    over which residency pays.
    """

    scope: Scope = "pool"
    keeps_us = True

    def __init__(self, setting: Setting, horizon: float = DEFAULT_HORIZON) -> None:
        super().__init__(setting)
        self.model = ValueModel.of(setting, number("value", "horizon", horizon, 0.0, 1e6))
        self.keep = self.model.keep

    def begin_sequence(self) -> None:
        self.model.begin_sequence()

    def observe(self, demand: LayerDemand) -> None:
        self.model.observe(demand)

    def admits(self, key: int) -> bool:
        """What will hardly be used again leaves after its layer: chance below 1 % at each of ``horizon`` tokens."""
        layer = key // self.setting.n_experts
        return float(self.keep[key]) >= WORTHLESS * self.model.horizon * self.model.saving_us(layer)

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        self.model.warmed(frequencies)
