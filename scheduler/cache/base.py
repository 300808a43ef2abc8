"""The interface of a cache policy: one number to keep an expert by, and how many slots a layer may hold."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand
from scheduler.setting import Setting

Scope = Literal["layer", "pool"]


class CachePolicy:
    """``keep`` float64[n_layers * n_experts]: the evictable resident with the lowest goes first, ties by key.

    ``scope`` "layer": each layer has its own number of slots (``capacities``) and evicts among its own experts;
    "pool": all layers share all slots.
    """

    scope: Scope = "layer"
    keeps_us = False
    """Whether ``keep`` is a saving in us, comparable with a prefetch's gain."""
    tracks_slots = False
    """Whether ``inserted`` and ``evicted`` are wanted."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.keep = np.zeros(setting.n_keys)
        self.capacities = even_capacities(setting.slots.n_slots, setting.n_layers, setting.n_experts)

    def rows(self) -> npt.NDArray[np.float64]:
        """``keep`` as [n_layers, n_experts]."""
        return self.keep.reshape(self.setting.n_layers, self.setting.n_experts)

    def begin_sequence(self) -> None:
        """A new sequence starts; what is resident stays."""

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        """Frequencies float64[n_layers, n_experts] known before the first step, if any."""

    def observe(self, demand: Demand) -> None:
        """The routing of a layer is known; not called where a policy does not say what it learns from that."""

    def refresh(self, layer: int) -> None:
        """``keep`` is read next, at this layer: bring it up to date."""

    def admits(self, key: int) -> bool:
        """Whether a demand-transferred expert stays after its layer."""
        return True

    def inserted(self, key: int) -> None:
        """A transfer of ``key`` starts."""

    def evicted(self, key: int) -> None:
        """``key`` lost its slot."""

    def resized(self, n_slots: int) -> None:
        """The number of slots has changed."""
        self.capacities = even_capacities(n_slots, self.setting.n_layers, self.setting.n_experts)


def even_capacities(n_slots: int, n_layers: int, n_experts: int) -> npt.NDArray[np.int64]:
    """Slots shared out evenly, the remainder to the first layers; never more than a layer has experts."""
    base, rest = divmod(min(n_slots, n_layers * n_experts), n_layers)
    return np.array([base + (layer < rest) for layer in range(n_layers)], np.int64)
