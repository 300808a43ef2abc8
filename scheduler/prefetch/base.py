"""The interface of a prefetch policy: experts of later layers worth the idle link, best first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand, Prediction
from scheduler.setting import Setting

Proposals = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Keys int64[n] best first, none of them in a slot, and the gain in us float64[n] that each promises."""

NOTHING: Proposals = (np.empty(0, np.int64), np.empty(0))


class PrefetchPolicy:
    """Told of every demand; asked only when the link has room for ``limit`` transfers before the next demand."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    def layers_ahead(self) -> int:
        """How many following layers' predictions are read."""
        return 0

    @property
    def pieces(self) -> int:
        """In how many pieces the link carries an expert: between two of them what a layer needs overtakes prefetches.

        0: experts are carried whole, in order. Simulated; the runtime carries them whole.
        """
        return 0

    def begin_sequence(self) -> None:
        """A new sequence starts."""

    def observe(self, demand: Demand) -> None:
        """The routing of a layer is known."""

    def propose(self, demand: Demand, limit: int) -> Proposals:
        """At most ``limit`` experts."""
        raise NotImplementedError

    def ahead(self, demand: Demand) -> tuple[Prediction, ...]:
        """The demand's predictions within the look-ahead, nearest layer first."""
        last = demand.layer + self.setting.lookahead
        return tuple(sorted((p for p in demand.predictions if p.layer <= last), key=lambda p: p.layer))

    def absent(self, layer: int, experts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """bool[n]: which of a layer's experts hold no slot."""
        return np.asarray(self.setting.slots.slot_of[layer * self.setting.n_experts + experts] < 0, np.bool_)

    def saving_us(self, layer: int, n_tokens: npt.ArrayLike = 1) -> npt.NDArray[np.float64]:
        """us that a resident saves against the CPU, expert by expert."""
        costs = self.setting.costs
        return np.asarray(np.maximum(costs.cpu_us(layer, n_tokens) - costs.accel_us(layer, n_tokens), 0.0))


class NoPrefetch(PrefetchPolicy):
    """Never prefetches."""

    def propose(self, demand: Demand, limit: int) -> Proposals:
        return NOTHING


def best_first(keys: list[npt.NDArray[np.int64]], gains: list[npt.NDArray[np.float64]], limit: int) -> Proposals:
    """Joins parts, sorts by falling gain (ties: the order given) and cuts."""
    if not keys:
        return NOTHING
    joined, worth = np.concatenate(keys), np.concatenate(gains)
    order = np.argsort(-worth, kind="stable")[:limit]
    return joined[order], worth[order]
