"""Messages from a pipe, and from a terminal: a real one (a pseudo-terminal), with what is typed and pasted into it."""

import contextlib
import io
import os
import pty
import stat
import subprocess
import sys
import time
from ast import literal_eval

import pytest

from hybrimoe.cli.chatting.messages import PipedMessages

PASTE = "\x1b[200~{}\x1b[201~"
UP, LEFT, ALT_ENTER, CTRL_D = "\x1b[A", "\x1b[D", "\x1b\r", "\x04"
ENTER = "\r"
"""A key of its own sends the message: between two prompts the terminal edits lines itself, and keeps a Ctrl-D."""
PROMPTED = "\x1b[?2004h"
"""What a prompt that reads keys asks the terminal for first: that pasted text is marked."""
READER = """
import sys
from pathlib import Path
from hybrimoe.cli.chatting.messages import TerminalMessages
source = TerminalMessages(Path(sys.argv[1]))
while (message := source.read()) is not None:
    print(ascii(message), flush=True)
print("end", flush=True)
"""


def piped(text):
    source, found = PipedMessages(io.StringIO(text)), []
    while (message := source.read()) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\ntwo\n\nthree", ["one\ntwo", "", "three"]),
        ("x" * 100_000 + "\r\n", ["x" * 100_000]),
        ("cut\\\n", ["cut"]),
        ("", []),
    ],
)
def test_lines_of_a_pipe(text, expected):
    assert piped(text) == expected


HANG_SECONDS = 600  # no machine is as slow: what takes so long hangs


class Screen:
    """Our side of a terminal: types keys, and reads what is shown, because a full terminal stops the program."""

    def __init__(self, number):
        self.number, self.shown = number, ""
        self.deadline = time.monotonic() + HANG_SECONDS
        os.set_blocking(number, False)

    def read(self):
        assert time.monotonic() < self.deadline, self.shown
        try:
            self.shown += os.read(self.number, 65536).decode("utf-8", "replace")
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:  # the program has closed its side
            return False
        return True

    def wait_for(self, text):
        while text not in self.shown:
            assert self.read(), self.shown

    def type(self, keys):
        data = keys.encode()
        while data:
            self.read()
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self.number, data[:1024]) :]

    def press_until(self, key, text):
        """Press a key again and again: what it looks for may still be read from a file."""
        self.shown = ""
        while text not in self.shown:
            self.type(key)
            for _ in range(50):
                self.read()


@pytest.fixture
def terminal(tmp_path):
    """`terminal(*keys)`: types into a terminal, waits for the program's end, returns the messages that it read. A pair
    of a key and a text presses the key until the text is shown."""

    def type_into(*keys):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [sys.executable, "-c", READER, str(tmp_path / "kept" / "history")]
        pipes = {"stdin": theirs, "stderr": theirs, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, env=environment, text=True) as process:
            os.close(theirs)
            screen = Screen(ours)
            try:
                screen.wait_for(PROMPTED)
                for key in keys:
                    if isinstance(key, tuple):
                        screen.press_until(*key)
                    elif key == ENTER:
                        screen.shown = ""
                        screen.type(ENTER)
                        screen.wait_for(PROMPTED)
                    else:
                        screen.type(key)
                while screen.read() and process.poll() is None:
                    pass
                lines = process.stdout.read().splitlines()
            finally:
                process.kill()
                os.close(ours)
        assert lines[-1] == "end"
        return [literal_eval(line) for line in lines[:-1]]

    return type_into


def test_pasted_lines_are_one_message(terminal):
    assert terminal(PASTE.format("one\ntwo\n\nthree"), ENTER, CTRL_D) == ["one\ntwo\n\nthree"]


def test_a_long_paste_is_not_cut(terminal):
    long = "word " * 4000
    assert terminal(PASTE.format(long), ENTER, CTRL_D) == [long]


def test_a_line_is_edited_and_continued(terminal):
    assert terminal("ac", LEFT, "b", ENTER, "one", ALT_ENTER, "two\\\rthree", ENTER, CTRL_D) == [
        "abc",
        "one\ntwo\nthree",
    ]


def test_earlier_messages_come_back_in_the_next_chat_and_only_the_user_can_read_them(terminal, tmp_path):
    assert terminal("first", ENTER, CTRL_D) == ["first"]
    (again,) = terminal((UP, "first"), "!", ENTER, CTRL_D)
    assert again == "first!"
    assert stat.S_IMODE((tmp_path / "kept" / "history").stat().st_mode) == 0o600
