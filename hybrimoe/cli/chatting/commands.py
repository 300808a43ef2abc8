"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrimoe.cli.chatting.answering import Chat
from hybrimoe.cli.chatting.settings import DEFAULT, checked_name, setting_lines, with_setting
from hybrimoe.cli.views import render
from hybrimoe.errors import FileError, PromptError, did_you_mean

MISTYPED = 0.8
"""Likeness of a word to a command from which a longer line is taken for a mistyped command, not for a message."""
NONE = "none"
"""As the text of /system: no system message."""
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Command:
    """shown: how to type it. does: gets what stands after the command, without blanks around it.

    takes: whether something may stand there.
    """

    shown: str
    line: str
    does: Callable[[str], None]
    takes: bool = False


class Commands:
    """The commands on one chat."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        clear = Command("/clear", "forget the conversation (so does /reset)", self._clear)
        self.table: dict[str, Command] = {
            "/help": Command("/help", "list the commands", self._help),
            "/retry": Command("/retry", "answer the last message anew", self._retry),
            "/edit": Command("/edit TEXT", "say TEXT in place of the last message", self._edit, takes=True),
            "/undo": Command("/undo", "take back the last message and its reply", self._undo),
            "/clear": clear,
            "/reset": clear,
            "/system": Command(
                "/system [TEXT]", "show the system message, or begin with one", self._system, takes=True
            ),
            "/image": Command("/image [FILE]", "show an image next, or list what waits", self._image, takes=True),
            "/save": Command("/save FILE", "write the conversation as JSON messages", self._save, takes=True),
            "/load": Command("/load FILE", "go on with the conversation of a file", self._load, takes=True),
            "/set": Command("/set [NAME VALUE]", "list the sampling options, or change one", self._set, takes=True),
            "/stats": Command("/stats", "speed, cache and lanes of the last reply", self._stats),
            "/timeline": Command("/timeline", "draw what each lane did in the last reply", self._timeline),
            "/models": Command("/models [NAME]", "list the models, or go on with another", self._models, takes=True),
            "/exit": Command("/exit", "leave (so does Ctrl-D)", self._exit, takes=True),
        }

    def run(self, line: str) -> bool:
        """Do what `line` says; False where it is a message. Raises HybriMoEError where it cannot be done."""
        if not line.startswith("/"):
            return False
        word, *rest = line.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        if word not in self.table:
            return self._is_unknown(word, argument)
        command = self.table[word]
        if argument and not command.takes:
            raise PromptError(f"{word} takes nothing after it; a message that begins with it needs a blank before")
        command.does(argument)
        return True

    def _is_unknown(self, word: str, argument: str) -> bool:
        """Says so; False where it is a path, or the first word of a message, and not a mistyped command."""
        if argument and not difflib.get_close_matches(word, self.table, cutoff=MISTYPED):
            return False
        if "/" in word[1:]:
            return False
        render.note(f"{word} is no command{did_you_mean(word, self.table)}; /help lists them")
        return True

    def _help(self, _: str) -> None:
        for command in dict.fromkeys(self.table.values()):
            render.note(f"{command.shown:<17} {command.line}")
        render.note(
            "anything else is a message, and so is a line with a blank before its /; a backslash at its end, or"
            " Alt-Enter, continues it on the next line"
        )

    def _retry(self, _: str) -> None:
        """The same seed would give the same reply: where one is set, each attempt takes the next."""
        chat = self._chat
        message, former = chat.conversation.last_message, chat.conversation.messages[-1]["content"]
        options = chat.options
        if options.seed is not None:
            used = options.seed if chat.last is None else int(chat.last["seed"])
            options = replace(options, seed=(used + 1) % LARGEST_SEED)
        reply = chat.answer(message, options=options, instead=True)
        if reply == former and not chat.quiet:
            render.note("the same reply again; a higher temperature (/set temperature 1) gives others")

    def _edit(self, text: str) -> None:
        if not text:
            raise PromptError("/edit needs the text that takes the place of your last message: /edit TEXT")
        self._chat.answer(text, instead=True)

    def _undo(self, _: str) -> None:
        chat = self._chat
        text = chat.conversation.undo()
        chat.keep()
        render.note(f"taken back: {text}")

    def _clear(self, _: str) -> None:
        self._chat.conversation.reset()
        self._begun_anew()
        render.note("the conversation is forgotten")

    def _system(self, text: str) -> None:
        conversation = self._chat.conversation
        if not text:
            system = conversation.system
            render.note("no system message is set" if system is None else f"system message: {system}")
            return
        conversation.begin_with(None if text == NONE else text)
        self._begun_anew()
        how = "without a system message" if text == NONE else "with this system message"
        render.note(f"the conversation begins anew, {how}")

    def _begun_anew(self) -> None:
        """A session, too, forgets what was said, and its keys and values; images that wait are forgotten."""
        chat = self._chat
        chat.images.clear()
        if chat.session is not None:
            chat.session.drop_states()
        chat.keep()

    def _image(self, name: str) -> None:
        """A file is looked at now: what is wrong with it is said before the message is written."""
        from hybrimoe.generation.chat import require_vision
        from hybrimoe.generation.images.reading import read_image_file

        chat = self._chat
        vision = require_vision(chat.opened.generator.vision)
        if name == NONE:
            chat.images.clear()
        elif name:
            image = read_image_file(name)
            n_tokens = vision.look(image).picture.n_tokens
            chat.images.append(image)
            render.note(f"{image.what}: {n_tokens} tokens, with your next message")
            return
        waiting = ", ".join(image.what for image in chat.images)
        render.note(
            f"with your next message: {waiting}; /image {NONE} takes them back" if waiting else "no image waits"
        )

    def _save(self, name: str) -> None:
        from hybrimoe.generation.saved.conversation_file import write_messages

        path = _path("/save", name)
        messages = self._chat.conversation.messages
        write_messages(path, messages)
        render.note(f"saved {_count(messages)} in {path}")

    def _load(self, name: str) -> None:
        from hybrimoe.generation.saved.conversation_file import read_messages

        conversation = self._chat.conversation
        path = _path("/load", name)
        try:
            messages = read_messages(path)
        except FileError as error:
            raise FileError(f"{error}; the conversation here goes on") from error
        conversation.check(messages)
        with_system = bool(messages) and messages[0]["role"] == "system"
        conversation.take_up(messages[0]["content"] if with_system else None, messages)
        self._chat.keep()
        render.note(f"loaded {_count(messages)} of {path}; they take the place of what was said here")

    def _set(self, argument: str) -> None:
        chat = self._chat
        words = argument.replace("=", " ").split()
        if len(words) > 2:
            raise PromptError(f"/set takes a name and a value, as in /set temperature 0.7; found {argument!r}")
        if not words:
            lines = setting_lines(chat.options)
        else:
            if len(words) == 2:
                chat.options = with_setting(chat.options, *words)
            lines = setting_lines(chat.options, [checked_name(words[0])])
        for line in lines:
            render.note(line)
        if not words:
            render.note(f"/set NAME VALUE changes one; /set NAME {DEFAULT} takes it back")

    def _stats(self, _: str) -> None:
        from hybrimoe.cli.views import render_summary

        if self._chat.last is None:
            render.note("no reply yet")
        else:
            render.err().print(render_summary.summary(self._chat.last), style="dim")

    def _timeline(self, _: str) -> None:
        from hybrimoe.cli.views import render_summary
        from hybrimoe.cli.views.render_timeline import timeline

        chat = self._chat
        records = list(chat.opened.session.timeline) if chat.opened.session is not None else []
        if chat.last is None or not records:
            render.note(
                "nothing was recorded yet (a conversation in a terminal records each reply where experts have slots;"
                " --profile shows where the time goes without)"
            )
            return
        console = render.err()
        label = render_summary.provenance(chat.last["experts"])
        console.print(timeline(records, label=label, width=console.width))

    def _models(self, name: str) -> None:
        chat = self._chat
        if name:
            chat.change_model(name)
            render.note(
                f"{name} goes on with {_count(chat.conversation.messages)}; it computes them with its next reply"
            )
            return
        models = chat.models
        sources = {chat.opened.name: chat.opened.name} if models is None else models.sources
        for one, source in sources.items():
            here = models is None or one == models.current
            render.note(f"{'*' if here else ' '} {one}" + (f"  ({source})" if source != one else ""))
        if len(sources) > 1:
            render.note("/models NAME goes on with another one in this conversation")

    def _exit(self, _: str) -> None:
        self._chat.leaves = True


def _path(command: str, name: str) -> Path:
    if not name:
        raise PromptError(f"{command} needs the name of a file: {command} conversation.json")
    return Path(os.path.expanduser(name))


def _count(messages: list[dict[str, Any]]) -> str:
    return f"{len(messages)} message" + "s" * (len(messages) != 1)
