"""Replies that join and leave a running batch are those that the same requests get alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrimoe
from hybrimoe.errors import PromptError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.continuous_batching import MOST_PARALLEL, PROMISED_TOKENS, BatchEngine, default_parallel
from hybrimoe.generation.growing import LEAST_ROOM
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.prefix.blocks import PrefixTree

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import Letters
from tiny_families import tiny_model as tiny_family

GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=9, ignore_eos=True)
PROMPTS = [[5 + n % 7, 17, *range(20, 20 + length)] for n, length in enumerate((1, 30, 7, 58, 2, 16))]
OPTIONS = [
    GREEDY, replace(GREEDY, max_new_tokens=14), replace(GREEDY, repetition_penalty=1.4, max_new_tokens=11),
    replace(GREEDY, temperature=0.9, seed=3), replace(GREEDY, frequency_penalty=1.0, top_logprobs=2),
    replace(GREEDY, max_new_tokens=1),
]  # fmt: skip
"""Each prompt's own: greedy, penalised, drawn with a seed, a single token."""
PART = 8


def compiled_generator(**options: Any) -> TextGenerator:
    model = tiny_family("qwen2_moe")
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    return TextGenerator(model, Letters(), **options)


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return compiled_generator()


@dataclass
class Told:
    """What an engine said about one request."""

    text: str = ""
    ended: bool = False
    error: Exception | None = None
    reply: Any = None
    stop: bool = field(default=False)


class Requests:
    """Requests by number, given to an engine as it has room, first come first served."""

    def __init__(self, engine: BatchEngine) -> None:
        self.engine = engine
        self.told: dict[int, Told] = {}
        self._waiting: list[int] = []
        self.most_running = 0

    def submit(self, number: int) -> None:
        self.told[number] = Told()
        self._waiting.append(number)

    def cancel(self, number: int) -> None:
        if number in self.told:
            self.told[number].stop = True

    def step(self) -> None:
        while self._waiting and self.engine.has_room(PROMPTS[self._waiting[0]], OPTIONS[self._waiting[0]]):
            number = self._waiting.pop(0)
            told = self.told[number]
            told.reply = self.engine.admit(PROMPTS[number], OPTIONS[number], lambda told=told: told.stop)
        self.most_running = max(self.most_running, self.engine.n_running)
        by_reply = {id(told.reply): told for told in self.told.values()}
        for progress in self.engine.step():
            told = by_reply[id(progress.reply)]
            assert not told.ended, "nothing is said of a reply that has ended"
            told.text += progress.text
            told.ended, told.error = progress.ended, progress.error

    def run(self) -> None:
        while self._waiting or self.engine.n_running:
            self.step()


ALONE: dict[int, Any] = {}


def alone(generator: TextGenerator, number: int) -> Any:
    """The reply to a request by itself, its prompt cut into the same parts."""
    if number not in ALONE:
        reply = generator.reply(PROMPTS[number], OPTIONS[number], part_tokens=PART)
        assert "".join(reply) == reply.text
        ALONE[number] = reply
    return ALONE[number]


def check(generator: TextGenerator, requests: Requests, numbers: Iterable[int]) -> None:
    for number in numbers:
        told, expected = requests.told[number], alone(generator, number)
        assert told.ended
        assert told.error is None
        if told.reply.finish_reason == "interrupted":
            assert told.reply.token_ids == expected.token_ids[: len(told.reply.token_ids)]
            continue
        assert told.reply.token_ids == expected.token_ids, number
        assert told.text == told.reply.text == expected.text
        assert told.reply.finish_reason == expected.finish_reason
        assert [one.token_id for one in told.reply.logprobs] == [one.token_id for one in expected.logprobs]


def test_prompts_of_different_lengths_join_at_different_times_and_some_go(generator: TextGenerator) -> None:
    requests = Requests(BatchEngine(generator, parallel=3, part_tokens=PART))
    for number in (0, 1, 2):
        requests.submit(number)
    requests.step()
    requests.step()
    requests.submit(3)
    requests.cancel(1)
    requests.step()
    for number in (4, 5):
        requests.submit(number)
    requests.run()
    check(generator, requests, range(6))
    assert requests.most_running == 3
    assert requests.told[1].reply.finish_reason == "interrupted"


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(["submit", "cancel", "step"]), st.integers(0, 5)), min_size=1, max_size=25),
)
def test_any_order_of_joining_and_leaving(
    generator: TextGenerator, parallel: int, actions: list[tuple[str, int]]
) -> None:
    requests = Requests(BatchEngine(generator, parallel=parallel, part_tokens=PART))
    for action, number in actions:
        if action == "submit" and number not in requests.told:
            requests.submit(number)
        elif action == "cancel":
            requests.cancel(number)
        elif action == "step":
            requests.step()
    requests.run()
    check(generator, requests, requests.told)


def test_all_running_replies_get_their_token_in_one_step(generator: TextGenerator) -> None:
    engine = BatchEngine(generator, parallel=4, part_tokens=64)
    assert engine.in_turn is None
    requests = Requests(engine)
    for number in (0, 1, 2, 4):
        requests.submit(number)
    for _ in range(4):
        requests.step()
    step = generator.model.hybrimoe.step
    before, tokens = step.n_steps, [len(told.reply.token_ids) for told in requests.told.values()]
    requests.step()
    assert step.n_steps == before + 1
    assert [len(told.reply.token_ids) for told in requests.told.values()] == [n + 1 for n in tokens]


@pytest.mark.parametrize("family", ["jamba", None])
def test_models_without_a_step_for_all_of_them_are_computed_in_turn(family: str | None) -> None:
    model = tiny_family(family or "olmoe")
    if family is not None:
        hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    own = TextGenerator(model, Letters())
    engine = BatchEngine(own, parallel=3, part_tokens=PART)
    assert engine.in_turn
    requests = Requests(engine)
    for number in (0, 1, 2):
        requests.submit(number)
    requests.run()
    for number in (0, 1, 2):
        expected = own.reply(PROMPTS[number], OPTIONS[number], part_tokens=PART)
        assert "".join(expected) == requests.told[number].text
    assert requests.most_running == 3


def test_replies_with_drafts_are_computed_in_turn() -> None:
    own = compiled_generator(speculate=True)
    engine = BatchEngine(own, parallel=3, part_tokens=PART)
    assert "speculation" in str(engine.in_turn)
    requests = Requests(engine)
    for number in (0, 1, 3):
        requests.submit(number)
    requests.run()
    check(compiled_generator(), requests, (0, 1, 3))


def test_a_long_prompt_holds_the_others_up_for_one_part_a_token(generator: TextGenerator) -> None:
    requests = Requests(BatchEngine(generator, parallel=3, part_tokens=PART))
    requests.submit(1)
    while not requests.told[1].text if 1 in requests.told and requests.told[1].reply else True:
        requests.step()
    requests.submit(3)
    n_parts = -(-len(PROMPTS[3]) // PART)
    for _ in range(n_parts):
        before = len(requests.told[1].reply.token_ids)
        assert not requests.told[3].reply or not requests.told[3].reply.token_ids
        requests.step()
        assert len(requests.told[1].reply.token_ids) == before + 1
    assert len(requests.told[3].reply.token_ids) == 1


def test_prompts_are_computed_in_the_order_in_which_they_came(generator: TextGenerator) -> None:
    requests = Requests(BatchEngine(generator, parallel=3, part_tokens=PART))
    for number in (3, 0):
        requests.submit(number)
    while not requests.told[3].reply or not requests.told[3].reply.token_ids:
        requests.step()
        assert not requests.told[0].reply.token_ids, "the short prompt came later"
    requests.step()
    assert len(requests.told[0].reply.token_ids) == 1


class TestFailures:
    def failing(self, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, method: str, cache: Any) -> None:
        own = getattr(generator, method)

        def fail(tokens: Any, caches: Any) -> Any:
            target = cache()
            if target and (caches is target or (isinstance(caches, list) and target in caches)):
                raise MemoryError("no room")
            return own(tokens, caches)

        monkeypatch.setattr(generator, method, fail)

    def test_a_failed_prompt_ends_its_reply_only(
        self, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone(generator, 0), alone(generator, 2)
        requests = Requests(BatchEngine(generator, parallel=3, part_tokens=PART))
        self.failing(generator, monkeypatch, "forward", lambda: requests.told[3].reply and requests.told[3].reply.cache)
        for number in (0, 3, 2):
            requests.submit(number)
        requests.run()
        check(generator, requests, (0, 2))
        assert isinstance(requests.told[3].error, MemoryError)

    def test_a_failed_step_of_several_ends_the_one_that_it_belongs_to(
        self, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone(generator, 0), alone(generator, 2)
        requests, fails = Requests(BatchEngine(generator, parallel=3, part_tokens=64)), []
        for method in ("forward", "forward_each"):
            self.failing(generator, monkeypatch, method, lambda: fails and requests.told[1].reply.cache)
        for number in (0, 1, 2):
            requests.submit(number)
        for _ in range(4):
            requests.step()
        told = requests.told[1]
        fails.append(True)
        requests.run()
        check(generator, requests, (0, 2))
        assert isinstance(told.error, MemoryError)
        assert 0 < len(told.reply.token_ids) < OPTIONS[1].max_new_tokens

    def test_a_token_that_cannot_be_chosen_ends_its_reply_only(
        self, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests = Requests(BatchEngine(generator, parallel=2, part_tokens=64))
        requests.submit(0)
        requests.submit(1)
        requests.step()
        requests.step()

        def fail(logits: torch.Tensor) -> str:
            raise ValueError("damaged")

        monkeypatch.setattr(requests.told[1].reply, "take", fail)
        requests.run()
        check(generator, requests, [0])
        assert isinstance(requests.told[1].error, ValueError)

    def test_a_prompt_that_never_fits_is_refused_with_the_room_that_there_is(self) -> None:
        own = compiled_generator(kv_bytes=1)
        own.kv_bytes = 40 * own.token_bytes()
        engine = BatchEngine(own, parallel=2)
        with pytest.raises(PromptError, match="Shorten the prompt to at most 39 tokens"):
            engine.admit(PROMPTS[3], GREEDY, lambda: False)
        assert engine.n_running == 0


class TestMemory:
    """What replies plan together stays within the memory for keys and values."""

    def engine(self, n_tokens: int) -> BatchEngine:
        own = compiled_generator()
        own.kv_bytes = n_tokens * own.token_bytes()
        own._measured = True
        return BatchEngine(own, parallel=4)

    def test_a_reply_waits_for_memory_and_comes_when_there_is(self) -> None:
        engine = self.engine(LEAST_ROOM + 10)  # the model's context is 128, so that each plans as much at most
        engine.generator.model.config.max_position_embeddings = 2 * LEAST_ROOM
        first = engine.admit(PROMPTS[0], GREEDY, lambda: False)
        assert not engine.has_room(PROMPTS[1], GREEDY)
        while engine.n_running:
            list(engine.step())
        assert first.finish_reason == "length"
        assert engine.has_room(PROMPTS[1], GREEDY)

    def test_a_reply_without_a_length_goes_on_while_there_is_room(self) -> None:
        engine = self.engine(2 * PROMISED_TOKENS + 60)
        engine.generator.model.config.max_position_embeddings = 4 * PROMISED_TOKENS
        endless = SamplingOptions(temperature=0.0, ignore_eos=True)
        place = engine.admit(PROMPTS[0], endless, lambda: False)
        assert engine.has_room(PROMPTS[1], endless)
        other = engine.admit(PROMPTS[1], endless, lambda: False)
        assert not engine.has_room(PROMPTS[2], GREEDY)
        planned = [one.planned for one in engine._places]
        assert planned == [len(PROMPTS[0]) + PROMISED_TOKENS, len(PROMPTS[1]) + PROMISED_TOKENS]
        assert place is not other

    def test_room_that_is_missing_ends_the_reply_that_goes_beyond_its_plan(self) -> None:
        engine = self.engine(3 * LEAST_ROOM)
        engine.generator.model.config.max_position_embeddings = 8 * LEAST_ROOM
        first = engine.admit(PROMPTS[0], replace(GREEDY, max_new_tokens=None), lambda: False)
        engine._places[0].planned = LEAST_ROOM  # as if less had been promised
        second = engine.admit(PROMPTS[1], replace(GREEDY, max_new_tokens=LEAST_ROOM + 200), lambda: False)
        while engine.n_running:
            list(engine.step())
            assert sum(one.planned for one in engine._places) <= 3 * LEAST_ROOM
        assert (first.finish_reason, second.finish_reason) == ("context", "length")
        assert len(first.prompt_ids) + len(first.token_ids) >= LEAST_ROOM

    def test_as_many_at_once_as_the_memory_holds(self) -> None:
        own = compiled_generator()
        assert default_parallel(own) == MOST_PARALLEL
        for n_tokens, expected in ((100, 1), (300, 2), (100_000, MOST_PARALLEL)):
            own.kv_bytes = n_tokens * own.token_bytes()
            assert default_parallel(own) == expected, "of 128 tokens of context each"

    def test_idle_caches_leave_the_memory_that_replies_under_way_have_planned(self) -> None:
        engine = self.engine(3 * LEAST_ROOM)
        engine.generator.model.config.max_position_embeddings = 8 * LEAST_ROOM
        limit = engine.generator.kv_bytes or 0
        for prompt in PROMPTS[:4]:
            engine.admit(prompt, GREEDY, lambda: False)
            while engine.n_running:
                list(engine.step())
        idle = engine._rows._idle
        assert sum(cache.n_bytes() for cache in idle) <= limit
        held = [cache.token_ids[: len(prompt)] == prompt for cache, prompt in zip(idle, PROMPTS[:4], strict=True)]
        assert held == [False, False, True, True], "those that were idle longest made room"
        engine.admit([9, *PROMPTS[5]], replace(GREEDY, max_new_tokens=2 * LEAST_ROOM), lambda: False)
        planned = engine._places[0].planned * engine.generator.token_bytes()
        assert sum(cache.n_bytes() for cache in idle) <= limit - planned

    def test_a_short_reply_keeps_the_memory_of_a_long_one_where_nobody_else_needs_it(self) -> None:
        """A long conversation that comes back then needs no new memory."""
        for n_tokens, parallel, stays in ((None, 1, True), (7 * LEAST_ROOM, 1, True), (7 * LEAST_ROOM, 4, False)):
            own = compiled_generator()
            own.model.config.max_position_embeddings = 8 * LEAST_ROOM
            own.kv_bytes = None if n_tokens is None else n_tokens * own.token_bytes()
            engine = BatchEngine(own, parallel=parallel)
            engine._rows.resize(1)
            engine.admit([3 + n % 60 for n in range(4 * LEAST_ROOM)], GREEDY, lambda: False)
            while engine.n_running:
                list(engine.step())
            (cache,) = engine._rows._idle
            before = cache.n_bytes()
            engine.admit([70, 71], GREEDY, lambda: False)
            while engine.n_running:
                list(engine.step())
            assert (cache.n_bytes() == before) == stays, (n_tokens, parallel)


class TestRows:
    def test_a_prompt_takes_the_cache_that_it_goes_on_from(self, generator: TextGenerator) -> None:
        engine = BatchEngine(generator, parallel=2, part_tokens=PART)
        first = engine.admit(PROMPTS[1], GREEDY, lambda: False)
        other = engine.admit(PROMPTS[2], GREEDY, lambda: False)
        while engine.n_running:
            list(engine.step())
        talk = [*PROMPTS[1], *first.token_ids, 40, 41]
        again = engine.admit(talk, GREEDY, lambda: False)
        beside = engine.admit([*talk, 42], GREEDY, lambda: False)
        buffers = [layer.buffers for layer in beside.cache.states.layers]
        while engine.n_running:
            list(engine.step())
        assert again.n_reused == len(PROMPTS[1]) + len(first.token_ids) - 1
        assert again.cache is first.cache
        assert beside.cache is other.cache
        assert beside.n_reused == 0, "another beginning, in the memory of the earlier reply"
        assert all(now.buffers is then for now, then in zip(beside.cache.states.layers, buffers, strict=True))

    def test_a_cancelled_prompt_leaves_what_was_computed(self, generator: TextGenerator) -> None:
        engine = BatchEngine(generator, parallel=1, part_tokens=PART)
        gone: list[bool] = []
        reply = engine.admit(PROMPTS[3], GREEDY, lambda: bool(gone))
        list(engine.step()), list(engine.step())
        gone.append(True)
        (progress,) = engine.step()
        assert progress.ended
        assert reply.finish_reason == "interrupted"
        assert engine.admit(PROMPTS[3], GREEDY, lambda: False).cache.token_ids == PROMPTS[3][: 2 * PART]


class TestSharing:
    def test_a_prompt_is_shared_after_its_first_token_is_told_and_before_the_second(
        self, generator: TextGenerator
    ) -> None:
        tree = PrefixTree(generator.model, 1 << 30)
        engine = BatchEngine(generator, parallel=2, prefixes=tree)
        engine.admit(PROMPTS[1], GREEDY, lambda: False)
        step = engine.step()
        assert next(step).reply.token_ids
        assert tree.n_blocks == 0, "whoever waits for the token does not wait for this"
        list(step)
        assert tree.look_up(PROMPTS[1]).n_tokens == len(PROMPTS[1])

    def test_a_reply_of_one_token_and_one_that_is_iterated_share_theirs_too(self, generator: TextGenerator) -> None:
        tree = PrefixTree(generator.model, 1 << 30)
        engine = BatchEngine(generator, parallel=2, prefixes=tree)
        engine.admit(PROMPTS[2], replace(GREEDY, max_new_tokens=1), lambda: False)
        while engine.n_running:
            list(engine.step())
        "".join(generator.reply(PROMPTS[3], GREEDY, cache=PrefixCache(generator.model, tree)))
        for prompt in PROMPTS[2:4]:
            known = tree.look_up(prompt)
            assert known.n_tokens == len(prompt)
            assert known.checkpoint is not None, "the logits after it"

    def test_where_sharing_fails_the_reply_ends_and_the_others_go_on(
        self, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = BatchEngine(generator, parallel=2, prefixes=PrefixTree(generator.model, 1 << 30))
        requests = Requests(engine)
        requests.submit(0)
        requests.step()
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "share_prompt", fails)
            requests.submit(1)
            requests.step()
        requests.run()
        assert isinstance(requests.told[1].error, RuntimeError)
        assert requests.told[0].error is None
        assert requests.told[0].ended


def fails(*_: Any) -> None:
    raise RuntimeError("no memory for it")
