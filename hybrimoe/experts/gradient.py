"""Gradients through packed experts: they are frozen, and what goes in and the routing weights get theirs.

The forward pass is the runtime's, as without gradients. The backward pass computes each active expert once more in
float32 torch from its dequantised weights, one expert at a time, so that it holds one expert's floats and no more.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cpu_kernels import ExpertWeights, reference_ffn
from hybrimoe.errors import ModelError

if TYPE_CHECKING:
    from hybrimoe.runtime.session import Session


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd is on and asks for the gradient of one of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def run_with_gradient(
    session: Session, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`session.run_layer` whose result carries the gradient of `hidden`, `top_k_weights`, and the layer's own norm.

    hidden: floating [..., H]; top_k_index: integer [T, k]; top_k_weights: floating [T, k].
    """
    norm = session.layers[layer].transform()
    trained = () if norm is None else tuple(norm.parameters())
    inputs = (session, layer, norm, hidden, top_k_index, top_k_weights, *trained)
    result: torch.Tensor = FrozenExperts.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class FrozenExperts(torch.autograd.Function):
    """sum_j w_j * norm(FFN_{e_j}(x)) of one layer, differentiated with respect to x, w and the norm's parameters."""

    @staticmethod
    def forward(
        ctx: Any, session: Session, layer: int, norm: nn.Module | None, hidden: torch.Tensor,
        top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *trained: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What `session.run_layer` gives."""
        ctx.session, ctx.layer, ctx.norm, ctx.n_trained = session, layer, norm, len(trained)
        ctx.save_for_backward(hidden, top_k_index, top_k_weights)
        return session.run_layer(layer, hidden.detach(), top_k_index, top_k_weights.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        """Gradients in the order of forward's arguments. Raises ModelError where a lossy policy computed the result."""
        session: Session = ctx.session
        if session.config.lossy is not None:
            raise ModelError(
                f"scheduler.lossy ({session.config.lossy}) changes what the experts compute, so there is no gradient"
                " through them; inject or load the model without it to train beside its experts"
            )
        hidden, top_k_index, top_k_weights = ctx.saved_tensors
        spec = session.layer_specs()[ctx.layer].spec
        rows = hidden.detach().reshape(-1, spec.hidden).float()
        grad_rows = grad_out.reshape(-1, spec.hidden).float()
        index, weights = top_k_index.reshape(len(rows), -1), top_k_weights.detach().reshape(len(rows), -1).float()
        trained = [] if ctx.norm is None else list(ctx.norm.parameters())
        wanted = [parameter for parameter in trained if parameter.requires_grad]
        grad_hidden, grad_weights = torch.zeros_like(rows), torch.zeros_like(weights)
        grad_trained = [torch.zeros_like(parameter) for parameter in wanted]
        for expert in _active(index, session.layers[ctx.layer].num_experts):
            tokens, ranks = torch.where(index == expert)
            ffn = _expert(session, ctx.layer, expert, rows.device)
            with torch.enable_grad():
                x, scores = rows[tokens].requires_grad_(), weights[tokens, ranks].requires_grad_()
                y = reference_ffn(spec, ffn, x)
                y = (y if ctx.norm is None else ctx.norm(y)) * scores[:, None]
            found = torch.autograd.grad(y, [x, scores, *wanted], grad_rows[tokens].to(y.dtype))
            grad_hidden.index_add_(0, tokens, found[0])
            grad_weights[tokens, ranks] = found[1]
            for total, part in zip(grad_trained, found[2:], strict=True):
                total += part
        done = iter(grad_trained)
        return (
            None, None, None, grad_hidden.to(hidden.dtype).reshape(hidden.shape), None,
            grad_weights.to(top_k_weights.dtype).reshape(top_k_weights.shape),
            *(next(done) if parameter.requires_grad else None for parameter in trained),
        )  # fmt: skip


def _active(index: torch.Tensor, num_experts: int) -> list[int]:
    """Experts that some token chose; ids outside the layer's experts mean absent."""
    ids = index.unique()
    chosen: list[int] = ids[(ids >= 0) & (ids < num_experts)].tolist()
    return chosen


def _expert(session: Session, layer: int, expert: int, device: torch.device) -> ExpertWeights:
    """The dequantised weights of one expert on `device`."""
    weights = session.store.read(layer, expert)
    parts = {part.name: getattr(weights, part.name) for part in fields(weights)}
    return replace(weights, **{name: part.to(device) for name, part in parts.items() if part is not None})
