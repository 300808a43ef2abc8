"""The parser of replies whose parts stand between markers: reasoning first, then an answer with calls in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybrimoe.generation.detokenise import beginning_of_one
from hybrimoe.server.replies.call_formats import CallFormat
from hybrimoe.server.replies.events import Event, Reasoning, Text, Tool, joined

__all__ = ["THINKING", "MarkedParser", "Thinking"]

BARE_CALLS = ('{"name"', '{"type":"function"', '{"function"')
"""How a call without a marker begins, white space left out."""
MOST_BARE = 64
"""Characters that must show whether a reply without a marker is a call."""
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Thinking:
    """The two markers of reasoning."""

    begin: str
    end: str


THINKING = (
    Thinking("<think>", "</think>"),
    Thinking("[THINK]", "[/THINK]"),
    Thinking("<seed:think>", "</seed:think>"),
    Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Of Qwen, DeepSeek, GLM and many others; of Mistral; of Seed; of Command."""


class MarkedParser:
    """See `ReplyParser`. A block of calls is read once it is complete; a malformed one is text.

    thinks: whether the prompt has opened the reasoning already. White space around reasoning and around calls belongs
    to their form and is left out.
    """

    def __init__(
        self, thinking: Thinking | None, thinks: bool, calls: CallFormat | None, tools: Sequence[Tool] = ()
    ) -> None:
        self._thinking, self._calls, self._tools = thinking, calls, tools
        self._left = ""
        """Text that has not been looked at, or may be the beginning of a marker."""
        self._space = ""
        """White space that is text only if more text follows."""
        self._bare = calls is not None and calls.bare
        self._new_part = thinks
        """Whether white space that comes next belongs to the form."""
        self._at_start = True
        self._thinks = thinks
        self._block: str | None = None
        """The marker that began the block of calls which is being read."""
        self._search_from = 0

    def push(self, text: str) -> list[Event]:
        """See `ReplyParser`."""
        self._left += text
        return self._advance(at_end=False)

    def finish(self) -> list[Event]:
        """See `ReplyParser`."""
        events = self._advance(at_end=True)
        if self._space and not self._new_part and not self._thinks:
            events = joined([*events, Text(self._space)])
        self._space = ""
        return events

    def _advance(self, at_end: bool) -> list[Event]:
        events: list[Event] = []
        going = True
        while going:
            if self._thinks:
                going = self._read_reasoning(events, at_end)
            elif self._block is not None:
                going = self._read_block(events, at_end)
            else:
                going = self._read_text(events, at_end)
        return joined(events)

    def _read_reasoning(self, events: list[Event], at_end: bool) -> bool:
        assert self._thinking is not None
        if self._at_start and self._opens_again(at_end):
            return False
        before, marker = self._up_to_a_marker((self._thinking.end,), at_end)
        self._say(events, before)
        if marker is None:
            return False
        self._thinks, self._space, self._new_part = False, "", True
        return True

    def _opens_again(self, at_end: bool) -> bool:
        """Leaves out a marker of the model's own behind that of the prompt. True: what there is does not tell yet."""
        assert self._thinking is not None
        begin, text = self._thinking.begin, self._left.lstrip()
        if begin.startswith(text) and text != begin and not at_end:
            return True
        self._at_start = False
        if text.startswith(begin):
            self._left = text.removeprefix(begin)
        return False

    def _read_text(self, events: list[Event], at_end: bool) -> bool:
        if self._bare and self._may_be_bare_call(at_end):
            return self._block is not None
        begins = () if self._calls is None else tuple(self._calls.begins)
        opening = (self._thinking.begin,) if self._thinking is not None and self._at_start else ()
        before, marker = self._up_to_a_marker((*begins, *opening), at_end)
        if before.strip():
            self._at_start = False
            if marker in opening:  # reasoning stands at the beginning; later it is a word like any other
                before, marker = before + str(marker), ""
        self._say(events, before)
        if marker is None:
            return False
        if marker in opening:
            self._thinks, self._space, self._new_part, self._at_start = True, "", True, False
        elif marker:
            self._block, self._search_from, self._at_start = marker, 0, False
        return True

    def _may_be_bare_call(self, at_end: bool) -> bool:
        """Whether the reply so far is, or may still be, a call from its first character on."""
        beginning = re.sub(r"\s", "", self._left[:MOST_BARE])
        if any(beginning.startswith(one) for one in BARE_CALLS):
            self._block, self._search_from, self._bare = "", 0, False
            return True
        if not at_end and any(one.startswith(beginning) for one in BARE_CALLS) and len(self._left) < MOST_BARE:
            return True
        self._bare = False
        return False

    def _read_block(self, events: list[Event], at_end: bool) -> bool:
        """Reads the block of calls once it is complete."""
        assert self._calls is not None
        assert self._block is not None
        end = self._calls.begins.get(self._block)
        block, marker, rest = self._whole_block(end, at_end)
        if block is None:
            return False
        begin, self._block, self._left = self._block, None, rest
        calls = self._calls.calls(block, self._tools)
        if calls is None:
            self._say(events, begin + block + marker)
        else:
            events.extend(calls)
            self._space, self._new_part = "", True
        return bool(rest)

    def _whole_block(self, end: str | None, at_end: bool) -> tuple[str | None, str, str]:
        """The block, the marker that ended it and what follows; no block where it is not complete."""
        assert self._calls is not None
        text = self._left
        if end is None:
            at = min((i for i in (text.find(begin) for begin in self._calls.begins) if i >= 0), default=-1)
            if at >= 0:
                return text[:at], "", text[at:]
            return (text, "", "") if at_end else (None, "", "")
        at = text.find(end, self._search_from)
        while at >= 0 and _within_a_string(text[:at]):
            at = text.find(end, at + len(end))
        if at >= 0:
            return text[:at], end, text[at + len(end) :]
        if at_end:  # without its end: cut, or a token that ends replies took its place
            first = text.find(end)
            return (text, "", "") if first < 0 else (text[:first], end, text[first + len(end) :])
        self._search_from = max(0, len(text) - len(end) + 1) if end not in text else 0
        return None, "", ""

    def _up_to_a_marker(self, markers: Sequence[str], at_end: bool) -> tuple[str, str | None]:
        """Takes text up to the first of `markers`, which is taken too; as far as is certain where there is none."""
        text = self._left
        found = [(text.index(marker), -len(marker), marker) for marker in markers if marker in text]
        if found:
            at, _, marker = min(found)
            self._left = text[at + len(marker) :]
            return text[:at], marker
        held = 0 if at_end else beginning_of_one(text, markers)
        self._left = text[len(text) - held :]
        return text[: len(text) - held], None

    def _say(self, events: list[Event], text: str) -> None:
        """Adds text to the part that is being read; white space at its end waits for more."""
        text = self._space + text
        if self._new_part:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._new_part = False
            events.append(Reasoning(said) if self._thinks else Text(said))


def _within_a_string(text: str) -> bool:
    """Whether a JSON text ends within one of its strings; what is no JSON object does not."""
    return text.lstrip().startswith(("{", "[")) and '"' in JSON_STRING.sub("", text)
