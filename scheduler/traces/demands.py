"""From the routing of a trace to the demands that the planner sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand, Phase, Prediction
from scheduler.traces.predictions import Predictions
from scheduler.traces.trace import Trace, TraceStep


class DemandSource:
    """Builds the :class:`LayerDemand` of each step and layer of a trace.

    ``gate_scores`` is the mean over the step's tokens of the gate's probability where the trace has it for all experts,
    else of the routing weight; without recorded weights every selected expert of a token counts 1 / top_k.
    """

    def __init__(self, trace: Trace, predictions: Predictions | None = None) -> None:
        self.trace = trace
        self.predictions = predictions
        self._order = np.argsort(trace.expert_ids, axis=-1, kind="stable")
        self._ids = np.take_along_axis(trace.expert_ids, self._order, axis=-1).astype(np.int32)
        weights = _weights(trace)
        self._weights = np.take_along_axis(weights, self._order, axis=-1)
        self._made: dict[tuple[int, int, int], LayerDemand] = {}

    def layer(self, step: TraceStep, layer: int) -> LayerDemand:
        """Demand of MoE layer ``layer`` for the tokens of ``step``; made once, since several policies ask for it."""
        key = (step.start, step.stop, layer)
        if key not in self._made:
            self._made[key] = self._make(step, layer)
        return self._made[key]

    def _make(self, step: TraceStep, layer: int) -> LayerDemand:
        ids = self._ids[step.start : step.stop, layer].ravel()
        weights = self._weights[step.start : step.stop, layer].ravel()
        made = demand_of(
            layer, step.phase, step.n_tokens, ids, weights, self.trace.n_experts, self.predicted(step, layer)
        )
        known = self.trace.gate_scores
        if known is None:
            return made
        return replace(made, gate_scores=known[step.start : step.stop, layer].mean(axis=0, dtype=np.float32))

    def step(self, step: TraceStep) -> Iterator[LayerDemand]:
        """Demands of all layers in order."""
        for layer in range(self.trace.n_layers):
            yield self.layer(step, layer)

    def routing(self, step: TraceStep) -> NDArray[np.int16]:
        """Expert ids [tokens, layers, top_k] of the step, for the oracles."""
        return self.trace.expert_ids[step.start : step.stop]

    def routed(self, step: TraceStep, layer: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Expert ids and weights [tokens, top_k] of the step at a layer, each token's ids ascending (absent first)."""
        rows = slice(step.start, step.stop)
        return self._ids[rows, layer], self._weights[rows, layer]

    def predicted(self, step: TraceStep, layer: int) -> tuple[Prediction, ...]:
        """Predicted demand of the layers after `layer`."""
        predictions = self.predictions
        if predictions is None:
            return ()
        found = []
        for ahead in range(1, predictions.horizon + 1):
            if layer + ahead >= self.trace.n_layers:
                break
            ids = predictions.ids[step.start : step.stop, layer, ahead - 1]
            scores = predictions.scores[step.start : step.stop, layer, ahead - 1]
            prediction = _prediction(layer + ahead, ids, scores, self.trace.n_experts)
            if prediction is not None:
                found.append(prediction)
        return tuple(found)


def demand_of(
    layer: int, phase: Phase, n_tokens: int, ids: NDArray[np.int32], weights: NDArray[np.floating], n_experts: int,
    predictions: tuple[Prediction, ...],
) -> LayerDemand:  # fmt: skip
    """The demand of flat routing: expert ids (-1 absent) and weights of all tokens' entries."""
    present = ids >= 0
    if not present.all():
        ids, weights = ids[present], weights[present]
    scores = np.bincount(ids, weights, n_experts) / n_tokens
    if n_tokens == 1 and _ascends(ids):
        experts, counts = ids, np.ones(ids.size, np.int32)
    else:
        per_expert = np.bincount(ids, minlength=n_experts)
        experts = np.flatnonzero(per_expert).astype(np.int32)
        counts = per_expert[experts].astype(np.int32)
    return LayerDemand(layer, phase, n_tokens, experts, counts, scores.astype(np.float32), predictions)


def _weights(trace: Trace) -> NDArray[np.float64]:
    if trace.expert_weights is not None:
        return trace.expert_weights.astype(np.float64)
    return np.where(trace.expert_ids >= 0, 1.0 / trace.top_k, 0.0)


def _ascends(ids: NDArray[np.int32]) -> bool:
    return bool((ids[1:] > ids[:-1]).all())


def _prediction(layer: int, ids: NDArray[np.int16], scores: NDArray[np.float32], n_experts: int) -> Prediction | None:
    """Predicted demand of one layer from ids and scores [tokens, p]; None where nothing was predicted."""
    n_tokens = ids.shape[0]
    flat, weight = ids.ravel().astype(np.int32), scores.ravel()
    present = flat >= 0
    if not present.any():
        return None
    flat, weight = flat[present], weight[present]
    if n_tokens == 1:
        return Prediction(layer, flat, np.ones(flat.size, np.float32), weight.astype(np.float32))
    counts = np.bincount(flat, minlength=n_experts)
    mean_score = np.bincount(flat, weight, n_experts) / n_tokens
    experts = np.flatnonzero(counts).astype(np.int32)
    return Prediction(layer, experts, counts[experts].astype(np.float32), mean_score[experts].astype(np.float32))
