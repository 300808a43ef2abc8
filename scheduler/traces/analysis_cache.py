"""Hit rates of cache policies on a trace, each layer with its own slots and every miss inserted (compiled).

The reference for ``scheduler.cache``, which works on one pool: a hit is an activated expert that its layer's cache
holds before the token. A policy never evicts an expert of the current token while it has another; the oracle (Belady)
may, since it knows when that one comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.compiled import compiled
from scheduler.errors import PolicyError, did_you_mean
from scheduler.traces.trace import Trace

LRU, LFU, MRS, BELADY = 0, 1, 2, 3
LAYER_POLICIES: Final = {"lru": LRU, "lfu": LFU, "mrs": MRS, "belady": BELADY}
#: HybriMoE's smoothing of the recent score; 0.1 is better than the obvious 0.5 on both published traces.
MRS_ALPHA: Final = 0.1
NEVER: Final = 1 << 30


def layer_hit_rate(trace: Trace, policy: str, slots_per_layer: int, alpha: float = MRS_ALPHA) -> float:
    """Hits over activations with ``slots_per_layer`` slots in each layer. ``alpha`` is used by ``mrs`` only."""
    if policy not in LAYER_POLICIES:
        raise PolicyError(f"unknown cache policy {policy!r}{did_you_mean(policy, LAYER_POLICIES)}")
    if not 1 <= slots_per_layer <= trace.n_experts:
        raise PolicyError(f"slots a layer must lie in 1..{trace.n_experts}, found {slots_per_layer}")
    ids = np.ascontiguousarray(trace.expert_ids)
    weights = routing_weights(trace)
    hits, seen = _replay(ids, weights, next_use(trace), trace.n_experts, slots_per_layer, LAYER_POLICIES[policy], alpha)
    return float(hits) / max(1, seen)


def hit_rate_curve(trace: Trace, policy: str, shares: Sequence[float]) -> list[float]:
    """Hit rate at each share of a layer's experts (at least one slot)."""
    return [layer_hit_rate(trace, policy, max(1, round(share * trace.n_experts))) for share in shares]


def routing_weights(trace: Trace) -> NDArray[np.float32]:
    """float32 [tokens, layers, top_k]; 1 / top_k where the trace has no weights."""
    if trace.expert_weights is not None:
        return np.ascontiguousarray(trace.expert_weights.astype(np.float32))
    return np.where(trace.expert_ids >= 0, np.float32(1.0 / trace.top_k), np.float32(0.0))


def next_use(trace: Trace) -> NDArray[np.int32]:
    """int32 [tokens, layers, top_k]: the next token that uses the same expert in this layer, NEVER if none."""
    return _next_use(np.ascontiguousarray(trace.expert_ids), trace.n_experts)


@compiled
def _next_use(ids: NDArray[np.int16], n_experts: int) -> NDArray[np.int32]:
    n_tokens, n_layers, top_k = ids.shape
    result = np.full(ids.shape, NEVER, np.int32)
    upcoming = np.full((n_layers, n_experts), NEVER, np.int32)
    for token in range(n_tokens - 1, -1, -1):
        for layer in range(n_layers):
            for j in range(top_k):
                if ids[token, layer, j] >= 0:
                    result[token, layer, j] = upcoming[layer, ids[token, layer, j]]
            for j in range(top_k):
                if ids[token, layer, j] >= 0:
                    upcoming[layer, ids[token, layer, j]] = token
    return result


@compiled
def _replay(
    ids: NDArray[np.int16],
    weights: NDArray[np.float32],
    upcoming: NDArray[np.int32],
    n_experts: int,
    n_slots: int,
    policy: int,
    alpha: float,
) -> tuple[int, int]:
    """(hits, activations). ``value`` is what a policy keeps: the cached expert with the smallest one leaves, ties by
    id."""
    n_tokens, n_layers, top_k = ids.shape
    hits, seen = 0, 0
    for layer in range(n_layers):
        value = np.zeros(n_experts)
        cached = np.zeros(n_experts, np.bool_)
        current = np.full(n_experts, -1, np.int64)
        held = 0
        for token in range(n_tokens):
            if policy == MRS:
                value *= 1.0 - alpha
            for j in range(top_k):
                expert = ids[token, layer, j]
                if expert < 0:
                    continue
                seen += 1
                hits += cached[expert]
                current[expert] = token
                if policy == LRU:
                    value[expert] = token + 1
                elif policy == LFU:
                    value[expert] += 1.0
                elif policy == MRS:
                    value[expert] += alpha * weights[token, layer, j]
                else:
                    value[expert] = -float(upcoming[token, layer, j])
            for j in range(top_k):
                expert = ids[token, layer, j]
                if expert < 0 or cached[expert]:
                    continue
                if held == n_slots:
                    leaves = _least(value, cached, current, -2 if policy == BELADY else token)
                    cached[leaves] = False
                    held -= 1
                cached[expert] = True
                held += 1
    return hits, seen


@compiled
def _least(value: NDArray[np.float64], cached: NDArray[np.bool_], current: NDArray[np.int64], token: int) -> int:
    """Cached expert of least value, one that ``token`` (-2: no protection) does not use if there is any."""
    best, best_current = -1, -1
    for expert in range(value.size):
        if not cached[expert]:
            continue
        if current[expert] == token:
            if best_current < 0 or value[expert] < value[best_current]:
                best_current = expert
        elif best < 0 or value[expert] < value[best]:
            best = expert
    return best if best >= 0 else best_current
