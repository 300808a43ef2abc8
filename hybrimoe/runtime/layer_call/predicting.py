"""The routing of the next layers as a call foretells it: to the planner as far as it reads it, to a recorder all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.routing import CallSpace, host_index
from hybrimoe.runtime.layer_call.stages import LossyStage
from scheduler import Prediction
from scheduler.demand import copied
from scheduler.forecast.affinity import MAX_ACTIVE
from scheduler.planner.protocol import LayerPlanner

RoutingRecorder = Callable[[int, npt.NDArray[np.integer], npt.NDArray[np.float32], tuple[Prediction, ...]], None]


def predict(
    space: CallSpace, top_k_index: torch.Tensor, lookahead: Lookahead | None, planner: LayerPlanner | None,
    lossy: LossyStage | None, layers_ahead: int = 0,
) -> tuple[Prediction, ...]:  # fmt: skip
    """Routing of as many following layers as the planner reads, and of the next `layers_ahead` in any case.

    Predictions may be a workspace of the lookahead, filled anew by the layer's next call.
    """
    planned = 0 if planner is None or planner.all_cached else planner.layers_ahead
    n_layers = max(planned, layers_ahead)
    if lookahead is None or not n_layers:
        return ()
    work = space.work
    if not lookahead.knows_all:
        _learn(space, top_k_index, lookahead)
    top_k = work.dispatch.top_k
    skipped = 0 if planner is None or layers_ahead or top_k > MAX_ACTIVE else planner.layers_skipped
    found = lookahead.predict(space.index, work.hidden, work.host_hidden, top_k, n_layers, skipped)
    return found if lossy is None else lossy.policy.predicted(found)


def record(
    recorder: RoutingRecorder, space: CallSpace, top_k_index: torch.Tensor, lookahead: Lookahead | None,
    lossy: LossyStage | None,
) -> tuple[Prediction, ...]:  # fmt: skip
    """Routing of all layers within lookahead. The recorder is told, of the router's own routing as well, whatever a
    lossy policy makes of it."""
    work, dispatch = space.work, space.work.dispatch
    predictions: tuple[Prediction, ...] = ()
    if lookahead is not None:
        _learn(space, top_k_index, lookahead)
        predictions = lookahead.predict(space.index, work.hidden, work.host_hidden, dispatch.top_k)
    weights = work.weights
    if lossy is not None:
        predictions, weights = lossy.policy.predicted(predictions), lossy.router_weights
    shape = dispatch.n_tokens, dispatch.top_k
    given = dispatch.weights if weights is None else weights
    recorder(space.index, host_index(top_k_index).reshape(shape), given.reshape(shape).copy(), copied(predictions))
    return predictions


def _learn(space: CallSpace, top_k_index: torch.Tensor, lookahead: Lookahead) -> None:
    """Lets the lookahead find the layer's gate in its first call."""
    if not lookahead.learned(space.index):
        rows = space.work.hidden.reshape(space.work.host_hidden.shape)
        lookahead.learn(space.index, rows, host_index(top_k_index).reshape(len(rows), -1))
