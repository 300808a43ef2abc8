"""Conversations that are saved and restored: the same replies, and never a wrong one from damaged files."""

import pytest

from hybrimoe.errors import FileError, PromptError
from hybrimoe.generation import Conversation, SamplingOptions, TextGenerator
from hybrimoe.generation.saved.sessions import STATES, TEXT, Session, session_names

GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=6)


def said(turn):
    return "".join(turn), turn.reply.token_ids, turn.reply.n_reused


@pytest.fixture(scope="module")
def generator(tiny_model, byte_tokenizer):
    return TextGenerator(tiny_model, byte_tokenizer)


@pytest.fixture(scope="module")
def saved(generator, tmp_path_factory):
    """A session after one turn, and the second turn of the same conversation without a pause."""
    folder = tmp_path_factory.mktemp("sessions")
    conversation = Conversation(generator, system="Speak plainly.")
    said(conversation.send("Good morning, sir.", GREEDY))
    session = Session(folder, "one", "this model")
    session.save_text(conversation)
    session.save_states(conversation)
    return session, said(conversation.send("And then?", GREEDY))


def resumed(generator, session):
    conversation = Conversation(generator)
    reason = session.restore(conversation)
    return reason, said(conversation.send("And then?", GREEDY))


def test_a_restored_conversation_goes_on_as_if_it_had_not_paused(generator, saved):
    session, expected = saved
    assert expected[2] > 0
    assert resumed(generator, session) == (None, expected)
    assert session_names(session.folder) == ["one"]


def test_states_have_the_bits_that_were_saved(generator, saved):
    session, _ = saved
    first, second = Conversation(generator, system="Speak plainly."), Conversation(generator)
    said(first.send("Good morning, sir.", GREEDY))
    session.restore(second)
    assert second.messages == first.messages
    assert second.cache.token_ids == first.cache.token_ids
    pairs = zip(first.cache.keys_and_values(), second.cache.keys_and_values(), strict=True)
    assert all(a.equal(b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_another_model_computes_the_text_again(generator, saved):
    session, expected = saved
    reason, again = resumed(generator, Session(session.folder, "one", "another model"))
    assert "another model" in reason
    assert (again[0], again[2]) == (expected[0], 0)


def test_states_that_were_cut_or_changed_anywhere_are_computed_again(generator, saved, tmp_path):
    session, expected = saved
    whole = (session.place / STATES).read_bytes()
    copy = Session(tmp_path, "one", "this model")
    copy.place.mkdir()
    (copy.place / TEXT).write_bytes((session.place / TEXT).read_bytes())
    for length in [*range(0, 64, 7), *range(64, len(whole), len(whole) // 40), len(whole) - 1]:
        (copy.place / STATES).write_bytes(whole[:length])
        conversation = Conversation(generator)
        assert "damaged" in copy.restore(conversation), length
        assert conversation.cache.token_ids == []
        assert len(conversation.messages) == 3
    changed = bytearray(whole)
    changed[-100] ^= 1
    (copy.place / STATES).write_bytes(changed)
    reason, again = resumed(generator, copy)
    assert "checksum" in reason
    assert again[0] == expected[0]
    (copy.place / STATES).unlink()
    assert "no states" in resumed(generator, copy)[0]


def test_a_text_that_was_cut_is_an_error(generator, saved, tmp_path):
    session, _ = saved
    copy = Session(tmp_path, "one", "this model")
    copy.place.mkdir()
    text = (session.place / TEXT).read_bytes()
    for length in range(0, len(text), 9):
        (copy.place / TEXT).write_bytes(text[:length])
        with pytest.raises(FileError, match="delete the session one"):
            copy.restore(Conversation(generator))
    copy.delete()
    assert session_names(tmp_path) == []
    with pytest.raises(FileError, match="no session"):
        copy.delete()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_names_stay_in_the_folder(name, tmp_path):
    with pytest.raises(PromptError, match="name of a session"):
        Session(tmp_path, name)
