"""Batched prompts: which run together, and in which order. Lossless, and pure planning like the rest of the package.

``clustering`` and ``routes`` are ExpertFlow's regrouping, ``lightning`` MoE-Lightning's choice of micro-batches,
``service`` eMoE's order by service level, ``groups`` what a job calls.
"""

from scheduler.batching.clustering import balanced_kmeans
from scheduler.batching.groups import BATCHINGS, Batching, batching_kind, make_batches
from scheduler.batching.lightning import (
    LightningPlan,
    MemoryLeft,
    Roofline,
    Workload,
    plan_lightning,
)
from scheduler.batching.routes import activation_counts, batched, counted_distinct, expected_distinct, route_vectors
from scheduler.batching.service import Request, ServiceCosts, ServiceOrder

__all__ = [
    "BATCHINGS",
    "Batching",
    "LightningPlan",
    "MemoryLeft",
    "Request",
    "Roofline",
    "ServiceCosts",
    "ServiceOrder",
    "Workload",
    "activation_counts",
    "balanced_kmeans",
    "batched",
    "batching_kind",
    "counted_distinct",
    "expected_distinct",
    "make_batches",
    "plan_lightning",
    "route_vectors",
]
