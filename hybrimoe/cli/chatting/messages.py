"""Where the messages of `hybrimoe chat` come from: an edited prompt in a terminal, lines of a pipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

HISTORY_NAME = "chat-history"
CONTINUES = "\\"
"""At the end of a line: the message goes on in the next one."""


class Messages(Protocol):
    """A source of messages."""

    def read(self) -> str | None:
        """The next message, None after the last. Raises KeyboardInterrupt for Ctrl-C."""


def messages(at_terminal: bool) -> Messages:
    """The source for this process: its terminal, or what stdin holds."""
    return TerminalMessages() if at_terminal else PipedMessages(sys.stdin)


class PipedMessages:
    """A line is a message, of any length; a backslash at its end continues it."""

    def __init__(self, source: TextIO) -> None:
        self._source = source

    def read(self) -> str | None:
        """See `Messages`."""
        lines: list[str] = []
        while line := self._source.readline():
            line = line.rstrip("\r\n")
            if not line.endswith(CONTINUES):
                return "\n".join([*lines, line])
            lines.append(line.removesuffix(CONTINUES))
        return "\n".join(lines) if lines else None


class TerminalMessages:
    """Editing with arrow keys, messages of earlier chats by up and down, and text that is pasted as it is.

    Enter sends; Alt-Enter, or Enter after a backslash, begins a new line. The prompt goes to stderr, so that stdout
    holds replies only.
    """

    def __init__(self, history_file: Path | None = None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="... ",
            history=_history(history_file),
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str | None:
        """See `Messages`; Ctrl-D on an empty line is the end."""
        try:
            return self._session.prompt()
        except EOFError:
            return None


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(CONTINUES):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(file: Path | None) -> History:
    """What was typed before, kept for the user alone; only in memory where the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from cpu_kernels.jit.cache_dir import cache_home

    file = file or cache_home() / HISTORY_NAME
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
