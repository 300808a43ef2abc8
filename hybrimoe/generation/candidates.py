"""The few tokens that can be chosen, found where the logits are: a card then sends some numbers, not a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def few_candidates(
    processors: Sequence[Any], logits: torch.Tensor, *, greedy: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits [k] and token ids [k] of the tokens among which `processors` choose, best first, on the logits' device.

    k is 1 for greedy choice, else the sampler's top_k. None for logits on the host, and where a processor needs them
    all, or changes their order (penalties, forbidden tokens). Of tokens that share the last place of the top k,
    transformers keeps all; here one is kept.
    """
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ordered = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
    if logits.device.type == "cpu" or any(type(processor) not in ordered for processor in processors):
        return None
    if greedy:
        return logits.topk(1)
    first = next((processor for processor in processors if not isinstance(processor, TemperatureLogitsWarper)), None)
    if not isinstance(first, TopKLogitsWarper):  # what stands before it would see fewer tokens than it should
        return None
    return logits.topk(min(first.top_k, logits.shape[-1]))


def sent_together(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [k] and token ids int64 [k] on the host, by one copy: the host waits for the card once."""
    import torch

    bits = torch.stack([logits.float().view(torch.int32), token_ids.to(torch.int32)]).cpu()
    return bits[0].view(torch.float32), bits[1].long()
