"""Log probabilities of a prompt's own tokens, computed part by part as the prompt is: what evaluations ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hybrimoe.generation.sampling import TokenLogprob

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.kv_cache import PrefixCache

    Rows = Callable[[Sequence[int], PrefixCache], torch.Tensor]

__all__ = ["PromptScorer", "most_scored_tokens", "token_logprobs"]

LOGITS_BYTES = 256 << 20
"""Logits of one part of a prompt take at most so much, as float32: 441 tokens of a vocabulary of 152,064."""
FEWEST_TOKENS = 16
"""Fewer in a part would read most of the weights for next to nothing; a large vocabulary may take more memory."""
SLICE_ROWS = 64
"""Rows whose log probabilities are computed at once: all of a part would take its memory a second and a third time."""
FLOAT_BYTES = 4


class PromptScorer:
    """Scores a prompt while it is computed.

    rows: computes tokens on top of a cache, and gives the logits [n, V] after each. n_top: best tokens that are told
    beside each. logprobs: one for each token of the prompt that has been computed; None for the first one, which
    nothing stands before.
    """

    def __init__(self, rows: Rows, prompt_ids: Sequence[int], n_top: int) -> None:
        self._rows, self._prompt_ids, self._n_top = rows, prompt_ids, n_top
        self.logprobs: list[TokenLogprob | None] = []
        self.restart()

    def restart(self) -> None:
        """The prompt is computed from its first token."""
        self.logprobs[:] = [None]

    def forward(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
        """Compute the prompt's next tokens; returns the logits [V] after the last of them."""
        logits = self._rows(token_ids, cache)
        at = len(self.logprobs)
        following = self._prompt_ids[at : at + len(token_ids)]
        self.logprobs.extend(token_logprobs(logits[: len(following)], following, self._n_top))
        last: torch.Tensor = logits[-1]
        return last.clone()  # the others' memory is free again


def most_scored_tokens(vocabulary: int) -> int:
    """Tokens of a part whose logits for a vocabulary of so many tokens take at most LOGITS_BYTES."""
    return max(FEWEST_TOKENS, LOGITS_BYTES // (FLOAT_BYTES * vocabulary))


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """Of each of n tokens, by the logits [n, V] in its place: its log probability and the `n_top` best ones."""
    found: list[TokenLogprob] = []
    for start in range(0, len(token_ids), SLICE_ROWS):
        found += _of_slice(logits[start : start + SLICE_ROWS], token_ids[start : start + SLICE_ROWS], n_top)
    return found


def _of_slice(logits: torch.Tensor, token_ids: Sequence[int], n_top: int) -> list[TokenLogprob]:
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, tokens = logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1)
    own = logprobs.gather(1, torch.tensor(list(token_ids), device=logprobs.device)[:, None])[:, 0].tolist()
    best = zip(tokens.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(token_ids, own, best, strict=True)
    ]
