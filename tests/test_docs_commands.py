"""Every command line in README and docs is one that the program takes; the short ones run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hybrimoe.cli.app import app, load_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"```(?:sh|bash|console)?\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`(hybrimoe [a-z][^`\n]*)`")
SHORT = (
    ("doctor", "--json"),
    ("rules", "check", "moe"),
    ("explain",),
    ("plan",),
    ("generate", "--prompt", "The king", "--max-new-tokens", "4", "--seed", "1"),
    ("simulate", "--policy", "static", "--hardware", "laptop", "--cache-ratio", "0.25"),
)


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of every complete command: in a fenced block, or inline with at least one argument."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        commands = [line.strip() for line in lines if re.match(r"\s*(\$ )?hybrimoe [a-z]", line)]
        found += [(page.name, line.removeprefix("$ ")) for line in commands]
        found += [(page.name, line) for line in INLINE.findall(text)]
    return found


def words_of(line: str) -> list[str]:
    """The words after `hybrimoe`, without a comment, a redirection or what follows a pipe."""
    words = shlex.split(line, comments=True)[1:]
    for at, word in enumerate(words):
        if word in ("|", ">", "2>", "&&", ";") or re.match(r"\d?>", word):
            return words[:at]
    return words


def parse(words: list[str]) -> None:
    """Raises what the parser raises for a wrong command line; runs nothing."""
    command: Any = load_command(words[0])
    name, rest, parent = words[0], words[1:], None
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"{name} has no command {rest[0]!r}"
        name, command, rest = rest[0], command.commands[rest[0]], rest[1:]
    if hasattr(command, "commands"):
        return  # a group named without a command, as in "`hybrimoe bench` measures"
    command.make_context(name, list(rest), parent=parent)


def test_commands_were_found() -> None:
    assert len(command_lines()) > 50


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_documented_command_lines_are_taken(page: str, line: str) -> None:
    words = words_of(line)
    if "..." in words or any(re.fullmatch(r"[a-z|-]*\|[a-z|-]*", word) for word in words):
        pytest.skip("stands for several commands")
    parse(words)


@pytest.mark.parametrize("words", SHORT, ids=" ".join)
def test_short_commands_run(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
