"""Gradients through packed experts: they are frozen, and what goes in and the routing weights get theirs.

The forward pass is the runtime's, as without gradients. The backward pass computes each active expert once more in
float32 torch from its dequantised weights, one expert at a time, so that it holds one expert's floats and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cpu_kernels import ExpertWeights, reference_ffn
from hybrimoe.experts.protocol import RunsLayers


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """One layer's packed experts. norm: what the family applies to each expert's output before the routing weight."""

    session: RunsLayers
    layer: int
    num_experts: int
    norm: nn.Module | None

    def run(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`session.run_layer` whose result carries the gradient of `hidden`, `top_k_weights` and the norm.

        hidden: floating [..., H]; top_k_index: integer [T, k]; top_k_weights: floating [T, k].
        """
        inputs = (self, hidden, top_k_index, top_k_weights, *self.trained())
        result: torch.Tensor = FrozenExperts.apply(*inputs)  # type: ignore[no-untyped-call]
        return result

    def trained(self) -> list[nn.Parameter]:
        """The norm's parameters."""
        return [] if self.norm is None else list(self.norm.parameters())

    def weights(self, expert: int, device: torch.device) -> ExpertWeights:
        """The dequantised weights of one expert on `device`."""
        return self.session.read_expert(self.layer, expert).to(device)


class FrozenExperts(torch.autograd.Function):
    """sum_j w_j * norm(FFN_{e_j}(x)) of one layer, differentiated with respect to x, w and the norm's parameters."""

    @staticmethod
    def forward(
        ctx: Any, frozen: FrozenLayer, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What `session.run_layer` gives."""
        ctx.frozen = frozen
        ctx.save_for_backward(hidden, top_k_index, top_k_weights)
        return frozen.session.run_layer(frozen.layer, hidden.detach(), top_k_index, top_k_weights.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        """Gradients in the order of forward's arguments. Raises ModelError where a lossy policy computed the result."""
        frozen: FrozenLayer = ctx.frozen
        frozen.session.require_exact("a gradient through the experts")
        hidden, top_k_index, top_k_weights = ctx.saved_tensors
        spec = frozen.session.expert_spec(frozen.layer)
        rows = hidden.detach().reshape(-1, spec.hidden).float()
        grad_rows = grad_out.reshape(-1, spec.hidden).float()
        index, weights = top_k_index.reshape(len(rows), -1), top_k_weights.detach().reshape(len(rows), -1).float()
        trained = frozen.trained()
        wanted = [parameter for parameter in trained if parameter.requires_grad]
        grad_hidden, grad_weights = torch.zeros_like(rows), torch.zeros_like(weights)
        grad_trained = [torch.zeros_like(parameter) for parameter in wanted]
        for expert in _active(index, frozen.num_experts):
            tokens, ranks = torch.where(index == expert)
            ffn = frozen.weights(expert, rows.device)
            with torch.enable_grad():
                x, scores = rows[tokens].requires_grad_(), weights[tokens, ranks].requires_grad_()
                y = reference_ffn(spec, ffn, x)
                y = (y if frozen.norm is None else frozen.norm(y)) * scores[:, None]
            found = torch.autograd.grad(y, [x, scores, *wanted], grad_rows[tokens].to(y.dtype))
            grad_hidden.index_add_(0, tokens, found[0])
            grad_weights[tokens, ranks] = found[1]
            for total, part in zip(grad_trained, found[2:], strict=True):
                total += part
        done = iter(grad_trained)
        return (
            None, grad_hidden.to(hidden.dtype).reshape(hidden.shape), None,
            grad_weights.to(top_k_weights.dtype).reshape(top_k_weights.shape),
            *(next(done) if parameter.requires_grad else None for parameter in trained),
        )  # fmt: skip


def _active(index: torch.Tensor, num_experts: int) -> list[int]:
    """Experts that some token chose; ids outside the layer's experts mean absent."""
    ids = index.unique()
    chosen: list[int] = ids[(ids >= 0) & (ids < num_experts)].tolist()
    return chosen
