"""Which form a model's replies have, by its template and tokens, and what they are held to."""

import json

import pytest

from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.errors import ConfigError
from hybrimoe.generation.constraint import ConstraintError, Grammars, Structure
from hybrimoe.server.replies.call_formats import CALL_FORMATS
from hybrimoe.server.replies.events import Call, Text, Tool
from hybrimoe.server.replies.marked import THINKING
from hybrimoe.server.replies.syntax import ReplySyntax, ToolUse

EVIDENCE = {
    "hermes": "{% if tools %}<tool_call>", "qwen3_coder": "{{ tools }}<tool_call><function=x><parameter=y>",
    "glm": "{{ tools }}<tool_call>{name}<arg_key>", "mistral": "{{ tools }}[TOOL_CALLS]",
    "llama3": "{{ tools }}<|python_tag|>", "deepseek": "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "harmony": "{{ tools }}<|start|>assistant<|channel|>analysis<|message|>",
}  # fmt: skip
PARAMETERS = {
    "type": "object", "required": ["a"],
    "properties": {"a": {"type": "integer"}, "unit": {"type": "string"}, "way": {"enum": ["up", "down"]}},
}  # fmt: skip
ADD, NOW = Tool("add", "Adds.", PARAMETERS), Tool("now")


class Tokenizer:
    """What the syntax reads of a tokenizer."""

    all_special_tokens, all_special_ids, added_tokens_decoder = ["[TOOL_CALLS]"], [5], {}

    def __init__(self, template):
        self.chat_template = template


@pytest.fixture(scope="module")
def grammars():
    pytest.importorskip("llguidance", reason="structured replies need the extra serve")
    return Grammars(load_tokenizer(None), 4096, [1])


@pytest.fixture(scope="module")
def accepts(grammars):
    """Whether a structure takes a text: whole, as a beginning, or not."""
    tokenizer = load_tokenizer(None)

    def accept(structure, text):
        state = grammars.compile(structure).begin()
        try:
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                state.accept(token)
        except ConstraintError:
            return "no"
        return "end" if state.is_complete else "yes" if state._matcher.is_accepting() else "beginning"

    return accept


@pytest.mark.parametrize("name", EVIDENCE)
def test_the_form_is_read_from_the_template(name):
    syntax = ReplySyntax.of(Tokenizer(EVIDENCE[name]))
    assert (syntax.name, syntax.generic) == (name, False)


def test_a_template_that_shows_no_tools_has_them_in_the_system_message():
    syntax = ReplySyntax.of(Tokenizer("{{ messages }}"))
    assert syntax.generic
    use = ToolUse((ADD,))
    assert syntax.template_tools(use) is None
    for messages in ([{"role": "user", "content": "Hi"}], [{"role": "system", "content": "Be brief."}]):
        first = syntax.instructed(messages, use)[0]
        assert first["role"] == "system"
        assert '"name": "add"' in first["content"]
    assert "Be brief." in first["content"]
    assert syntax.instructed(messages, ToolUse((ADD,), "none")) == messages


def test_the_configuration_may_name_the_form_and_no_other():
    assert ReplySyntax.of(Tokenizer(EVIDENCE["hermes"]), "glm").name == "glm"
    assert ReplySyntax.of(Tokenizer(EVIDENCE["hermes"]), "harmony").calls is None
    with pytest.raises(ConfigError, match="mistral"):
        ReplySyntax.of(Tokenizer(""), "mistrl")


def test_markers_that_are_special_tokens_are_shown():
    assert ReplySyntax.of(Tokenizer(EVIDENCE["mistral"])).shown_special == {5}
    assert not ReplySyntax.of(Tokenizer(EVIDENCE["hermes"])).shown_special


def test_mistral_takes_ids_of_nine_characters():
    for name, template in EVIDENCE.items():
        new = ReplySyntax.of(Tokenizer(template)).new_id()
        assert len(new) == 9 if name == "mistral" else new.startswith("call_")


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "unit": "m"}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=unit>\nm\n</parameter>\n"
    "</function>\n</tool_call>",
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>unit</arg_key>\n"
    "<arg_value>m</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "unit": "m"}}]',
    "llama3": '{"name": "add", "parameters": {"a": 2, "unit": "m"}}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": 2, "unit": "m"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
    '<|constrain|>json<|message|>{"a": 2, "unit": "m"}',
}


def plain(name):
    """A syntax whose markers are plain text, as the demo model's tokenizer has none of them."""
    form = {one.name: one for one in CALL_FORMATS}.get(name)
    return ReplySyntax(form, False, None, {})


@pytest.mark.parametrize("name", WRITTEN)
def test_a_reply_that_must_call_has_a_grammar_that_takes_what_the_parser_reads(accepts, name):
    syntax, use = plain(name), ToolUse((ADD, NOW), "required")
    structure = syntax.structure("", use, None)
    assert accepts(structure, WRITTEN[name]) in ("yes", "end")
    for wrong in (WRITTEN[name].replace("2", "x"), WRITTEN[name].replace("add", "sub"), "Hello"):
        assert accepts(structure, wrong) == "no", wrong
    parser = syntax.parser("", use)
    events = [*parser.push(WRITTEN[name]), *parser.finish()]
    assert events[-1] == Call("add", '{"a": 2, "unit": "m"}')
    one = syntax.structure("", ToolUse((ADD, NOW), "required", named="add", many=False), None)
    assert accepts(one, WRITTEN[name]) == "end"
    assert accepts(one, WRITTEN[name].replace("add", "now")) == "no"


HALVES = {
    "mistral": ("}}]", '}}, {"name": "add", "arguments": {"a": 3}}]'),
    "llama3": ("}}", '}}; {"name": "add", "parameters": {"a": 3}}'),
    "deepseek": (
        "<｜tool▁calls▁end｜>",
        '\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
}
"""Ends of one call, and of two, in forms that put several into one block."""


@pytest.mark.parametrize("name", sorted({*WRITTEN} - {"harmony"}))
def test_several_calls_in_one_reply(accepts, name):
    one = WRITTEN[name]
    two = one.replace(*HALVES[name]) if name in HALVES else f"{one}\n{one}"
    syntax, use = plain(name), ToolUse((ADD,), "required")
    assert accepts(syntax.structure("", use, None), two) in ("yes", "end")
    assert accepts(syntax.structure("", ToolUse((ADD,), "required", many=False), None), two) == "no"
    parser = syntax.parser("", use)
    assert len([*parser.push(two), *parser.finish()]) == 2


def test_reasoning_comes_before_what_a_reply_must_be(accepts):
    answer = Structure("json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}})
    syntax = ReplySyntax(CALL_FORMATS[-2], False, THINKING[0], {})
    assert accepts(syntax.structure("", ToolUse(), answer), '<think>{"a</think>\n{"a": 1}') == "end"
    assert accepts(syntax.structure("", ToolUse(), answer), '{"a": 1}') == "end"
    assert accepts(syntax.structure("<think>\n", ToolUse(), answer), 'so</think>\n{"a": 1}') == "end"
    assert accepts(syntax.structure("<think>\n", ToolUse(), answer), '{"a": 1}') == "beginning"
    assert syntax.structure("<think>\n\n</think>\n\n", ToolUse(), answer) is answer
    either = syntax.structure("</think>", ToolUse((ADD,)), answer)
    assert accepts(either, '{"a": 1}') == "end"
    assert accepts(either, WRITTEN["hermes"]) in ("yes", "end")
    harmony = plain("harmony").structure("", ToolUse(), answer)
    assert accepts(harmony, '<|channel|>final <|constrain|>json<|message|>{"a": 1}') == "end"


def test_strict_tools_are_held_to_their_schema_where_the_model_calls_them(accepts):
    strict = Tool("add", "", PARAMETERS, strict=True)
    structure = plain("hermes").structure("", ToolUse((strict,)), None)
    assert accepts(structure, "Just text, with < and {.") == "yes"
    assert accepts(structure, f"Well.\n{WRITTEN['hermes']}") == "yes"
    assert accepts(structure, WRITTEN["hermes"].replace("2", "x")) == "no"
    assert plain("hermes").structure("", ToolUse((ADD,)), None) is None, "free without strict"


def test_one_call_where_several_are_not_wanted():
    parser = plain("hermes").parser("", ToolUse((ADD,), many=False))
    events = [*parser.push(f"{WRITTEN['hermes']} {WRITTEN['hermes']} ok"), *parser.finish()]
    assert events == [Call("add", json.dumps({"a": 2, "unit": "m"})), Text("ok")]
