"""Prefetch policy ``value`` (ours): what the next layer needs almost surely, if that beats what it would evict."""

from __future__ import annotations

import numpy as np

from scheduler.demand import LayerDemand
from scheduler.prefetch.base import NOTHING, PrefetchPolicy, Proposals
from scheduler.setting import Setting, number
from scheduler.transitions import count_transitions, follow

COUNT_DECAY = 0.998
PRIOR_TRUST = 8.0


class ValuePrefetch(PrefetchPolicy):
    """Experts of the next layer whose chance of use now is above ``certainty``; gain = chance * saving + later worth.

    The chance is the gate's prediction where there is one, else the mean of P(expert | active experts of this layer)
    from running counts, shrunk to the expert's own rate.
    """

    def __init__(self, setting: Setting, certainty: float = 0.75) -> None:
        super().__init__(setting)
        self.certainty = number("value", "certainty", certainty, 0.0, 1.0)
        n_layers, n_experts = setting.n_layers, setting.n_experts
        self.counts = np.zeros((n_layers, n_experts, n_experts + 1), np.float32)
        self.rate = np.zeros((n_layers, n_experts))
        self.previous: LayerDemand | None = None

    def begin_sequence(self) -> None:
        self.previous = None

    def observe(self, demand: LayerDemand) -> None:
        before = self.previous
        if before is not None and before.layer + 1 == demand.layer:
            count_transitions(self.counts[before.layer], before.expert_ids, demand.expert_ids, COUNT_DECAY)
        self.previous = demand
        self.rate[demand.layer] *= 0.95
        self.rate[demand.layer, demand.expert_ids] += 0.05

    def propose(self, demand: LayerDemand, limit: int) -> Proposals:
        layer = demand.layer + 1
        if layer >= self.setting.n_layers:
            return NOTHING
        n = self.setting.n_experts
        chance = follow(self.counts[demand.layer], demand.expert_ids, self.rate[layer], PRIOR_TRUST)
        for prediction in demand.predictions:
            if prediction.layer == layer:
                chance[prediction.expert_ids] = np.maximum(chance[prediction.expert_ids], 0.9)
        chance[self.setting.slots.slot_of[layer * n : layer * n + n] >= 0] = 0.0
        order = np.argsort(-chance, kind="stable")[:limit]
        order = order[chance[order] >= self.certainty]
        return layer * n + order, chance[order] * 4.0 * self.saving_us(layer)
