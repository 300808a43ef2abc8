"""Messages from a pipe, and from a terminal: a real one (a pseudo-terminal), with what is typed and pasted into it."""

import io
import os
import pty
import stat
import subprocess
import sys
import time
from ast import literal_eval

import pytest

from hybrimoe.cli.messages import PipedMessages

PASTE = "\x1b[200~{}\x1b[201~"
UP, LEFT, ALT_ENTER, CTRL_D = "\x1b[A", "\x1b[D", "\x1b\r", "\x04"
READER = """
import sys
from pathlib import Path
from hybrimoe.cli.messages import TerminalMessages
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


@pytest.fixture
def terminal(tmp_path):
    """`terminal(*keys)`: types into a terminal, waits for the program's end, returns what it read (stdout's lines)."""

    def type_into(*keys):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [sys.executable, "-c", READER, str(tmp_path / "kept" / "history")]
        with subprocess.Popen(
            command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=environment, text=True
        ) as process:
            os.close(theirs)
            shown = b""
            while b"> " not in shown:
                shown += os.read(ours, 4096)
            os.set_blocking(ours, False)
            data = "".join(keys).encode()
            deadline = time.monotonic() + 60
            while data and time.monotonic() < deadline:
                drain(ours)
                try:
                    data = data[os.write(ours, data[:1024]) :]
                except BlockingIOError:
                    time.sleep(0.001)
            while process.poll() is None and time.monotonic() < deadline:
                drain(ours)
                time.sleep(0.001)
            process.kill()
            lines = process.stdout.read().splitlines()
            os.close(ours)
        assert lines[-1] == "end"
        return [literal_eval(line) for line in lines[:-1]]

    return type_into


def drain(terminal):
    """What is shown is not read by anyone else, and a full terminal stops the program."""
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        return


def test_pasted_lines_are_one_message(terminal):
    assert terminal(PASTE.format("one\ntwo\n\nthree"), "\r", CTRL_D) == ["one\ntwo\n\nthree"]


def test_a_long_paste_is_not_cut(terminal):
    long = "word " * 4000
    assert terminal(PASTE.format(long), "\r", CTRL_D) == [long]


def test_a_line_is_edited_and_continued(terminal):
    assert terminal("ac", LEFT, "b", "\r", "one", ALT_ENTER, "two\\\rthree\r", CTRL_D) == ["abc", "one\ntwo\nthree"]


def test_earlier_messages_come_back_in_the_next_chat_and_only_the_user_can_read_them(terminal, tmp_path):
    assert terminal("first\r", "second\r", UP, UP, "\r", CTRL_D) == ["first", "second", "first"]
    assert terminal(UP, "!\r", CTRL_D) == ["first!"]
    assert stat.S_IMODE((tmp_path / "kept" / "history").stat().st_mode) == 0o600
