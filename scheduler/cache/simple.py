"""Cache policies with a score an expert: MRS (the paper), LRU, LFU, HOBBIT's mixture, shallow layers first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.cache.allocation import by_dynamic_programming, gains_of, shallow_first
from scheduler.cache.base import CachePolicy, Scope
from scheduler.compiled import compiled
from scheduler.demand import Demand
from scheduler.setting import Setting, choice, integer, number


class Mrs(CachePolicy):
    """HybriMoE's minus recent score (arXiv 2504.05897, section 4.4), per layer: evict argmin S.

    S <- alpha * TopP(s) + (1 - alpha) * S, where s is the mean over the step's tokens of the gate probability and TopP
    keeps the p largest and zeroes the rest; every expert decays. p = 2k, k = experts a token.
    """

    def __init__(self, setting: Setting, alpha: float = 0.1, top_p: int | None = None) -> None:
        super().__init__(setting)
        self.alpha = number("mrs", "alpha", alpha, 0.0, 1.0)
        self.top_p = None if top_p is None else integer("mrs", "top_p", top_p, 1)

    def observe(self, demand: Demand) -> None:
        start = demand.layer * self.setting.n_experts
        row = self.keep[start : start + self.setting.n_experts]
        p = self.top_p if self.top_p is not None else 2 * experts_per_token(demand)
        mrs_update(row, demand.gate_scores, p, self.alpha)

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        if frequencies is not None:
            self.rows()[:] = frequencies / np.maximum(frequencies.sum(axis=1, keepdims=True), 1e-300)


def experts_per_token(demand: Demand) -> int:
    """Routed experts a token, rounded up, from the demand itself."""
    return max(1, -(-int(demand.n_tokens.sum()) // max(demand.n_tokens_total, 1)))


@compiled
def mrs_update(row: npt.NDArray[np.float64], scores: npt.NDArray[np.float32], p: int, alpha: float) -> None:
    """row <- alpha * TopP(scores) + (1 - alpha) * row, in place; ties of the p-th place go to the lower id."""
    n = row.size
    for e in range(n):
        row[e] *= 1.0 - alpha
    if p >= n:
        for e in range(n):
            row[e] += alpha * scores[e]
        return
    chosen = np.zeros(n, np.bool_)
    for _ in range(p):
        top = -1
        for e in range(n):
            if not chosen[e] and (top < 0 or scores[e] > scores[top]):
                top = e
        if scores[top] <= 0.0:
            break
        chosen[top] = True
        row[top] += alpha * scores[top]


class Lru(CachePolicy):
    """Least recently used. ``scope`` "layer" or "pool" (FreeToken's global LRU).

    ``sizes`` (scope layer): "even", or "dp": AdapMoE's dynamic programming on the warm-up frequencies.
    """

    def __init__(self, setting: Setting, scope: str = "layer", sizes: str = "even") -> None:
        super().__init__(setting)
        self.scope: Scope = "pool" if choice("lru", "scope", scope, ("layer", "pool")) == "pool" else "layer"
        self.sizes = choice("lru", "sizes", sizes, ("even", "dp"))
        self.clock = 0.0

    def observe(self, demand: Demand) -> None:
        self.clock += 1.0
        self.keep[demand.expert_ids + demand.layer * self.setting.n_experts] = self.clock

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        if frequencies is not None and self.sizes == "dp":
            self.capacities = by_dynamic_programming(gains_of(frequencies), self.setting.slots.n_slots)


class Lfu(CachePolicy):
    """Least frequently used: activations (tokens) since the start, per layer or in one pool."""

    def __init__(self, setting: Setting, scope: str = "layer") -> None:
        super().__init__(setting)
        self.scope: Scope = "pool" if choice("lfu", "scope", scope, ("layer", "pool")) == "pool" else "layer"

    def observe(self, demand: Demand) -> None:
        self.keep[demand.expert_ids + demand.layer * self.setting.n_experts] += demand.n_tokens

    def warmed(self, frequencies: npt.NDArray[np.float64] | None) -> None:
        if frequencies is not None:
            self.rows()[:] = frequencies / np.maximum(frequencies.sum(), 1e-300)


class Hobbit(CachePolicy):
    """HOBBIT (arXiv 2411.01433, section 3.4), one pool: evict the lowest

    w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - ((l_t - l_i + L) mod L) / L)

    T = steps so far, R = step of the last use, F = uses, H = uses in high precision (the expert's weight rank within
    ``high_share`` of the sum before it, rank 0 always), l_t the expert's layer, l_i the layer at work: the sooner a
    layer comes, the more its experts are kept.
    """

    scope: Scope = "pool"

    def __init__(
        self, setting: Setting, w_lru: float = 0.4, w_lfu: float = 0.3, w_lhu: float = 0.2, w_fld: float = 0.1,
        high_share: float = 0.6,
    ) -> None:  # fmt: skip
        super().__init__(setting)
        names: dict[str, Any] = {"w_lru": w_lru, "w_lfu": w_lfu, "w_lhu": w_lhu, "w_fld": w_fld}
        self.weights = tuple(number("hobbit", name, value, 0.0, 1e9) for name, value in names.items())
        self.high_share = number("hobbit", "high_share", high_share, 0.0, 1.0)
        self.last_used, self.uses, self.high_uses = (np.zeros(setting.n_keys) for _ in range(3))
        self.layer_of = np.repeat(np.arange(setting.n_layers), setting.n_experts)
        self.n_steps = 0

    def observe(self, demand: Demand) -> None:
        if demand.layer == 0:
            self.n_steps += 1
        keys = demand.expert_ids + demand.layer * self.setting.n_experts
        self.last_used[keys] = max(self.n_steps, 1)
        self.uses[keys] += 1
        weights = demand.gate_scores[demand.expert_ids].astype(np.float64)
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        self.high_uses[keys[order[before <= self.high_share * max(weights.sum(), 1e-300)]]] += 1

    def refresh(self, layer: int) -> None:
        n_layers = self.setting.n_layers
        w_lru, w_lfu, w_lhu, w_fld = self.weights
        ahead = (self.layer_of - layer + n_layers) % n_layers
        used = w_lru * self.last_used + w_lfu * self.uses + w_lhu * self.high_uses
        self.keep = used / max(self.n_steps, 1) + w_fld * (1.0 - ahead / n_layers)


class Fixed(CachePolicy):
    """The warm-up's residents stay for good: KTransformers' static set beside something that brings experts.

    Each layer sets ``visitors`` of its slots aside for what is brought later, first in first out (while all of them are
    in use or in flight, a newcomer takes a resident's slot). It is what a prefetch
    does without a cache policy: the expert serves the layer that it was brought for, and joins no set.
    """

    tracks_slots = True

    def __init__(self, setting: Setting, visitors: int = 2) -> None:
        super().__init__(setting)
        self.visitors = integer("fixed", "visitors", visitors, 1)
        self._held = np.zeros(setting.n_layers, np.int64)
        self._clock = 0.0

    def observe(self, demand: Demand) -> None:
        """Use changes nothing."""

    def inserted(self, key: int) -> None:
        layer = key // self.setting.n_experts
        self._clock += 1.0
        self.keep[key] = self._clock
        if self.setting.step < 0 and self._held[layer] < self.capacities[layer] - self.visitors:
            self._held[layer] += 1
            self.keep[key] = np.inf


class ShallowFirst(Lru):
    """Slots go to shallow layers first (Fate; llama.cpp's whole layers with ``n_shallow`` = all), LRU in each layer."""

    def __init__(self, setting: Setting, n_shallow: int | None = None) -> None:
        super().__init__(setting)
        self.n_shallow = setting.n_layers if n_shallow is None else integer("shallow_first", "n_shallow", n_shallow, 0)
        self.resized(setting.slots.n_slots)

    def resized(self, n_slots: int) -> None:
        self.capacities = shallow_first(n_slots, self.setting.n_layers, self.setting.n_experts, self.n_shallow)
