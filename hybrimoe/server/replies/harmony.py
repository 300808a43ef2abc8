"""Harmony, the form of gpt-oss: a reply is a row of messages, each with a channel and perhaps a recipient.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hybrimoe.generation.constraint import in_lark
from hybrimoe.generation.detokenise import beginning_of_one
from hybrimoe.server.replies.events import Event, Reasoning, Text, Tool, call, joined
from hybrimoe.server.replies.lark import Lark, arguments_schema

__all__ = ["HARMONY_EVIDENCE", "HARMONY_MARKERS", "HarmonyParser", "harmony_calls", "harmony_grammar"]

HARMONY_EVIDENCE = ("<|channel|>", "<|message|>", "<|start|>")
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
HARMONY_MARKERS = ("<|channel|>", "<|message|>", "<|constrain|>", *ENDS)
HEADERS = ("<|channel|>", "<|start|>", "<|message|>", "to=")
"""How a header begins; the prompt ends with the start of the first one."""
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser:
    """See `ReplyParser`. What comes without a header is the answer; a malformed call is text."""

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        self._with_tools = bool(tools)
        self._left = ""
        self._in_header = True
        self._channel, self._recipient = "final", ""
        self._body = ""
        """Of a call, which is read once it is complete."""

    def push(self, text: str) -> list[Event]:
        """See `ReplyParser`."""
        self._left += text
        return self._advance(at_end=False)

    def finish(self) -> list[Event]:
        """See `ReplyParser`."""
        return joined([*self._advance(at_end=True), *self._end_of_message()])

    def _advance(self, at_end: bool) -> list[Event]:
        events: list[Event] = []
        going = True
        while going:
            going = self._read_header(at_end) if self._in_header else self._read_body(events, at_end)
        return joined(events)

    def _read_header(self, at_end: bool) -> bool:
        """Reads up to the message itself. True: there is something to read on."""
        text = self._left.lstrip()
        if at_end and not text:
            self._left = ""
            return False
        if not any(text.startswith(one) for one in HEADERS):
            if not at_end and any(one.startswith(text) for one in HEADERS):
                return False
            return self._begin("", self._left)
        head, marker, rest = text.partition("<|message|>")
        if marker:
            return self._begin(head, rest)
        if at_end and text.startswith("<|"):  # cut within a header: there is no message
            self._left = ""
        return self._begin("", self._left) if at_end and self._left else False

    def _begin(self, head: str, rest: str) -> bool:
        """A message begins, with `head` as its header."""
        recipient, channel = RECIPIENT.search(head), CHANNEL.search(head)
        self._recipient = "" if recipient is None else recipient[1]
        self._channel = "final" if channel is None else channel[1]
        self._in_header, self._left = False, rest
        return bool(rest)

    def _read_body(self, events: list[Event], at_end: bool) -> bool:
        text = self._left
        found = min(((text.index(end), end) for end in ENDS if end in text), default=None)
        if found is None:
            held = 0 if at_end else beginning_of_one(text, ENDS)
            self._left = text[len(text) - held :]
            self._say(events, text[: len(text) - held])
            return False
        at, end = found
        self._say(events, text[:at])
        events.extend(self._end_of_message())
        self._left = text[at + (0 if end == "<|start|>" else len(end)) :]
        self._in_header = True
        return bool(self._left)

    def _say(self, events: list[Event], text: str) -> None:
        if not text:
            return
        if self._recipient:
            self._body += text
        else:
            events.append(Reasoning(text) if self._channel == "analysis" else Text(text))

    def _end_of_message(self) -> list[Event]:
        """The call that a message was."""
        name, body = self._recipient, self._body
        self._recipient = self._body = ""
        if not name:
            return []
        found = call(name, body) if self._with_tools else None
        return [Text(body)] if found is None else [found]


def harmony_calls(lark: Lark, tools: Sequence[Tool]) -> str:
    """Lark rules, of which `calls` is a message to one of the `tools`: there is one in a reply."""
    one = " | ".join(
        f"{lark.text(f'<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>')}"
        f" {in_lark(arguments_schema(tool))}"
        for tool in tools
    )
    return f"calls: {one}\n"


def harmony_grammar(lark: Lark, parts: str, answers: Sequence[str]) -> str:
    """A whole grammar: reasoning if the model likes, then one of `answers`, rules of `parts`.

    The rule `final` is a message of the final channel whose text is `@answer`.
    """
    analysis = f"{lark.text('<|channel|>analysis<|message|>')} thought {lark.text('<|start|>assistant')}"
    final = f'{lark.text("<|channel|>final")} (" " {lark.text("<|constrain|>json")})? {lark.text("<|message|>")}'
    rules = f"start: analysis? ({' | '.join(answers)})\nanalysis: {analysis}\n{lark.up_to('thought', '<|end|>')}"
    return rules + (f"final: {final} @answer\n" if "final" in answers else "") + parts
