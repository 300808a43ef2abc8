"""Replies of every family, cut at any place: the same events; what is malformed is text."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe.server.replies.call_formats import CALL_FORMATS
from hybrimoe.server.replies.events import Call, PlainParser, Reasoning, Text, Tool, joined
from hybrimoe.server.replies.harmony import HarmonyParser
from hybrimoe.server.replies.marked import THINKING, MarkedParser

FORMATS = {form.name: form for form in CALL_FORMATS}
ADD = Tool("add", "", {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}})
TOOLS = (ADD, Tool("now"))
ARGUMENTS = {"a": 2, "note": 'x "</tool_call>" é'}
TWO = [Call("add", json.dumps(ARGUMENTS, ensure_ascii=False)), Call("now", "{}")]
ONE, NOW = TWO
THINK = THINKING[0]


def hermes(name, arguments, key="arguments"):
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


DEEP_ADD = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ONE.arguments}\n```<｜tool▁call▁end｜>"
DEEP_NOW = "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
PLAIN_VALUES = [Call("add", '{"a": 2, "note": "7"}'), NOW]
GOOD = {
    "hermes": (
        f"<think>\nhm < </think>\n\nYes.\n<tool_call>\n{hermes('add', ARGUMENTS)}\n</tool_call>\n<tool_call>"
        f"{hermes('now', {})}</tool_call>\n",
        [Reasoning("hm <"), Text("Yes."), *TWO],
    ),
    "hermes list": (f"<tool_call>[{hermes('add', ARGUMENTS)}, {hermes('now', '')}]</tool_call>", TWO),
    "hermes without its end": (f"<tool_call>\n{hermes('now', {})}", [NOW]),
    "qwen3_coder": (
        "Sure <tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=note>\n7\n</parameter>\n"
        "</function>\n</tool_call>\n<function=now>\n</function> done",
        [Text("Sure"), *PLAIN_VALUES, Text("done")],
    ),
    "glm": (
        "<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>note</arg_key>\n"
        "<arg_value>7</arg_value>\n</tool_call><tool_call>now</tool_call>",
        PLAIN_VALUES,
    ),
    "mistral": (f"[TOOL_CALLS] [{hermes('add', ARGUMENTS)}, {hermes('now', {})}]", TWO),
    "mistral later": (f"So: [TOOL_CALLS]add[ARGS]{ONE.arguments}[TOOL_CALLS]now{{}}", [Text("So:"), *TWO]),
    "llama3": (f"\n{hermes('add', ARGUMENTS, 'parameters')}; {hermes('now', {}, 'parameters')}", TWO),
    "llama3 tagged": (f"<|python_tag|>{hermes('add', ARGUMENTS, 'parameters')}", [ONE]),
    "llama3 python": ('<|python_tag|>search.call(query="a b", n=3)', [Call("search", '{"query": "a b", "n": 3}')]),
    "deepseek": (
        f"<think>so</think>Well<｜tool▁calls▁begin｜>{DEEP_ADD}\n{DEEP_NOW}<｜tool▁calls▁end｜>",
        [Reasoning("so"), Text("Well"), *TWO],
    ),
}
MALFORMED = {
    "hermes": ["<tool_call>\n{'name': 1}\n</tool_call> more", '<tool_call>{"name": "add"', "<tool_call></tool_call>"],
    "qwen3_coder": ["<function=add>\n<parameter=a>\n2\n</function>", "<tool_call>x</tool_call>"],
    "glm": ["<tool_call>add\n<arg_key>a</arg_key></tool_call>"],
    "mistral": ["[TOOL_CALLS] [1, 2", "[TOOL_CALLS]add[ARGS]{x}"],
    "llama3": ['{"name": "add", "parameters": {"a"', '{"name": 3}', "<|python_tag|>print(1)"],
    "deepseek": ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁calls▁end｜>!"],
}
HARMONY = {
    "answer": (
        "<|channel|>analysis<|message|>Let me <see><|end|><|start|>assistant<|channel|>final<|message|>Hi <b>",
        [Reasoning("Let me <see>"), Text("Hi <b>")],
    ),
    "call": (
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        f"<|constrain|>json<|message|>{ONE.arguments}<|call|>",
        [Reasoning("so"), ONE],
    ),
    "recipient first": (
        " to=functions.now<|channel|>commentary json<|message|>{}<|start|>assistant to=add<|message|>"
        f"{ONE.arguments}",
        [NOW, ONE],
    ),
    "preamble": ("<|channel|>commentary<|message|>I look.<|end|>", [Text("I look.")]),
    "no header": ("final answers need none", [Text("final answers need none")]),
    "malformed call": ("<|channel|>commentary to=functions.add<|message|>{a<|call|>", [Text("{a")]),
    "cut in a header": ("<|channel|>analysis<|message|>so<|end|><|start|>assistant<|chan", [Reasoning("so")]),
}


def read(parser, pieces):
    return joined([*(event for piece in pieces for event in parser.push(piece)), *parser.finish()])


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def marked(case, thinking=THINK, thinks=False):
    return MarkedParser(thinking, thinks, FORMATS[case.split()[0]], TOOLS)


@pytest.mark.parametrize("case", GOOD)
@settings(max_examples=60, deadline=None)
@given(places=st.lists(st.integers(0, 10_000), max_size=12))
def test_calls_of_each_family_are_read_however_the_text_is_cut(case, places):
    text, expected = GOOD[case]
    assert read(marked(case), cut(text, places)) == expected
    assert read(marked(case), text) == expected, "character by character"


@pytest.mark.parametrize("case", HARMONY)
@settings(max_examples=60, deadline=None)
@given(places=st.lists(st.integers(0, 10_000), max_size=12))
def test_harmony_is_read_however_the_text_is_cut(case, places):
    text, expected = HARMONY[case]
    assert read(HarmonyParser(TOOLS), cut(text, places)) == expected
    assert read(HarmonyParser(TOOLS), text) == expected


@pytest.mark.parametrize(("case", "text"), [(case, text) for case, texts in MALFORMED.items() for text in texts])
def test_a_malformed_call_is_text(case, text):
    for pieces in ([text], text):
        assert read(marked(case), pieces) == [Text(text)]


PARTS = [
    "<tool_call>", "</tool_call>", "<function=", "<arg_key>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>",
    " to=functions.add", "add", "{", "}", '"', '{"name": "add", "arguments": {}}', "\n", " ", "\\", "[", "x",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["harmony", *FORMATS]), parts=st.lists(st.sampled_from(PARTS), max_size=14),
    places=st.lists(st.integers(0, 10_000), max_size=6), thinks=st.booleans(),
)  # fmt: skip
def test_any_text_has_the_same_events_however_it_is_cut(name, parts, places, thinks):
    def parser():
        return HarmonyParser(TOOLS) if name == "harmony" else marked(name, thinks=thinks)

    text = "".join(parts)
    whole = read(parser(), [text])
    assert read(parser(), cut(text, places)) == whole
    assert read(parser(), text) == whole


@pytest.mark.parametrize("text", ["", "  plain \n text ", "a <think>b</think> <tool", "<", "\n\n"])
def test_text_without_calls_stays_as_it_is(text):
    expected = [Text(text)] if text else []
    assert read(MarkedParser(None, False, FORMATS["hermes"], TOOLS), text) == expected
    assert read(PlainParser(), text) == expected


def test_reasoning_that_the_prompt_opened():
    parser = marked("hermes", thinks=True)
    assert read(parser, "\nI think.\n</think>\n\nYes") == [Reasoning("I think."), Text("Yes")]
    assert read(marked("hermes", thinks=True), "<think>again</think>Yes") == [Reasoning("again"), Text("Yes")]
    assert read(marked("hermes", thinks=True), "cut short ") == [Reasoning("cut short")]


@pytest.mark.parametrize("arguments", ['{"a": NaN}', "[" * 100_000, '{"a": "\\ud83d"}', "3"])
def test_arguments_that_are_no_json_object_are_no_call_and_all_text_can_be_sent(arguments):
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    for event in read(marked("hermes"), [text]):
        said = event.arguments if isinstance(event, Call) else event.text
        said.encode()


def test_joined_texts_are_of_one_kind_and_calls_stay_apart():
    events = [
        Text("a"),
        Text("b"),
        Reasoning("c"),
        Call("f", "{}"),
        Call("f", "{}"),
        Text("d"),
        Reasoning("e"),
        Reasoning("f"),
    ]
    assert joined(events) == [Text("ab"), Reasoning("c"), Call("f", "{}"), Call("f", "{}"), Text("d"), Reasoning("ef")]
    assert joined(iter([])) == []
