"""Tokens that a model does not have are refused by name, wherever they come from."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hybrimoe.errors import PromptError
from hybrimoe.generation import Conversation, SamplingOptions, TextGenerator
from hybrimoe.generation.batch.generate import BatchPrompt, generate_batch
from hybrimoe.generation.batch.job import job_prompts
from hybrimoe.generation.batch.prompts_file import read_prompts
from hybrimoe.generation.vocabulary import check_token_ids, vocabulary_size

GREEDY = SamplingOptions(max_new_tokens=2, temperature=0.0)


@pytest.fixture
def generator(tiny_model, byte_tokenizer):
    return TextGenerator(tiny_model, byte_tokenizer)


@pytest.fixture
def larger(tiny_model, byte_tokenizer):
    """The model with a tokenizer to which a token was added."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str()),
        eos_token="<eos>",
    )
    tokenizer.add_tokens(["<added>"])
    return TextGenerator(tiny_model, tokenizer)


@pytest.mark.parametrize("token", [-1, 257, 10**12])
def test_a_prompt_of_token_ids(generator, token):
    size = vocabulary_size(generator.model)
    assert size == len(generator.tokenizer) == 257
    with pytest.raises(
        PromptError, match=rf"token {token} at position 1 is outside the vocabulary of 257: .* 0 to 256"
    ):
        generator.reply([65, token], GREEDY)


def test_every_token_of_the_model_is_taken(generator):
    assert len("".join(generator.reply([0, 256], GREEDY))) >= 0


def test_a_token_that_was_added_to_the_tokenizer(larger):
    told = r"token 257 \('<added>', at position 2\) is outside the vocabulary of 257: the tokenizer has tokens"
    with pytest.raises(PromptError, match=told):
        larger.reply(larger.encode("ab<added>"), GREEDY)
    with pytest.raises(PromptError, match="'<added>'"):
        Conversation(larger).send("<added>", GREEDY)
    lines = read_prompts("fine\nab<added>\n", "prompts.txt")
    with pytest.raises(PromptError, match=rf"prompts\.txt:2: .*{told}"):
        job_prompts(larger, lines, "prompts.txt")


def test_a_batch_from_python(generator):
    with pytest.raises(PromptError, match="token 300 at position 0"):
        generate_batch(generator, [BatchPrompt((65,)), BatchPrompt((300, 65))], GREEDY, lambda: False)


def test_a_logit_bias(generator):
    options = SamplingOptions(max_new_tokens=2, logit_bias=((300, 1.0),))
    with pytest.raises(PromptError, match="logit_bias: token 300"):
        generator.reply([65], options)


def test_padded_embeddings_count():
    """Rows behind the vocabulary of the configuration are rows all the same."""

    class Padded(torch.nn.Module):
        def get_input_embeddings(self):
            return torch.nn.Embedding(64, 2)

    check_token_ids(Padded(), [63])
    with pytest.raises(PromptError, match="vocabulary of 64"):
        check_token_ids(Padded(), [64])
