"""Prompts into batches: in input order, by like routes (ExpertFlow), or longest first for MoE-Lightning's plan.

None of these changes a token of a greedy reply beyond what padding does: they are lossless. Requests of different
service levels never share a batch, so that an urgent one does not wait for others' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scheduler.batching.clustering import balanced_kmeans
from scheduler.batching.service import Request
from scheduler.errors import PolicyError, SchedulerError, did_you_mean

Floats = NDArray[np.float64]
Batching = Literal["none", "expertflow", "moe-lightning"]
BATCHINGS: tuple[Batching, ...] = get_args(Batching)


def batching_kind(name: str) -> Batching:
    """``name`` if it is a way of batching; raises PolicyError with the nearest name."""
    for kind in BATCHINGS:
        if name == kind:
            return kind
    raise PolicyError(f"unknown batching {name!r}{did_you_mean(name, BATCHINGS)}")


def make_batches(
    requests: Sequence[Request], kind: Batching, size: int, routes: Floats | None = None, seed: int = 0
) -> list[list[int]]:
    """Batches of at most ``size`` positions in ``requests``, each position once, batches by their first request.

    ``routes`` float [requests, layers, experts] (see ``routes.route_vectors``) is what ``expertflow`` groups by. Raises
    SchedulerError for no requests, a size below 1, and missing or unfitting routes.
    """
    if not requests or size < 1:
        raise SchedulerError(f"expected requests and a batch size of at least 1, found {len(requests)} and {size}")
    if kind == "expertflow" and (routes is None or len(routes) != len(requests)):
        raise SchedulerError("expertflow groups by route vectors: expected one a request")
    rng = np.random.default_rng(seed)
    batches: list[list[int]] = []
    for level in sorted({request.priority for request in requests}, reverse=True):
        members = [at for at, request in enumerate(requests) if request.priority == level]
        if kind == "expertflow":
            assert routes is not None
            batches += _by_route(members, routes, size, rng)
        else:
            if kind == "moe-lightning":
                members.sort(key=lambda at: (-requests[at].n_prompt, at))
            batches += [members[i : i + size] for i in range(0, len(members), size)]
    return sorted(batches, key=min)


def _by_route(members: list[int], routes: Floats, size: int, rng: np.random.Generator) -> list[list[int]]:
    n_batches = -(-len(members) // size)
    clusters = balanced_kmeans(routes[members].reshape(len(members), -1), n_batches, rng)
    return [[members[i] for i in np.flatnonzero(clusters == g).tolist()] for g in range(n_batches)]
