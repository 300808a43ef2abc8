"""Tools and reasoning in chats: what the model is shown, what comes back, whole and streamed."""

import json

import pytest

from hybrimoe.server.replies.syntax import TOOL_PARSERS, ReplySyntax

pytest.importorskip("llguidance", reason="calls that must be need the extra serve")

PATH = "/v1/chat/completions"
ADD = {
    "name": "add", "description": "Adds.",
    "parameters": {
        "type": "object", "required": ["a"], "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "now"}}]
BODY = {
    "messages": [{"role": "user", "content": "Two and two?"}], "tools": TOOLS, "seed": 3, "temperature": 1,
    "max_tokens": 200,
}  # fmt: skip
SAID = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


def message(call, **more):
    answer = call("POST", PATH, {**BODY, **more})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


def streamed(call, **more):
    """The message that the chunks of a stream add up to, and why it ended."""
    text = call("POST", PATH, {**BODY, **more, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and line[0] != ":"]
    assert lines[-1] == "[DONE]", text
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    told, calls = {"role": "assistant"}, []
    for chunk in chunks:
        delta = chunk["delta"]
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                told[name] = told.get(name, "") + delta[name]
        for one in delta.get("tool_calls", []):
            if "id" in one:
                assert one["index"] == len(calls)
                assert one["type"] == "function"
                calls.append({"name": one["function"]["name"], "arguments": ""})
            calls[one["index"]]["arguments"] += one["function"]["arguments"]
    return told | ({"tool_calls": calls} if calls else {}), chunks[-1]["finish_reason"]


def functions(message):
    return [one["function"] for one in message.get("tool_calls", [])]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_reply_that_must_call_calls_by_the_schema(call, choice):
    ask = {"tool_choice": choice, "parallel_tool_calls": False}
    told, reason = message(call, **ask)
    assert reason == "tool_calls"
    assert told["content"] is None
    for one in told["tool_calls"]:
        assert one["type"] == "function"
        assert len(one["id"]) > 8
        arguments = json.loads(one["function"]["arguments"])
        if one["function"]["name"] == "add":
            assert list(arguments) == ["a"]
            assert 0 <= arguments["a"] <= 9
    if choice != "required":
        assert [one["name"] for one in functions(told)] == ["add"]
    pieces, reason = streamed(call, **ask)
    assert pieces["tool_calls"] == functions(told)
    assert reason == "tool_calls"


def test_a_call_that_the_model_decides_on_is_read(call):
    for said, expected in ((f"Well. {SAID}\n{SAID}", "Well."), (SAID, None)):
        told, reason = message(call, guided_choice=[said])
        assert told["content"] == expected
        assert reason == "tool_calls"
        assert json.loads(functions(told)[0]["arguments"]) == {"a": 2}
        assert len({one["id"] for one in told["tool_calls"]}) == said.count("add")
        assert streamed(call, guided_choice=[said])[0].get("tool_calls") == functions(told)
    told, _ = message(call, guided_choice=[f"{SAID}{SAID}"], parallel_tool_calls=False)
    assert len(told["tool_calls"]) == 1


def test_what_is_no_call_is_text(call):
    broken = '<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>'
    told, reason = message(call, guided_choice=[broken])
    assert (told["content"], reason) == (broken, "stop")
    assert streamed(call, guided_choice=[broken]) == ({"role": "assistant", "content": broken}, "stop")
    for more in ({"tool_choice": "none"}, {"tools": None}, {"tools": []}):
        told, reason = message(call, guided_choice=[SAID], **more)
        assert (told["content"], reason) == (SAID, "stop")


def test_reasoning_is_apart_from_the_answer(application, calling, generator, monkeypatch):
    template = generator.tokenizer.chat_template
    monkeypatch.setattr(ReplySyntax, "structure", lambda self, prompt, use, answer: answer)  # it says what it is told
    monkeypatch.setattr(generator.tokenizer, "chat_template", template + "{# </think> #}")
    call = calling(application()[0])
    said = {"tools": None, "guided_choice": ["<think>\nHm, 4.\n</think>\n\nFour."]}
    told, reason = message(call, **said)
    assert (told["reasoning_content"], told["content"], reason) == ("Hm, 4.", "Four.", "stop")
    assert streamed(call, **said)[0] == told
    within, _ = message(call, **said, reasoning_format="none")
    assert within["content"] == said["guided_choice"][0]
    monkeypatch.setattr(
        generator.tokenizer,
        "chat_template",
        template + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}",
    )
    call = calling(application()[0])
    said = {"tools": None, "guided_choice": ["Four."]}
    told, _ = message(call, **said, max_tokens=20)
    assert told["content"] == "", "the prompt opened the reasoning, which the model never ended"
    assert told["reasoning_content"]


def test_the_model_is_shown_tools_calls_and_results(call, generator, monkeypatch):
    prompts = []
    encode = type(generator.tokenizer).__call__

    def seen(self, text, **more):
        prompts.append(text)
        return encode(self, text, **more)

    monkeypatch.setattr(type(generator.tokenizer), "__call__", seen)
    history = [
        *BODY["messages"],
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ]  # fmt: skip
    message(call, messages=history, max_tokens=1)
    assert '"name": "add"' in prompts[-1]
    assert "<tool_call>\n" in prompts[-1]
    assert "<tool_response>\n4\n</tool_response>" in prompts[-1]
    message(call, messages=history, tool_choice="none", max_tokens=1)
    assert "Adds." not in prompts[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "no tool has the name 'sub'"),
        ({"tool_choice": "required", "tools": None}, "no tools to call"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {**ADD, "parameters": {"type": "array"}}}]},
         "the parameters of 'add' must be the schema of an object, found the type 'array'"),
        ({"tools": [{"type": "function", "function": {**ADD, "parameters": {"properties": {"a": {"type": "thing"}}}}}],
          "tool_choice": "required"}, "Invalid type: thing"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_are_refused(call, more, words):
    answer = call("POST", PATH, {**BODY, **more})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_the_configuration_knows_the_same_forms():
    from typing import get_args

    from hybrimoe.config.deploy import ToolParser

    assert sorted(get_args(ToolParser)) == sorted(TOOL_PARSERS)
