"""From a layer call's tensors to what the scheduler and the kernels take: host arrays, dispatch, demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import Dispatch, build_dispatch
from cpu_kernels.engine.routed import FLOATS, fits, read_call
from gpu_kernels import LayerWork
from hybrimoe.errors import ModelError
from hybrimoe.runtime.layer_call.compiled import describe_routing
from scheduler import LayerDemand, Phase, Prediction

WORKSPACE_BYTES = 64 << 20
"""Result rows up to this size reuse one buffer; larger ones (long prompts) are allocated for the call."""


class Workspace:
    """The reused float32 buffers of inputs and result rows. One layer at a time, so one of each a session."""

    def __init__(self) -> None:
        self._rows = np.empty(0, dtype=np.float32)
        self._inputs = np.empty((0, 0), dtype=np.float32)

    def inputs(self, n_tokens: int, hidden: int) -> npt.NDArray[np.float32]:
        """float32 [n_tokens, hidden] of a call of few tokens, contents undefined."""
        if self._inputs.shape != (n_tokens, hidden):
            self._inputs = np.empty((n_tokens, hidden), dtype=np.float32)
        return self._inputs

    def rows(self, n_rows: int, hidden: int) -> npt.NDArray[np.float32]:
        """float32 [n_rows, hidden], contents undefined."""
        size = n_rows * hidden
        if size * 4 > WORKSPACE_BYTES:
            return np.empty((n_rows, hidden), dtype=np.float32)
        if size > self._rows.size:
            self._rows = np.empty(size, dtype=np.float32)
        return self._rows[:size].reshape(n_rows, hidden)


@dataclass(frozen=True, slots=True, eq=False)
class CallInputs:
    """One call's tensors on the host: host_hidden float32 [T, H], ids integer [T, k], weights float32 [T, k]."""

    hidden: torch.Tensor
    host_hidden: npt.NDArray[np.float32]
    ids: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]

    def work(
        self, ids: npt.NDArray[np.integer], weights: npt.NDArray[np.float32], num_experts: int, workspace: Workspace
    ) -> LayerWork:
        """The work of this routing of the call (the router's, or a part of it), grouped by expert."""
        dispatch = build_dispatch(ids, weights, num_experts)
        rows = workspace.rows(dispatch.n_tokens * dispatch.top_k, self.host_hidden.shape[1])
        return LayerWork(dispatch, self.hidden, self.host_hidden, rows)


def call_inputs(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, hidden_size: int
) -> CallInputs:
    """Checks one call's tensors and brings them to the host.

    hidden: [..., hidden_size] floating; top_k_index: [T, k] integer; top_k_weights: [T, k] floating. Raises ModelError
    where shapes do not fit together.
    """
    if hidden.shape[-1] != hidden_size or not hidden.is_floating_point():
        raise ModelError(f"experts expect floating hidden states [T, {hidden_size}], found {_describe(hidden)}")
    hidden = hidden.detach()
    host_hidden = host_floats(hidden).reshape(-1, hidden_size)
    top_k = top_k_index.shape[-1]
    if top_k_index.shape != top_k_weights.shape or top_k_index.numel() != len(host_hidden) * top_k:
        raise ModelError(
            f"{len(host_hidden)} tokens need top_k_index and top_k_weights [{len(host_hidden)}, k], found"
            f" {_describe(top_k_index)} and {_describe(top_k_weights)}"
        )
    weights = host_floats(top_k_weights.detach()).reshape(-1, top_k)
    return CallInputs(hidden, host_hidden, host_index(top_k_index).reshape(-1, top_k), weights)


def layer_work(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int, hidden_size: int,
    workspace: Workspace,
) -> LayerWork:  # fmt: skip
    """Checks one call's tensors and groups its routing by expert; see `call_inputs`."""
    if fits(hidden, top_k_index, top_k_weights, hidden_size) and not hidden.requires_grad:
        work = _short_work(hidden, top_k_index, top_k_weights, num_experts, hidden_size, workspace)
        if work is not None:
            return work
    inputs = call_inputs(hidden, top_k_index, top_k_weights, hidden_size)
    return inputs.work(inputs.ids, inputs.weights, num_experts, workspace)


def _short_work(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int, hidden_size: int,
    workspace: Workspace,
) -> LayerWork | None:  # fmt: skip
    """`layer_work` in one compiled call, for tensors that fit it; None for a routing that `build_dispatch` refuses."""
    n_tokens, top_k = top_k_index.shape
    host_hidden = workspace.inputs(n_tokens, hidden_size)
    ids, offsets, rows, weights, problem = read_call(
        top_k_index.data_ptr(), top_k_weights.data_ptr(), FLOATS[top_k_weights.dtype], n_tokens, top_k, num_experts,
        hidden.data_ptr(), FLOATS[hidden.dtype], host_hidden,
    )  # fmt: skip
    if problem >= 0:
        return None
    dispatch = Dispatch(top_k, n_tokens, ids, offsets, rows, weights)
    return LayerWork(dispatch, hidden, host_hidden, workspace.rows(n_tokens * top_k, hidden_size), like=hidden)


def host_floats(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """C-contiguous float32 values on the host; shares memory where they are so already."""
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        tensor = tensor.to("cpu", torch.float32)
    return np.ascontiguousarray(tensor.numpy())


def host_index(tensor: torch.Tensor) -> npt.NDArray[np.integer]:
    """Expert ids on the host."""
    return (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy()


def layer_demand(
    layer: int, phase: Phase, dispatch: Dispatch, predictions: tuple[Prediction, ...],
    activations: npt.NDArray[np.float64],
) -> LayerDemand:  # fmt: skip
    """What the planner sees of a call. `activations` [E]: the layer's row of counts, each active expert gets 1 more.

    E is the planner's number of experts, at least the layer's own.
    """
    ids = dispatch.expert_ids
    n_tokens, scores = describe_routing(
        ids, dispatch.offsets, dispatch.rows, dispatch.weights, dispatch.n_tokens, activations
    )
    return LayerDemand(layer, phase, dispatch.n_tokens, ids, n_tokens, scores, predictions)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
