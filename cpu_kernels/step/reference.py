"""The obvious form of the choice of experts, in torch: what the compiled one is held to and models are read by."""

import torch

from cpu_kernels.step.router import (
    SIGMOID,
    SIGMOID_OF_CHOSEN,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    SUM_TO_ONE,
    Selection,
)


def select(selection: Selection, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int64 [rows, top_k], best first, and their weights float32, from logits float32 [rows, experts]."""
    if selection.jitter:
        return _mix_sparsely(selection, logits)
    scores = {SOFTMAX: logits.softmax(-1), SIGMOID: logits.sigmoid()}.get(selection.scoring, logits)
    choice = scores if selection.correction is None else scores + torch.as_tensor(selection.correction)
    if selection.n_groups > 1:
        groups = choice.unflatten(-1, (selection.n_groups, -1))
        best = groups.topk(min(selection.best_of_group, groups.shape[-1]), -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(selection.top_groups, -1)[1], 1).bool()
        choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = choice.topk(selection.top_k, -1)[1]
    weights = scores.gather(1, ids)
    if selection.weighing == SOFTMAX_OF_CHOSEN:
        weights = logits.gather(1, ids).softmax(-1)
    elif selection.weighing == SIGMOID_OF_CHOSEN:
        weights = logits.gather(1, ids).sigmoid()
    elif selection.weighing == SUM_TO_ONE:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=selection.floor)
    return ids, weights * selection.scale


def _mix_sparsely(selection: Selection, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, ids, weights = logits.clone(), [], []
    for _ in range(selection.top_k):
        top, best = left.max(-1, keepdim=True)
        near = (top - logits) / logits.abs().clamp(min=top) <= 2 * selection.jitter
        weights.append(left.masked_fill(~near, -torch.inf).softmax(-1).gather(1, best))
        ids.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(ids, -1), torch.cat(weights, -1)
