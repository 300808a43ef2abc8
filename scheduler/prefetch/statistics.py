"""Prefetch from what was routed before: recent use, misses, activation matrices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand
from scheduler.forecast.activation_matrix import EPSILON, ActivationMatrices
from scheduler.prefetch.base import NOTHING, PrefetchPolicy, Proposals, best_first
from scheduler.setting import Setting, integer, number


class History(PrefetchPolicy):
    """Experts used lately in the layers ahead: moving mean m <- weight * used + (1 - weight) * m, per expert.

    Proposes those with m >= ``threshold``; gain = m * saving, so nearer layers only win ties.
    """

    def __init__(self, setting: Setting, weight: float = 0.3, threshold: float = 0.25) -> None:
        super().__init__(setting)
        self.weight = number("history", "weight", weight, 0.0, 1.0)
        self.threshold = number("history", "threshold", threshold, 0.0, 1.0)
        self.mean = np.zeros((setting.n_layers, setting.n_experts))

    def begin_sequence(self) -> None:
        self.mean[:] = 0.0

    def observe(self, demand: Demand) -> None:
        row = self.mean[demand.layer]
        row *= 1.0 - self.weight
        row[demand.expert_ids] += self.weight

    def propose(self, demand: Demand, limit: int) -> Proposals:
        keys: list[npt.NDArray[np.int64]] = []
        gains: list[npt.NDArray[np.float64]] = []
        last = min(demand.layer + self.setting.lookahead, self.setting.n_layers - 1)
        for layer in range(demand.layer + 1, last + 1):
            likely = np.flatnonzero(self.mean[layer] >= self.threshold)
            likely = likely[self.absent(layer, likely)]
            if likely.size:
                keys.append(layer * self.setting.n_experts + likely)
                gains.append(self.mean[layer, likely] * self.saving_us(layer))
        return best_first(keys, gains, limit)


class Misses(PrefetchPolicy):
    """What this layer just missed, for its next tokens: high gate score first (ties: lower id).

    A cache without a scheduler fills itself so: the CPU computes the misses, and the idle link brings them behind it.
    """

    def observe(self, demand: Demand) -> None:
        """Only the demand itself counts."""

    def propose(self, demand: Demand, limit: int) -> Proposals:
        here = demand.layer
        absent = self.absent(here, demand.expert_ids.astype(np.int64))
        missed, n_tokens = demand.expert_ids[absent], demand.n_tokens[absent]
        order = np.argsort(-demand.gate_scores[missed], kind="stable")[:limit]
        if not order.size:
            return NOTHING
        return here * self.setting.n_experts + missed[order].astype(np.int64), self.saving_us(here, n_tokens[order])


class ActivationMatrixPrefetch(PrefetchPolicy):
    """MoE-Infinity (arXiv 2401.14361, section 5): priority (p + 1e-8) * (1 - (x - l) / (L + 1)) for layers x > l.

    p = the expert's share of row x in the nearest stored activation matrix (mean cosine over the rows seen so far of
    the running sequence, rows normalised). ``capacity`` matrices are stored; nothing is proposed before the first.
    """

    def __init__(self, setting: Setting, capacity: int = 64) -> None:
        super().__init__(setting)
        capacity = integer("activation_matrix", "capacity", capacity, 1)
        self.matrices = ActivationMatrices(setting.n_layers, setting.n_experts, capacity)

    def begin_sequence(self) -> None:
        self.matrices.begin_sequence()

    def observe(self, demand: Demand) -> None:
        self.matrices.add(demand)

    def propose(self, demand: Demand, limit: int) -> Proposals:
        nearest = self.matrices.nearest()
        layer, n_layers = demand.layer, self.setting.n_layers
        if nearest is None or layer + 1 >= n_layers:
            return NOTHING
        distance = np.arange(1, n_layers - layer)[:, None]
        priority = ((nearest[layer + 1 :] + EPSILON) * (1.0 - distance / (n_layers + 1))).ravel()
        first = (layer + 1) * self.setting.n_experts
        absent = np.flatnonzero(self.setting.slots.slot_of[first:] < 0)
        order = absent[np.argsort(-priority[absent], kind="stable")][:limit]
        return first + order, priority[order] * self.saving_us(layer)


class Perfect(PrefetchPolicy):
    """Oracle: what the layers ahead will ask for, read from a recorded trace; nearest layer first, each layer once."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        setting.need_future("perfect")

    def propose(self, demand: Demand, limit: int) -> Proposals:
        future, n_layers = self.setting.need_future("perfect"), self.setting.n_layers
        keys: list[npt.NDArray[np.int64]] = []
        gains: list[npt.NDArray[np.float64]] = []
        for distance in range(1, min(self.setting.lookahead, n_layers) + 1):
            extra, layer = divmod(demand.layer + distance, n_layers)
            step = max(self.setting.step, 0) + extra
            active = future.active(step, layer)
            active = active[self.absent(layer, active)]
            if active.size:
                keys.append(layer * self.setting.n_experts + active)
                gains.append(self.saving_us(layer, future.n_tokens[step, layer, active]))
        if not keys:
            return NOTHING
        return np.concatenate(keys)[:limit], np.concatenate(gains)[:limit]
