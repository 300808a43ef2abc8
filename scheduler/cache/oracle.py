"""Cache policy ``belady``: evicts what is needed last (Belady, 1966). An oracle: it reads a recorded trace."""

from __future__ import annotations

from scheduler.cache.base import CachePolicy, Scope
from scheduler.demand import Demand
from scheduler.setting import Setting, choice


class Belady(CachePolicy):
    """keep = -(time of the next use), time = step * n_layers + layer. One pool, or per layer."""

    def __init__(self, setting: Setting, scope: str = "pool") -> None:
        super().__init__(setting)
        setting.need_future("belady")
        self.scope: Scope = "pool" if choice("belady", "scope", scope, ("layer", "pool")) == "pool" else "layer"

    def observe(self, demand: Demand) -> None:
        """Nothing to learn: the future is known."""

    def refresh(self, layer: int) -> None:
        times = self.setting.need_future("belady").times(max(self.setting.step, 0), layer)
        self.keep = -times.ravel()
