"""Replies: limits, chunks, the cache that is kept, interruption; conversations on top of them."""

import os
import signal

import pytest
import torch

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation import Conversation, PrefixCache, SamplingOptions, TextGenerator, interruptible

CONTEXT = 128
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
