"""Cache policy ``arc``: adaptive replacement (Megiddo and Modha, FAST 2003), which Fate uses, one per layer."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from scheduler.cache.allocation import shallow_first
from scheduler.cache.base import CachePolicy
from scheduler.demand import Demand
from scheduler.setting import Setting, integer

FREQUENT_BONUS = 1e12
"""Above every clock value: puts one list wholly above the other in ``keep``."""


class Arc(CachePolicy):
    """T1 holds experts used once since they came, T2 those used again; B1 and B2 remember what each lost.

    A miss found in B1 raises the target size of T1 by max(1, |B2| / |B1|), one in B2 lowers it by max(1, |B1| / |B2|).
    Evict the LRU of T1 if |T1| is above the target, else the LRU of T2 (of the other list if that one is empty).
    The first ``n_shallow`` layers get all their experts first (Fate).
    """

    tracks_slots = True

    def __init__(self, setting: Setting, n_shallow: int = 2) -> None:
        super().__init__(setting)
        self.n_shallow = integer("arc", "n_shallow", n_shallow, 0)
        self.resized(setting.slots.n_slots)
        self.clock = 0.0
        self.last_used = np.zeros(setting.n_keys)
        self.list_of = np.zeros(setting.n_keys, np.int8)
        self.target = np.zeros(setting.n_layers)
        self.ghosts = [(OrderedDict[int, None](), OrderedDict[int, None]()) for _ in range(setting.n_layers)]

    def resized(self, n_slots: int) -> None:
        self.capacities = shallow_first(n_slots, self.setting.n_layers, self.setting.n_experts, self.n_shallow)

    def observe(self, demand: Demand) -> None:
        self.clock += 1.0
        keys = demand.expert_ids + demand.layer * self.setting.n_experts
        self.last_used[keys] = self.clock
        held = keys[self.list_of[keys] > 0]
        self.list_of[held] = 2

    def refresh(self, layer: int) -> None:
        n = self.setting.n_experts
        for row in range(self.setting.n_layers):
            part = slice(row * n, row * n + n)
            lists = self.list_of[part]
            spare_first = np.count_nonzero(lists == 1) > self.target[row]
            kept = 2 if spare_first else 1
            self.keep[part] = self.last_used[part] + FREQUENT_BONUS * (lists == kept)

    def inserted(self, key: int) -> None:
        layer = key // self.setting.n_experts
        recent, frequent = self.ghosts[layer]
        if key in recent:
            self.target[layer] += max(1.0, len(frequent) / len(recent))
            self.target[layer] = min(self.target[layer], self.capacities[layer])
            del recent[key]
            self.list_of[key] = 2
        elif key in frequent:
            self.target[layer] = max(self.target[layer] - max(1.0, len(recent) / len(frequent)), 0.0)
            del frequent[key]
            self.list_of[key] = 2
        else:
            self.list_of[key] = 1

    def evicted(self, key: int) -> None:
        layer = key // self.setting.n_experts
        ghosts = self.ghosts[layer][0 if self.list_of[key] == 1 else 1]
        ghosts[key] = None
        while len(ghosts) > max(int(self.capacities[layer]), 1):
            ghosts.popitem(last=False)
        self.list_of[key] = 0
