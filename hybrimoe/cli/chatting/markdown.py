"""A reply as Markdown in a terminal, shown as it comes: blocks that are complete stay, the last one is drawn anew."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment

REDRAWS_PER_SECOND = 10
CODE_THEME = "ansi_dark"
"""Code in the terminal's own colours, so that it is legible on light and dark backgrounds."""
CONTROLS = dict.fromkeys((*range(9), *range(11, 32), 127, *range(128, 160)))
"""Characters that would move the cursor or begin an escape sequence; tabs and ends of lines stay."""
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
"""Tags are text: rich shows nothing in the place of HTML."""


def can_redraw(console: Console) -> bool:
    """Whether the console is a terminal in which lines can be drawn anew."""
    return console.is_terminal and not console.is_dumb_terminal


def show_markdown(pieces: Iterable[str], console: Console) -> None:
    """Shows the text that `pieces` make up. What has come is shown to its end where `pieces` raises, too."""
    rest, n_blocks, drawn = "", 0, 0.0
    end = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    try:
        with end:
            for piece in pieces:
                rest += piece.translate(CONTROLS)
                for block in _complete(rest):
                    console.print(_Block(block, first=not n_blocks))
                    rest, n_blocks, drawn = rest[len(block) :], n_blocks + 1, 0.0
                if time.monotonic() - drawn >= 1 / REDRAWS_PER_SECOND:
                    end.update(_Block(rest, first=not n_blocks, max_lines=console.height - 1), refresh=True)
                    drawn = time.monotonic()
            end.update("", refresh=True)  # ending it prints what it shows once more, and would scroll
    finally:
        console.print(_Block(rest, first=not n_blocks))


def _complete(text: str) -> Iterator[str]:
    """The top-level blocks of `text`, each with the empty lines after it, without the last: that may go on."""
    tokens = PARSER.parse(text)
    begins = [token.map[0] for token in tokens if token.level == 0 and token.map is not None and token.nesting >= 0]
    lines = text.splitlines(keepends=True)
    edges = [0, *begins[1:]]
    for begin, end in pairwise(edges):
        yield "".join(lines[begin:end])


class _LeftHeading(Heading):
    """A heading where the text begins; rich centres it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Markdown(Markdown):
    """Rich's Markdown of a block by our parser; addresses of links are written out."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _LeftHeading}

    def __init__(self, block: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = PARSER.parse(block)


class _Block:
    """A block with an empty line before it, if it is not the first, and none of its own before and after.

    max_lines: only its last lines, where it has more: what scrolls out of a terminal cannot be drawn anew.
    """

    def __init__(self, block: str, *, first: bool, max_lines: int | None = None) -> None:
        self._block, self._first, self._max_lines = block, first, max_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(_Markdown(self._block), options, pad=False)
        filled = [at for at, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
        if not filled:
            return
        lines = ([] if self._first else [[Segment("")]]) + lines[filled[0] : filled[-1] + 1]
        for line in lines if self._max_lines is None else lines[-max(1, self._max_lines) :]:
            yield from line
            yield Segment.line()
