"""One reply, token by token: prefill in parts, then sample, show, forward; timed, interruptible between tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import CheckpointError, PromptError
from hybrimoe.generation.context import ContextShift, model_context_tokens
from hybrimoe.generation.decoding import warn_of_other_decoding
from hybrimoe.generation.images.forward import ImageForward
from hybrimoe.generation.images.tokens import has_images, is_inside, whole_images
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.kv_memory import (
    FEWEST_TOKENS,
    chunk_tokens,
    estimated_token_bytes,
    measured_token_bytes,
    reads_experts,
)
from hybrimoe.generation.layer_major import LayerMajor, group_of
from hybrimoe.generation.pace import DraftPace
from hybrimoe.generation.profile import Profile
from hybrimoe.generation.prompt_logprobs import PromptScorer, most_scored_tokens
from hybrimoe.generation.prompt_parts import tokens_behind
from hybrimoe.generation.sampling import Sampler, SamplingOptions, Settings, TokenLogprob
from hybrimoe.generation.speculation import Speculation, SpeculationStats, require_speculation
from hybrimoe.generation.transcript import FinishReason, Transcript
from hybrimoe.generation.vocabulary import check_token_ids, vocabulary_size
from hybrimoe.text_files import require_text

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.images.vision import Vision

__all__ = ["FinishReason", "Reply", "ReplyTimes", "TextGenerator"]

NOTHING: Mapping[str, Any] = {}
MEASURE_TOKENS = 64
"""A cache that holds so many tokens is long enough to see what one takes."""
READ_WAIT_S = 0.02
"""In which a prompt waits for what is read of it from disk, before other replies get a token."""


def _never() -> bool:
    return False


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


class TextGenerator:
    """A model and its tokenizer, ready to reply. Greedy and seeded tokens are those of `model.generate`.

    prefill_chunk_tokens: of a prompt, that go through the model at once; it bounds the memory of intermediate results,
    not the result. None chooses by the free memory, anew for each prompt.
    kv_bytes: what keys and values may take, None for no limit; a prompt that would take more is refused, and a reply
    ends before it does. speculate: replies are computed with drafts, see `hybrimoe.generation.speculation`; raises
    ConfigError for a model that cannot. pace: how many tokens are drafted, None without drafts. shift: what is left out
    of texts that outgrow the context; None: a longer prompt is refused, and a reply ends there.
    forward_kwargs: what a forward call of the model takes beside its inputs; logits of the last token only, if it can.
    vision: what turns images into tokens of prompts; None: prompts are text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, prefill_chunk_tokens: int | None = None, kv_bytes: int | None = None,
        speculate: bool = False, shift: ContextShift | None = None, vision: Vision | None = None,
    ) -> None:  # fmt: skip
        import inspect

        if speculate:
            require_speculation(model)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = Settings(model)
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.kv_bytes = kv_bytes
        self.pace = DraftPace() if speculate else None
        self._token_bytes = estimated_token_bytes(model)
        self._measured = False
        self.vision = vision
        self._of_images = ImageForward(model)
        self.shift = shift
        if shift is not None:
            shift.check(self.context_tokens)
        warn_of_other_decoding(model)
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.forward_kwargs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if takes_logits_to_keep:
            self.forward_kwargs["logits_to_keep"] = 1

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence, prompt and reply together: the model's limit, or what the memory for keys and values
        holds where that is less; None where neither sets a limit."""
        limits = [limit for limit in (model_context_tokens(self.model.config), self.memory_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def whole_images(self) -> bool:
        """Whether an image of a prompt must be computed at once."""
        return self._of_images.whole_images

    @property
    def memory_tokens(self) -> int | None:
        """Tokens whose keys and values fit `kv_bytes`; None without a limit."""
        return None if self.kv_bytes is None or not self._token_bytes else self.kv_bytes // self._token_bytes

    def token_bytes(self) -> int:
        """Bytes that the keys and values of one more token take: estimated, after the first longer reply measured."""
        return self._token_bytes

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts in front.

        Raises:
            PromptError: the text is empty or only white space, or is no Unicode.
        """
        if not text.strip():
            raise PromptError("the prompt is empty: expected some text to continue")
        require_text(text, "the prompt")
        return list(self.tokenizer(text)["input_ids"])

    def reply(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions | None = None,
        *,
        cache: PrefixCache | None = None,
        should_stop: Callable[[], bool] = _never,
        profile: Profile | None = None,
        part_tokens: int | None = None,
        part_slower: float = 0.0,
        part_us: float | None = None,
    ) -> Reply:
        """A reply to `prompt_ids`, computed while it is iterated.

        Args:
            cache: kept from reply to reply; what a prompt shares with the sequence before is not computed again.
            should_stop: asked between tokens and prefill chunks; True ends the reply, with what there is.
            profile: a new one, which then has where the time went.
            part_tokens: of the prompt, that are computed at once at most; None for `prefill_chunk_tokens`.
            part_slower: by which a part is smaller for each token before it, see `prompt_parts.PromptPart`.
            part_us: what `prefill` may take where parts pass the layers together; None for all of them at once.

        Raises:
            PromptError: no token, one that the model does not have, or no room for a reply in the model's context.
        """
        self.check_prompt(len(prompt_ids))
        if options is not None and options.prompt_logprobs is not None:
            self.check_prompt(len(prompt_ids), may_shift=False)
        check_token_ids(self.model, prompt_ids, self.tokenizer)
        options = (options or SamplingOptions()).with_seed()
        cache = cache or PrefixCache(self.model)
        return Reply(self, list(prompt_ids), options, cache, should_stop, profile, part_tokens, part_slower, part_us)

    def check_prompt(self, n_tokens: int, *, may_shift: bool = True) -> None:
        """Raises PromptError unless a prompt of `n_tokens` leaves room for one token, or what is too much of it is left
        out (may_shift: where that is what the deployment says)."""
        limit = self.context_tokens
        if n_tokens == 0:
            raise PromptError("the prompt has no tokens: expected some text to continue")
        if limit is not None and n_tokens >= limit and not (may_shift and self.shift is not None):
            what = f"the model's context is {limit} tokens"
            if limit == self.memory_tokens and limit != model_context_tokens(self.model.config):
                what = f"the memory for keys and values ({(self.kv_bytes or 0) / 2**20:.0f} MiB) holds {limit} tokens"
            raise PromptError(
                f"the prompt has {n_tokens} tokens; {what}, prompt and reply together. "
                f"Shorten the prompt to at most {limit - 1} tokens"
                + (", or raise memory.kv." if "memory" in what else ".")
                + (" --context-shift leaves the oldest tokens out." if may_shift else "")
            )

    def forward(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
        """Compute `token_ids` on top of `cache`; returns the logits [V] after the last of them."""
        with self._on_device():
            rows = None if has_images(token_ids) else self._step_logits(token_ids, cache)
            last: torch.Tensor = (self._model_logits(token_ids, cache) if rows is None else rows)[-1]
        return last

    def forward_rows(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
        """As `forward`, with the logits [n, V] after each of the tokens."""
        with self._on_device():
            return self._model_logits(token_ids, cache, {"logits_to_keep": 0})

    def _model_logits(
        self, token_ids: Sequence[int], cache: PrefixCache, more: Mapping[str, Any] = NOTHING
    ) -> torch.Tensor:
        """Logits [n, V] by the model's forward, for which `more` replaces arguments that it takes."""
        try:
            outputs = self._outputs(token_ids, cache.states, cache.token_ids, self._shift_of(cache), more)
        except BaseException:
            cache.clear()  # some layers hold the new tokens, some do not
            raise
        cache.extended(token_ids, outputs.past_key_values)
        self._measure(cache)
        logits: torch.Tensor = outputs.logits[0]
        return logits

    def _outputs(
        self, token_ids: Sequence[int], states: Any, past_ids: Sequence[int], shift: int,
        more: Mapping[str, Any] = NOTHING,
    ) -> Any:  # fmt: skip
        """What the model's forward returns of tokens behind `past_ids`, whose keys and values are in `states`."""
        import torch

        kwargs = self.forward_kwargs | {name: more[name] for name in more if name in self.forward_kwargs}
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self.model.device)
        with torch.inference_mode():
            inputs = self.model.prepare_inputs_for_generation(
                ids, past_key_values=states, is_first_iteration=not past_ids, **kwargs
            )
            return self.model(**inputs | self._of_images.arguments(token_ids, past_ids, shift))

    def by_layers(self, parts: Sequence[Sequence[int]], cache: PrefixCache) -> LayerMajor | None:
        """The first of the parts of a prompt, as many as should pass the model's layers together, on top of `cache`;
        None where each is to be computed by itself."""
        n_parts = group_of(self.model, cache, parts)
        if not n_parts:
            return None
        shift = self._shift_of(cache)

        def forward(token_ids: Sequence[int], states: Any, n_before: int) -> torch.Tensor:
            with self._on_device():
                logits: torch.Tensor = self._outputs(token_ids, states, range(n_before), shift).logits[0]
            return logits

        return LayerMajor(self.model, forward, cache, parts[:n_parts])

    def forward_each(self, token_ids: Sequence[int], caches: Sequence[PrefixCache]) -> torch.Tensor | None:
        """Compute a token of each of several sequences on top of its cache, in one compiled step; logits [n, V].

        Each row has the bits that `forward` gives for the sequence alone. None, before anything is computed, where they
        must be computed one after another. A step that fails leaves the caches as they were.
        """
        step = getattr(getattr(self.model, "hybrimoe", None), "step", None)
        if step is None:
            return None
        with self._on_device():
            logits: torch.Tensor | None = step.logits_of_each(
                token_ids, [cache.states for cache in caches], [self._shift_of(cache) for cache in caches]
            )
        if logits is not None:
            self._check_experts(caches)
            for token, cache in zip(token_ids, caches, strict=True):
                cache.extended([token], cache.states)
                self._measure(cache)
        return logits

    def _on_device(self) -> AbstractContextManager[None]:
        """Around work of the model: a device of its that hangs or has failed raises LostError."""
        from gpu_kernels.waiting import on_device

        return on_device(self.model.device)

    @property
    def has_lost_device(self) -> bool:
        """Whether a device of the model hangs or has failed, so that no reply can be made until the program starts
        again."""
        session = getattr(getattr(self.model, "hybrimoe", None), "session", None)
        return session is not None and bool(session.is_stuck)

    @property
    def has_lost_experts(self) -> bool:
        """Whether bytes of experts are lost, so that no reply can be made until the model is loaded again."""
        try:
            self._check_experts(())
        except CheckpointError:
            return True
        return False

    @property
    def failed_reads(self) -> str | None:
        """As `ExpertStore.failed_reads`, of the model's experts."""
        injection = getattr(self.model, "hybrimoe", None)
        failed: str | None = None if injection is None else injection.session.store.failed_reads
        return failed

    def _check_experts(self, caches: Sequence[PrefixCache]) -> None:
        """After a step beside the model's forward, which looks itself. Raises CheckpointError where experts that it may
        have used are lost; the caches hold nothing then."""
        injection = getattr(self.model, "hybrimoe", None)
        if injection is None:
            return
        try:
            injection.session.store.check()
        except CheckpointError:
            for cache in caches:
                cache.clear()
            raise

    def verify(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor | None:
        """Compute a token and drafted ones on top of `cache`; returns the logits [n, V] after each of them.

        None, before anything is computed, where the compiled step leaves them to the model. Each row has the bits that
        `forward` gives token by token.
        """
        with self._on_device():
            return self._step_logits(token_ids, cache, drafted=True)

    def make_room(self, error: torch.OutOfMemoryError) -> None:
        """After a prompt for which an accelerator had no memory left. Raises `error` for a model without a session,
        BudgetError where there are no slots to give up."""
        session = getattr(getattr(self.model, "hybrimoe", None), "session", None)
        if session is None:
            raise error
        session.make_room(error)

    def _step_logits(
        self, token_ids: Sequence[int], cache: PrefixCache, *, drafted: bool = False
    ) -> torch.Tensor | None:
        """Logits [n, V] by the model's compiled step; None where it has none or leaves these tokens to the model."""
        step = getattr(getattr(self.model, "hybrimoe", None), "step", None)
        if step is None:
            return None
        try:
            logits: torch.Tensor | None = step.next_logits(
                token_ids, cache.states, drafted=drafted, shift=self._shift_of(cache)
            )
        except BaseException:
            cache.clear()
            raise
        if logits is not None:
            self._check_experts([cache])
            cache.extended(token_ids, cache.states)
            self._measure(cache)
        return logits

    def _shift_of(self, cache: PrefixCache) -> int:
        """By how much the images in a cache move the positions of the text behind them."""
        return cache.n_shifted() if self._of_images.in_a_plane else 0

    def _measure(self, cache: PrefixCache) -> None:
        """Learn from a cache what a token takes, once."""
        layers = [] if self._measured or len(cache.token_ids) < MEASURE_TOKENS else cache.growing_layers()
        if layers:
            self._token_bytes = measured_token_bytes(layers, len(cache.token_ids))
            self._measured = True


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
        generator: TextGenerator,
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
        self._generator = generator
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
        limit = generator.context_tokens
        if self._shift is not None and limit is not None and len(prompt_ids) >= limit:
            self._computed_ids = whole_images(self._shift.kept(prompt_ids, limit))
            self.n_shifts = 1
        self.n_kept = len(self._computed_ids)
        self._sampler = Sampler(generator.model, options, prompt_ids, generator.settings)
        self._scorer: PromptScorer | None = None
        if options.prompt_logprobs is not None:
            self._scorer = PromptScorer(generator.forward_rows, prompt_ids, options.prompt_logprobs)
        self._transcript = Transcript(
            generator.tokenizer, prompt_ids, eos_token_ids=self._sampler.eos_token_ids,
            max_new_tokens=self._sampler.max_new_tokens, context_tokens=self._longest(options), stop=options.stop,
            shown_special=options.shown_special,
        )  # fmt: skip
        self.profile = profile
        self._forward, self._choose, self._show = generator.forward, self._sampler.next, self._transcript.push
        verify = generator.verify
        if profile is not None:
            self._forward, verify = profile.forwarding(self._forward), profile.forwarding(verify)
            self._choose = profile.choosing(self._choose, lambda: len(prompt_ids) - self.n_reused)
            self._show = profile.timed("detokenising", self._show)
        self._speculation: Speculation | None = None
        if generator.pace is not None:
            self._speculation = Speculation(prompt_ids, cache, generator.pace, self._forward, verify)

    @property
    def _shift(self) -> ContextShift | None:
        return self._generator.shift

    def _longest(self, options: SamplingOptions) -> int | None:
        """Tokens of prompt and reply at most. Where oldest ones are left out, a reply whose length is given has no such
        limit, and every other may be as long as the context by itself."""
        limit = self._generator.context_tokens
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
            self._generator.make_room(error)
            return None

    @property
    def n_context(self) -> int:
        """Tokens of the context: those of the prompt and the reply that were not left out."""
        return len(self._computed_ids) + len(self.token_ids) - self._n_before

    def must_shift(self) -> bool:
        """Whether the context has no room for the newest token, and oldest ones are to be left out."""
        limit = self._generator.context_tokens
        return self._shift is not None and limit is not None and self.n_context > limit

    def begin_shift(self) -> None:
        """Leaves the oldest tokens out; `prefill` then computes the others, and gives the logits after the newest."""
        self.share_prompt()
        limit = self._generator.context_tokens
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
        left, limit = self._transcript.n_left, self._generator.context_tokens
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
            self._together = self._generator.by_layers([token_ids[a:b] for a, b in self._parts], self.cache)
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
        size = self._generator.prefill_chunk_tokens or (FEWEST_TOKENS if short else chunk_tokens(self._generator.model))
        if self._scorer is not None:
            size = min(size, most_scored_tokens(vocabulary_size(self._generator.model)))
        for end in (*self._checkpoints, len(self._computed_ids)):
            while start < end:
                stop = min(start + self._part_size(start, size), end)
                if 0 < end - stop <= FEWEST_TOKENS and reads_experts(self._generator.model):
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
        while self._generator.whole_images and stop < len(ids) and is_inside(ids[stop]):
            stop += 1
        return stop
