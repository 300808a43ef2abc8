"""Prefetch from predicted routing: the gates of later layers applied to today's hidden state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.peers import hybrimoe
from scheduler.balancing.problem import ACCEL, ARRIVAL, CPU, TRANSFER
from scheduler.compiled import compiled
from scheduler.demand import Demand, Prediction
from scheduler.machine.costs import GRID_TOKENS
from scheduler.prefetch.base import NOTHING, PrefetchPolicy, Proposals
from scheduler.setting import Setting, integer, number

Floats = npt.NDArray[np.float64]


class Impact(PrefetchPolicy):
    """HybriMoE's impact-driven prefetch (arXiv 2504.05897, section 4.3).

    For the next ``lookahead`` layers, gain(e) = makespan of the layer's predicted demand without e resident minus that
    with it, by the paper's balance greedy. The largest gain goes first (ties: nearer layer, then lower id); the
    layer's gains are taken anew after each choice; ends where no gain is left.
    """

    @property
    def layers_ahead(self) -> int:
        return self.setting.lookahead

    def propose(self, demand: Demand, limit: int) -> Proposals:
        tables = [(p, self._table(p)) for p in self.ahead(demand) if p.expert_ids.size]
        gains = [impact_gains(table) for _, table in tables]
        keys: list[int] = []
        worth: list[float] = []
        while tables and len(keys) < limit:
            best = max(range(len(tables)), key=lambda i: (float(gains[i].max()), -i))
            position = int(gains[best].argmax())
            if not gains[best][position] > 0.0:
                break
            prediction, table = tables[best]
            keys.append(prediction.layer * self.setting.n_experts + int(prediction.expert_ids[position]))
            worth.append(float(gains[best][position]))
            table[ARRIVAL, position] = 0.0
            gains[best] = impact_gains(table)
        return (np.array(keys, np.int64), np.array(worth)) if keys else NOTHING

    def _table(self, prediction: Prediction) -> Floats:
        costs, layer = self.setting.costs, prediction.layer
        kind = costs.kind[layer]
        slots = self.setting.slots.slot_of[layer * self.setting.n_experts + prediction.expert_ids]
        return predicted_table(
            prediction.n_tokens,
            slots,
            costs.cpu_grid[kind],
            costs.accel_grid[kind],
            costs.drift,
            costs.transfer_us(layer),
        )


@compiled
def predicted_table(
    n_tokens: npt.NDArray[np.float32],
    slots: npt.NDArray[np.int64],
    cpu: Floats,
    accel: Floats,
    drift: Floats,
    link: float,
) -> Floats:
    """Cost table float64[5, P] of a predicted demand; token counts are rounded up, at least 1."""
    table = np.zeros((5, n_tokens.size))
    for i in range(n_tokens.size):
        n = min(max(int(np.ceil(n_tokens[i])), 1), GRID_TOKENS)
        table[CPU, i] = cpu[n] * drift[0]
        table[ACCEL, i] = accel[n] * drift[1]
        table[TRANSFER, i] = link
        table[ARRIVAL, i] = 0.0 if slots[i] >= 0 else -1.0
    return table


@compiled
def impact_gains(table: Floats) -> Floats:
    """float64[P]: makespan lost by each expert's absence (0 for residents), every lane free at 0."""
    n = table.shape[1]
    gains = np.zeros(n)
    ready, params, plan = np.zeros(3), np.zeros(2), np.empty((3, n + 1), np.int64)
    before = hybrimoe(table, ready, params, plan)[0]
    for i in range(n):
        if table[ARRIVAL, i] < 0.0:
            table[ARRIVAL, i] = 0.0
            gains[i] = before - hybrimoe(table, ready, params, plan)[0]
            table[ARRIVAL, i] = -1.0
    return gains


class GateTopK(PrefetchPolicy):
    """The predicted experts themselves, nearest layer first, high gate score first (ties: lower id).

    ``depth`` layers ahead (AdapMoE, arXiv 2408.10284: 1). ``only_if_cached``: go one layer deeper only while all
    predicted experts of the nearer ones hold slots (HOBBIT, arXiv 2411.01433). ``share``: take the experts above that
    percentile of all the layer's gate scores instead of every predicted one (Fate, arXiv 2502.12224: 0.75, an
    over-fetch; predictions must then name more than top-k experts). ``pieces``: an expert crosses the link in so many,
    and what a layer needs overtakes prefetches between them (ProMoE, arXiv 2410.22134); 0: whole, in order.
    """

    def __init__(
        self,
        setting: Setting,
        depth: int = 1,
        only_if_cached: bool = False,
        share: float | None = None,
        pieces: int = 0,
    ) -> None:
        super().__init__(setting)
        self.depth = integer("gate_topk", "depth", depth, 1)
        self.only_if_cached = bool(only_if_cached)
        self.share = None if share is None else number("gate_topk", "share", share, 0.0, 1.0)
        self._pieces = integer("gate_topk", "pieces", pieces, 0)

    @property
    def layers_ahead(self) -> int:
        return min(self.depth, self.setting.lookahead)

    @property
    def pieces(self) -> int:
        return self._pieces

    def propose(self, demand: Demand, limit: int) -> Proposals:
        keys: list[npt.NDArray[np.int64]] = []
        gains: list[Floats] = []
        for prediction in self.ahead(demand)[: self.depth]:
            chosen = np.argsort(-prediction.scores, kind="stable")[: self._width(prediction)]
            experts = prediction.expert_ids[chosen].astype(np.int64)
            absent = self.absent(prediction.layer, experts)
            if absent.any():
                keys.append(prediction.layer * self.setting.n_experts + experts[absent])
                gains.append(
                    self.saving_us(prediction.layer, np.maximum(prediction.n_tokens[chosen][absent], 1).astype(int))
                )
                if self.only_if_cached:
                    break
        if not keys:
            return NOTHING
        return np.concatenate(keys)[:limit], np.concatenate(gains)[:limit]

    def _width(self, prediction: Prediction) -> int:
        if self.share is None:
            return int(prediction.expert_ids.size)
        return max(1, round((1.0 - self.share) * self.setting.n_experts))
