"""Prompts of a batched job from a file: one a line, or JSON Lines with a service level, a deadline and a length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrimoe.errors import PromptError, did_you_mean
from hybrimoe.text_files import parse_json

__all__ = ["PromptLine", "is_json_lines", "read_prompts"]

JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line. `priority`: higher goes first. `deadline_ms` counts from the job's start; None is no deadline."""

    line: int
    text: str
    id: str | int | None = None
    priority: int = 0
    deadline_ms: float | None = None
    max_new_tokens: int | None = None


def is_json_lines(name: str, text: str) -> bool:
    """By the file's suffix; stdin (`-`) is JSON Lines where its first line is an object."""
    if name == "-":
        return text.lstrip().startswith('{"')
    return name.lower().endswith(JSON_SUFFIXES)


def read_prompts(text: str, name: str) -> list[PromptLine]:
    """The prompts of `text`; empty lines are skipped. `name`: the file, for the format and for messages.

    JSON Lines: objects with `prompt` and optionally `id`, `priority`, `deadline_ms`, `max_new_tokens`.
    Raises PromptError with file and line for what is none of that, and for a file without prompts.
    """
    read = _json_line if is_json_lines(name, text) else _plain_line
    shown = "stdin" if name == "-" else name
    lines = [
        read(line, number, f"{shown}:{number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not lines:
        raise PromptError(f"{shown} has no prompts: expected one a line, or JSON Lines with a prompt in each")
    return lines


def _plain_line(text: str, number: int, where: str) -> PromptLine:
    return PromptLine(number, text)


def _json_line(text: str, number: int, where: str) -> PromptLine:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise PromptError(f"{where}: expected a JSON object ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        raise PromptError(f'{where}: expected an object with a text in "prompt", found {text[:80]}')
    for key in data:
        if key not in FIELDS and key != "prompt":
            raise PromptError(f"{where}: unknown key {key!r}{did_you_mean(key, ('prompt', *FIELDS))}")
    for key, (fits, expected) in FIELDS.items():
        if data.get(key) is not None and not fits(data[key]):
            raise PromptError(f"{where}: {key} must be {expected}, found {data[key]!r}")
    return PromptLine(
        number, data["prompt"], data.get("id"), data.get("priority") or 0, data.get("deadline_ms"),
        data.get("max_new_tokens"),
    )  # fmt: skip


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str) or _is_integer(value), "a text or an integer"),
    "priority": (_is_integer, "an integer (higher goes first)"),
    "deadline_ms": (_is_time, "a number of ms above 0"),
    "max_new_tokens": (lambda value: _is_integer(value) and value > 0, "an integer of at least 1"),
}
