"""Simulated lanes that carry experts in two precisions, and experts whose results come late."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.machine.costs import CostModel
from scheduler.plan import LayerPlan, Transfer
from scheduler.simulator.engine import Engine

Floats = NDArray[np.float64]


@dataclass(slots=True)
class PairEngine(Engine):
    """Expert ids from ``n_experts`` on are the low-precision copies of those below.

    Late experts keep the CPU lane beyond the end of their layer, until ``late_until_us``; the next one waits for them.
    """

    low_costs: CostModel | None = None
    low_bytes: int = 0
    n_experts: int = 0
    late_until_us: float = 0.0
    _cpu_free_us: float = 0.0

    def wait_for_late(self) -> None:
        """The layer needs the late results of the one before it."""
        if self.late_until_us > self.now_us:
            self._advance_link(self.late_until_us)
            self.now_us = self.late_until_us

    def start_late(self, us: float) -> None:
        """``us`` of late experts follow this layer's work on the CPU lane."""
        self.late_until_us = max(self._cpu_free_us, self.late_until_us) + us
        self.busy.cpu += us

    def _cpu_from(self, plan: LayerPlan) -> Floats:
        return np.maximum(Engine._cpu_from(self, plan), self.late_until_us)

    def _account(
        self, plan: LayerPlan, tokens: dict[int, int], times: tuple[Floats, ...], began_us: float, shared_us: float
    ) -> None:
        self._cpu_free_us = max(float(times[1].max(initial=began_us)), began_us)
        Engine._account(self, plan, tokens, times, began_us, shared_us)

    def _compute_us(self, plan: LayerPlan, tokens: dict[int, int]) -> tuple[Floats, Floats]:
        own, low = self.costs, self.low_costs or self.costs

        def us(experts: tuple[int, ...], lane: str) -> Floats:
            models = [low if expert >= self.n_experts else own for expert in experts]
            each = zip(experts, models, strict=True)
            return np.array([float(getattr(model, lane)(plan.layer, tokens[e])) for e, model in each], np.float64)

        return us(plan.cpu, "cpu_us"), us(plan.accel, "accel_us")

    def _transfer_us(self, transfer: Transfer) -> float:
        low = self.low_costs if transfer.expert >= self.n_experts else None
        return (low or self.costs).transfer_us(transfer.layer)

    def _transfer_bytes(self, transfer: Transfer) -> int:
        return self.low_bytes if transfer.expert >= self.n_experts else self.expert_bytes
