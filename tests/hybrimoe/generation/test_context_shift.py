"""Texts that outgrow the context: an error, or the oldest tokens are left out and the rest is computed as if alone."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

import hybrimoe
from hybrimoe.errors import ConfigError, PromptError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.chat import Conversation
from hybrimoe.generation.context import ContextShift
from hybrimoe.generation.continuous_batching import BatchEngine

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import tiny_model as tiny_family

CONTEXT = 128
"""Of the tiny model."""
PROMPT = list(b"once upon a time there was a king who had three daughters, and he said: ")
SHIFT = ContextShift(n_sinks=4)


def options(n_tokens: int | None) -> SamplingOptions:
    return SamplingOptions(temperature=0, max_new_tokens=n_tokens, ignore_eos=True)


def replied(generator: TextGenerator, prompt: list[int], n_tokens: int | None) -> Any:
    reply = generator.reply(prompt, options(n_tokens))
    "".join(reply)
    return reply


def computed_alone(generator: TextGenerator, prompt: list[int], n_tokens: int, limit: int, shift: ContextShift) -> Any:
    """The tokens of a reply where each time that the context is full a fresh one begins with the kept tokens."""
    context, found = list(prompt), []
    while len(found) < n_tokens:
        if len(context) >= limit:
            context = shift.kept(context, limit)
        n_new = min(n_tokens - len(found), limit + 1 - len(context))
        plain = TextGenerator(generator.model, generator.tokenizer, shift=shift)
        new = replied(plain, context, n_new).token_ids
        found += new
        context += new
    return found


def test_what_is_kept() -> None:
    assert ContextShift(4).kept(list(range(100)), 50) == [0, 1, 2, 3, *range(77, 100)]
    assert ContextShift(0).kept(list(range(100)), 3) == [99]
    with pytest.raises(ConfigError, match="63 of a context of 100 tokens; expected at most 49"):
        ContextShift(63).check(100)


@pytest.mark.parametrize("family", [None, "jamba", "deepseek_v3", "gpt_oss"])
def test_a_shifted_reply_is_the_fresh_one_of_the_kept_tokens(
    tiny_model: Any, byte_tokenizer: Any, family: str | None
) -> None:
    """Also of recurrent states, latent attention and windows."""
    model = tiny_model if family is None else tiny_family(family)
    generator = TextGenerator(model, byte_tokenizer, shift=SHIFT)
    limit = CONTEXT
    if family is not None:
        model.config.max_position_embeddings = limit
        rope = getattr(model.config, "rope_parameters", None) or {}
        rope["original_max_position_embeddings"] = limit // int(rope.get("factor", 1))
    prompt = PROMPT if family is None else [token % 60 + 3 for token in PROMPT]
    reply = replied(generator, prompt, 130)
    assert generator.context_tokens == limit
    assert len(reply.token_ids) == 130
    assert reply.finish_reason == "length"
    assert reply.n_shifts == 2
    assert reply.token_ids == computed_alone(generator, prompt, 130, limit, SHIFT)


def test_a_long_prompt_loses_its_middle(tiny_model: Any, byte_tokenizer: Any) -> None:
    long = PROMPT * 3
    generator = TextGenerator(tiny_model, byte_tokenizer, shift=SHIFT)
    reply = replied(generator, long, 8)
    assert reply.n_shifts == 1
    assert reply.token_ids == replied(generator, SHIFT.kept(long, CONTEXT), 8).token_ids
    with pytest.raises(PromptError, match=r"at most 127 tokens.*--context-shift leaves the oldest tokens out"):
        TextGenerator(tiny_model, byte_tokenizer).reply(long)
    with pytest.raises(PromptError, match="at most 127 tokens"):  # each token is to be scored
        generator.reply(long, SamplingOptions(prompt_logprobs=1, max_new_tokens=1))


def test_without_a_length_a_reply_is_as_long_as_the_context(tiny_model: Any, byte_tokenizer: Any) -> None:
    generator = TextGenerator(tiny_model, byte_tokenizer, shift=SHIFT)
    tiny_model.generation_config.max_new_tokens = None
    reply = generator.reply(PROMPT, options(None))
    "".join(reply)
    assert reply.finish_reason in ("context", "length")
    assert len(reply.token_ids) <= CONTEXT


def test_side_by_side_with_drafts_and_in_less_memory(tiny_model: Any, byte_tokenizer: Any) -> None:
    model = copy.deepcopy(tiny_model)
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32", kv_dtype="int8")
    generator = TextGenerator(model, byte_tokenizer, shift=SHIFT)
    prompts = [PROMPT, PROMPT[20:]]
    alone = [replied(generator, prompt, 110).token_ids for prompt in prompts]
    engine = BatchEngine(generator, parallel=2, part_tokens=16)
    replies = [engine.admit(prompt, options(110), lambda: False) for prompt in prompts]
    while engine.n_running:
        list(engine.step())
    assert [reply.token_ids for reply in replies] == alone
    drafting = TextGenerator(model, byte_tokenizer, speculate=True, shift=SHIFT)
    assert replied(drafting, PROMPT, 110).token_ids == alone[0]
    small = TextGenerator(model, byte_tokenizer, kv_bytes=100 * generator.token_bytes(), shift=SHIFT)
    assert small.context_tokens == 100
    assert replied(small, PROMPT, 100).n_shifts == 2


def test_a_chat_goes_on(tiny_model: Any, byte_tokenizer: Any) -> None:
    conversation = Conversation(TextGenerator(tiny_model, byte_tokenizer, shift=SHIFT))
    for message in ("hello", "x" * 200, "and then"):
        turn = conversation.send(message, options(60))
        assert len(list(turn)) > 0
        assert len(turn.reply.token_ids) == 60


def test_sinks_go_with_shifts() -> None:
    with pytest.raises(ConfigError, match="attention_sinks are tokens that context_shift keeps"):
        hybrimoe.load_config({"generation": {"attention_sinks": 4}})
    config = hybrimoe.load_config({}, context_shift=True, attention_sinks=0)
    assert (config.generation.context_shift, config.generation.attention_sinks) == (True, 0)
