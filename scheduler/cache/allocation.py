"""How many slots each layer gets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.errors import SchedulerError


def by_dynamic_programming(gains: npt.NDArray[np.float64], n_slots: int) -> npt.NDArray[np.int64]:
    """AdapMoE's knapsack (arXiv 2408.10284, section 4.3): sizes with the greatest total gain.

    gains float64[n_layers, n_experts + 1]: gains[l, c] = expected hits of layer l with c slots, gains[l, 0] = 0.
    best[l, s] = max over c of best[l - 1, s - c] + gains[l, c]; ties take the fewer slots for the deeper layer.
    Returns int64[n_layers] with sum min(n_slots, n_layers * n_experts).
    """
    if gains.ndim != 2 or not np.all(np.isfinite(gains)):
        raise SchedulerError(f"gains: expected finite [n_layers, n_experts + 1], found shape {gains.shape}")
    n_layers, widest = gains.shape[0], gains.shape[1] - 1
    total = min(n_slots, n_layers * widest)
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((n_layers, total + 1), np.int64)
    for layer in range(n_layers):
        options = np.full((widest + 1, total + 1), -np.inf)
        for c in range(min(widest, total) + 1):
            options[c, c:] = best[: total + 1 - c] + gains[layer, c]
        taken[layer] = options.argmax(axis=0)
        best = options.max(axis=0)
    sizes = np.zeros(n_layers, np.int64)
    for layer in range(n_layers - 1, -1, -1):
        sizes[layer] = taken[layer, total]
        total -= int(sizes[layer])
    return sizes


def gains_of(frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """gains[l, c] of ``by_dynamic_programming`` from measured use: the c most frequent experts' share of a layer."""
    shares = frequencies / np.maximum(frequencies.sum(axis=1, keepdims=True), 1e-300)
    ordered = -np.sort(-shares, axis=1)
    return np.concatenate((np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)), axis=1)


def shallow_first(n_slots: int, n_layers: int, n_experts: int, n_shallow: int) -> npt.NDArray[np.int64]:
    """The first ``n_shallow`` layers get all their experts as far as the slots reach; the rest is shared evenly."""
    sizes = np.zeros(n_layers, np.int64)
    left = min(n_slots, n_layers * n_experts)
    for layer in range(min(n_shallow, n_layers)):
        sizes[layer] = min(n_experts, left)
        left -= int(sizes[layer])
    deep = n_layers - min(n_shallow, n_layers)
    for i in range(deep):
        sizes[n_layers - deep + i] = left // deep + (i < left % deep)
    return sizes
