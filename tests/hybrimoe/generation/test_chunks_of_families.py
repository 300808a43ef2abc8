"""A prompt in chunks, and a second prompt on a kept cache, give the tokens of the whole prompt computed anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hybrimoe.generation import PrefixCache, SamplingOptions, TextGenerator

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))

FAMILIES = ("unlimited_ocr", "qwen3_moe", "gpt_oss", "deepseek_v2", "granitemoehybrid", "lfm2_moe")
"""Keeps its prompt and a window of its reply, plain, sliding windows, latent, Mamba, convolutions."""
NEW_TOKENS = 24
"""More than the sliding window of 16, so that a window that began in the wrong place shows."""


def generator(family: str, tokenizer: PreTrainedTokenizerFast, chunk: int) -> TextGenerator:
    from tiny_families import tiny_model

    return TextGenerator(tiny_model(family), tokenizer, prefill_chunk_tokens=chunk)


def tokens(made: TextGenerator, prompt_ids: list[int], cache: PrefixCache | None = None) -> list[int]:
    reply = made.reply(prompt_ids, SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0), cache=cache)
    list(reply)
    return reply.token_ids


@pytest.fixture
def prompt_ids() -> list[int]:
    return torch.randint(3, 96, (23,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks(family: str, byte_tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]) -> None:
    from tiny_families import tiny_model

    with torch.no_grad():
        generated = tiny_model(family).generate(
            torch.tensor([prompt_ids]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    expected = generated[0, len(prompt_ids) :].tolist()
    for chunk in (64, 5):
        assert tokens(generator(family, byte_tokenizer, chunk), prompt_ids) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_on_a_kept_cache(
    family: str, byte_tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]
) -> None:
    made = generator(family, byte_tokenizer, 5)
    cache = PrefixCache(made.model)
    second = [*prompt_ids, *tokens(made, prompt_ids, cache), *prompt_ids[:9]]
    reply = made.reply(second, SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0), cache=cache)
    list(reply)
    assert reply.token_ids == tokens(made, second)
    if family == "unlimited_ocr":
        assert reply.n_reused == 0, "the first reply lies in a window, as no part of a prompt does"
