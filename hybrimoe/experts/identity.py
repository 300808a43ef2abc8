"""Experts that are the identity: what they add to a layer's result, without weights and without a place in a plan.

A router with zero-computation experts (LongCat-Flash, MoE++) sends a token to them where it needs no work. Their ids
follow those of the experts with weights, so the runtime takes them for absent, and here they get their share.
"""

from __future__ import annotations

import torch


def add_identity_experts(
    routed: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    num_identity: int,
) -> torch.Tensor:
    """routed[t] + hidden[t] * the sum of the weights by which token t was sent to an identity expert.

    routed, hidden: floating [..., H] of T tokens; top_k_index: integer [T, k], of which ids in
    num_experts .. num_experts + num_identity - 1 are identity experts; top_k_weights: floating [T, k]. Returns
    `routed`'s shape and dtype. The sum over the ranks is in the weights' dtype.
    """
    is_identity = (top_k_index >= num_experts) & (top_k_index < num_experts + num_identity)
    share = torch.where(is_identity, top_k_weights, 0).sum(dim=-1)
    return routed + (hidden * share.reshape(*hidden.shape[:-1], 1)).to(routed.dtype)
