"""Routing learned from hidden states: what a layer's router saw says which experts later layers will choose.

ProMoE (arXiv 2410.22134) predicts so in place of the later layers' gates; PreScope (arXiv 2509.23638) and DALI correct
what these gates say of today's state. Both learn small nets; here it is a ridge regression a layer and distance, which
has one solution and needs few tokens. What it is worth: docs/systems.md.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scheduler.traces.trace import Trace, TraceError

HiddenKind = Literal["hidden", "residual"]
RIDGE_SHARE = 0.003
"""Ridge by the mean square of the inputs, which are about 1, and the number of tokens."""
Singles = NDArray[np.float32]


class HiddenPredictor:
    """For each layer l and distance d: P(expert of layer l + d is used) = W [state of l, constant], cut to 0..1.

    ``hidden``: from the state alone, as ProMoE. ``residual``: the ranks that the gate of layer l + d gave on that state
    (the trace's ``predicted_ids``) are inputs, too, so that the rest corrects them.
    """

    def __init__(self, kind: HiddenKind = "hidden", horizon: int = 3) -> None:
        self.kind, self.horizon = kind, horizon
        self._weights: dict[tuple[int, int], Singles] = {}

    def fit(self, trace: Trace) -> HiddenPredictor:
        """Learn from a trace with hidden states (and, for ``residual``, predictions). Raises TraceError without."""
        self._require(trace)
        for ahead in range(1, self._reach(trace) + 1):
            for layer in range(trace.n_layers - ahead):
                inputs = self._inputs(trace, layer, ahead)
                used = _used(trace.expert_ids[:, layer + ahead], trace.n_experts)
                square = inputs.T @ inputs
                square[np.diag_indices_from(square)] += RIDGE_SHARE * len(inputs)
                self._weights[layer, ahead] = np.linalg.solve(square, inputs.T @ used).astype(np.float32)
        return self

    def predict(self, trace: Trace) -> tuple[NDArray[np.int16], Singles]:
        """Of each token, layer and distance the best ``top_k`` experts, ids int16 and chances float32 [tokens, layers,
        horizon, top_k]; -1 and 0 beyond the last layer. Raises TraceError where the trace is not like the learned."""
        self._require(trace)
        n_tokens, n_layers, top_k = trace.expert_ids.shape
        ids = np.full((n_tokens, n_layers, self.horizon, top_k), -1, np.int16)
        chances = np.zeros(ids.shape, np.float32)
        for ahead in range(1, self._reach(trace) + 1):
            for layer in range(n_layers - ahead):
                inputs, weights = self._inputs(trace, layer, ahead), self._weights[layer, ahead]
                if inputs.shape[1] != len(weights):
                    raise TraceError(
                        f"trace {trace.name!r}: inputs of width {inputs.shape[1]} for a predictor of {len(weights)};"
                        " the traces must be of one model, recorded with the same --hidden"
                    )
                chance = np.clip(inputs @ weights, 0.0, 1.0)
                best = np.argsort(-chance, axis=1, kind="stable")[:, :top_k]
                ids[:, layer, ahead - 1] = best
                chances[:, layer, ahead - 1] = np.take_along_axis(chance, best, axis=1)
        return ids, chances

    def _reach(self, trace: Trace) -> int:
        known = trace.predicted_ids
        reach = self.horizon if self.kind == "hidden" or known is None else min(self.horizon, known.shape[2])
        return min(reach, trace.n_layers - 1)

    def _inputs(self, trace: Trace, layer: int, ahead: int) -> Singles:
        """float32 [tokens, width]: state, constant, and the gate's ranks."""
        assert trace.hidden is not None
        parts = [trace.hidden[:, layer].astype(np.float32), np.ones((trace.n_tokens, 1), np.float32)]
        if self.kind == "residual":
            assert trace.predicted_ids is not None
            parts.append(_ranks(trace.predicted_ids[:, layer, ahead - 1], trace.n_experts))
        return np.concatenate(parts, axis=1)

    def _require(self, trace: Trace) -> None:
        if trace.hidden is None:
            raise TraceError(
                f"trace {trace.name!r} has no hidden states to predict from; record it with `hybrimoe trace record"
                " --hidden 256`, or use predictions 'recorded', 'transition' or 'none'"
            )
        if self.kind == "residual" and trace.predicted_ids is None:
            raise TraceError(f"trace {trace.name!r} has no predicted_ids to correct; use predictions 'hidden'")


def _used(ids: NDArray[np.int16], n_experts: int) -> Singles:
    """float32 [tokens, experts]: 1 where an expert is used; ids -1 are none."""
    used = np.zeros((len(ids), n_experts + 1), np.float32)
    np.put_along_axis(used, ids.astype(np.int64), 1.0, axis=1)
    return used[:, :-1]


def _ranks(ids: NDArray[np.int16], n_experts: int) -> Singles:
    """float32 [tokens, experts]: 1 for the best of p guesses, 1 - 1 / p for the next, ..., 0 for those not named."""
    ranks = np.zeros((len(ids), n_experts + 1), np.float32)
    width = ids.shape[1]
    falling = np.broadcast_to(np.arange(width, 0, -1, dtype=np.float32) / width, ids.shape)
    np.put_along_axis(ranks, ids.astype(np.int64), falling, axis=1)
    return ranks[:, :-1]
