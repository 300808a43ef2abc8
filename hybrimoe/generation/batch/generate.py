"""One padded batch: prompts that transformers' `generate` runs side by side, watched token by token.

Greedy replies are those of single runs as far as the arithmetic goes: attention does not see padding, and experts add
a token's rows in the same order whatever else is in the batch. Sums over another width can differ in the last bits, in
padded attention and in kernels that take several tokens at once; where two tokens are that close, a reply can differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.generation.batch.padding import Padding, left_padded, listening
from hybrimoe.generation.engine import TextGenerator
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.sampling import COMPLETION_TOKENS, Sampler, SamplingOptions, with_length
from hybrimoe.generation.transcript import FinishReason, Transcript
from hybrimoe.generation.vocabulary import check_token_ids

if TYPE_CHECKING:
    import torch

__all__ = ["BatchPrompt", "BatchReply", "generate_batch", "new_tokens", "probe_batch", "require_single"]


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """One prompt of a batched job: its tokens, and its own limit where it has one."""

    token_ids: tuple[int, ...]
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class BatchReply:
    """What became of a prompt. `token_ids` includes an end-of-sequence token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def generate_batch(
    generator: TextGenerator, prompts: Sequence[BatchPrompt], options: SamplingOptions,
    should_stop: Callable[[], bool], on_step: Callable[[], None] = lambda: None, prefixes: PrefixTree | None = None,
) -> list[BatchReply]:  # fmt: skip
    """Replies to all prompts, in their order. `should_stop` is asked between tokens, `on_step` called after each step.

    prefixes: what earlier prompts computed, which a prompt without others beside it takes up.

    Sampled replies depend on what shares the batch: the batch draws from one generator with the seed of `options`.
    A generator with speculation takes one prompt at a time. Raises PromptError for a prompt without room for a reply or
    with a token that the model does not have, ConfigError for options of single replies only, and for several prompts
    with speculation.
    """
    import torch
    from transformers import StoppingCriteriaList

    from hybrimoe.generation.stored import kv_dtype_of, new_cache

    _check_options(options)
    for prompt in prompts:
        check_token_ids(generator.model, prompt.token_ids, generator.tokenizer)
    if generator.pace is not None:
        require_single(len(prompts))
    if generator.pace is not None or (prefixes is not None and len(prompts) == 1):
        return [_alone(generator, prompt, options, should_stop, on_step, prefixes) for prompt in prompts]
    order = _longest_first(prompts)
    transcripts = [_transcript(generator, prompts[at], options) for at in order]
    padding = Padding(np.zeros(len(prompts), np.bool_))
    ids, mask = left_padded([prompts[at].token_ids for at in order])
    watch = _Watch(transcripts, padding, should_stop, on_step, ids.shape[1])
    kwargs = options.generation_kwargs() | {
        "max_new_tokens": max(new_tokens(generator, prompts[at], options) for at in order),
        "pad_token_id": int(ids[0, 0]),
    }
    if kv_dtype_of(generator.model) != "auto":
        kwargs["past_key_values"] = new_cache(generator.model)
    device = generator.model.device
    with listening(generator.model, padding), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(options.with_seed().seed or 0)
        generator.model.generate(
            ids.to(device), attention_mask=mask.to(device), stopping_criteria=StoppingCriteriaList([watch]), **kwargs
        )
    replies = {at: _reply(transcript) for at, transcript in zip(order, transcripts, strict=True)}
    return [replies[at] for at in range(len(prompts))]


def require_single(n_sequences: int) -> None:
    """Raises ConfigError where drafts would have to be verified for several sequences at once."""
    if n_sequences > 1:
        raise ConfigError(
            f"speculation is for one sequence at a time, found batches of up to {n_sequences}: choose --batch-size 1,"
            " or leave --speculate (generation.speculate) out"
        )


def _alone(
    generator: TextGenerator, prompt: BatchPrompt, options: SamplingOptions, should_stop: Callable[[], bool],
    on_step: Callable[[], None], prefixes: PrefixTree | None,
) -> BatchReply:  # fmt: skip
    """A batch of one, with drafts or what is known of its beginning: the tokens are those that `generate` would choose
    or draw."""
    own = _own_options(generator, prompt, options)
    cache = PrefixCache(generator.model, prefixes)
    reply = generator.reply(list(prompt.token_ids), own, cache=cache, should_stop=should_stop)
    n_told = 0
    for _ in chain(reply, [""]):  # tokens without a text of their own come with the next piece, or at the end
        while n_told < len(reply.token_ids):
            on_step()
            n_told += 1
    return BatchReply(reply.text, tuple(reply.token_ids), reply.finish_reason or "interrupted")


def probe_batch(generator: TextGenerator, prompts: Sequence[BatchPrompt]) -> np.typing.NDArray[np.float64]:
    """Route vectors of prompts, float64 [n, layers, experts]: one prefill of all, whose logits are thrown away.

    Padded prompts may stand at shifted positions here, which can move a route of a model with absolute positions.
    Raises ConfigError where nothing tells the routing: experts that were not replaced, or Llama 4's sorted tokens.
    """
    import torch

    order = _longest_first(prompts)
    padding = Padding(np.zeros(len(prompts), np.bool_), count=True)
    ids, mask = left_padded([prompts[at].token_ids for at in order])
    device = generator.model.device
    with listening(generator.model, padding), torch.inference_mode():
        inputs = generator.model.prepare_inputs_for_generation(
            ids.to(device), attention_mask=mask.to(device), past_key_values=None, is_first_iteration=True,
            **generator.forward_kwargs | {"use_cache": False},
        )  # fmt: skip
        generator.model(**inputs)
    if padding.activations is None or padding.tokens is None:
        raise ConfigError(
            "grouping by routes needs a model whose experts were replaced and are told which token goes where"
            f" ({type(generator.model).__name__} does not show it); use --batching none or moe-lightning"
        )
    routes = padding.activations / np.maximum(padding.tokens, 1)[:, None, None]
    return np.asarray(routes[np.argsort(order)])


def new_tokens(generator: TextGenerator, prompt: BatchPrompt, options: SamplingOptions) -> int:
    """The longest reply that a prompt may have: its own limit or the job's, within the model's context."""
    limit = generator.context_tokens
    given = _sampler(generator, prompt, options).max_new_tokens
    return given if limit is None else min(given, limit - len(prompt.token_ids))


def _sampler(generator: TextGenerator, prompt: BatchPrompt, options: SamplingOptions) -> Sampler:
    return Sampler(generator.model, _own_options(generator, prompt, options), prompt.token_ids)


def _own_options(generator: TextGenerator, prompt: BatchPrompt, options: SamplingOptions) -> SamplingOptions:
    """The options with the length that the prompt's reply may have."""
    own = options if prompt.max_new_tokens is None else replace(options, max_new_tokens=prompt.max_new_tokens)
    return with_length(own, generator.model, COMPLETION_TOKENS)


def _transcript(generator: TextGenerator, prompt: BatchPrompt, options: SamplingOptions) -> Transcript:
    generator.check_prompt(len(prompt.token_ids))
    sampler = _sampler(generator, prompt, options)
    return Transcript(
        generator.tokenizer, prompt.token_ids, eos_token_ids=sampler.eos_token_ids,
        max_new_tokens=sampler.max_new_tokens, context_tokens=generator.context_tokens, stop=options.stop,
    )  # fmt: skip


def _check_options(options: SamplingOptions) -> None:
    """Raises ConfigError for what transformers' `generate` does not have."""
    for name in ("ignore_eos", "frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(options, name):
            raise ConfigError(f"{name} is for single replies; batches have no support for it")
    if options.top_logprobs is not None:
        raise ConfigError("top_logprobs is for single replies; batches record no log probabilities")


def _longest_first(prompts: Sequence[BatchPrompt]) -> list[int]:
    """The first row then has no padding: lookahead gates are checked against the first tokens of a call."""
    return sorted(range(len(prompts)), key=lambda at: (-len(prompts[at].token_ids), at))


def _reply(transcript: Transcript) -> BatchReply:
    transcript.end()
    return BatchReply(transcript.text, tuple(transcript.token_ids), transcript.finish_reason or "interrupted")


class _Watch:
    """A stopping criterion of transformers: hands each new token to its transcript, and ends rows one by one."""

    def __init__(
        self, transcripts: Sequence[Transcript], padding: Padding, should_stop: Callable[[], bool],
        on_step: Callable[[], None], n_prompt: int,
    ) -> None:  # fmt: skip
        self._transcripts, self._padding, self._n_prompt = transcripts, padding, n_prompt
        self._should_stop, self._on_step = should_stop, on_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        ended = self._padding.ended
        newest = input_ids[:, -1].tolist()
        for row, transcript in enumerate(self._transcripts):
            if not ended[row]:
                transcript.push(newest[row])
                ended[row] = transcript.finish_reason is not None
        self._on_step()
        if self._should_stop():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return torch.from_numpy(ended.copy()).to(input_ids.device)
