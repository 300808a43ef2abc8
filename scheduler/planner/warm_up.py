"""Which experts fill the slots before the first step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.cache.base import CachePolicy
from scheduler.slots import SlotTable


def preferred(
    cache: CachePolicy, slots: SlotTable, frequencies: npt.NDArray[np.float64] | None, offered: npt.NDArray[np.bool_]
) -> list[int]:
    """Keys in transfer order, at most as many as there are slots; only layers that are ``offered`` (bool[n_layers]).

    Layer scope: each layer's most frequent up to its capacity. Pool: the most frequent of all, frequencies taken as
    shares of their layer. Without frequencies every layer's low ids, evenly. Ties: the lower key. Experts that already
    hold a slot are left out.
    """
    n_layers, n_experts = slots.n_layers, slots.n_experts
    free = slots.n_slots - int(np.count_nonzero(slots.key_of >= 0))
    if frequencies is None:
        shares = -np.tile(np.arange(n_experts, dtype=np.float64), (n_layers, 1))
    else:
        shares = frequencies / np.maximum(frequencies.sum(axis=1, keepdims=True), 1e-300)
    shares = np.where(offered[:, None], shares, -np.inf)
    if cache.scope == "layer":
        place = np.argsort(np.argsort(-shares, axis=1, kind="stable"), axis=1, kind="stable")
        shares = np.where(place < cache.capacities[:, None], shares, -np.inf)
    flat = shares.ravel()
    order = np.argsort(-flat, kind="stable")
    return [int(key) for key in order if flat[key] > -np.inf and slots.slot_of[key] < 0][:free]
