"""From a layer call's tensors to what the scheduler and the kernels take: host arrays, dispatch, demand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import Dispatch, build_dispatch
from gpu_kernels import LayerWork
from hybrimoe.errors import ModelError
from scheduler import LayerDemand, Phase, Prediction

WORKSPACE_BYTES = 64 << 20
"""Result rows up to this size reuse one buffer; larger ones (long prompts) are allocated for the call."""


class Workspace:
    """The reused float32 buffer of result rows. One layer at a time, so one buffer a session."""

    def __init__(self) -> None:
        self._rows = np.empty(0, dtype=np.float32)

    def rows(self, n_rows: int, hidden: int) -> npt.NDArray[np.float32]:
        """float32 [n_rows, hidden], contents undefined."""
        size = n_rows * hidden
        if size * 4 > WORKSPACE_BYTES:
            return np.empty((n_rows, hidden), dtype=np.float32)
        if size > self._rows.size:
            self._rows = np.empty(size, dtype=np.float32)
        return self._rows[:size].reshape(n_rows, hidden)


def layer_work(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int, hidden_size: int,
    workspace: Workspace,
) -> LayerWork:  # fmt: skip
    """Checks one call's tensors and groups its routing by expert.

    hidden: [..., hidden_size] floating; top_k_index: [T, k] integer; top_k_weights: [T, k] floating. Raises ModelError
    where shapes do not fit together.
    """
    if hidden.shape[-1] != hidden_size or not hidden.is_floating_point():
        raise ModelError(f"experts expect floating hidden states [T, {hidden_size}], found {_describe(hidden)}")
    flat = hidden.detach().reshape(-1, hidden_size)
    top_k = top_k_index.shape[-1]
    if top_k_index.shape != top_k_weights.shape or top_k_index.numel() != len(flat) * top_k:
        raise ModelError(
            f"{len(flat)} tokens need top_k_index and top_k_weights [{len(flat)}, k], found"
            f" {_describe(top_k_index)} and {_describe(top_k_weights)}"
        )
    index, weights = top_k_index.detach().reshape(-1, top_k), top_k_weights.detach().reshape(-1, top_k)
    host_hidden = flat.to("cpu", torch.float32).contiguous().numpy()
    dispatch = build_dispatch(index.cpu().numpy(), weights.to("cpu", torch.float32).numpy(), num_experts)
    rows = workspace.rows(dispatch.n_tokens * dispatch.top_k, hidden_size)
    return LayerWork(dispatch, flat, host_hidden, rows)


def layer_demand(
    layer: int, phase: Phase, dispatch: Dispatch, n_experts: int, predictions: tuple[Prediction, ...]
) -> LayerDemand:
    """What the planner sees of a call. `n_experts`: of the planner, at least the layer's own."""
    offsets = dispatch.offsets
    scores = np.zeros(n_experts, dtype=np.float32)
    if len(dispatch.rows):
        scores[dispatch.expert_ids] = np.add.reduceat(dispatch.weights[dispatch.rows], offsets[:-1])
        if dispatch.n_tokens > 1:
            scores /= dispatch.n_tokens
    n_tokens = offsets[1:] - offsets[:-1]
    return LayerDemand(layer, phase, dispatch.n_tokens, dispatch.expert_ids, n_tokens, scores, predictions)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
