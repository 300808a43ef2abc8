"""What the commands print with: results to stdout, notes and errors to stderr, JSON in one shape.

Consoles are made at each call, because tests and pipes replace `sys.stdout`. With `--json`, stdout carries exactly one
JSON document (a result, or `{"error": {...}}`); everything else a command says goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def out() -> Console:
    """A console on stdout, for results."""
    return Console(highlight=False, soft_wrap=False, emoji=False)


def err() -> Console:
    """A console on stderr, for notes, progress and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=False, emoji=False)


def emit_json(data: Any) -> None:
    """Write one JSON document to stdout. Dataclasses, paths, sets and numpy values are understood."""
    text = json.dumps(data, indent=2, default=_plain, ensure_ascii=False)
    sys.stdout.write(_NUMBERS.sub(_on_one_line, text) + "\n")
    sys.stdout.flush()


def emit_json_line(data: Any) -> None:
    """Write one line of JSON to stdout (JSON Lines)."""
    sys.stdout.write(json.dumps(data, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


# A list of numbers over several lines; inside JSON strings there are no line ends, so nothing else looks like this.
_NUMBERS = re.compile(r"\[\n\s+([-+.\deE]+(?:,\n\s+[-+.\deE]+)*)\n\s+\]")


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + re.sub(r",\n\s+", ", ", numbers[1]) + "]"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return value.tolist()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def note(text: str) -> None:
    """A dim remark on stderr (no markup is read from `text`)."""
    err().print(escape(text), style="dim")


def error(text: str) -> None:
    """An error on stderr (no markup is read from `text`)."""
    err().print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def traceback_to_stderr(problem: BaseException) -> None:
    """The full traceback of `problem`, for --debug."""
    sys.stderr.write("".join(traceback.format_exception(problem)))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A compact table: the first column is text, the others are right-aligned figures. In a narrow terminal what has no
    room in a line goes on in the next: a figure that is cut is another figure."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        result.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result
