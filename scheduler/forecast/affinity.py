"""Which experts follow those active now: an online logistic regression a layer, learnt while running (compiled).

Inputs are the experts that were active in the latest SOURCE_LAYERS layers, outputs the experts of one layer. An active
expert s adds its weight for e to the log-odds of e; when the truth is known, the weights of the active ones move by the
gradient of the cross-entropy: w[s, e] += rate * (share used - chance). An expert that never was active adds nothing.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled

Weights = npt.NDArray[np.float32]
Routes = npt.NDArray[np.int32]

SOURCE_LAYERS: Final = 3
"""The layer of the newest routing and the two before it: a fourth adds a hundredth of recall (gpt-oss, tuning half)."""
MAX_ACTIVE: Final = 32
"""Most active experts of a layer that are inputs; a step with more says little about who follows whom."""
NOBODY: Final = -1


def no_weights(n_layers: int, n_experts: int) -> Weights:
    """float32[n_layers, SOURCE_LAYERS, E, E]: nothing is known."""
    return np.zeros((n_layers, SOURCE_LAYERS, n_experts, n_experts), np.float32)


def no_routes(n_steps: int, n_layers: int) -> Routes:
    """int32[n_steps, n_layers, MAX_ACTIVE]: active experts, filled up with NOBODY."""
    return np.full((n_steps, n_layers, MAX_ACTIVE), NOBODY, np.int32)


@compiled
def write_route(routes: Routes, step: int, layer: int, ids: npt.NDArray[np.int32]) -> None:
    """Remembers the active experts ``ids`` (at most MAX_ACTIVE) of a layer."""
    for i in range(ids.size):
        routes[step, layer, i] = ids[i]
    for i in range(ids.size, MAX_ACTIVE):
        routes[step, layer, i] = NOBODY


@compiled
def add_votes(weights: Weights, target: int, routes: Routes, step: int, layer: int, votes: Weights) -> None:
    """votes float32[E] += what the experts active in ``layer`` and those before it say about layer ``target``."""
    for back in range(min(SOURCE_LAYERS, layer + 1)):
        for i in range(MAX_ACTIVE):
            source = routes[step, layer - back, i]
            if source < 0:
                break
            row = weights[target, back, source]
            for e in range(votes.size):
                votes[e] += row[e]


@compiled
def correct(weights: Weights, target: int, routes: Routes, step: int, layer: int, moves: Weights) -> None:
    """Moves the weights of the experts active in ``layer`` and before for layer ``target`` by ``moves`` float32[E]."""
    for back in range(min(SOURCE_LAYERS, layer + 1)):
        for i in range(MAX_ACTIVE):
            source = routes[step, layer - back, i]
            if source < 0:
                break
            row = weights[target, back, source]
            for e in range(moves.size):
                row[e] += moves[e]
