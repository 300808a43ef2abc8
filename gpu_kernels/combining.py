"""From result rows to the layer's output, on the host."""

from __future__ import annotations

import numpy as np
import torch

from cpu_kernels import combine
from gpu_kernels.accelerator import LayerWork


def combine_on_host(work: LayerWork) -> torch.Tensor:
    """[T, H] float32: each token's rows of `work.host_rows` added in top-k order. All lanes must have ended."""
    if work.transform is not None:
        _finish_rows(work)
    out = np.empty(work.host_hidden.shape, dtype=np.float32)
    combine(work.host_rows, work.dispatch, out)
    return torch.from_numpy(out)


def _finish_rows(work: LayerWork) -> None:
    """Applies `transform` and the routing weights to the rows that experts wrote, in place."""
    assert work.transform is not None
    assert work.weights is not None
    rows = work.dispatch.rows
    values = work.transform(torch.from_numpy(work.host_rows[rows])).float().numpy()
    work.host_rows[rows] = values * work.weights[rows, None]
