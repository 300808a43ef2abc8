"""Drafts change how fast a reply comes, never what it says: same tokens, same bits, the cache as without them."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrimoe
from hybrimoe.errors import ConfigError
from hybrimoe.generation import Conversation, PrefixCache, Profile, SamplingOptions, TextGenerator, speculation
from hybrimoe.generation.batch.generate import BatchPrompt, generate_batch
from hybrimoe.generation.batch.job import BatchJob
from hybrimoe.generation.pace import FIRST_ACCEPTANCE, KEPT_TIMES, MAX_DRAFT_TOKENS, STALE_STEPS, DraftPace
from hybrimoe.generation.speculation import PromptLookup

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import Letters
from tiny_families import tiny_model as tiny_family

PASSAGE = [5, 17, 42, 8, 63, 29, 11, 80, 33, 54, 71, 9, 26]
PROMPT = [*PASSAGE, 3, 4, *PASSAGE[:4]]
NEW_TOKENS = 40
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True, top_logprobs=2)
DRAWN = replace(GREEDY, temperature=0.8, seed=11, logit_bias=((5, 9.0), (17, 9.0), (42, 8.0)))
"""Among a few tokens, so that pairs of them come again: some drafts are right, others wrong."""


class Always(DraftPace):
    """Every draft is computed as a whole."""

    def n_to_draft(self, n_offered: int) -> int:
        return min(n_offered, MAX_DRAFT_TOKENS)


def injected(family: str, **options: Any) -> Any:
    model = tiny_family(family)
    hybrimoe.inject(model, accelerator="none", **({"expert_dtype": "float32"} | options))
    assert model.hybrimoe.step is not None, model.hybrimoe.way
    return model


def generator_of(model: Any, pace: DraftPace | None = None) -> TextGenerator:
    generator = TextGenerator(model, Letters(), speculate=pace is not None)
    generator.pace = pace
    return generator


def beginning(model: Any, prompt: list[int] = PROMPT) -> PrefixCache:
    """A cache that holds all of a prompt but its last token. Both ways of a comparison begin with a copy of it, because
    torch does not give a prefill the same bits each time."""
    cache = PrefixCache(model)
    "".join(TextGenerator(model, Letters()).reply(prompt[:-1], SamplingOptions(max_new_tokens=1), cache=cache))
    return cache


def twin(model: Any, cache: PrefixCache) -> PrefixCache:
    copied = PrefixCache(model)
    copied.extended(cache.token_ids, copy.deepcopy(cache.states))
    return copied


def run(reply: Any) -> Any:
    assert "".join(reply) == reply.text
    return reply


# Drafts -------------------------------------------------------------------------------------------------------------


def test_what_followed_the_longest_known_end_is_drafted() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 50, 51, 3, 4, 60, 61, 2, 3, 4])
    assert lookup.draft(3) == [50, 51, 3], "after 2 3 4 there is one place; 3 4 alone was later followed by 60"
    lookup.append(60)
    assert lookup.draft(2) == [61, 2], "of several places the latest"
    lookup.append(70)
    assert lookup.draft(3) == []
    assert PromptLookup([]).draft(3) == []
    assert PromptLookup([1]).draft(3) == []


def test_a_repetition_is_continued_beyond_the_end_of_the_text() -> None:
    assert PromptLookup([9, 7, 7, 7]).draft(4) == [7, 7, 7, 7]
    assert PromptLookup([9, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]


# How many to draft --------------------------------------------------------------------------------------------------


def paced(times_us: dict[int, float], acceptance: float, n_steps: int = 60) -> tuple[DraftPace, list[int]]:
    """A pace after so many steps that had a draft, of which each token was right with a steady share; its choices."""
    pace, chosen, credit = DraftPace(), [], 0.0
    for _ in range(n_steps):
        n = pace.n_to_draft(MAX_DRAFT_TOKENS)
        chosen.append(n)
        pace.measured(n + 1, times_us[n + 1])
        for _ in range(max(n, 1)):
            credit += acceptance
            right = credit >= 1.0
            credit -= right
            pace.compared(right)
            if not right:
                break
    return pace, chosen


CHEAP = {1: 100.0, 2: 110.0, 3: 120.0, 4: 130.0}
DEAR = {1: 100.0, 2: 190.0, 3: 280.0, 4: 370.0}


def test_as_many_tokens_are_drafted_as_pay() -> None:
    assert set(paced(CHEAP, 1.0)[1][-20:]) == {3}
    assert set(paced(DEAR, 1.0)[1][-20:]) == {3}, "all right: 4 tokens in the time of 3.7"
    assert set(paced({**CHEAP, 3: 300.0, 4: 500.0}, 1.0)[1][45:]) == {1}


def test_drafts_that_lose_are_switched_off_and_measured_seldom() -> None:
    pace, chosen = paced(DEAR, 0.5, n_steps=5 * STALE_STEPS)
    assert chosen[50:250] == [0] * 200
    assert 0 < sum(n > 0 for n in chosen[50:]) <= 5 * 2 * MAX_DRAFT_TOKENS
    assert pace.acceptance < 0.9


def test_a_text_that_repeats_switches_them_on_again() -> None:
    pace, _ = paced(CHEAP, 1.0)
    for _ in range(40):
        pace.compared(False)
    assert pace.n_to_draft(3) == 0
    for _ in range(20):  # drafts that were passed over turn out right
        pace.compared(True)
    assert pace.n_to_draft(3) == 3
    pace.begin_reply()
    assert pace.acceptance == FIRST_ACCEPTANCE


def test_times_that_change_are_noticed() -> None:
    pace, _ = paced(CHEAP, 1.0)
    assert pace.n_to_draft(3) == 3
    for _ in range(KEPT_TIMES):
        pace.measured(4, 2_000.0)
    assert pace.n_to_draft(3) == 2


def test_a_slow_moment_does_not_keep_drafts_off_that_are_right() -> None:
    pace, chosen = DraftPace(), []
    for number in range(100):
        chosen.append(pace.n_to_draft(3))
        slow = 10.0 if number < 10 and chosen[-1] else 1.0  # another program had the machine while drafts were tried
        pace.measured(chosen[-1] + 1, slow * CHEAP[chosen[-1] + 1])
        pace.compared(True)
    assert set(chosen[20:30]) == {0}
    assert set(chosen[50:]) == {3}


def test_hopeless_drafts_are_not_even_measured() -> None:
    pace = DraftPace()
    for _ in range(60):
        pace.compared(False)
    for _ in range(2):
        assert pace.n_to_draft(3) == 0
        pace.measured(1, 100.0)
    assert pace.n_to_draft(3) == 0


# Replies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("family", "dtypes"),
    [
        ("qwen2_moe", {}),
        ("olmoe", {"expert_dtype": "int8", "dense_dtype": "int8"}),
        ("qwen2_moe", {"expert_dtype": "int4", "dense_dtype": "int4"}),
        ("olmoe", {"expert_dtype": "bfloat16"}),
        ("gpt_oss", {}),
        ("gpt_oss", {"expert_dtype": "int8", "dense_dtype": "int8"}),
    ],
)
def test_tokens_and_bits_are_those_without_drafts(family: str, dtypes: dict[str, str], options: Any) -> None:
    model = injected(family, **dtypes)
    start = beginning(model)
    plain_cache, cache = twin(model, start), twin(model, start)
    plain = run(generator_of(model).reply(PROMPT, options, cache=plain_cache))
    drafted = run(generator_of(model, Always()).reply(PROMPT, options, cache=cache))
    assert drafted.token_ids == plain.token_ids
    assert drafted.logprobs == plain.logprobs, "the logits have the same bits"
    assert drafted.text == plain.text
    assert drafted.finish_reason == plain.finish_reason == "length"
    stats = drafted.speculation
    assert plain.speculation is None
    assert stats.drafted_tokens > 0
    assert stats.steps + stats.steps_saved == NEW_TOKENS - 1
    assert cache.token_ids == plain_cache.token_ids == PROMPT + plain.token_ids[:-1]
    for one, other in zip(cache.states.layers, plain_cache.states.layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_drafts_are_right_where_the_text_repeats() -> None:
    model = injected("qwen2_moe")
    found = run(generator_of(model, Always()).reply(PROMPT, replace(GREEDY, max_new_tokens=100)))
    stats = found.speculation
    assert stats.accepted_tokens > 10, "a random model soon repeats itself"
    assert stats.accepted_tokens == stats.steps_saved
    assert stats.as_dict()["steps_saved"] == stats.steps_saved


class Patterned:
    """A structure of tokens whose number modulo 3 goes 0, 1, 1, 2 and again; it ends after so many tokens. What it has
    been asked and told since `begin` must be one reply's tokens, in order."""

    PATTERN = (0, 1, 1, 2)

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens, self.chosen = n_tokens, []

    def begin(self) -> Patterned:
        return Patterned(self.n_tokens)

    @property
    def is_complete(self) -> bool:
        return len(self.chosen) == self.n_tokens

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        allowed = torch.arange(len(logits)) % 3 == self.PATTERN[len(self.chosen) % 4]
        return torch.where(allowed, logits, -torch.inf)

    def accept(self, token: int) -> None:
        assert token % 3 == self.PATTERN[len(self.chosen) % 4]
        self.chosen.append(token)


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_structure_holds_with_drafts_as_without(options: Any) -> None:
    model = injected("qwen2_moe")
    options = replace(options, constraint=Patterned(30))
    start = beginning(model)
    plain = run(generator_of(model).reply(PROMPT, options, cache=twin(model, start)))
    drafted = run(generator_of(model, Always()).reply(PROMPT, options, cache=twin(model, start)))
    assert drafted.token_ids == plain.token_ids
    assert len(plain.token_ids) == 30
    assert drafted.finish_reason == plain.finish_reason == "complete"
    assert drafted.speculation.drafted_tokens > 0


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_turns_of_a_conversation_are_those_without_drafts(family: str) -> None:
    model = injected(family)
    talks = [Conversation(generator_of(model, pace)) for pace in (None, Always())]
    for message in ("abcabcabc", "and abc", "abcabd"):
        turns = [talk.send(message, replace(GREEDY, max_new_tokens=12)) for talk in talks]
        said = ["".join(turn) for turn in turns]
        assert said[0] == said[1]
        assert turns[0].reply.n_reused == turns[1].reply.n_reused


@pytest.mark.parametrize("n_read", [1, 5, 12])
def test_a_reader_who_leaves_finds_no_draft_in_the_cache(n_read: int) -> None:
    model = injected("gpt_oss")
    cache = PrefixCache(model)
    generator = generator_of(model, Always())
    reply = generator.reply(PROMPT, GREEDY, cache=cache)
    for number, _ in enumerate(reply, 1):
        if number == n_read:
            break
    del _
    said = [*PROMPT, *reply.token_ids]
    assert cache.token_ids == said[: len(cache.token_ids)]
    assert len(said) - len(cache.token_ids) == 1
    assert {layer.get_seq_length() for layer in cache.states.layers} == {len(cache.token_ids)}


def test_the_context_and_stop_texts_end_a_reply_at_the_same_token() -> None:
    model = injected("qwen2_moe")
    long = replace(GREEDY, max_new_tokens=1000)
    start = beginning(model)
    whole = run(generator_of(model).reply(PROMPT, long, cache=twin(model, start)))
    assert whole.finish_reason == "context"
    stopping = replace(long, stop=(whole.text[30:33],))
    for options in (long, stopping):
        plain, drafted = (
            run(generator_of(model, pace).reply(PROMPT, options, cache=twin(model, start))) for pace in (None, Always())
        )
        assert drafted.token_ids == plain.token_ids
        assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)


class Guesses(PromptLookup):
    """Drafts at every step, whether the text repeats itself or not."""

    def draft(self, n_tokens: int) -> list[int]:
        return super().draft(n_tokens) or [16] * n_tokens


def test_the_demo_model_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "PromptLookup", Guesses)
    model = hybrimoe.load(accelerator="none", expert_dtype="int4")
    tokenizer = hybrimoe.checkpoint.load_tokenizer(None)
    text = "It was a bright morning, and Elizabeth was happy. "
    generators = [TextGenerator(model, tokenizer, speculate=speculate) for speculate in (False, True)]
    generators[1].pace = Always()
    prompt = generators[0].encode(3 * text)
    cache = PrefixCache(model)
    run(generators[0].reply(prompt[:-1], SamplingOptions(max_new_tokens=1), cache=cache))
    for options in (GREEDY, replace(DRAWN, logit_bias=())):
        plain, drafted = (run(one.reply(prompt, options, cache=twin(model, cache))) for one in generators)
        assert drafted.token_ids == plain.token_ids
        assert drafted.logprobs == plain.logprobs
        assert drafted.speculation.drafted_tokens > 0
    model.hybrimoe.session.close()


def test_drafts_that_lose_are_passed_over() -> None:
    now = [0]

    def taking(ns: int, work: Any) -> Any:
        def worked(*args: Any) -> Any:
            now[0] += ns
            return work(*args)

        return worked

    model = injected("qwen2_moe")
    generator = generator_of(model, DraftPace(lambda: now[0]))
    generator.forward = taking(1_000, generator.forward)  # type: ignore[method-assign]
    generator.verify = taking(10_000, generator.verify)  # type: ignore[method-assign]
    options = replace(GREEDY, max_new_tokens=100)
    stats = run(generator.reply(PROMPT, options)).speculation
    assert stats.drafts <= 4 * 2 * MAX_DRAFT_TOKENS, "tried again after 32 steps where drafts are right"
    assert stats.passed_over > 30
    again = run(generator.reply(PROMPT, replace(options, max_new_tokens=10))).speculation
    assert again.drafts == 0, "times are kept from reply to reply"


def test_a_step_that_cannot_serve_leaves_single_tokens_to_the_model() -> None:
    model = injected("qwen2_moe")
    generator = generator_of(model, Always())
    expected = run(generator.reply(PROMPT, GREEDY)).token_ids
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    watched = run(generator.reply(PROMPT, GREEDY))
    handle.remove()
    assert watched.token_ids == expected
    assert len(seen) == NEW_TOKENS
    assert watched.speculation.drafts == 0


def test_a_profile_adds_up_with_drafts() -> None:
    model = injected("qwen2_moe")
    generator = generator_of(model, Always())
    reply = run(generator.reply(PROMPT, GREEDY, profile=Profile(model)))
    decode = reply.profile.phases["decode"]
    assert decode.n_tokens == NEW_TOKENS - 1
    assert sum(decode.parts_us.values()) == pytest.approx(reply.times.decode_us, rel=0.03)
    assert decode.parts_us["experts_cpu"] > 0


def test_verified_tokens_count_as_decoding() -> None:
    model = injected("qwen2_moe")
    model.hybrimoe.session.reset_stats()
    reply = run(generator_of(model, Always()).reply(PROMPT, GREEDY))
    stats = model.hybrimoe.session.stats()
    computed = reply.speculation.steps + reply.speculation.drafted_tokens
    n_layers = len(model.hybrimoe.session.layers)
    assert stats.by_phase["decode"].tokens == n_layers * computed
    assert stats.by_phase["prefill"].tokens == n_layers * len(PROMPT)


# Batches, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, replace(DRAWN, logit_bias=(), top_k=2)], ids=["greedy", "drawn"])
def test_a_batch_of_one_has_the_tokens_of_transformers(options: SamplingOptions) -> None:
    model = injected("qwen2_moe")
    options = replace(options, ignore_eos=False, top_logprobs=None)
    prompts = [BatchPrompt(tuple(PROMPT)), BatchPrompt(tuple(PROMPT[2:]), max_new_tokens=7)]
    for prompt in prompts:
        steps = iter(range(1000))
        (plain,) = generate_batch(generator_of(model), [prompt], options, lambda: False)
        (drafted,) = generate_batch(generator_of(model, Always()), [prompt], options, lambda: False, steps.__next__)
        assert drafted == plain
        assert next(steps) == len(plain.token_ids)


def test_several_sequences_are_refused() -> None:
    generator = generator_of(injected("qwen2_moe"), Always())
    prompt = BatchPrompt(tuple(PROMPT))
    with pytest.raises(ConfigError, match=r"one sequence at a time.*--batch-size 1"):
        generate_batch(generator, [prompt, prompt], SamplingOptions(), lambda: False)
    with pytest.raises(ConfigError, match="batches of up to 8"):
        BatchJob(generator, None, [], [], SamplingOptions(), "none", 8)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen2_moe", {"accelerator": "emulated", "gpu_expert_slots": 4}, r"slots on an accelerator.*accelerator none"),
        ("qwen2_moe", {"accelerator": "none", "step": "transformers"}, "step: transformers"),
        ("qwen3_next", {"accelerator": "none"}, "keeps a state"),
        ("jamba", {"accelerator": "none"}, "no compiled step"),
        ("qwen2_moe", None, "not replaced"),
    ],
    ids=["slots", "transformers", "linear attention", "in pieces", "plain"],
)
def test_models_that_cannot_verify_drafts_are_refused(family: str, options: Any, reason: str) -> None:
    model = tiny_family(family)
    if options is not None:
        hybrimoe.inject(model, expert_dtype="float32", **options)
    with pytest.raises(ConfigError, match=f"speculation: .*{reason}"):
        TextGenerator(model, Letters(), speculate=True)


def test_angles_that_depend_on_the_longest_position_are_refused() -> None:
    model = injected("qwen2_moe")
    model.hybrimoe.step.angles[0].changes = True
    with pytest.raises(ConfigError, match="rotary embedding depend"):
        TextGenerator(model, Letters(), speculate=True)


def test_the_server_counts_drafts() -> None:
    pytest.importorskip("prometheus_client")
    from hybrimoe.server.metrics import Metrics
    from hybrimoe.server.models import Models

    reply = run(generator_of(injected("qwen2_moe"), Always()).reply(PROMPT, replace(GREEDY, max_new_tokens=100)))
    metrics = Metrics(Models({"qwen2_moe": None}))
    metrics.observe(reply)
    shown = metrics.render().decode()
    assert f"hybrimoe_drafted_tokens_total {float(reply.speculation.drafted_tokens)}" in shown
    assert f"hybrimoe_accepted_tokens_total {float(reply.speculation.accepted_tokens)}" in shown
