"""Which experts follow those active now: an online logistic regression a layer, learnt while running (compiled).

Inputs are the experts that were active in the latest layers, each with its gate weight over the mean of those active
(1 where gates are not known), outputs the experts of one layer. An active expert s adds gate * w[s, e] to the log-odds
of e; when the truth is known, the weights of the active ones move by the gradient of the cross-entropy: w[s, e] += rate
* gate * (share used - chance). An expert that never was active adds nothing.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled

Weights = npt.NDArray[np.float32]
Routes = npt.NDArray[np.int32]

SOURCE_LAYERS: Final = 6
"""The layer of the newest routing and the five before it, as far as WEIGHTS_BYTES reach: six more add two thousandths
of recall (gpt-oss, tuning half)."""
LEAST_SOURCES: Final = 3
WEIGHTS_BYTES: Final = 64 << 20
"""A model of so many experts that its weights would take more has fewer source layers, but LEAST_SOURCES."""
MAX_ACTIVE: Final = 32
"""Most active experts of a layer that are inputs; a step with more says little about who follows whom."""
NOBODY: Final = -1


def source_layers(n_layers: int, n_experts: int) -> int:
    """How many layers are inputs in a model of this size."""
    fit = WEIGHTS_BYTES // (4 * n_layers * n_experts * n_experts)
    return min(max(fit, LEAST_SOURCES), SOURCE_LAYERS)


def no_weights(n_layers: int, n_experts: int) -> Weights:
    """float32[n_layers, source layers, E, E]: nothing is known."""
    return np.zeros((n_layers, source_layers(n_layers, n_experts), n_experts, n_experts), np.float32)


def no_routes(n_steps: int, n_layers: int) -> tuple[Routes, Weights]:
    """Active experts int32[n_steps, n_layers, MAX_ACTIVE], filled up with NOBODY, and the gate weight of each over
    their mean, float32 of the same shape."""
    shape = n_steps, n_layers, MAX_ACTIVE
    return np.full(shape, NOBODY, np.int32), np.zeros(shape, np.float32)


@compiled
def write_route(routes: Routes, gates: Weights, step: int, layer: int, ids: Routes, scores: Weights) -> None:
    """Remembers the active experts ``ids`` (at most MAX_ACTIVE) of a layer; scores float32[E]: their gate weights."""
    total = 0.0
    for expert in ids:
        total += max(scores[expert], 0.0)
    for i in range(ids.size):
        routes[step, layer, i] = ids[i]
        gates[step, layer, i] = max(scores[ids[i]], 0.0) * ids.size / total if total > 0.0 else 1.0
    for i in range(ids.size, MAX_ACTIVE):
        routes[step, layer, i] = NOBODY


@compiled
def add_votes(
    weights: Weights, target: int, routes: Routes, gates: Weights, step: int, layer: int, votes: Weights
) -> None:
    """votes float32[E] += what the experts active in ``layer`` and those before it say about layer ``target``."""
    for back in range(min(weights.shape[1], layer + 1)):
        for i in range(MAX_ACTIVE):
            source = routes[step, layer - back, i]
            if source < 0:
                break
            row, gate = weights[target, back, source], gates[step, layer - back, i]
            for e in range(votes.size):
                votes[e] += gate * row[e]


@compiled
def correct(
    weights: Weights, target: int, routes: Routes, gates: Weights, step: int, layer: int, moves: Weights
) -> None:
    """Moves the weights of the experts active in ``layer`` and before for layer ``target`` by gate * ``moves``
    float32[E]."""
    for back in range(min(weights.shape[1], layer + 1)):
        for i in range(MAX_ACTIVE):
            source = routes[step, layer - back, i]
            if source < 0:
                break
            row, gate = weights[target, back, source], gates[step, layer - back, i]
            for e in range(moves.size):
                row[e] += gate * moves[e]
