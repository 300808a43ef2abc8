"""How one model writes its replies, read from its template and tokens: where reasoning stands, how calls look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybrimoe.errors import ConfigError, did_you_mean
from hybrimoe.generation.constraint import Structure
from hybrimoe.server.replies.call_formats import CALL_FORMATS, CallFormat
from hybrimoe.server.replies.events import Call, Event, PlainParser, ReplyParser, Tool
from hybrimoe.server.replies.harmony import (
    HARMONY_EVIDENCE,
    HARMONY_MARKERS,
    HarmonyParser,
    harmony_calls,
    harmony_grammar,
)
from hybrimoe.server.replies.lark import MOST_CALLS, Lark, special_tokens
from hybrimoe.server.replies.marked import THINKING, MarkedParser, Thinking

__all__ = ["HARMONY", "TOOL_PARSERS", "ReplySyntax", "ToolUse"]

HARMONY = "harmony"
TOOL_PARSERS = (*(form.name for form in CALL_FORMATS), HARMONY)
"""What `server.tool_parser` may name."""
GENERIC = "hermes"
"""The form that a model is taught in its system message whose template shows no tools."""
INSTRUCTION = """\
You may call functions to help with the user's request. Their signatures stand within <tools></tools>:
<tools>
{tools}
</tools>
For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools of a request. named: the only one that may be called. many: whether a reply may have several calls."""

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    many: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """Those that the model is shown."""
        return () if self.choice == "none" else self.tools

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(tool for tool in self.offered if self.named in (None, tool.name))

    @property
    def must_call(self) -> bool:
        """Whether the reply has to be a call."""
        return self.choice == "required"

    @property
    def is_strict(self) -> bool:
        """Whether calls that the model decides on must follow their schema."""
        return self.choice == "auto" and any(tool.strict for tool in self.tools)


@dataclass(frozen=True, slots=True)
class ReplySyntax:
    """calls: None for harmony, whose parser reads all of a reply. generic: the template shows no tools, so the system
    message does. thinking: the markers of reasoning, if there are any. specials: special tokens by name."""

    calls: CallFormat | None
    generic: bool
    thinking: Thinking | None
    specials: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any, tool_parser: str | None = None) -> ReplySyntax:
        """The syntax of a tokenizer's model. tool_parser: the name of the form of calls, where it is known better.

        Raises ConfigError for a name that there is not.
        """
        template = _template(tokenizer)
        specials = special_tokens(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        known = "\n".join([template, *(str(token.content) for token in added.values())])
        form, generic = _form(template, known, tool_parser)
        thinking = next((one for one in THINKING if one.end in template), None)
        return cls(form, generic, thinking, specials)

    @property
    def name(self) -> str:
        """As `server.tool_parser` has it."""
        return HARMONY if self.calls is None else self.calls.name

    @property
    def can_think(self) -> bool:
        """Whether replies may hold reasoning."""
        return self.calls is None or self.thinking is not None

    @property
    def shown_special(self) -> frozenset[int]:
        """Special tokens that a parser must see."""
        thinking = () if self.thinking is None else (self.thinking.begin, self.thinking.end)
        markers = (*HARMONY_MARKERS, *thinking) if self.calls is None else (*self.calls.markers, *thinking)
        return frozenset(self.specials[marker] for marker in markers if marker in self.specials)

    def new_id(self) -> str:
        """An id for a call."""
        return (self.calls or CALL_FORMATS[0]).new_id()

    def parser(self, prompt: str, use: ToolUse) -> ReplyParser:
        """The parser of one reply to `prompt`, the text of which may have opened the reasoning."""
        if self.calls is None:
            parser: ReplyParser = HarmonyParser(use.offered)
        elif self.thinking is None and not use.offered:
            return PlainParser()
        else:
            parser = MarkedParser(
                self.thinking, self._thinks(prompt), self.calls if use.offered else None, use.offered
            )  # fmt: skip
        return parser if use.many else FirstCall(parser)

    def structure(self, prompt: str, use: ToolUse, answer: Structure | None) -> Structure | None:
        """What a reply to `prompt` must be, around the `answer` or instead of it; None for free text."""
        if answer is None and not use.must_call and not (use.is_strict and use.offered):
            return None
        lark = Lark(self.specials)
        if self.calls is None:
            return self._harmony_structure(lark, use, answer)
        reasoning, rules = self._reasoning(lark, prompt)
        if not use.offered and answer is not None and not reasoning:
            return answer
        if use.offered:
            rules += self._calls(lark, use)
        if use.must_call:
            body = "calls"
        elif answer is not None:
            body = "(calls | @answer)" if use.offered else "@answer"
        else:
            body, more = self._free(lark)
            rules += more
        return Structure("lark", f"start: {reasoning} {body}\n{rules}", None if use.must_call else answer)

    def instructed(self, messages: list[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
        """`messages` with the tools in the system message, where the model's template does not show them."""
        if not use.offered or not self.generic:
            return messages
        shown = "\n".join(json.dumps(tool.as_template_takes_it(), ensure_ascii=False) for tool in use.offered)
        text = INSTRUCTION.format(tools=shown)
        first = messages[0]
        if first["role"] in ("system", "developer"):
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:
        """Tools for the model's template; None where it shows none."""
        if self.generic or not use.offered:
            return None
        return [tool.as_template_takes_it() for tool in use.offered]

    def _thinks(self, prompt: str) -> bool:
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.begin)

    def _reasoning(self, lark: Lark, prompt: str) -> tuple[str, str]:
        """An expression for reasoning that the reply begins with, and its rules."""
        if self.thinking is None or prompt.rstrip().endswith(self.thinking.end):
            return "", ""
        space = "/\\s{0,4}/"
        rules = lark.up_to("thought", self.thinking.end)
        if self._thinks(prompt):
            return f"thought {space}", rules
        return f"({lark.text(self.thinking.begin)} thought {space})?", rules

    def _calls(self, lark: Lark, use: ToolUse) -> str:
        assert self.calls is not None
        one = f"{lark.text(self.calls.marker)} block" if self.calls.marker else "block"
        more = f'("\\n"? one){{0,{MOST_CALLS - 1}}}' if use.many and self.calls.repeats else ""
        return f"calls: one {more}\none: {one}\n{self.calls.rules(lark, use.allowed, use.many)}"

    def _free(self, lark: Lark) -> tuple[str, str]:
        """Text in which calls stand that follow their schema, wherever the model begins one."""
        assert self.calls is not None
        marker = self.calls.marker
        if not marker:  # a call without a marker is told from text only by what it says
            return "/(.|\\n)*/", ""
        if marker in lark.specials:
            return "/(.|\\n)*/ calls?", ""
        return "(text_and_marker block)* TEXT", lark.up_to("text_and_marker", marker) + lark.without("TEXT", [marker])

    def _harmony_structure(self, lark: Lark, use: ToolUse, answer: Structure | None) -> Structure | None:
        calls = harmony_calls(lark, use.allowed) if use.offered else ""
        if use.must_call:
            return Structure("lark", harmony_grammar(lark, calls, ["calls"]))
        if answer is None:  # harmony's models are trained to the schema, and one message may be of any channel
            return None
        return Structure("lark", harmony_grammar(lark, calls, ["calls", "final"] if calls else ["final"]), answer)


class FirstCall:
    """See `ReplyParser`: of several calls, the first one only."""

    def __init__(self, parser: ReplyParser) -> None:
        self._parser = parser
        self._called = False

    def push(self, text: str) -> list[Event]:
        """See `ReplyParser`."""
        return self._first(self._parser.push(text))

    def finish(self) -> list[Event]:
        """See `ReplyParser`."""
        return self._first(self._parser.finish())

    def _first(self, events: Sequence[Event]) -> list[Event]:
        kept = []
        for event in events:
            if not isinstance(event, Call) or not self._called:
                kept.append(event)
            self._called = self._called or isinstance(event, Call)
        return kept


def _form(template: str, known: str, tool_parser: str | None) -> tuple[CallFormat | None, bool]:
    """The form of calls, and whether the system message has to teach it."""
    by_name = {form.name: form for form in CALL_FORMATS}
    shows_tools = "tools" in template
    if tool_parser is not None:
        if tool_parser not in TOOL_PARSERS:
            raise ConfigError(
                f"server.tool_parser: unknown form {tool_parser!r}{did_you_mean(tool_parser, TOOL_PARSERS)}; "
                f"expected one of {', '.join(TOOL_PARSERS)}"
            )
        return by_name.get(tool_parser), not shows_tools
    if all(marker in template for marker in HARMONY_EVIDENCE):
        return None, False
    if shows_tools:
        for text in (template, known):
            for form in CALL_FORMATS:
                if any(all(marker in text for marker in group) for group in form.evidence):
                    return form, False
    return by_name[GENERIC], True


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)
