"""What keeps an expert in host memory: the uses that are expected of it, by the forecast that slots are kept by.

All records cost the same read, so that uses alone decide, without us. Runtime and simulator ask the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand, LayerDemand
from scheduler.forecast.affinity import MAX_ACTIVE
from scheduler.forecast.residency import Residency
from scheduler.forecast.use_model import FEW_TOKENS, UseModel
from scheduler.forecast.value_model import keep_by_use

Floats = npt.NDArray[np.float64]

__all__ = ["LAYERS_AHEAD", "Worth", "make_ready"]

LAYERS_AHEAD = 1
"""Distance of the forecast that needs no gates."""


class Worth:
    """keep float64 [layers * experts]: uses expected while an expert would stay in memory."""

    def __init__(self, n_layers: int, n_experts: int, n_slots: int) -> None:
        self.n_layers, self.n_experts = n_layers, n_experts
        self.use, self.residency = UseModel(n_layers, n_experts, LAYERS_AHEAD), Residency(n_slots)
        self.keep = np.zeros(n_layers * n_experts)
        self._n_slots, self._last_layer = n_slots, n_layers

    def resized(self, n_slots: int) -> None:
        """So many records fit memory from here on."""
        self._n_slots = n_slots

    def begin_sequence(self) -> None:
        """What was active last does not precede what comes."""
        self._last_layer = self.n_layers
        self.use.begin_sequence()

    def warmed(self, uses: npt.NDArray[np.float64]) -> None:
        """Uses [layers, experts] of earlier runs."""
        shares = uses / np.maximum(uses.sum(axis=1, keepdims=True), 1e-300)
        self.use.warmed(shares)
        self.keep[:] = shares.reshape(-1)

    def read(self) -> None:
        """A record is brought: the more of them, the shorter each stays."""
        self.residency.transferred()

    def observe(self, demand: Demand) -> tuple[int, npt.NDArray[np.float32]] | None:
        """A layer's routing is known. Returns the next layer, and the log-odds float32 [E] that the running step uses
        its experts; None after the last layer, and where there are too many tokens to say."""
        layer = demand.layer
        few = demand.n_tokens_total <= FEW_TOKENS and demand.expert_ids.size <= MAX_ACTIVE
        if layer <= self._last_layer:
            self.residency.begin_step(self._n_slots, few)
            self.use.begin_step(few)
        self._last_layer = layer
        target = self.use.observe(demand, few)
        keep_by_use(self.keep, layer * self.n_experts, self.use.odds, self.use.far, layer, self.residency.horizon, 1.0)
        return None if target < 0 else (target, self.use.ahead[target])


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first call would otherwise wait for."""
    worth, nobody = Worth(2, 1, 1), np.zeros(1, np.int32)
    for layer in range(2):
        worth.observe(LayerDemand(layer, "decode", 1, nobody, np.ones(1, np.int32), np.ones(1, np.float32)))
