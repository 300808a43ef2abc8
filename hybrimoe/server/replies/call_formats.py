"""The forms in which families of models write calls of tools: how each is read, and a grammar that holds to it.

A call stands between two markers, so a parser needs to know the markers and what is between. A new family is a class
here and a line in `CALL_FORMATS`.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hybrimoe.generation.constraint import in_lark
from hybrimoe.server.replies.events import Call, Tool, call, parsed_json
from hybrimoe.server.replies.lark import MOST_CALLS, Lark, arguments_schema, call_objects

__all__ = ["CALL_FORMATS", "CallFormat"]

ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 24


class CallFormat(ABC):
    """One form. All methods are pure.

    name: in `server.tool_parser`. begins: each text that begins a block of calls, and the one that ends it; None: the
    block goes on to the next one, or to the reply's end. inner: further markers within a block. bare: whether a reply
    may be a call from its first character on, without a marker. evidence: texts of a chat template or names of tokens
    that only models of this form have: all of one of the groups. repeats: whether several calls are several blocks.
    """

    name: ClassVar[str]
    begins: ClassVar[Mapping[str, str | None]]
    inner: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[bool] = False
    repeats: ClassVar[bool] = True
    evidence: ClassVar[tuple[tuple[str, ...], ...]]

    @abstractmethod
    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """The calls of a block, its markers left out; None where it is malformed."""

    @abstractmethod
    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """Lark rules, of which `block` is a block of one call of one of the `tools`, without the marker that begins it.

        many: it may hold several calls, where blocks of this form can.
        """

    @property
    def marker(self) -> str:
        """What begins a block that a grammar holds to."""
        return "" if self.bare else next(iter(self.begins))

    @property
    def markers(self) -> list[str]:
        """All texts that have to be seen, which may be special tokens."""
        return [*self.begins, *(end for end in self.begins.values() if end), *self.inner]

    def new_id(self) -> str:
        """An id for a call."""
        return "call_" + "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))


class Hermes(CallFormat):
    """<tool_call> and a JSON object with name and arguments: Hermes, Qwen 2.5 and 3, SmolLM, and many others."""

    name = "hermes"
    begins: ClassVar[Mapping[str, str | None]] = {"<tool_call>": "</tool_call>"}
    evidence = (("<tool_call>",),)

    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """See `CallFormat`."""
        return _calls_of_json(parsed_json(block))

    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """See `CallFormat`."""
        block = f'"\\n" object "\\n" {lark.text("</tool_call>")}'
        return f"block: {block}\nobject: {call_objects(tools, 'arguments')}\n"


class QwenCoder(CallFormat):
    """<function=name> and <parameter=name> with plain values: Qwen3-Coder, Nemotron 3."""

    name = "qwen3_coder"
    begins: ClassVar[Mapping[str, str | None]] = {"<tool_call>": "</tool_call>", "<function=": "</function>"}
    evidence = (("<function=", "<parameter="),)
    FUNCTION = re.compile(r"\s*(?:<function=)?([^>\n]+)>(.*?)(?:</function>\s*)?", re.DOTALL)
    PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)

    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """See `CallFormat`."""
        found = self.FUNCTION.fullmatch(block)
        if found is None:
            return None
        name, body = found[1].strip(), found[2]
        pairs = self.PARAMETER.findall(body)
        if self.PARAMETER.sub("", body).strip():
            return None
        values = [(key.strip(), value.removeprefix("\n").removesuffix("\n")) for key, value in pairs]
        return _one(call(name, _typed(name, values, tools)))

    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """See `CallFormat`."""
        alternatives, further = [], ""
        for number, tool in enumerate(tools):
            parts = []
            for place, (key, optional) in enumerate(_parameters(tool)):
                value, more = _plain_value(f"v{number}_{place}", tool.properties[key], "\n</parameter>\n")
                further += more
                parts.append(f"({lark.text(f'<parameter={key}>')} {_NEWLINE} {value}){optional}")
            head, tail = lark.text(f"<function={tool.name}>"), lark.text("</function>")
            alternatives.append(f"{head} {_NEWLINE} {' '.join(parts)} {tail}")
        block = f"{_NEWLINE} function {_NEWLINE} {lark.text('</tool_call>')}"
        return f"block: {block}\nfunction: {' | '.join(alternatives)}\n{further}"


class Glm(CallFormat):
    """<tool_call>name, then <arg_key> and <arg_value>: GLM 4.5 and later."""

    name = "glm"
    begins: ClassVar[Mapping[str, str | None]] = {"<tool_call>": "</tool_call>"}
    inner = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    evidence = (("<tool_call>", "<arg_key>"),)
    NAME = re.compile(r"\s*([^<\n]+?)\s*(<arg_key>.*)?", re.DOTALL)
    ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)

    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """See `CallFormat`."""
        found = self.NAME.fullmatch(block)
        if found is None or self.ARGUMENT.sub("", found[2] or ""):
            return None
        values = [(key.strip(), value) for key, value in self.ARGUMENT.findall(found[2] or "")]
        return _one(call(found[1], _typed(found[1], values, tools)))

    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """See `CallFormat`."""
        alternatives, further = [], ""
        for number, tool in enumerate(tools):
            parts = []
            for place, (key, optional) in enumerate(_parameters(tool)):
                value, more = _plain_value(f"v{number}_{place}", tool.properties[key], "</arg_value>", lark)
                further += more
                head = lark.text(f"<arg_key>{key}</arg_key>")
                parts.append(f"({head} {_NEWLINE} {lark.text('<arg_value>')} {value} {_NEWLINE}){optional}")
            alternatives.append(f"{lark.text(tool.name)} {_NEWLINE} {' '.join(parts)}")
        return f"block: function {lark.text('</tool_call>')}\nfunction: {' | '.join(alternatives)}\n{further}"


class Mistral(CallFormat):
    """[TOOL_CALLS] and a JSON list, or, in later models, the name, [ARGS] and the arguments of each call."""

    name = "mistral"
    begins: ClassVar[Mapping[str, str | None]] = {"[TOOL_CALLS]": None}
    inner = ("[ARGS]", "[CALL_ID]")
    evidence = (("[TOOL_CALLS]",),)
    LATER = re.compile(r"\s*([^\[{\s]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(\{.*\})\s*", re.DOTALL)

    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """See `CallFormat`."""
        later = self.LATER.fullmatch(block)
        return _calls_of_json(parsed_json(block)) if later is None else _one(call(later[1], later[2]))

    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """See `CallFormat`."""
        if "[ARGS]" not in lark.specials:
            more = f'("," " "? object){{0,{MOST_CALLS - 1}}}' if many else ""
            return f'block: " "? "[" object {more} "]"\nobject: {call_objects(tools, "arguments")}\n'
        named = " | ".join(f"{lark.text(f'{tool.name}[ARGS]')} {in_lark(arguments_schema(tool))}" for tool in tools)
        return f"block: {named}\n"

    def new_id(self) -> str:
        """Mistral's templates take nothing but nine letters and digits."""
        return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


class Llama(CallFormat):
    """A JSON object with name and parameters, by itself or behind <|python_tag|>: Llama 3.1 and later."""

    name = "llama3"
    begins: ClassVar[Mapping[str, str | None]] = {"<|python_tag|>": None}
    bare = True
    repeats = False
    evidence = (("<|python_tag|>",),)

    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """See `CallFormat`."""
        decoder, found, rest = json.JSONDecoder(), [], block.strip()
        if not rest.startswith("{"):
            return _python_call(rest)
        while rest:
            try:
                data, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return None
            found.append(data)
            rest = rest[end:].lstrip(" \n;,")
        return _calls_of_json(found)

    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """See `CallFormat`."""
        more = f'("; " object){{0,{MOST_CALLS - 1}}}' if many else ""
        return f"block: object {more}\nobject: {call_objects(tools, 'parameters')}\n"


class DeepSeek(CallFormat):
    """A list of calls between tokens of their own: DeepSeek V3 and R1, and V3.1 without the type and the fence."""

    name = "deepseek"
    begins: ClassVar[Mapping[str, str | None]] = {"<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>"}
    repeats = False
    inner = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
    evidence = (("<｜tool▁calls▁begin｜>",), ("<｜tool▁call▁begin｜>",))
    ONE = re.compile(r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>\s*", re.DOTALL)
    FENCED = re.compile(r"\s*(\S+)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)

    def calls(self, block: str, tools: Sequence[Tool]) -> list[Call] | None:
        """See `CallFormat`."""
        pairs = self.ONE.findall(block)
        if not pairs or self.ONE.sub("", block):
            return None
        found = []
        for before, after in pairs:
            fenced = self.FENCED.fullmatch(after)
            found.append(call(before, after) if fenced is None else call(fenced[1], fenced[2]))
        return _all(found)

    def rules(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """See `CallFormat`."""
        begin, separator, end = (lark.text(marker) for marker in self.inner)
        named = " | ".join(
            f'{name} {separator} {arguments} | "function" {separator} {name} "\\n```json\\n" {arguments} "\\n```"'
            for name, arguments in ((lark.text(tool.name), in_lark(arguments_schema(tool))) for tool in tools)
        )
        more = f'("\\n"? item){{0,{MOST_CALLS - 1}}}' if many else ""
        last = lark.text("<｜tool▁calls▁end｜>")
        return f"block: item {more} {last}\nitem: {begin} (named) {end}\nnamed: {named}\n"


CALL_FORMATS: tuple[CallFormat, ...] = (Glm(), QwenCoder(), DeepSeek(), Mistral(), Hermes(), Llama())
"""In the order in which their evidence is looked for: the more particular ones first."""

_NEWLINE = '"\\n"?'


def _one(found: Call | None) -> list[Call] | None:
    return None if found is None else [found]


def _all(found: Sequence[Call | None]) -> list[Call] | None:
    """The calls, where every one is well formed."""
    calls = [one for one in found if one is not None]
    return calls if calls and len(calls) == len(found) else None


def _calls_of_json(data: Any) -> list[Call] | None:
    """Calls from an object with name and arguments (or parameters), or from a list of such."""
    entries = data if isinstance(data, list) else [data]
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            return None
        inner = entry.get("function")
        named = inner if isinstance(inner, dict) else entry
        name = named.get("name", inner)
        found.append(call(name, named.get("arguments", named.get("parameters", {}))))
    return _all(found)


def _python_call(text: str) -> list[Call] | None:
    """`tool.call(query="...")`, as Llama calls its own tools."""
    try:
        expression = ast.parse(text, mode="eval").body
        if not isinstance(expression, ast.Call) or expression.args:
            return None
        function = expression.func
        name = ast.unparse(function.value if isinstance(function, ast.Attribute) else function)
        values = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in expression.keywords}
        return _one(call(name, json.loads(json.dumps(values))))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _typed(name: str, values: Sequence[tuple[str, str]], tools: Sequence[Tool]) -> dict[str, Any]:
    """Arguments that stand as plain text: data where the tool's schema does not ask for a text."""
    tool = next((tool for tool in tools if tool.name == name), None)
    properties = {} if tool is None else tool.properties
    return {key: _value(value, properties.get(key)) for key, value in values}


def _value(text: str, schema: Any) -> Any:
    if _is_text(schema):
        return text
    data = parsed_json(text)
    return text if data is None and text.strip() != "null" else data


def _is_text(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    return schema.get("type") == "string" or all(isinstance(one, str) for one in schema.get("enum", [0]))


def _parameters(tool: Tool) -> list[tuple[str, str]]:
    """The arguments in order, and "?" for each that may be left out."""
    required = tool.parameters.get("required", [])
    return [(key, "" if key in required else "?") for key in tool.properties]


def _plain_value(rule: str, schema: Any, end: str, lark: Lark | None = None) -> tuple[str, str]:
    """An expression for a value and the text `end`, and the rules that it needs: texts stand as they are, all else is
    JSON."""
    closing = json.dumps(end) if lark is None else lark.text(end)
    if not _is_text(schema):
        return f"{in_lark(schema)} {closing}", ""
    if "enum" in schema:
        return f"({' | '.join(json.dumps(text) for text in schema['enum'])}) {closing}", ""
    return rule, (Lark({}) if lark is None else lark).up_to(rule, end)
