"""Prefetch policy ``value`` (ours): absent experts whose expected saving beats the link's price and what they evict."""

from __future__ import annotations

import numpy as np

from scheduler.compiled import compiled
from scheduler.demand import Demand
from scheduler.forecast.value_model import ValueModel
from scheduler.prefetch.base import NOTHING, PrefetchPolicy, Proposals
from scheduler.setting import Setting, number

CPU_WORKS = 0.5
"""Part of a transfer's time in which the CPU computes experts and can lose time to it (0.4 to 0.56 in simulated decode
at 25 % cached, tuning half)."""
DELAY_SHARE = 0.05
"""Part of a transfer's time by which later demand on the link is delayed on average (tuned)."""


@compiled
def worth_us(chance: float, saving_us: float, price_us: float) -> float:
    """What bringing an expert gains. Compiled wherever it is asked for: machine code rounds product and difference as
    one (a fused multiply-add), Python rounds each."""
    return chance * saving_us - price_us


class ValuePrefetch(PrefetchPolicy):
    """gain = chance * saving - price of the link, for absent experts of the layers ahead with chance >= ``certainty``.

    The layers ahead are those that pass while a transfer runs (``value_model``), the nearest first. The chance is
    measured: forecasts and gate predictions of absent experts are binned, and the share that came true is kept per
    layer. The price is ``link_share`` of a transfer's time; by default the CPU time lost to contention, CPU_WORKS *
    (1 - the CPU's share of its rate beside the link), plus DELAY_SHARE. In a prefill, which uses nearly every expert,
    the next layer's absent experts are streamed in by expected load, each worth what it saves with those tokens.
    """

    def __init__(self, setting: Setting, certainty: float = 0.4, link_share: float | None = None) -> None:
        super().__init__(setting)
        self.certainty = number("value", "certainty", certainty, 0.0, 1.0)
        contended = CPU_WORKS * (1.0 - setting.costs.cpu_with_link) + DELAY_SHARE
        self.link_share = contended if link_share is None else number("value", "link_share", link_share, 0.0, 10.0)
        self.model = ValueModel.of(setting)

    @property
    def layers_ahead(self) -> int:
        return min(self.model.distance, self.setting.lookahead)

    def propose(self, demand: Demand, limit: int) -> Proposals:
        model = self.model
        if not model.few:
            return self._streamed(demand, limit)
        if not self.setting.lookahead:
            return NOTHING
        layer = demand.layer
        keys, chances = model.sure(layer, self.certainty)
        if not keys.size:
            return NOTHING
        price = self.link_share * self.setting.costs.transfer_us(layer, cpu_busy=True)
        saving_us = model.saving_us(layer)
        gains = [worth_us(chance, saving_us, price) for chance in chances[:limit].tolist()]
        return keys[:limit].copy(), np.array(gains)

    def _streamed(self, demand: Demand, limit: int) -> Proposals:
        """Absent experts of the next layer, heaviest expected load first (ties: lower id)."""
        layer, n = demand.layer + 1, self.setting.n_experts
        if layer >= self.setting.n_layers or not self.setting.lookahead:
            return NOTHING
        loads = self.model.loads(layer, demand)
        gains = self.model.load_saving_us(layer, loads)
        gains -= self.link_share * self.setting.costs.transfer_us(layer, cpu_busy=True)
        absent = np.flatnonzero((self.setting.slots.slot_of[layer * n : layer * n + n] < 0) & (gains > 0.0))
        best = absent[np.argsort(-loads[absent], kind="stable")][:limit]
        return best + layer * n, gains[best]
