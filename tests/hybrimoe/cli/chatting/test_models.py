"""`/models`: a chat goes on with another model; what does not fit is refused before anything is given up."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from hybrimoe.cli.chatting import models as chat_models
from hybrimoe.cli.chatting.answering import Chat
from hybrimoe.cli.chatting.loop import ChatLoop
from hybrimoe.cli.chatting.models import ChatModels, Opened, needed_bytes
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.opening import open_model
from hybrimoe.config.deploy import load_config
from hybrimoe.errors import ModelError
from hybrimoe.generation import Conversation, SamplingOptions
from hybrimoe.generation.saved.sessions import STATES, Session

SHORT = SamplingOptions(max_new_tokens=4, temperature=0.0)


class Lines:
    def __init__(self, lines):
        self.lines = list(lines)

    def read(self):
        return self.lines.pop(0) if self.lines else None


@pytest.fixture(scope="module")
def loaded():
    with open_model(deploy_config(None, model=None), show_progress=False) as model:
        yield model


@pytest.fixture
def talk(loaded, capsys, tmp_path):
    """`talk(*lines)`: a chat of these lines that may go on with the demo model under another name, or with one that
    cannot be opened; `talk.opened` are the names in the order in which they came into memory."""
    opened, folder = [], tmp_path / "sessions"
    names = {name: load_config({"server": {"name": name}}) for name in ("first", "second", "broken")}

    @contextmanager
    def open_one(deployment):
        name = deployment.server.name
        opened.append(name)
        if name == "broken":
            raise ModelError("its weights are damaged")
        session = Session(folder, "walk", identity=name)
        yield Opened(replace(loaded, name=name), Conversation(loaded.generator, system="Be brief."), session)

    def run(*lines):
        opened.clear()
        with ChatModels(names, open_one) as choice:
            one = choice.open("first")
            chat = Chat(
                one.model, one.conversation, SHORT, session=one.session, profiled=False, quiet=False, as_json=True,
                models=choice,
            )  # fmt: skip
            loop = ChatLoop(chat)
            loop.messages = Lines(lines)
            capsys.readouterr()
            loop.run()
        out, err = capsys.readouterr()
        return chat, [json.loads(line) for line in out.splitlines()], " ".join(err.split())

    run.opened, run.folder = opened, folder
    return run


def test_models_are_listed_with_the_one_in_memory(talk):
    _, said, notes = talk("/models")
    assert said == []
    assert "* first second broken" in notes
    assert "/models NAME" in notes


def test_another_model_goes_on_with_what_was_said(talk):
    chat, said, notes = talk("Good morning", "/models second", "And then?")
    assert talk.opened == ["first", "second"]
    assert [one["model"] for one in said] == ["first", "second"]
    assert [message["content"] for message in chat.conversation.messages] == [
        "Be brief.", "Good morning", said[0]["text"], "And then?", said[1]["text"],
    ]  # fmt: skip
    assert said[1]["reused_tokens"] == 0, "nothing of another model's states"
    assert "second goes on with 3 messages" in notes
    assert chat.session.identity == "second"
    assert not (talk.folder / "walk" / STATES).exists()


def test_what_cannot_be_changed_to_leaves_the_model_where_it_is(talk, monkeypatch):
    monkeypatch.setattr(chat_models, "needed_bytes", lambda one: (1 << 60) if one.server.name == "second" else 1 << 20)
    chat, said, _ = talk("Good morning", "/models second", "/models frist", "/models first", "And then?")
    assert talk.opened == ["first"]
    errors = [one["error"] for one in said if "error" in one]
    assert [error["type"] for error in errors] == ["BudgetError", "ConfigError", "ConfigError"]
    assert "first stays" in errors[0]["message"]
    assert "first" in errors[1]["message"]
    assert "is the model that this conversation is with" in errors[2]["message"]
    assert len(chat.conversation.messages) == 5


def test_one_that_fails_while_it_is_loaded_brings_the_former_one_back(talk):
    chat, said, _ = talk("Good morning", "/models broken", "And then?")
    assert talk.opened == ["first", "broken", "first"]
    assert "its weights are damaged; first is back" in said[1]["error"]["message"]
    assert said[2]["model"] == "first"
    assert len(chat.conversation.messages) == 5


def test_a_chat_of_one_model_says_how_to_have_more(loaded, capsys):
    chat = Chat(loaded, Conversation(loaded.generator), SHORT, session=None, profiled=False, quiet=False, as_json=True)
    loop = ChatLoop(chat)
    loop.messages = Lines(["/models", "/models other", "Good morning"])
    loop.run()
    out, err = capsys.readouterr()
    assert "* demo" in err
    assert "--models FOLDER" in json.loads(out.splitlines()[0])["error"]["message"]


def test_memory_that_a_model_needs_is_told_by_its_configuration():
    demo = needed_bytes(load_config({}))
    assert 1 << 20 < demo < 1 << 30
    assert needed_bytes(load_config({"cpu": {"expert_dtype": "int4"}})) < demo
    assert needed_bytes(load_config({"memory": {"disk": "auto"}})) < demo
