"""What a parser finds in a reply's text, in the order in which it stands there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

__all__ = ["Call", "Event", "PlainParser", "Reasoning", "ReplyParser", "Text", "Tool", "call", "joined", "parsed_json"]


@dataclass(frozen=True, slots=True)
class Text:
    """A part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A complete call of a tool. arguments: a JSON object, as text."""

    name: str
    arguments: str


Event = Text | Reasoning | Call


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments. strict: calls must follow it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """Schemas of the arguments by name; none where the schema does not list them."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    def as_template_takes_it(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class ReplyParser(Protocol):
    """Takes a reply's text in pieces of any size; however it is cut, the events joined are the same."""

    def push(self, text: str) -> list[Event]:
        """What is certain with these further characters."""

    def finish(self) -> list[Event]:
        """What was held back, at the reply's end."""


class PlainParser:
    """For replies that are nothing but an answer."""

    def push(self, text: str) -> list[Event]:
        """See `ReplyParser`."""
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        """See `ReplyParser`."""
        return []


def call(name: Any, arguments: Any) -> Call | None:
    """A call from what a model wrote; None where that is none. arguments: an object, or one as JSON text."""
    if isinstance(arguments, str):
        arguments = parsed_json(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    if not _is_unicode(text):
        text = json.dumps(arguments)
    return Call(name.strip(), text) if _is_unicode(name) else None


def parsed_json(text: str) -> Any:
    """The data of a JSON text; None where it is none (or null)."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring texts of one kind in one."""
    result: list[Event] = []
    for kind, neighbours in groupby(events, type):
        if kind is Call:
            result.extend(neighbours)
        else:
            text = "".join(event.text for event in neighbours if not isinstance(event, Call))
            result.append(Reasoning(text) if kind is Reasoning else Text(text))
    return result


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
