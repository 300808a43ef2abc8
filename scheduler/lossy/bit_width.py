"""Lossy policy ``bit_width``: experts of one layer in different precision, by sensitivity, under a memory budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.demand import Prediction
from scheduler.errors import PolicyError
from scheduler.lossy.base import FULL, LOW, LossyPolicy, LossySetting, Rewritten, Routing
from scheduler.setting import integer, number

LEAST_BUDGET = 0.5
"""Share of the full-precision bytes that is kept if nothing else is asked for."""


class BitWidth(LossyPolicy):
    """Bit width per expert (EdgeMoE, arXiv 2308.14352, section 4.1), chosen once when the model is loaded.

    Sensitivity of an expert = relative error of its output in low precision * how often it is used. All experts start
    low; full precision goes to the most sensitive ones as long as all records together fit the budget. Upgrades cost
    the same bytes each, so this greedy choice by marginal gain is the best one (a knapsack with equal weights). Ties:
    the earlier layer, the lower expert. An expert lives in one of the two stores only.

    budget: share of the bytes of all experts in full precision; ``budget_bytes`` instead: a size.
    """

    name = "bit_width"
    uses_low_copy = True
    one_copy = True

    def __init__(self, setting: LossySetting, budget: float = LEAST_BUDGET, budget_bytes: int | None = None) -> None:
        super().__init__(setting)
        share = number(self.name, "budget", budget, 0.0, 1.0)
        n_bytes = None if budget_bytes is None else integer(self.name, "budget_bytes", budget_bytes, 1)
        shape = (setting.n_layers, setting.n_experts)
        errors = np.ones(shape) if setting.low_errors is None else setting.low_errors
        used = np.ones(shape) if setting.frequencies is None else setting.frequencies
        all_bytes = int(np.count_nonzero(setting.exists)) * setting.expert_bytes
        self.low = choose_low(
            np.where(setting.exists, errors * used, -1.0), setting.exists, setting.expert_bytes, setting.low_bytes,
            int(share * all_bytes) if n_bytes is None else n_bytes,
        )  # fmt: skip

    def rewrite(self, routing: Routing) -> Rewritten:
        ids = routing.expert_ids
        low = (ids >= 0) & self.low[routing.layer][ids]
        if not low.any():
            return Rewritten(ids, routing.weights)
        parts = np.where(low, np.uint8(LOW), np.uint8(FULL))
        return Rewritten(ids, routing.weights, parts, lowered=int(low.sum()))

    def predicted(self, predictions: tuple[Prediction, ...]) -> tuple[Prediction, ...]:
        found = []
        for item in predictions:
            full = ~self.low[item.layer][item.expert_ids]
            found.append(Prediction(item.layer, item.expert_ids[full], item.n_tokens[full], item.scores[full]))
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        return {"low_experts": int(self.low.sum()), "full_experts": int((~self.low & self.setting.exists).sum())}


def choose_low(
    sensitivity: npt.NDArray[np.float64], exists: npt.NDArray[np.bool_], full_bytes: int, low_bytes: int,
    budget_bytes: int,
) -> npt.NDArray[np.bool_]:  # fmt: skip
    """bool[L, E]: experts that are stored in low precision, so that all of them fit ``budget_bytes``.

    Raises PolicyError where not even the low records do.
    """
    n_experts = int(np.count_nonzero(exists))
    least_bytes = n_experts * low_bytes
    if budget_bytes < least_bytes:
        raise PolicyError(
            f"bit_width: {n_experts} experts in low precision take {least_bytes} bytes, the budget is {budget_bytes};"
            f" give at least that (a share of {least_bytes / max(n_experts * full_bytes, 1):.2f})"
        )
    upgrade_bytes = full_bytes - low_bytes
    n_full = n_experts if upgrade_bytes <= 0 else min(n_experts, (budget_bytes - least_bytes) // upgrade_bytes)
    low = exists.copy()
    low.ravel()[np.argsort(-sensitivity.ravel(), kind="stable")[:n_full]] = False
    return low
