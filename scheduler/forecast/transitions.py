"""Which experts of the next layer follow which of this layer: running counts (compiled)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


@compiled
def count_transitions(counts: Floats, sources: Ids, targets: Ids, decay: float) -> None:
    """counts float32[E, E + 1] of one layer pair: row = source; column E = times the source was active.

    The rows of active sources decay by ``decay`` and count the active targets.
    """
    n = counts.shape[1] - 1
    for source in sources:
        for target in range(n + 1):
            counts[source, target] *= decay
        for target in targets:
            counts[source, target] += 1.0
        counts[source, n] += 1.0


@compiled
def follow(counts: Floats, sources: Ids, prior: npt.NDArray[np.float64], trust: float) -> npt.NDArray[np.float64]:
    """float64[E]: mean over active sources of P(target | source), shrunk to ``prior`` by ``trust`` pseudo-counts."""
    n = prior.size
    chance = np.zeros(n)
    for source in sources:
        scale = 1.0 / (counts[source, n] + trust)
        for target in range(n):
            chance[target] += (counts[source, target] + trust * prior[target]) * scale
    for target in range(n):
        chance[target] /= max(sources.size, 1)
    return chance
