"""One reply, token by token: prefill in chunks, then sample, show, forward; timed, interruptible between tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import PromptError
from hybrimoe.generation.decoding import warn_of_other_decoding
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.sampling import Sampler, SamplingOptions
from hybrimoe.generation.transcript import FinishReason, Transcript

if TYPE_CHECKING:
    import torch

__all__ = ["FinishReason", "Reply", "ReplyTimes", "TextGenerator"]

PREFILL_CHUNK_TOKENS = 2048
"""Tokens of a prompt that go through the model at once; bounds the memory of activations, not the result."""


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

    forward_kwargs: what a forward call of the model takes beside its inputs; logits of the last token only, if it can.
    """

    def __init__(self, model: Any, tokenizer: Any, *, prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> None:
        import inspect

        self.model = model
        self.tokenizer = tokenizer
        self.prefill_chunk_tokens = prefill_chunk_tokens
        warn_of_other_decoding(model)
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.forward_kwargs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if takes_logits_to_keep:
            self.forward_kwargs["logits_to_keep"] = 1

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence, prompt and reply together, that the model is made for; None where it sets no limit."""
        text_config = self.model.config.get_text_config(decoder=True)
        limit = getattr(text_config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts in front.

        Raises:
            PromptError: the text is empty or only white space.
        """
        if not text.strip():
            raise PromptError("the prompt is empty: expected some text to continue; pass --prompt, a file, or stdin")
        return list(self.tokenizer(text)["input_ids"])

    def reply(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions | None = None,
        *,
        cache: PrefixCache | None = None,
        should_stop: Callable[[], bool] = _never,
    ) -> Reply:
        """A reply to `prompt_ids`, computed while it is iterated.

        Args:
            cache: kept from reply to reply; what a prompt shares with the sequence before is not computed again.
            should_stop: asked between tokens and prefill chunks; True ends the reply, with what there is.

        Raises:
            PromptError: no token, or no room for a reply in the model's context.
        """
        self.check_prompt(len(prompt_ids))
        options = (options or SamplingOptions()).with_seed()
        return Reply(self, list(prompt_ids), options, cache or PrefixCache(self.model), should_stop)

    def check_prompt(self, n_tokens: int) -> None:
        """Raises PromptError unless a prompt of `n_tokens` leaves room for one token."""
        limit = self.context_tokens
        if n_tokens == 0:
            raise PromptError("the prompt has no tokens: expected some text to continue")
        if limit is not None and n_tokens >= limit:
            raise PromptError(
                f"the prompt has {n_tokens} tokens; the model's context is {limit} tokens, prompt and reply together. "
                f"Shorten the prompt to at most {limit - 1} tokens."
            )

    def forward(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
        """Compute `token_ids` on top of `cache`; returns the logits [V] after the last of them."""
        import torch

        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self.model.device)
        try:
            with torch.inference_mode():
                inputs = self.model.prepare_inputs_for_generation(
                    ids, past_key_values=cache.states, is_first_iteration=not cache.token_ids, **self.forward_kwargs
                )
                outputs = self.model(**inputs)
        except BaseException:
            cache.clear()  # some layers hold the new tokens, some do not
            raise
        cache.extended(token_ids, outputs.past_key_values)
        logits: torch.Tensor = outputs.logits[0, -1]
        return logits


class Reply:
    """Iterating gives the text piece by piece; afterwards the attributes say what happened.

    text: all pieces joined. token_ids: the new tokens, an end-of-sequence token included. n_reused: prompt tokens that
    came from the cache. seed: with it the same reply comes again.
    """

    def __init__(
        self,
        generator: TextGenerator,
        prompt_ids: list[int],
        options: SamplingOptions,
        cache: PrefixCache,
        should_stop: Callable[[], bool],
    ) -> None:
        self.prompt_ids = prompt_ids
        self.seed = options.seed
        self.n_reused = 0
        self.times = ReplyTimes()
        self._generator = generator
        self._cache = cache
        self._should_stop = should_stop
        self._sampler = Sampler(generator.model, options, prompt_ids)
        self._transcript = Transcript(
            generator.tokenizer, prompt_ids, eos_token_ids=self._sampler.eos_token_ids,
            max_new_tokens=self._sampler.max_new_tokens, context_tokens=generator.context_tokens, stop=options.stop,
        )  # fmt: skip

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

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces():
            if piece:
                yield piece

    def _pieces(self) -> Iterator[str]:
        last = started = time.perf_counter_ns()
        logits = self._prefill()
        self.times.prefill_us = (time.perf_counter_ns() - started) / 1000
        while logits is not None:
            token = self._sampler.next(logits)
            now = time.perf_counter_ns()
            if self.token_ids:
                self.times.between_tokens_us.append((now - last) / 1000)
            else:
                self.times.ttft_us = (now - started) / 1000
            last = now
            yield self._transcript.push(token)
            if self.finish_reason is None and self._should_stop():
                self._transcript.finish_reason = "interrupted"
            if self.finish_reason is not None:
                break
            logits = self._generator.forward([token], self._cache)
        yield self._transcript.end()

    def _prefill(self) -> torch.Tensor | None:
        """Logits after the prompt; None where it was interrupted."""
        logits = None
        self.n_reused = self._cache.reuse(self.prompt_ids)
        self._cache.announce(len(self.prompt_ids))
        chunk = self._generator.prefill_chunk_tokens
        for start in range(self.n_reused, len(self.prompt_ids), chunk):
            if self._should_stop():
                self._transcript.finish_reason = "interrupted"
                return None
            logits = self._generator.forward(self.prompt_ids[start : start + chunk], self._cache)
        return logits
