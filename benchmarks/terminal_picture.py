"""Writes docs/pictures/generate.svg: what `hybrimoe generate` of the demo model shows in a terminal.

    python benchmarks/terminal_picture.py

The command runs in a pseudo-terminal of 100 columns; its output, colours included, becomes an SVG by rich.
"""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "generate.svg"
WIDTH = 100
PROMPT = "It was a bright morning, and Elizabeth"
WORDS = ("generate", "--prompt", PROMPT, "--max-new-tokens", "96", "--seed", "7", "--timeline")


def record(words: tuple[str, ...]) -> str:
    """What a command of `hybrimoe` writes to a terminal, with its control sequences. Raises CalledProcessError."""
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "TERM": "xterm-256color", "FORCE_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrimoe", *words], stdin=child, stdout=child, stderr=child, env=environment
    )
    os.close(child)
    pieces = []
    try:
        while piece := os.read(parent, 65536):
            pieces.append(piece)
    except OSError:  # the other end was closed: the command has ended
        pass
    os.close(parent)
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, words, b"".join(pieces))
    return b"".join(pieces).decode("utf-8", errors="replace")


CURSOR_UP, ERASE_LINE = "\x1b[1A", "\x1b[2K"


def screen(output: str) -> list[str]:
    """The lines as they stand when everything was written: a progress bar that was erased is not among them."""
    lines: list[str] = []
    for written in output.split("\n"):
        for _ in range(written.count(CURSOR_UP)):
            lines.pop()
        lines.append(written.rstrip("\r").rsplit(ERASE_LINE, 1)[-1].rsplit("\r", 1)[-1])
    return lines


def main() -> None:
    """Runs the command once for the caches of compiled kernels, then once for the picture."""
    record(WORDS)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f'$ hybrimoe generate --prompt "{PROMPT}" \\\n      --max-new-tokens 96 --seed 7 --timeline'))
    for line in screen(record(WORDS)):
        console.print(Text.from_ansi(line))
    PICTURE.parent.mkdir(exist_ok=True)
    console.save_svg(str(PICTURE), title="hybrimoe")


if __name__ == "__main__":
    main()
