"""Lossy policy ``d2moe``: bit width by gate weight over nested planes (D2MoE, arXiv 2504.15299)."""

from __future__ import annotations

import numpy as np

from scheduler.lossy.base import LossyPolicy, LossySetting, Rewritten, Routing, shares
from scheduler.setting import number


class D2Moe(LossyPolicy):
    """The high two bits of an int4 expert are an expert by themselves; the link brings them first, the low two bits
    only where they are worth it.

    An expert is computed from all its bits if some token of the call gives it at least ``full_share`` of its weight
    (1 / k, an even share, if not given); else from what its slot holds. The CPU always has all bits. In the source a
    trained second router chooses the width, from 2 to 8 bits; the gate weight as its measure, and 2 or 4 bits, are
    ours. Its order, hottest expert's bits first, is: high bits at any transfer, low bits with them only for an expert
    that is wanted now, never for a prefetch.
    """

    name = "d2moe"
    uses_planes = True

    def __init__(self, setting: LossySetting, full_share: float | None = None) -> None:
        super().__init__(setting)
        self.full_share = None if full_share is None else number("d2moe", "full_share", full_share, 0.0, 1.0)

    def rewrite(self, routing: Routing) -> Rewritten:
        ids, weights = routing.expert_ids, routing.weights
        least = 1.0 / ids.shape[1] if self.full_share is None else self.full_share
        whole = np.zeros(routing.resident.size, np.bool_)
        whole[ids[(ids >= 0) & (shares(weights, ids) >= least)]] = True
        return Rewritten(ids, weights, whole=whole)
