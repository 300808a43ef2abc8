"""Lossy policy ``defer``: results of the least experts come one layer later (Expert Deferral of KTransformers)."""

from __future__ import annotations

import numpy as np

from scheduler.lossy.base import DEFERRED, FULL, LossyPolicy, LossySetting, Rewritten, Routing, router_order
from scheduler.setting import integer


class Defer(LossyPolicy):
    """Expert Deferral (KTransformers, SOSP 2025): in decode, of each token's experts by falling routing weight the last
    ``experts`` that are not resident are DEFERRED.

    A layer's late experts run on the CPU while the model goes on, and their weighted results are added to the output of
    the next MoE layer: O_{l+1} = imm_{l+1}(x_{l+1}) + late_l(x_l). So no expert is skipped, but layer l + 1's attention
    and router do not see them. The last MoE layer defers nothing. The first ``immediate`` experts of a token are never
    late. An expert is late for all tokens of a call or for none: its weights are read once. In the source the experts
    on the accelerator are fixed, and those of the CPU are deferred up to a number; both defaults are ours.
    """

    name = "defer"

    def __init__(self, setting: LossySetting, experts: int = 2, immediate: int = 2) -> None:
        super().__init__(setting)
        self.experts = integer("defer", "experts", experts, 1)
        self.immediate = integer("defer", "immediate", immediate, 0)

    def rewrite(self, routing: Routing) -> Rewritten:
        ids, weights = routing.expert_ids, routing.weights
        if routing.phase == "prefill" or routing.layer >= self.setting.n_layers - 1:
            return Rewritten(ids, weights)
        order = router_order(weights, ids)
        ranked = np.take_along_axis(ids, order, axis=1)
        free = (ranked >= 0) & ~routing.resident[ranked]
        free[:, : self.immediate] = False
        from_the_end = np.cumsum(free[:, ::-1], axis=1)[:, ::-1]
        chosen = np.empty(ids.shape, np.bool_)
        np.put_along_axis(chosen, order, free & (from_the_end <= self.experts), axis=1)
        chosen &= ~np.isin(ids, ids[~chosen])
        if not chosen.any():
            return Rewritten(ids, weights)
        return Rewritten(ids, weights, np.where(chosen, np.uint8(DEFERRED), np.uint8(FULL)))
