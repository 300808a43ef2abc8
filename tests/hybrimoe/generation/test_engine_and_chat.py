"""Replies: limits, chunks, the cache that is kept, interruption; conversations on top of them."""

import os
import signal

import pytest
import torch

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation import Conversation, PrefixCache, PrefixCaches, SamplingOptions, TextGenerator, interruptible
from hybrimoe.generation.growing import LEAST_ROOM

CONTEXT = 128
LEAST_ROOM_BYTES = 2 * 2 * (50 + LEAST_ROOM) * 16 * 4
"""Keys and values of a conversation of 50 tokens in the tiny model: two layers of 16 float32, with room to grow."""
TEXT = "She had been so long in the world that she knew it well."


@pytest.fixture
def generator(tiny_model, byte_tokenizer):
    return TextGenerator(tiny_model, byte_tokenizer)


def run(reply):
    """Iterate a reply or a turn to its end."""
    text = "".join(reply)
    assert text == getattr(reply, "reply", reply).text
    return reply


def test_chunked_prefill_gives_the_same_tokens(tiny_model, byte_tokenizer, generator):
    ids = generator.encode(TEXT)
    whole = run(generator.reply(ids, SamplingOptions(max_new_tokens=16)))
    for chunk in (1, 7, len(ids)):
        small = TextGenerator(tiny_model, byte_tokenizer, prefill_chunk_tokens=chunk)
        assert run(small.reply(ids, SamplingOptions(max_new_tokens=16))).token_ids == whole.token_ids


def test_a_kept_cache_computes_only_what_is_new(generator):
    ids = generator.encode(TEXT)
    cache = PrefixCache(generator.model)
    first = run(generator.reply(ids, SamplingOptions(max_new_tokens=8), cache=cache))
    assert cache.token_ids == ids + first.token_ids[:-1]
    prompts = [
        (ids + first.token_ids + ids[:5], len(ids) + len(first.token_ids) - 1),
        ([*ids[:20], 3, 2, 1], 20),
        ([*ids[:20], 3, 2, 1], 22),
        (ids[5:], 0),
    ]
    for prompt, n_shared in prompts:
        kept = run(generator.reply(prompt, SamplingOptions(max_new_tokens=8), cache=cache))
        fresh = run(generator.reply(prompt, SamplingOptions(max_new_tokens=8)))
        assert kept.token_ids == fresh.token_ids
        assert kept.n_reused == n_shared


def test_states_that_cannot_be_cropped_start_anew(generator, monkeypatch):
    ids = generator.encode(TEXT)
    cache = PrefixCache(generator.model)
    run(generator.reply(ids, SamplingOptions(max_new_tokens=4), cache=cache))

    def refuse(n_tokens):
        raise RuntimeError("the sliding window was already reached")

    monkeypatch.setattr(cache.states, "crop", refuse)
    reply = run(generator.reply(ids[:-3], SamplingOptions(max_new_tokens=4), cache=cache))
    assert reply.n_reused == 0
    assert reply.token_ids == run(generator.reply(ids[:-3], SamplingOptions(max_new_tokens=4))).token_ids


def test_conversations_that_take_turns_keep_their_caches(generator):
    caches = PrefixCaches(generator.model, 2)
    options = SamplingOptions(max_new_tokens=4)
    talks = [generator.encode(TEXT), generator.encode("Quite another talk, of other things.")]
    for turn in range(3):
        for number, talk in enumerate(talks):
            reply = run(generator.reply(talk, options, cache=caches.for_prompt(talk)))
            assert reply.token_ids == run(generator.reply(talk, options)).token_ids
            assert (reply.n_reused > 0) == (turn > 0)
            talks[number] = talk + reply.token_ids + [7, 8, 9]


def filled(generator, caches, *prompts):
    for prompt in prompts:
        caches.for_prompt(prompt).extended(prompt, None)


def test_the_least_recent_conversation_makes_room(generator):
    caches = PrefixCaches(generator.model, 2)
    old, new, third = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]
    filled(generator, caches, old, new)
    assert caches.for_prompt([*old, 12]).token_ids == old
    assert caches.for_prompt(third).token_ids == new, "old was used after new"


def test_a_common_beginning_is_no_continuation(generator):
    caches = PrefixCaches(generator.model, 2)
    talk = [1, 2, 3, 4, 5, 6, 7, 8]
    filled(generator, caches, talk)
    assert caches.for_prompt([1, 2, 3, 20, 21]).token_ids == [], "3 of 8 tokens: the talk is kept whole"
    assert caches.for_prompt([1, 2, 3, 4, 5, 20]).token_ids == talk


def test_a_large_conversation_outlives_small_ones_that_come_between(generator):
    caches = PrefixCaches(generator.model, 2)
    talk = list(range(40))
    filled(generator, caches, talk)
    for title in range(3):
        filled(generator, caches, [50 + title, 60, 61])
    assert caches.for_prompt([*talk, 41]).token_ids == talk


def test_kept_conversations_leave_room_for_the_reply_under_way(tiny_model, byte_tokenizer):
    """What all hold together stays within the budget after each step, and no more is dropped than must be."""
    token_bytes = TextGenerator(tiny_model, byte_tokenizer).token_bytes()
    budget = 2 * LEAST_ROOM_BYTES + 40 * token_bytes
    generator = TextGenerator(tiny_model, byte_tokenizer, kv_bytes=budget)
    caches = PrefixCaches(tiny_model, 4, generator.kv_bytes, generator.token_bytes)
    options = SamplingOptions(max_new_tokens=30)
    talks = [[number] * 20 for number in range(1, 5)]
    for talk in talks:
        cache = caches.for_prompt(talk)
        for _ in generator.reply(talk, options, cache=cache):
            assert sum(one.n_bytes() for one in caches._caches if one is not cache) <= budget
    held = [cache.token_ids[:20] for cache in caches._caches]
    assert [talk in held for talk in talks] == [False, False, True, True]
    assert sum(cache.n_bytes() for cache in caches._caches) <= budget


def test_a_failed_forward_leaves_no_half_filled_cache(generator, monkeypatch):
    ids = generator.encode(TEXT)
    cache = PrefixCache(generator.model)
    run(generator.reply(ids, SamplingOptions(max_new_tokens=4), cache=cache))
    layer = generator.model.model.layers[1]

    def fail(*args, **kwargs):
        raise RuntimeError("a lane died")

    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="a lane died"):
            run(generator.reply([*ids, 5, 6], SamplingOptions(max_new_tokens=4), cache=cache))
    assert cache.token_ids == []
    after = run(generator.reply(ids, SamplingOptions(max_new_tokens=4), cache=cache))
    assert after.token_ids == run(generator.reply(ids, SamplingOptions(max_new_tokens=4))).token_ids


def test_empty_and_too_long_prompts_are_refused_with_the_numbers(generator):
    for empty in ("", "  \n\t"):
        with pytest.raises(PromptError, match="empty"):
            generator.encode(empty)
    with pytest.raises(PromptError, match="no tokens"):
        generator.reply([])
    with pytest.raises(PromptError, match=rf"{CONTEXT} tokens; the model's context is {CONTEXT} tokens"):
        generator.reply([1] * CONTEXT)


def test_a_reply_ends_at_the_end_of_the_context(generator):
    reply = run(generator.reply([1] * (CONTEXT - 5), SamplingOptions(max_new_tokens=50)))
    assert reply.finish_reason == "context"
    assert len(reply.token_ids) == 5


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(generator):
    ids = generator.encode(TEXT)
    options = {"temperature": 1.5, "seed": 2, "max_new_tokens": 40}
    free = run(generator.reply(ids, SamplingOptions(**options)))
    stop = free.text[10:13]
    assert "\ufffd" not in stop
    reply = run(generator.reply(ids, SamplingOptions(**options, stop=(stop,))))
    assert reply.finish_reason == "stop"
    assert reply.text == free.text[: free.text.index(stop)]
    assert len(reply.token_ids) < len(free.token_ids)


def test_times_cover_every_token(generator):
    reply = run(generator.reply(generator.encode(TEXT), SamplingOptions(max_new_tokens=6)))
    assert 0 < reply.times.prefill_us < reply.times.ttft_us
    assert len(reply.times.between_tokens_us) == 5
    assert all(time > 0 for time in reply.times.between_tokens_us)


@pytest.fixture
def listening_to_ctrl_c():
    """A background job starts with SIGINT ignored, and so do the tests in it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("listening_to_ctrl_c")
def test_ctrl_c_ends_the_reply_between_tokens_and_a_second_one_the_program(generator):
    ids = generator.encode(TEXT)
    cache = PrefixCache(generator.model)
    with interruptible() as interrupt:
        reply = generator.reply(ids, SamplingOptions(max_new_tokens=60), cache=cache, should_stop=interrupt)
        for _ in reply:
            os.kill(os.getpid(), signal.SIGINT)
            break
        assert interrupt.pressed
        stopped = run(generator.reply(ids, SamplingOptions(max_new_tokens=60), cache=cache, should_stop=interrupt))
        assert stopped.finish_reason == "interrupted"
        assert stopped.token_ids == []
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    resumed = run(generator.reply(ids, SamplingOptions(max_new_tokens=6), cache=cache))
    assert resumed.token_ids == run(generator.reply(ids, SamplingOptions(max_new_tokens=6))).token_ids


def test_the_random_state_of_the_caller_is_left_alone(generator):
    before = torch.get_rng_state()
    run(generator.reply(generator.encode(TEXT), SamplingOptions(temperature=1.0, seed=1, max_new_tokens=5)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_conversation_reuses_its_cache_and_equals_one_that_starts_fresh(generator):
    options = SamplingOptions(max_new_tokens=6, temperature=0.7, seed=5, ignore_eos=True)
    chat = Conversation(generator)
    assert not chat.has_template
    run(chat.send("Hello", options))
    second = run(chat.send("And?", options))
    assert chat.n_turns == 2
    assert second.reply.n_reused >= len("User: Hello\nAssistant:")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    fresh = Conversation(generator)
    fresh.messages = chat.messages[:2]
    assert run(fresh.send("And?", options)).reply.token_ids == second.reply.token_ids
    chat.reset()
    assert chat.messages == []


def test_the_oldest_turns_go_when_the_context_is_full_and_the_system_message_stays(generator):
    options = SamplingOptions(max_new_tokens=8)
    chat = Conversation(generator, system="Be brief.")
    dropped = 0
    for index in range(6):
        turn = run(chat.send(f"message {index} {'x' * 20}", options))
        dropped += turn.n_dropped
        assert len(turn.reply.prompt_ids) + 8 <= CONTEXT
    assert dropped >= 2
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert chat.messages[1]["role"] == "user"


def test_a_message_that_cannot_be_answered_leaves_the_history_as_it_was(generator, monkeypatch):
    chat = Conversation(generator)
    run(chat.send("Hello", SamplingOptions(max_new_tokens=3)))
    before = list(chat.messages)
    for bad, error in (("  ", "empty"), ("x" * 200, "context")):
        with pytest.raises(PromptError, match=error):
            chat.send(bad, SamplingOptions(max_new_tokens=3))
        assert chat.messages == before

    def fail(*args, **kwargs):
        raise RuntimeError("a lane died")

    monkeypatch.setattr(generator.model.model.layers[0].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="a lane died"):
        run(chat.send("Again", SamplingOptions(max_new_tokens=3)))
    assert chat.messages == before


def test_a_template_of_the_model_is_used_and_its_refusal_is_an_error(generator, byte_tokenizer, monkeypatch):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{{ '[assistant]' }}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    chat = Conversation(generator)
    turn = chat.send("Hi", SamplingOptions(max_new_tokens=2))
    assert byte_tokenizer.decode(turn.reply.prompt_ids) == "[user]Hi[assistant]"
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(ModelError, match="no system role"):
        Conversation(generator).send("Hi", SamplingOptions(max_new_tokens=2))
