"""Runs injected layers: store, slots, lanes, lookahead, statistics. `Session` is the entry."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.runtime.config import RuntimeConfig
    from hybrimoe.runtime.hybrid_experts import HybridExperts
    from hybrimoe.runtime.session import Session
    from hybrimoe.runtime.stats import Counters, SessionStats
    from hybrimoe.runtime.store import ExpertStore, LayerSpec

_MODULE_OF = {
    "Counters": "stats",
    "ExpertStore": "store",
    "HybridExperts": "hybrid_experts",
    "LayerSpec": "store",
    "RuntimeConfig": "config",
    "Session": "session",
    "SessionStats": "stats",
}

__all__ = ["Counters", "ExpertStore", "HybridExperts", "LayerSpec", "RuntimeConfig", "Session", "SessionStats"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
