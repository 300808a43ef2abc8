"""FineMoE's expert maps (fMoE, arXiv 2502.05370): the gate distributions of earlier steps, searched by cosine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand
from scheduler.prefetch.base import NOTHING, PrefetchPolicy, Proposals, best_first
from scheduler.setting import Setting, integer

Floats = npt.NDArray[np.float64]


class ExpertMaps(PrefetchPolicy):
    """A map holds the gate probabilities of all layers of one step. The stored map whose layers so far are most like
    the running step's (cosine of both, laid end to end) says what the layers ahead will want.

    Of each layer within the look-ahead the likeliest experts are proposed, until their probabilities add up to
    1 - cosine: the less alike, the more; never fewer than the running layer uses. Gain = p / distance * saving.
    ``capacity`` maps are stored, over all sequences; the oldest goes first. The paper finds the first layers' map by
    the prompt's meaning instead, and drops the map that is most like another one: neither is here.
    """

    def __init__(self, setting: Setting, capacity: int = 256) -> None:
        super().__init__(setting)
        self.capacity = integer("expert_maps", "capacity", capacity, 1)
        n_layers, n_experts = setting.n_layers, setting.n_experts
        self.maps: Floats = np.zeros((self.capacity, n_layers, n_experts))
        self.running: Floats = np.zeros((n_layers, n_experts))
        self.n_stored, self._next = 0, 0
        self._alike: Floats = np.zeros(self.capacity)
        """float64[capacity]: product of each map with the running step's layers so far."""
        self._lengths: Floats = np.zeros(self.capacity)
        """float64[capacity]: squared length of the same layers of each map."""

    def begin_sequence(self) -> None:
        """Maps of earlier sequences stay; the running step's is filed."""
        self._file()

    def observe(self, demand: Demand) -> None:
        if demand.layer == 0:
            self._file()
        total = float(demand.gate_scores.sum())
        if total <= 0.0:
            return
        layer, row = demand.layer, self.running[demand.layer]
        row[:] = demand.gate_scores / total
        stored = self.maps[: self.n_stored, layer]
        self._alike[: self.n_stored] += stored @ row
        self._lengths[: self.n_stored] += np.einsum("me,me->m", stored, stored)

    def propose(self, demand: Demand, limit: int) -> Proposals:
        cosine, nearest = self.nearest()
        if nearest is None:
            return NOTHING
        keys: list[npt.NDArray[np.int64]] = []
        gains: list[Floats] = []
        last = min(demand.layer + self.setting.lookahead, self.setting.n_layers - 1)
        for layer in range(demand.layer + 1, last + 1):
            likely = _likely(nearest[layer], 1.0 - cosine, len(demand.expert_ids))
            likely = likely[self.absent(layer, likely)]
            keys.append(layer * self.setting.n_experts + likely)
            gains.append(nearest[layer, likely] / (layer - demand.layer) * self.saving_us(layer))
        return best_first(keys, gains, limit)

    def nearest(self) -> tuple[float, Floats | None]:
        """(cosine, map float64[layers, experts]) of the most alike stored map (ties: the lower place), or (0, None)."""
        length = float(np.sqrt((self.running**2).sum()))
        if not self.n_stored or length == 0.0:
            return 0.0, None
        n = self.n_stored
        cosines = self._alike[:n] / np.maximum(np.sqrt(self._lengths[:n]) * length, 1e-300)
        best = int(cosines.argmax())
        return min(float(cosines[best]), 1.0), self.maps[best]

    def _file(self) -> None:
        """Stores the running step's map, and starts an empty one."""
        if self.running.any():
            self.maps[self._next] = self.running
            self._next = (self._next + 1) % self.capacity
            self.n_stored = min(self.n_stored + 1, self.capacity)
        self.running[:] = 0.0
        self._alike[:] = 0.0
        self._lengths[:] = 0.0


def _likely(probabilities: Floats, share: float, least: int) -> npt.NDArray[np.int64]:
    """int64[n]: experts by falling probability (ties: lower id) until they add up to ``share``, at least ``least``;
    none without a probability."""
    order = np.argsort(-probabilities, kind="stable")
    reached = int(np.searchsorted(np.cumsum(probabilities[order]), share)) + 1
    chosen = order[: max(reached, least)]
    return np.asarray(chosen[probabilities[chosen] > 0.0], np.int64)
