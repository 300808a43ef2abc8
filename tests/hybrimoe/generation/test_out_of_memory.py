"""A prompt for which an accelerator has no memory, beside the experts: slots make room, and the prompt begins anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hybrimoe
from hybrimoe.errors import BudgetError
from hybrimoe.generation import SamplingOptions, TextGenerator

PROMPT = list(range(3, 23))
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=6)


def tokens_of(generator: TextGenerator) -> list[int]:
    reply = generator.reply(PROMPT, GREEDY)
    "".join(reply)
    return reply.token_ids


def failing(model: Any, times: int) -> None:
    """The last norm finds no memory in the next calls."""
    own, left = model.model.norm.forward, [times]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines")
        result: torch.Tensor = own(hidden)
        return result

    model.model.norm.forward = forward


@pytest.fixture
def generator(tiny_model: Any, byte_tokenizer: PreTrainedTokenizerFast) -> TextGenerator:
    model = copy.deepcopy(tiny_model)
    hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=4, expert_dtype="float32")
    return TextGenerator(model, byte_tokenizer, prefill_chunk_tokens=8)


def test_the_prompt_begins_anew_with_fewer_slots(generator: TextGenerator) -> None:
    expected = tokens_of(generator)
    session = generator.model.hybrimoe.session
    failing(generator.model, 1)
    with pytest.warns(RuntimeWarning, match="out of memory: 3 expert slots in place of 4"):
        assert tokens_of(generator) == expected
    assert session.n_slots == 3
    assert tokens_of(generator) == expected


def test_without_slots_to_give_up_it_is_an_error_that_says_what_to_do(generator: TextGenerator) -> None:
    expected = tokens_of(generator)
    failing(generator.model, 10)
    with pytest.warns(RuntimeWarning), pytest.raises(BudgetError, match=r"no expert slots.*20.00 MiB.*Shorten"):
        tokens_of(generator)
    generator.model.model.norm.__dict__.pop("forward")
    assert generator.model.hybrimoe.session.n_slots == 0
    assert tokens_of(generator) == expected


def test_a_model_as_transformers_has_it_keeps_torchs_error(
    tiny_model: Any, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(tiny_model)
    failing(model, 1)
    with pytest.raises(torch.OutOfMemoryError):
        tokens_of(TextGenerator(model, byte_tokenizer))
