"""Cache policy ``value`` (ours): one number decides everything, the us that an expert's residency should save."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy, Scope
from scheduler.forecast.residency import HORIZON_SCALE
from scheduler.forecast.value_model import ValueModel
from scheduler.setting import Setting, number

WORTHLESS = 0.01
"""Uses to come below which a transferred expert is not admitted."""


class ValueCache(CachePolicy):
    """keep = (uses expected while residency pays) * (cpu_us - accel_us), one pool over all layers.

    Uses expected = the forecast mean use (``use_model``) for the next three tokens, then the slow mean of use, up to
    ``horizon_scale`` * root of (slots / transfers a token) tokens (``residency``). Residents of a layer that is
    forecast are worth at least what they will save now. Eviction takes the least; a demand transfer (balance
    ``value``) weighs it against its makespan; a prefetch must beat it and the price of the link.
    """

    scope: Scope = "pool"
    keeps_us = True
    tracks_slots = True

    def __init__(self, setting: Setting, horizon_scale: float = HORIZON_SCALE) -> None:
        super().__init__(setting)
        self.model = ValueModel.of(setting)
        self.model.residency.horizon_scale = number("value", "horizon_scale", horizon_scale, 0.0, 1e6)
        self.keep = self.model.keep

    def inserted(self, key: int) -> None:
        if self.setting.step >= 0:  # not the warm-up
            self.model.residency.transferred()

    def admits(self, key: int) -> bool:
        """What will hardly be used again leaves after its layer."""
        return float(self.keep[key]) >= WORTHLESS * self.model.saving_us(key // self.setting.n_experts)

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        self.model.warmed(frequencies)
