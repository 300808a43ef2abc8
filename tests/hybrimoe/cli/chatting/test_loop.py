"""The commands of a chat, on the demo model, in this process."""

import json

import pytest

from hybrimoe.amounts import Amount
from hybrimoe.cli.chatting.answering import Chat
from hybrimoe.cli.chatting.loop import ChatLoop
from hybrimoe.cli.chatting.settings import SETTINGS, setting_lines
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.opening import open_model
from hybrimoe.generation import Conversation, SamplingOptions
from hybrimoe.generation.prefix.budget import DiskSettings, PrefixSettings, prefix_tree
from hybrimoe.generation.saved.sessions import STATES, TEXT, Session

SHORT = SamplingOptions(max_new_tokens=5, temperature=0.8, seed=3)
HELLO = "Good morning"
TOO_LONG = "word " * 4000


@pytest.fixture(scope="module")
def opened():
    with open_model(deploy_config(None, model=None), show_progress=False) as model:
        yield model


class Lines:
    """A source of messages: those of a list."""

    def __init__(self, lines):
        self.lines = list(lines)

    def read(self):
        return self.lines.pop(0) if self.lines else None


class Talk:
    """What was said in a chat of `lines`: replies as data, errors, notes as one line."""

    def __init__(self, loop, out, err):
        self.loop, self.chat, self.conversation = loop, loop.chat, loop.chat.conversation
        said = [json.loads(line) for line in out.splitlines()] if self.chat.as_json else []
        self.replies = [line for line in said if "error" not in line]
        self.errors = [line["error"]["message"] for line in said if "error" in line]
        self.out, self.err, self.notes = out, err, " ".join(err.split())

    @property
    def contents(self):
        return [message["content"] for message in self.conversation.messages]


@pytest.fixture
def talk(opened, capsys):
    """`talk(*lines)`: a chat of these lines, or the next ones of a `conversation`."""

    def run(*lines, conversation=None, session=None, at_terminal=False, quiet=False, as_json=True):
        how = {"session": session, "profiled": False, "quiet": quiet, "as_json": as_json}
        chat = Chat(opened, conversation or Conversation(opened.generator), SHORT, **how)
        loop = ChatLoop(chat)
        chat.at_terminal, loop.messages = at_terminal, Lines(lines)
        capsys.readouterr()
        loop.run()
        opened.session.record_timeline(False)
        return Talk(loop, *capsys.readouterr())

    return run


def test_retry_answers_anew_with_the_next_seed(talk):
    chat = talk(HELLO, "/retry", "/retry")
    first, second, third = chat.replies
    assert [reply["seed"] for reply in chat.replies] == [3, 4, 5]
    assert second["prompt_tokens"] == third["prompt_tokens"] == first["prompt_tokens"]
    assert second["reused_tokens"] == first["prompt_tokens"] - 1
    assert chat.contents == [HELLO, third["text"]]
    assert len({reply["text"] for reply in chat.replies}) > 1


def test_a_greedy_retry_says_that_it_is_the_same(talk):
    """The first may differ from the reply before: the end of the prompt is computed alone, and rounded otherwise."""
    chat = talk("/set temperature 0", HELLO, "/retry", "/retry")
    assert chat.replies[1]["text"] == chat.replies[2]["text"]
    assert "the same reply again" in chat.notes


def test_edit_replaces_the_last_message_and_its_reply(talk):
    chat = talk(HELLO, "And then?", "/edit What\nnow?", f"/edit {TOO_LONG}", "/edit")
    fresh = talk(HELLO, "What\nnow?")
    assert chat.replies[2]["token_ids"] == fresh.replies[1]["token_ids"]
    assert chat.contents == fresh.contents
    assert "context is 2048 tokens" in chat.errors[0]
    assert "/edit TEXT" in chat.errors[1]


def test_undo_and_clear(talk):
    chat = talk(HELLO, "And then?", "/undo")
    assert chat.contents == [HELLO, chat.replies[0]["text"]]
    assert "taken back: And then?" in chat.notes
    for command in ("/clear", "/reset"):
        assert talk(HELLO, command).contents == []
    nothing = talk(HELLO, "/clear", "/undo", "/retry", "/edit Hello")
    assert len(nothing.errors) == 3
    assert set(nothing.errors) == {"nothing was said yet: send a message first"}


def test_a_system_message_begins_the_conversation_anew(talk):
    chat = talk(HELLO, "/system", "/system Be brief.", "/system", HELLO)
    for words in ("no system message is set", "begins anew, with this", "system message: Be brief."):
        assert words in chat.notes
    assert chat.contents == ["Be brief.", HELLO, chat.replies[1]["text"]]
    assert chat.replies[1]["prompt_tokens"] > chat.replies[0]["prompt_tokens"]
    again = talk("/clear", HELLO, "/system none", HELLO, conversation=chat.conversation)
    assert again.replies[0]["text"] == chat.replies[1]["text"]
    assert again.replies[1]["text"] == chat.replies[0]["text"]


def test_a_conversation_is_saved_and_loaded(talk, tmp_path):
    file = tmp_path / "a walk.json"
    chat = talk("/system Be brief.", HELLO, f"/save {file}", "And then?", f"/load {file}", "And then?")
    assert json.loads(file.read_text()) == chat.conversation.messages[:3]
    before, loaded = chat.replies[1:]
    assert loaded["token_ids"] == before["token_ids"]
    assert loaded["reused_tokens"] == loaded["prompt_tokens"] - 1
    other = talk(f"/load {file}", "And then?", f"/save {file}")
    assert other.replies[0]["text"] == before["text"]
    assert other.conversation.system == "Be brief."
    assert len(json.loads(file.read_text())) == 5
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_every_branch_and_every_conversation_reuses_what_any_other_computed(talk, opened, tmp_path):
    file, disk = tmp_path / "walk.json", DiskSettings(tmp_path / "prefixes", Amount("auto"), "the demo")

    def conversation(tree):
        return Conversation(opened.generator, prefixes=tree)

    def begun():
        return prefix_tree(opened.generator.model, PrefixSettings(Amount("bytes", 1 << 28), disk), 0)

    tree = begun()
    lines = (
        HELLO,
        "And then?",
        f"/save {file}",
        "/edit What now?",
        f"/load {file}",
        "Go on",
        "/retry",
        "/clear",
        HELLO,
    )
    chat = talk(*lines, "/stats", conversation=conversation(tree))
    hello, then, edited, on, retried, again = chat.replies
    assert hello["reused_tokens"] == 0
    assert edited["reused_tokens"] >= hello["prompt_tokens"], "the row goes back"
    assert on["reused_tokens"] >= then["prompt_tokens"], "the branch before /edit is in the tree"
    for reply in (retried, again):
        assert reply["reused_tokens"] == reply["prompt_tokens"], "nothing is computed for the same prompt"
    assert f"{again['prompt_tokens']} from the cache)" in chat.notes
    other = talk(HELLO, "/edit Good evening", conversation=conversation(tree)).replies
    assert other[0]["token_ids"] == hello["token_ids"]
    tree.close(60)
    later = talk(f"/load {file}", "Go on", "/stats", conversation=conversation(begun()))
    (reply,) = later.replies
    assert reply["reused_from_disk"] == reply["reused_tokens"] == reply["prompt_tokens"]
    assert reply["token_ids"] == on["token_ids"]
    assert f"{reply['prompt_tokens']} of them read from disk" in later.notes


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
NO_CONVERSATIONS = {
    "no JSON": ("[{", "is no conversation"),
    "no UTF-8": (b"\xff\xfe", "is no conversation"),
    "another object": ('{"a": 1}', "a JSON list of messages"),
    "no texts": (
        json.dumps([{"role": "user", "content": None}]),
        "message 1: expected an object with role and content",
    ),
    "half a character": ('[{"role": "user", "content": "\\ud800"}]', "surrogates not allowed"),
    "another role": (json.dumps([USER, {"role": "tool", "content": "4"}]), "expected the role assistant, found tool"),
    "no reply": (json.dumps([USER, REPLY, USER]), "has no reply"),
    "deep": ("[" * 100_000, "is no conversation"),
}


def test_what_is_no_conversation_is_refused_and_kept(talk, tmp_path):
    lines = [HELLO]
    for name, (content, _) in NO_CONVERSATIONS.items():
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        lines += [f"/load {file}", f"/save {file}"]
    chat = talk(
        *lines, "/load", "/save", f"/load {tmp_path}", f"/save {tmp_path / 'gone' / 'x'}", f"/load {tmp_path}/gone"
    )
    assert chat.contents == [HELLO, chat.replies[0]["text"]]
    errors = chat.errors
    for name, (content, told) in NO_CONVERSATIONS.items():
        load, save = errors.pop(0), errors.pop(0)
        assert told in load
        assert "the conversation here goes on" in load
        assert "give a name that is free" in save
        assert (tmp_path / name).read_bytes() == (content if isinstance(content, bytes) else content.encode())
    for told in ("/load conversation.json", "/save conversation.json", "is no file", "cannot write", "cannot read"):
        assert told in errors.pop(0)


def test_settings_are_listed_and_changed(talk):
    chat = talk(
        "/set", "/set temperature 0", "/set top-p=0.9", "/set max_new_tokens 2", "/set seed default", HELLO,
        "/set temprature 1", "/set temperature hot", "/set top_k 0.5", "/set top_p 2", "/set min_p nan",
        "/set seed 1 2",
    )  # fmt: skip
    options = chat.chat.options
    assert (options.temperature, options.top_p, options.max_new_tokens, options.seed) == (0.0, 0.9, 2, None)
    assert (options.top_k, options.min_p) == (None, None)
    assert chat.replies[0]["new_tokens"] == 2
    assert all(name in chat.notes for name in SETTINGS)
    for told in ("did you mean 'temperature'", "takes a number", "takes a whole number", "between 0", "between 0",
                 "a name and a value"):  # fmt: skip
        assert told in chat.errors.pop(0)
    assert chat.errors == []


def test_a_session_follows_each_command(talk, opened, tmp_path):
    session = Session(tmp_path, "walk", "this model")
    file = tmp_path / "kept.json"

    def kept():
        return json.loads((session.place / TEXT).read_text())

    chat = talk(HELLO, f"/save {file}", "And then?", "/retry", "/edit What now?", session=session)
    session.save_states(chat.conversation)
    assert kept()["messages"] == chat.conversation.messages
    restored = Conversation(opened.generator)
    assert session.restore(restored) is None
    going_on, resumed = talk("Go on", conversation=chat.conversation), talk("Go on", conversation=restored)
    assert going_on.replies[0]["token_ids"] == resumed.replies[0]["token_ids"]
    assert going_on.replies[0]["reused_tokens"] == resumed.replies[0]["reused_tokens"] > 0

    talk("/undo", conversation=chat.conversation, session=session)
    assert kept()["messages"] == chat.conversation.messages
    talk(f"/load {file}", conversation=chat.conversation, session=session)
    assert kept()["messages"] == json.loads(file.read_text())
    talk("/system Be brief.", conversation=chat.conversation, session=session)
    assert kept() == {"version": 1, "system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}]}
    assert not (session.place / STATES).exists()


def test_words_after_a_slash(talk):
    """Commands, mistyped commands, and messages that begin with a slash or mention a command."""
    chat = talk("/sett seed 1", "/hlep", "/clear the table", "/etc is a folder", " /clear", "/exit", "never read")
    assert "/sett is no command; did you mean '/set'" in chat.notes
    assert "/hlep is no command; did you mean '/help'" in chat.notes
    assert "/clear takes nothing after it" in chat.errors[0]
    assert chat.contents[::2] == ["/etc is a folder", " /clear"]


def test_a_terminal_of_60_columns(talk, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    chat = talk(HELLO, "/help", "/set", at_terminal=True, as_json=False)
    assert "tokens/s, hit rate" in chat.notes
    used = chat.chat.last["prompt_tokens"] + 5
    assert f"context {used} of 2048]" in chat.notes
    assert "\x1b" not in chat.err
    assert max(map(len, chat.err.splitlines())) <= 60
    commands = list(dict.fromkeys(chat.loop.commands.table.values()))
    lines = chat.err.splitlines()
    for line in [f"{command.shown:<17} {command.line}" for command in commands] + setting_lines(SHORT):
        assert line in lines, "it stands on one line"
    assert talk(HELLO, at_terminal=True, quiet=True, as_json=False).err == ""
    piped = talk(HELLO, as_json=False)
    assert piped.out == chat.out
    assert "tokens/s" in piped.err
    assert "context" not in piped.err
