"""Lossy policy ``hobbit``: precision by rank (HOBBIT, arXiv 2411.01433, section 3.2)."""

from __future__ import annotations

import numpy as np

from scheduler.errors import PolicyError
from scheduler.lossy.base import (
    ABSENT,
    FULL,
    LOW,
    LossyPolicy,
    LossySetting,
    Rewritten,
    Routing,
    renormalised,
    router_order,
    shares,
)
from scheduler.setting import flag, number


class Hobbit(LossyPolicy):
    """A token's experts by falling routing weight w (as shares of the token's sum); s_i = w_0 + .. + w_{i-1}.

    s_i <= t1: full precision; t1 < s_i <= t2: the low copy; above: skipped. Rank 0 is always full. As in the source
    this is for experts that are not resident (``misses_only``); False applies it to all of them, which makes the
    result independent of the cache. ``renormalise``: the weights of skipped experts go to the others.
    """

    name = "hobbit"
    uses_low_copy = True

    def __init__(
        self, setting: LossySetting, t1: float = 0.6, t2: float = 0.9, misses_only: bool = True,
        renormalise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(setting)
        self.t1, self.t2 = number("hobbit", "t1", t1, 0.0, 1.0), number("hobbit", "t2", t2, 0.0, 1.0)
        if self.t1 > self.t2:
            raise PolicyError(f"hobbit: t1 must not be above t2, found t1={t1} and t2={t2}")
        self.misses_only = flag("hobbit", "misses_only", misses_only)
        self.renormalise = flag("hobbit", "renormalise", renormalise)

    def rewrite(self, routing: Routing) -> Rewritten:
        ids, weights = routing.expert_ids, routing.weights
        share = shares(weights, ids)
        order = router_order(weights, ids)
        ranked = np.take_along_axis(share, order, axis=1)
        before = np.empty_like(ranked)
        np.put_along_axis(before, order, np.cumsum(ranked, axis=1) - ranked, axis=1)
        first = np.zeros(ids.shape, np.bool_)
        np.put_along_axis(first, order[:, :1], True, axis=1)
        free = (ids >= 0) & ~first
        if self.misses_only:
            free &= ~routing.resident[ids]
        skip, low = free & (before > self.t2), free & (before > self.t1) & (before <= self.t2)
        kept = np.where(skip, np.int32(ABSENT), ids)
        parts = np.where(low, np.uint8(LOW), np.uint8(FULL))
        lowered = int(low.sum())
        if self.renormalise and skip.any():
            weights = renormalised(weights, ids, weights, kept)
        return Rewritten(kept, weights, parts if lowered else None, skipped=int(skip.sum()), lowered=lowered)
