"""Tokens of the own loop against `model.generate`, and the options' own checks."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.generation import SamplingOptions, TextGenerator, sampling
from hybrimoe.generation.sampling import Sampler

PROMPT = "It was a bright morning, and"
CASES = {
    "greedy": (SamplingOptions(), {"do_sample": False}),
    "temperature 0": (SamplingOptions(temperature=0.0, top_p=0.5), {"do_sample": False}),
    "temperature": (SamplingOptions(temperature=1.7, seed=3), {"do_sample": True, "temperature": 1.7, "top_k": 50}),
    "top_p": (SamplingOptions(top_p=0.6, seed=4), {"do_sample": True, "top_p": 0.6}),
    "top_k": (SamplingOptions(top_k=5, seed=5), {"do_sample": True, "top_k": 5}),
    "min_p": (SamplingOptions(min_p=0.1, top_k=0, seed=6), {"do_sample": True, "min_p": 0.1, "top_k": 0}),
    "repetition": (SamplingOptions(repetition_penalty=1.4), {"do_sample": False, "repetition_penalty": 1.4}),
    "all": (
        SamplingOptions(temperature=0.8, top_p=0.9, top_k=20, min_p=0.02, repetition_penalty=1.1, seed=7),
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.1},
    ),
}


def generated(model, prompt_ids, seed, **kwargs):
    if seed is not None:
        torch.manual_seed(seed)
    return model.generate(torch.tensor([prompt_ids]), **kwargs)[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_model_generate(tiny_model, byte_tokenizer, case):
    options, kwargs = CASES[case]
    generator = TextGenerator(tiny_model, byte_tokenizer)
    prompt_ids = generator.encode(PROMPT)
    expected = generated(tiny_model, prompt_ids, options.seed, max_new_tokens=40, **kwargs)
    reply = generator.reply(prompt_ids, replace(options, max_new_tokens=40))
    "".join(reply)
    assert reply.token_ids == expected
    assert reply.finish_reason == "length"


def test_settings_of_the_generation_config_hold_where_no_option_is_given(tiny_model, byte_tokenizer, monkeypatch):
    config = GenerationConfig(do_sample=True, top_k=3, no_repeat_ngram_size=2, max_new_tokens=25)
    monkeypatch.setattr(tiny_model, "generation_config", config)
    generator = TextGenerator(tiny_model, byte_tokenizer)
    prompt_ids = generator.encode(PROMPT)
    expected = generated(tiny_model, prompt_ids, 11)
    reply = generator.reply(prompt_ids, SamplingOptions(seed=11))
    "".join(reply)
    assert reply.token_ids == expected
    assert len(expected) == 25


def test_any_token_of_the_eos_list_ends_the_reply(tiny_model, byte_tokenizer, monkeypatch):
    generator = TextGenerator(tiny_model, byte_tokenizer)
    prompt_ids = generator.encode(PROMPT)
    free = generator.reply(prompt_ids, SamplingOptions(max_new_tokens=30, seed=1, temperature=1.0))
    "".join(free)
    last = free.token_ids[9]
    end = free.token_ids.index(last)
    config = GenerationConfig(eos_token_id=[byte_tokenizer.eos_token_id, last])
    monkeypatch.setattr(tiny_model, "generation_config", config)
    reply = generator.reply(prompt_ids, SamplingOptions(max_new_tokens=30, seed=1, temperature=1.0))
    text = "".join(reply)
    assert reply.token_ids == free.token_ids[: end + 1]
    assert reply.finish_reason == "eos"
    assert text == byte_tokenizer.decode(free.token_ids[:end])
    ignoring = generator.reply(prompt_ids, SamplingOptions(max_new_tokens=30, seed=1, temperature=1.0, ignore_eos=True))
    "".join(ignoring)
    assert ignoring.token_ids == free.token_ids


def test_a_drawn_seed_is_told_and_repeats_the_reply(tiny_model, byte_tokenizer):
    generator = TextGenerator(tiny_model, byte_tokenizer)
    prompt_ids = generator.encode(PROMPT)
    first = generator.reply(prompt_ids, SamplingOptions(temperature=2.0, max_new_tokens=20))
    again = generator.reply(prompt_ids, SamplingOptions(temperature=2.0, max_new_tokens=20, seed=first.seed))
    other = generator.reply(prompt_ids, SamplingOptions(temperature=2.0, max_new_tokens=20))
    assert "".join(first) == "".join(again)
    "".join(other)
    assert first.seed != other.seed
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -3}, "seed"),
        ({"stop": ("a", "")}, "stop"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        SamplingOptions(**options)


def test_the_first_of_the_largest_logits_is_chosen_where_nothing_else_has_a_say(tiny_model):
    sampler = Sampler(tiny_model, SamplingOptions(), [1, 2])
    logits = torch.randn(256, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits[[9, 77, 140]] = 6.0
    assert sampler.next(logits) == 9
    assert sampler.next(logits.float()) == 9
    for damaged in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match=r"after 4 tokens are not finite numbers"):
            sampler.next(logits.index_fill(0, torch.tensor([3]), damaged))
    with pytest.raises(ModelError, match="not finite"):
        sampler.next(torch.full((256,), float("-inf")))


def test_settings_are_put_together_once_and_follow_the_model(tiny_model, monkeypatch):
    asked = []
    put_together = sampling.compat.generation_settings
    monkeypatch.setattr(
        sampling.compat, "generation_settings", lambda *given: asked.append(given) or put_together(*given)
    )
    settings = sampling.Settings(tiny_model)
    warm, cold = SamplingOptions(temperature=0.5), SamplingOptions(temperature=0.0)
    first = settings.of(warm)
    first.max_length = 7
    again = settings.of(warm)
    assert (again.temperature, again.max_length != 7, len(asked)) == (0.5, True, 1), "each has one of its own"
    assert settings.of(cold).do_sample is False
    assert len(asked) == 2
    monkeypatch.setattr(tiny_model.generation_config, "repetition_penalty", 1.5)
    assert settings.of(warm).repetition_penalty == 1.5, "what the model's configuration says now"
    for number in range(sampling.KNOWN_SETTINGS + 2):
        settings.of(SamplingOptions(max_new_tokens=number + 1))
    assert len(settings._known) <= sampling.KNOWN_SETTINGS


class AnyStructure:
    """A constraint that allows every token, and ends nothing."""

    is_complete = False

    def begin(self):
        return self

    def masked(self, logits):
        return logits

    def accept(self, token):
        pass


@pytest.mark.parametrize(("asked", "applied"), [(None, 1.0), (1.3, 1.3)])
def test_a_structured_reply_has_the_penalty_that_is_asked_for_and_not_the_models(
    tiny_model, byte_tokenizer, monkeypatch, asked, applied
):
    """The names and values of JSON must repeat what stands in prompt and reply."""
    monkeypatch.setattr(tiny_model.generation_config, "repetition_penalty", 1.4)
    generator = TextGenerator(tiny_model, byte_tokenizer)
    prompt_ids = generator.encode(PROMPT)

    def tokens(**options):
        reply = generator.reply(prompt_ids, SamplingOptions(temperature=0.0, max_new_tokens=20, **options))
        list(reply)
        return reply.token_ids

    structured = tokens(repetition_penalty=asked, constraint=AnyStructure())
    assert structured == tokens(repetition_penalty=applied)
    assert tokens() == tokens(repetition_penalty=1.4) != tokens(repetition_penalty=1.0)
