"""Runs injected layers: store, slots, lanes, lookahead, statistics. `Session` is the entry."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.experts.module import HybridExperts
    from hybrimoe.runtime.config import RuntimeConfig
    from hybrimoe.runtime.layer_call.stats import Counters, SessionStats
    from hybrimoe.runtime.session import Session
    from hybrimoe.runtime.store import ExpertStore, LayerSpec

_MODULE_OF = {
    "Counters": "hybrimoe.runtime.layer_call.stats",
    "ExpertStore": "hybrimoe.runtime.store",
    "HybridExperts": "hybrimoe.experts.module",
    "LayerSpec": "hybrimoe.runtime.store",
    "RuntimeConfig": "hybrimoe.runtime.config",
    "Session": "hybrimoe.runtime.session",
    "SessionStats": "hybrimoe.runtime.layer_call.stats",
}

__all__ = ["Counters", "ExpertStore", "HybridExperts", "LayerSpec", "RuntimeConfig", "Session", "SessionStats"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
