"""The loop of a chat: reads messages and commands until their end."""

from __future__ import annotations

import typer

from hybrimoe.cli.chatting.answering import Chat
from hybrimoe.cli.chatting.commands import Commands
from hybrimoe.cli.chatting.messages import messages
from hybrimoe.cli.views import render

FAILED, INTERRUPTED = 1, 130


class ChatLoop:
    """Reads messages and commands until their end; nothing that goes wrong with a message ends the loop."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.messages = messages(chat.at_terminal)
        self.commands = Commands(chat)
        self.n_failed = 0

    def run(self) -> None:
        """The loop. Raises typer.Exit(130) when Ctrl-C is pressed twice while it waits for a message, Exit(1) at the
        end of a pipe of which no message could be answered."""
        self._greet()
        presses = 0
        while True:
            try:
                message = self.messages.read()
            except KeyboardInterrupt:
                presses += 1
                if presses > 1 or not self.chat.at_terminal:
                    raise typer.Exit(INTERRUPTED) from None
                render.note("\npress Ctrl-C again to leave")
                continue
            presses = 0
            if message is None:
                break
            self._handle(message)
            if self.chat.leaves:
                break
        if self.n_failed and self.chat.last is None and not self.chat.at_terminal:
            raise typer.Exit(FAILED)

    def _greet(self) -> None:
        if self.chat.quiet:
            return
        if not self.chat.conversation.has_template:
            render.note("this model has no chat template: the conversation is given to it as a plain transcript")
        if self.chat.at_terminal:
            render.note(f"{self.chat.opened.name}; /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")

    def _handle(self, message: str) -> None:
        """Do a command or answer a message."""
        if not message.strip():
            return
        try:
            if not self.commands.run(message):
                self.chat.answer(message)
        except Exception as error:  # noqa: BLE001  # it belongs to the message: the conversation goes on
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        from hybrimoe.errors import HybriMoEError

        self.n_failed += 1
        said = str(error) if isinstance(error, HybriMoEError) else f"unexpected {type(error).__name__}: {error}"
        if self.chat.as_json:
            self.chat.emit({"error": {"type": type(error).__name__, "message": said}})
        else:
            render.error(said)
