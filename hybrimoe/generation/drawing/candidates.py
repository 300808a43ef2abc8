"""The tokens among which a reply's processors choose, found without asking them about the whole vocabulary.

On the host a sampler of transformers sorts all tokens and draws a number for each of them, which for a vocabulary of
150,000 takes longer than a layer of a large model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

LARGEST_NUCLEUS = 1024
"""Most tokens among which the ones that top_p keeps are looked for; where they do not suffice, all are sorted."""


def few_candidates(
    processors: Sequence[Any], logits: torch.Tensor, *, greedy: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits [k] and token ids [k] of the tokens among which `processors` choose, best first, on the logits' device.

    k is 1 for greedy choice, else the sampler's top_k. None for logits on the host, and where a processor needs them
    all, or changes their order (penalties, forbidden tokens). Of tokens that share the last place of the top k,
    transformers keeps all; here one is kept.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    if logits.device.type == "cpu" or any(type(processor) not in _ordered() for processor in processors):
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


def first_that_narrows(processors: Sequence[Any]) -> int | None:
    """The place of the first processor that keeps only the best tokens, where all behind it ask for no others; None
    where there is none."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    n_ordered = len(processors)
    while n_ordered and type(processors[n_ordered - 1]) in _ordered():
        n_ordered -= 1
    places = range(n_ordered, len(processors))
    return next((at for at in places if type(processors[at]) in (TopKLogitsWarper, TopPLogitsWarper)), None)


def kept_by(processor: Any, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64] | None:
    """Token ids, in their order, that `processor` (transformers' top_k or top_p) keeps of scores [V] on the host, among
    which no NaN may be; None where only the processor itself can tell, and where all tokens are excluded.

    Of tokens that share the last place of the top k all are kept, as there; of those that share the last place of
    top_p the first, where torch keeps those that its sort happens to put last.
    """
    from transformers import TopKLogitsWarper

    among = _best(scores, processor.top_k if isinstance(processor, TopKLogitsWarper) else LARGEST_NUCLEUS)
    if isinstance(processor, TopKLogitsWarper) or not among.size:
        return among if among.size else None
    largest = scores[among].max()
    weights = np.exp(scores[among] - largest, dtype=np.float64)
    shares = weights / np.exp(scores - largest).sum(dtype=np.float64)
    order = np.argsort(-shares, kind="stable")
    before = np.cumsum(shares[order]) - shares[order]
    kept = before < processor.top_p
    if kept.all() and len(among) < np.count_nonzero(scores > -np.inf):
        return None
    kept[: processor.min_tokens_to_keep] = True
    return np.sort(among[order[kept]])


def _best(scores: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int64]:
    """The n tokens of the largest scores [V], more where the last place is shared, without those that are excluded."""
    if n >= len(scores):
        return np.flatnonzero(scores > -np.inf)
    last = np.partition(scores, len(scores) - n)[len(scores) - n]
    return np.flatnonzero(scores >= last if last > -np.inf else scores > -np.inf)


def _ordered() -> tuple[type[Any], ...]:
    """Processors that leave the order of tokens as it is, and look at none but the best."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    return TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper
