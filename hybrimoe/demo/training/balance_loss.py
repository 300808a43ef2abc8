"""Router losses that are taken layer by layer.

transformers' `load_balancing_loss_func` adds the loads of all layers before it multiplies them with the router
probabilities: a layer that sends everything to expert 0 is forgiven if another layer avoids expert 0. Here every
layer has to balance its own experts, and only the layers' losses are averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_load(router_logits: Tensor, top_k: int) -> Tensor:
    """Share of the choices that each expert got, float32 [experts], sums to 1; from logits [tokens, experts]."""
    num_experts = router_logits.shape[-1]
    chosen = router_logits.detach().topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=num_experts).float() / chosen.numel()


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Mean over layers of `experts * sum(load * mean probability)` (Switch Transformer, equations 4 to 6).

    Args:
        router_logits: one [tokens, experts] tensor a layer.
        top_k: experts a token is sent to.

    Returns:
        float32 scalar: 1.0 if each layer is uniform, up to experts / top_k if one is certain and always the same.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(dim=-1).mean(dim=0)
        losses.append(logits.shape[-1] * (layer_load(logits, top_k) * probability).sum())
    return torch.stack(losses).mean()


def router_z_loss(router_logits: Sequence[Tensor]) -> Tensor:
    """Mean squared log-sum-exp of the router logits, which keeps them small (ST-MoE, equation 5). float32 scalar."""
    return torch.stack([logits.float().logsumexp(dim=-1).square().mean() for logits in router_logits]).mean()


def load_entropy(load: Tensor) -> float:
    """Entropy of a load [experts] over its greatest possible value: 1.0 is uniform, 0.0 is one expert only."""
    positive = load[load > 0]
    entropy = -(positive * positive.log()).sum()
    return float(entropy / torch.log(torch.tensor(float(load.numel()))))
