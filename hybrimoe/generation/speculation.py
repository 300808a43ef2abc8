"""Speculation without a second model: drafts from the text are computed in one step with the token before them.

A step of 2 to 4 tokens reads most weights once, and the compiled step gives each of them the bits that it has alone. So
the sampler is asked for each token as without drafts, with the same logits and the same random numbers, and the text is
the same. What it does not choose is taken out of the KV cache again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import ConfigError
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.pace import MAX_DRAFT_TOKENS, DraftPace

if TYPE_CHECKING:
    import torch

__all__ = ["PromptLookup", "Speculation", "SpeculationStats", "require_speculation"]

NGRAM_TOKENS = (4, 3, 2)
"""Lengths of the ends that are looked for, longest first: a longer match is right more often, and a single token stands
nearly everywhere."""

Forward = Callable[[Sequence[int], PrefixCache], "torch.Tensor"]
Verify = Callable[[Sequence[int], PrefixCache], "torch.Tensor | None"]


@dataclass(slots=True)
class SpeculationStats:
    """What drafts did for one reply.

    steps: of decoding that were computed. drafts: steps with drafted tokens; drafted_tokens, accepted_tokens: of those.
    passed_over: steps that had a draft and were computed without it, because drafts were losing.
    """

    steps: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    passed_over: int = 0

    @property
    def steps_saved(self) -> int:
        """Steps that would have been computed without drafts, and were not: one for each accepted token."""
        return self.accepted_tokens

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**asdict(self), "steps_saved": self.steps_saved}


class PromptLookup:
    """Prompt-lookup decoding (A. Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding; llama.cpp's `lookup`).

    The latest earlier place of the longest known end of the text gives the draft. A table of all ends makes a draft
    cost the same at any length of the context.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        """Where the token stands that followed an n-gram the last time."""
        for token in token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        ids = self._ids
        for n in NGRAM_TOKENS:
            if len(ids) >= n:
                self._follows[tuple(ids[-n:])] = len(ids)
        ids.append(token)

    def draft(self, n_tokens: int) -> list[int]:
        """At most `n_tokens` that may come next; none where no end of the text is known.

        A draft that reaches the end of the text goes on with itself, so that a repetition of any length is continued.
        """
        ids = self._ids
        for n in NGRAM_TOKENS:
            at = self._follows.get(tuple(ids[-n:]))
            if at is not None and len(ids) >= n:
                break
        else:
            return []
        draft: list[int] = []
        for place in range(at, at + n_tokens):
            draft.append(ids[place] if place < len(ids) else draft[place - len(ids)])
        return draft


class Speculation:
    """The decode steps of one reply, with drafts.

    forward: computes one token, as `TextGenerator.forward`. verify: computes several and gives logits [n, V] after each
    of them, None (and nothing computed) where only `forward` can serve.
    """

    def __init__(
        self, prompt_ids: Sequence[int], cache: PrefixCache, pace: DraftPace, forward: Forward, verify: Verify
    ) -> None:
        self.stats = SpeculationStats()
        self._cache, self._pace = cache, pace
        self._forward, self._verify = forward, verify
        self._lookup = PromptLookup(prompt_ids)
        self._ahead: deque[tuple[int, torch.Tensor]] = deque()
        """Drafted tokens that are in the cache and not chosen yet, with the logits after each."""
        self._passed_over: int | None = None
        """First token of a draft that was not computed: whether it comes is worth knowing all the same."""
        pace.begin_reply()

    def next_logits(self, token: int, n_left: int) -> torch.Tensor:
        """Logits [V] after `token`, which was just chosen; n_left: tokens that the reply may still have after it."""
        self._lookup.append(token)
        if self._passed_over is not None:
            self._pace.compared(token == self._passed_over)
            self._passed_over = None
        if self._ahead:
            right = token == self._ahead[0][0]
            self._pace.compared(right)
            if right:
                self.stats.accepted_tokens += 1
                return self._ahead.popleft()[1]
            self.give_up()
        return self._step(token, self._lookup.draft(min(MAX_DRAFT_TOKENS, n_left - 1)))

    def pass_over(self, token: int) -> None:
        """`token` was chosen and is computed elsewhere, in another context than the drafts."""
        self._lookup.append(token)
        self._passed_over = None
        self.give_up()

    def give_up(self) -> None:
        """Takes drafted tokens that were not chosen out of the cache; the reply ends here, or goes another way."""
        if self._ahead:
            self._cache.drop_last(len(self._ahead))
            self._ahead.clear()

    def _step(self, token: int, draft: list[int]) -> torch.Tensor:
        """Computes `token`, and as much of the draft as pays."""
        stats, pace = self.stats, self._pace
        n = pace.n_to_draft(len(draft)) if draft else 0
        stats.steps += 1
        began = pace.clock_ns()
        rows = self._verify([token, *draft[:n]], self._cache) if n else None
        if rows is None:
            logits = self._forward([token], self._cache)
            pace.measured(1, (pace.clock_ns() - began) / 1000)
            stats.passed_over += bool(draft)
            self._passed_over = draft[0] if draft else None
            return logits
        pace.measured(n + 1, (pace.clock_ns() - began) / 1000)
        stats.drafts += 1
        stats.drafted_tokens += n
        self._ahead.extend(zip(draft[:n], rows[1:], strict=True))
        first: torch.Tensor = rows[0]
        return first


def require_speculation(model: Any) -> None:
    """Raises ConfigError, with the reason, for a model whose steps cannot verify drafts exactly."""
    injection = getattr(model, "hybrimoe", None)
    step = getattr(injection, "step", None)
    if step is not None:
        reason = step.differs_in_batches
    else:
        way = getattr(getattr(injection, "way", None), "reason", None) or "its experts were not replaced"
        reason = f"this model has no compiled step, in which drafts are verified: {way}"
    if reason is not None:
        slots = bool(getattr(getattr(injection, "session", None), "n_slots", 0))
        remedy = "choose --accelerator none (accelerator: none), or leave" if slots else "leave"
        raise ConfigError(f"speculation: {reason}; {remedy} --speculate (generation.speculate) out")
