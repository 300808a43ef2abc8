"""From result rows to the layer's output, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpu_kernels.engine.routed import FLOATS, sum_rows
from gpu_kernels.accelerator import Event, LayerWork


def combine_on_host(work: LayerWork, events: Sequence[Event] = ()) -> torch.Tensor:
    """Each token's rows of `work.host_rows` added in top-k order: `work.out`, or like `work.like`, or float32 [T, H].

    Waits for `events`; the CPU lane must have ended. Raises LaneError where a lane failed.
    """
    out = _new_output(work) if work.out is None else work.out
    for event in events:
        event.wait()
    if work.transform is not None:
        _finish_rows(work)
    dispatch = work.dispatch
    sum_rows(work.host_rows, dispatch.rows, dispatch.top_k, out.data_ptr(), FLOATS[out.dtype], dispatch.n_tokens)
    return out


def _new_output(work: LayerWork) -> torch.Tensor:
    if work.like is not None:
        return torch.empty_like(work.like)
    return torch.empty(work.host_hidden.shape, dtype=torch.float32)


def _finish_rows(work: LayerWork) -> None:
    """Applies `transform` and the routing weights to the rows that experts wrote, in place."""
    assert work.transform is not None
    assert work.weights is not None
    rows = work.dispatch.rows
    values = work.transform(torch.from_numpy(work.host_rows[rows])).float().numpy()
    work.host_rows[rows] = values * work.weights[rows, None]
