"""Prefetch policies: which experts of later layers to bring while the link idles."""

from __future__ import annotations

from scheduler.prefetch.base import NoPrefetch, PrefetchPolicy
from scheduler.prefetch.expert_maps import ExpertMaps
from scheduler.prefetch.gates import GateTopK, Impact
from scheduler.prefetch.learned import PREFETCH_FEATURES, LearnedPrefetch
from scheduler.prefetch.statistics import ActivationMatrixPrefetch, History, Misses, Perfect
from scheduler.prefetch.value import ValuePrefetch

PREFETCH_POLICIES: dict[str, type[PrefetchPolicy]] = {
    "none": NoPrefetch,
    "impact": Impact,
    "gate_topk": GateTopK,
    "history": History,
    "misses": Misses,
    "activation_matrix": ActivationMatrixPrefetch,
    "expert_maps": ExpertMaps,
    "learned": LearnedPrefetch,
    "perfect": Perfect,
    "value": ValuePrefetch,
}

__all__ = ["PREFETCH_FEATURES", "PREFETCH_POLICIES", "PrefetchPolicy"]
