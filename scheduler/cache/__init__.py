"""Cache policies: which resident expert goes first, and how many slots a layer may hold."""

from __future__ import annotations

from scheduler.cache.activation import ActivationMatrixCache
from scheduler.cache.arc import Arc
from scheduler.cache.base import CachePolicy
from scheduler.cache.learned import CACHE_FEATURES, Learned
from scheduler.cache.oracle import Belady
from scheduler.cache.simple import Fixed, Hobbit, Lfu, Lru, Mrs, ShallowFirst
from scheduler.cache.value import ValueCache

CACHE_POLICIES: dict[str, type[CachePolicy]] = {
    "mrs": Mrs,
    "lru": Lru,
    "lfu": Lfu,
    "hobbit": Hobbit,
    "activation_matrix": ActivationMatrixCache,
    "shallow_first": ShallowFirst,
    "fixed": Fixed,
    "arc": Arc,
    "learned": Learned,
    "belady": Belady,
    "value": ValueCache,
}

__all__ = ["CACHE_FEATURES", "CACHE_POLICIES", "CachePolicy"]
