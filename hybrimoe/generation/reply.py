"""One reply, token by token: prefill in parts, then sample, show, forward; timed, interruptible between tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrimoe.generation.context import ContextShift
from hybrimoe.generation.images.tokens import is_inside, whole_images
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.kv_memory import FEWEST_TOKENS, chunk_tokens, reads_experts
from hybrimoe.generation.profile import Profile
from hybrimoe.generation.prompts.layer_major import LayerMajor
from hybrimoe.generation.prompts.logprobs import PromptScorer, most_scored_tokens
from hybrimoe.generation.prompts.parts import tokens_behind
from hybrimoe.generation.runner import ModelRunner
from hybrimoe.generation.sampling import Sampler, SamplingOptions, TokenLogprob
from hybrimoe.generation.speculation import Speculation, SpeculationStats
from hybrimoe.generation.transcript import FinishReason, Transcript
from hybrimoe.generation.vocabulary import vocabulary_size

if TYPE_CHECKING:
    import torch

__all__ = ["FinishReason", "Reply", "ReplyTimes"]

READ_WAIT_S = 0.02
"""In which a prompt waits for what is read of it from disk, before other replies get a token."""


@dataclass(slots=True)
class ReplyTimes:
    """Wall-clock times of one reply (measured). All in us.

    prefill_us: computing the prompt's new tokens. ttft_us: from the start to the first token's text, sampling included.
    between_tokens_us: for each further token, the time since the one before (TBT).
    """

    prefill_us: float = 0.0
    ttft_us: float = 0.0
    between_tokens_us: list[float] = field(default_factory=list)

    @property
    def decode_us(self) -> float:
        """Time of all decode steps together."""
        return sum(self.between_tokens_us)


class Reply:
    """Iterating gives the text piece by piece; afterwards the attributes say what happened.

    Whoever computes several replies side by side drives each by hand instead: `begin`, `prefill` until it gives logits,
    then `take` with the logits after each token until `has_ended`, and `end`; `share_prompt` before the second token.

    text: all pieces joined. token_ids: the new tokens, an end-of-sequence token included. n_reused: prompt tokens that
    came from the cache, n_read: those of them that were read from disk. seed: with it the same reply comes again.
    text_offsets: where each token's text begins in the reply, in characters. n_kept: tokens of the prompt that are
    computed or reused. n_shifts: how often the context was full, so that oldest tokens were left out.
    """

    def __init__(
        self,
        runner: ModelRunner,
        prompt_ids: list[int],
        options: SamplingOptions,
        cache: PrefixCache,
        should_stop: Callable[[], bool],
        profile: Profile | None = None,
        part_tokens: int | None = None,
        part_slower: float = 0.0,
        part_us: float | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.seed = options.seed
        self.n_reused = self.n_read = 0
        self.times = ReplyTimes()
        self.text_offsets: list[int] = []
        self._runner = runner
        self.cache = cache
        self._part_tokens, self._part_slower, self._part_us = part_tokens, part_slower, part_us
        self._together: LayerMajor | None = None
        """Parts of the prompt that pass the layers together."""
        self._parts: deque[tuple[int, int]] | None = None
        self._computed_ids = prompt_ids
        """What is computed as a prompt: the prompt, later what a shift has kept."""
        self._n_before = 0
        """New tokens that are among them."""
        self.n_shifts = 0
        self._checkpoints: list[int] = []
        self._unshared: torch.Tensor | None = None
        """Logits after a prompt that others cannot use yet."""
        self._started = self._last = 0
        self._should_stop = should_stop
        limit = runner.context_tokens
        if self._shift is not None and limit is not None and len(prompt_ids) >= limit:
            self._computed_ids = whole_images(self._shift.kept(prompt_ids, limit))
            self.n_shifts = 1
        self.n_kept = len(self._computed_ids)
        self._sampler = Sampler(runner.model, options, prompt_ids, runner.settings)
        self._scorer: PromptScorer | None = None
        if options.prompt_logprobs is not None:
            self._scorer = PromptScorer(runner.forward_rows, prompt_ids, options.prompt_logprobs)
        self._transcript = Transcript(
            runner.tokenizer, prompt_ids, eos_token_ids=self._sampler.eos_token_ids,
            max_new_tokens=self._sampler.max_new_tokens, context_tokens=self._longest(options), stop=options.stop,
            shown_special=options.shown_special,
        )  # fmt: skip
        self.profile = profile
        self._forward, self._choose, self._show = runner.forward, self._sampler.next, self._transcript.push
        verify = runner.verify
        if profile is not None:
            self._forward, verify = profile.forwarding(self._forward), profile.forwarding(verify)
            self._choose = profile.choosing(self._choose, lambda: len(prompt_ids) - self.n_reused)
            self._show = profile.timed("detokenising", self._show)
        self._speculation: Speculation | None = None
        if runner.pace is not None:
            self._speculation = Speculation(prompt_ids, cache, runner.pace, self._forward, verify)

    @property
    def _shift(self) -> ContextShift | None:
        return self._runner.shift

    def _longest(self, options: SamplingOptions) -> int | None:
        """Tokens of prompt and reply at most. Where oldest ones are left out, a reply whose length is given has no such
        limit, and every other may be as long as the context by itself."""
        limit = self._runner.context_tokens
        if limit is None or self._shift is None:
            return limit
        return None if options.max_new_tokens is not None else len(self.prompt_ids) + limit

    @property
    def speculation(self) -> SpeculationStats | None:
        """What drafts did so far; None without speculation."""
        return None if self._speculation is None else self._speculation.stats

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log probabilities of the new tokens so far, where the options ask for them."""
        return self._sampler.logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Log probabilities of the prompt's tokens that were computed so far, None for the first one; empty where the
        options ask for none."""
        return [] if self._scorer is None else self._scorer.logprobs

    @property
    def text(self) -> str:
        """All pieces so far, joined."""
        return self._transcript.text

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far."""
        return self._transcript.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the reply ended; None before."""
        return self._transcript.finish_reason

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended the reply, which is no part of it."""
        return self._transcript.stop_text

    def __iter__(self) -> Iterator[str]:
        pieces = self._pieces()
        try:
            for piece in pieces if self.profile is None else self.profile.watch(pieces):
                if piece:
                    yield piece
        finally:
            if self._speculation is not None:
                self._speculation.give_up()

    def _pieces(self) -> Iterator[str]:
        self.begin()
        logits = None
        while logits is None and not self.has_ended():
            logits = self.prefill()
        while logits is not None:
            yield self.take(logits)
            logits = None if self.has_ended() else self._go_on()
        yield self.end()

    def _go_on(self) -> torch.Tensor | None:
        """Logits after the newest token; None where the reply ended while a shifted context was computed."""
        if not self.must_shift():
            return self.next_logits()
        self.begin_shift()
        logits = None
        while logits is None and not self.has_ended():
            logits = self.prefill()
        return logits

    def begin(self) -> None:
        """The reply's times count from here on."""
        self._started = self._last = time.perf_counter_ns()

    def has_ended(self) -> bool:
        """Whether nothing more is to be computed; asks `should_stop`."""
        if self.finish_reason is None and self._should_stop():
            self.finish("interrupted")
        return self.finish_reason is not None

    def finish(self, reason: FinishReason) -> None:
        """The reply ends with what there is."""
        self._transcript.finish_reason = reason

    def prefill(self) -> torch.Tensor | None:
        """Computes the next part of the prompt; returns the logits [V] after the prompt once it is complete, else None.

        Where an accelerator's memory does not suffice, expert slots make room and the prompt begins anew.
        """
        import torch

        try:
            return self._next_part()
        except torch.OutOfMemoryError as error:
            self._parts = self._together = None
            self.cache.clear()
            self._runner.make_room(error)
            return None

    @property
    def n_context(self) -> int:
        """Tokens of the context: those of the prompt and the reply that were not left out."""
        return len(self._computed_ids) + len(self.token_ids) - self._n_before

    def must_shift(self) -> bool:
        """Whether the context has no room for the newest token, and oldest ones are to be left out."""
        limit = self._runner.context_tokens
        return self._shift is not None and limit is not None and self.n_context > limit

    def begin_shift(self) -> None:
        """Leaves the oldest tokens out; `prefill` then computes the others, and gives the logits after the newest."""
        self.share_prompt()
        limit = self._runner.context_tokens
        assert self._shift is not None
        assert limit is not None
        if self._speculation is not None:
            self._speculation.pass_over(self.token_ids[-1])
        longer = [*self._computed_ids, *self.token_ids[self._n_before :]]
        self._computed_ids = whole_images(self._shift.kept(longer, limit))
        self._n_before = len(self.token_ids)
        self._parts = None
        self.n_shifts += 1

    def take(self, logits: torch.Tensor) -> str:
        """Chooses the next token by the logits [V] after what there is; returns the text that it completes."""
        token = self._choose(logits)
        now = time.perf_counter_ns()
        if self.token_ids:
            self.times.between_tokens_us.append((now - self._last) / 1000)
        else:
            self.times.ttft_us = (now - self._started) / 1000
        self._last = now
        self.text_offsets.append(self._transcript.n_characters)
        text = self._show(token)
        if self._sampler.is_complete:
            self._transcript.complete()
        return text

    def share_prompt(self) -> None:
        """Others may use what was computed of the prompt. Called before any further token is computed, and after the
        first one is told: whoever waits for it does not wait for this."""
        logits, self._unshared = self._unshared, None
        if logits is not None:
            self.cache.share_prompt(logits)

    def next_logits(self) -> torch.Tensor:
        """Computes the newest token; returns the logits [V] after it."""
        self.share_prompt()
        token = self.token_ids[-1]
        if self._speculation is None:
            return self._forward([token], self.cache)
        return self._speculation.next_logits(token, self._n_left())

    def _n_left(self) -> int:
        """New tokens that may still come, before the context is full."""
        left, limit = self._transcript.n_left, self._runner.context_tokens
        return left if limit is None or self._shift is None else min(left, limit - self.n_context + 1)

    def end(self) -> str:
        """The text that was held back; others may use what was computed."""
        if self._speculation is not None:
            self._speculation.give_up()
        if self._together is not None:
            self._together.give_up()
        self.share_prompt()
        if self.token_ids:
            self.cache.share_reply()
        return self._transcript.end()

    def _next_part(self) -> torch.Tensor | None:
        token_ids, in_prompt = self._computed_ids, self._n_before == 0
        scorer = self._scorer if in_prompt else None
        if self._parts is None:
            if scorer is None and not self.cache.has_read(token_ids, READ_WAIT_S):
                return None
            if scorer is not None:
                scorer.restart()
            n_reused = self.cache.reuse(token_ids, anew=scorer is not None)
            if in_prompt:
                self.n_reused, self.n_read = n_reused, self.cache.n_read if scorer is None else 0
            self.cache.announce(len(token_ids))
            self._checkpoints = self.cache.checkpoint_places(len(token_ids))
            self._parts = deque(self._cut(n_reused))
            if not self._parts:
                self._prefilled()
                return self.cache.known_logits()
        if scorer is None and self._together is None and len(self._parts) > 1:
            self._together = self._runner.by_layers([token_ids[a:b] for a, b in self._parts], self.cache)
        if self._together is not None:
            logits = self._pass_layers(self._together)
            if logits is None:
                return None
            end = [self._parts.popleft() for _ in self._together.parts][-1][1]
            self._together = None
        else:
            start, end = self._parts.popleft()
            forward = self._forward if scorer is None else scorer.forward
            logits = forward(token_ids[start:end], self.cache)
        if end in self._checkpoints:
            self.cache.checkpoint()
        if self._parts:
            self.cache.share_part()
        else:
            self._unshared = logits
        self._prefilled()
        return None if self._parts else logits

    def _pass_layers(self, together: LayerMajor) -> torch.Tensor | None:
        """Parts pass layers for as long as others may wait, one pass at least; logits [V] once all have passed all."""
        began = time.perf_counter_ns()
        while True:
            logits = together.advance()
            if logits is not None or self._should_stop():
                return logits
            took_us = (time.perf_counter_ns() - began) / 1000
            if self._part_us is not None and took_us + together.longest_us > self._part_us:
                return None

    def _prefilled(self) -> None:
        """A part of the prompt is computed; what a shift computes later counts as time between two tokens."""
        if self._n_before == 0:
            self.times.prefill_us = (time.perf_counter_ns() - self._started) / 1000

    def _cut(self, start: int) -> Iterator[tuple[int, int]]:
        """Beginnings and ends of the parts in which the prompt is computed from `start` on; one ends at each
        checkpoint."""
        short = len(self._computed_ids) - start <= FEWEST_TOKENS  # whose part fits in any case: memory is not asked for
        size = self._runner.prefill_chunk_tokens or (FEWEST_TOKENS if short else chunk_tokens(self._runner.model))
        if self._scorer is not None:
            size = min(size, most_scored_tokens(vocabulary_size(self._runner.model)))
        for end in (*self._checkpoints, len(self._computed_ids)):
            while start < end:
                stop = min(start + self._part_size(start, size), end)
                if 0 < end - stop <= FEWEST_TOKENS and reads_experts(self._runner.model):
                    stop = start + -(-(end - start) // 2)  # a short last part would read nearly all of them for little
                stop = self._after_image(stop)
                yield start, stop
                start = stop

    def _part_size(self, start: int, most: int) -> int:
        """Tokens of a part that begins at `start`."""
        if self._part_tokens is None:
            return most
        return min(most, tokens_behind(start, self._part_tokens, self._part_slower))

    def _after_image(self, stop: int) -> int:
        """The end of a part, moved behind an image that it would cut where images are computed whole."""
        ids = self._computed_ids
        while self._runner.whole_images and stop < len(ids) and is_inside(ids[stop]):
            stop += 1
        return stop
