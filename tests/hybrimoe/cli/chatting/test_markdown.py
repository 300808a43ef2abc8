"""Replies as Markdown: the same whatever pieces they come in, drawn once in a real terminal (tmux), and harmless."""

import io
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console

from hybrimoe.cli.chatting.markdown import can_redraw, show_markdown

REPLY = """# Title

Some *words* and `code`, and a [link](https://example.org).

- one
  - nested
- two

```python
def f(x):

    return x
```

> quoted

<think>a tag</think>

last words"""
SHOWN = """\
Title

Some words and code, and a link
(https://example.org).

 • one
    • nested
 • two

 def f(x):

     return x

▌ quoted

<think>a tag</think>

last words"""
WIDTH, HEIGHT = 40, 12
SOCKETS = itertools.count()
NEEDS_TMUX = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


def shown(pieces) -> str:
    """What is left on a page of WIDTH columns, without the blanks at the ends of its lines."""
    file = io.StringIO()
    show_markdown(pieces, Console(file=file, width=WIDTH, highlight=False))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


@pytest.mark.parametrize("size", [1, 7, len(REPLY)])
def test_a_reply_is_the_same_in_any_pieces(size):
    assert shown(REPLY[at : at + size] for at in range(0, len(REPLY), size)) == SHOWN


@pytest.mark.parametrize(
    ("reply", "left"),
    [
        ("", ""),
        (" \n\n", ""),
        ("\x1b[31mred\x1b[0m \x07\x9b2J", "[31mred[0m 2J"),
        ("a [link](javascript:alert)", "a [link](javascript:alert)"),
        ("![picture](https://example.org/x.png)", "🌆 picture"),
        ("[bold]no markup[/bold] :smile:", "[bold]no markup[/bold] :smile:"),
        ("```\nnever closed", " never closed"),
    ],
)  # fmt: skip
def test_nothing_in_a_reply_does_more_than_being_read(reply, left):
    assert shown([reply]) == left


def test_a_table_has_its_cells_in_columns():
    head, _, row = (line.split() for line in shown(["| a | b |\n|---|---|\n| 1 | 2 |"]).splitlines())
    assert (head, row) == (["a", "b"], ["1", "2"])


def test_what_has_come_is_shown_where_the_reply_fails():
    file = io.StringIO()

    def pieces():
        yield "the beginning"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        show_markdown(pieces(), Console(file=file, width=WIDTH))
    assert file.getvalue().strip() == "the beginning"


def test_pipes_and_dumb_terminals_get_the_text(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not can_redraw(Console(force_terminal=True))
    assert not can_redraw(Console(file=io.StringIO()))
    monkeypatch.setenv("TERM", "xterm")
    assert can_redraw(Console(force_terminal=True))


class Terminal:
    """A command in a terminal of tmux, of its own server."""

    def __init__(self, *command):
        self._socket = f"hybrimoe-test-{os.getpid()}-{next(SOCKETS)}"  # one that ends is not asked for a session
        words = shlex.join(["env", "-u", "NO_COLOR", "-u", "COLUMNS", "-u", "LINES", *command]) + "; sleep 600"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), words)

    def _tmux(self, *words):
        return subprocess.run(["tmux", "-L", self._socket, *words], capture_output=True, text=True, check=True).stdout

    def screen(self):
        """All lines, those that have scrolled away, too."""
        return self._tmux("capture-pane", "-p", "-S", "-").rstrip()

    def press(self, *keys):
        self._tmux("send-keys", *keys)

    def wait_for(self, text):
        """The screen once `text` is on it."""
        end = time.monotonic() + 600  # it hangs
        while text not in (screen := self.screen()):
            assert time.monotonic() < end, screen
            time.sleep(0.05)
        return screen

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tmux("kill-server")


PROGRAM = """
import sys, time
from rich.console import Console
from hybrimoe.cli.chatting.markdown import show_markdown
text = sys.argv[1]

def pieces():
    for at in range(0, len(text), 4):
        time.sleep(0.002)  # long enough in all that the end is drawn anew several times
        yield text[at : at + 4]

show_markdown(pieces(), Console(highlight=False))
print('[done]')
"""


@NEEDS_TMUX
def test_a_terminal_shows_each_line_once():
    code = "\n".join(f"line {at}." for at in range(3 * HEIGHT))  # far more than the screen has room for
    with Terminal(sys.executable, "-c", PROGRAM, f"{REPLY}\n\n```\n{code}\n```\n\nafter it") as terminal:
        screen = terminal.wait_for("[done]")
    lines = [line.rstrip() for line in screen.splitlines()]
    expected = [*SHOWN.splitlines(), "", *(f" {line}" for line in code.splitlines()), "", "after it", "[done]"]
    assert lines == expected


@NEEDS_TMUX
def test_a_chat_in_a_terminal_of_40_columns():
    words = (sys.executable, "-m", "hybrimoe", "chat", "-n", "6", "--seed", "3", "-t", "1")
    with Terminal(*words) as terminal:
        terminal.wait_for("\n>")  # what is typed earlier is the terminal's, which does not know M-Enter
        terminal.press("Good morning", "M-Enter", "to all", "Enter")
        screen = terminal.wait_for("context")
        terminal.press("/undo", "Enter")
        told = " ".join(terminal.wait_for("taken back").split())
        terminal.press("C-d")
    assert "> Good morning" in screen
    assert "... to all" in screen
    assert "tokens/s" in screen
    assert "taken back: Good morning to all" in told
