"""Conversations kept by name: their text, and the keys and values of their tokens, so that they go on where they were.

A session is a folder of two files, each written whole or not at all. `conversation.json` has the messages;
`states.safetensors` has keys and values with the tokens they stand for, the identity of the model, and a checksum. The
text alone is enough: states that are damaged, missing, or of another model are left out, and computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import FileError, PromptError
from hybrimoe.generation.images.messages import as_json
from hybrimoe.generation.saved.conversation_file import messages_of, write_whole
from hybrimoe.generation.saved.states_file import DamagedStatesError, OtherModelError, read_states, write_states
from hybrimoe.text_files import parse_json

if TYPE_CHECKING:
    from hybrimoe.generation.chat import Conversation

__all__ = ["Session", "identity_of", "session_names"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
TEXT, STATES = "conversation.json", "states.safetensors"
VERSION = 1


def identity_of(facts: Mapping[str, Any]) -> str:
    """A hash of all that the keys and values of a text depend on: weights, template, dtypes, versions."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def session_names(folder: Path) -> list[str]:
    """The sessions of a folder, by name."""
    return sorted(path.parent.name for path in folder.glob(f"*/{TEXT}"))


@dataclass(frozen=True, slots=True)
class Session:
    """The session `name` in `folder`, of a model with `identity`; it need not exist yet.

    Raises PromptError for a name that is none: letters, digits, and - _ . within.
    """

    folder: Path
    name: str
    identity: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise PromptError(f"{self.name!r} is no name of a session: expected letters, digits, and - _ . within")

    @property
    def place(self) -> Path:
        """Its folder."""
        return self.folder / self.name

    def save_text(self, conversation: Conversation) -> None:
        """Write the messages: cheap, after every turn. Raises FileError where that cannot be."""
        data = {"version": VERSION, "system": conversation.system, "messages": as_json(conversation.messages)}
        text = json.dumps(data, ensure_ascii=False, indent=1)
        self._write(TEXT, lambda path: write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8")))

    def save_states(self, conversation: Conversation) -> None:
        """Write keys and values, when the conversation pauses. Nothing is written for a model with other states
        (sliding windows, linear attention), nor for a conversation with images: they are computed again. Raises as
        `save_text`."""
        cache = conversation.cache
        held = cache.keys_and_values()
        if held is not None:
            self._write(STATES, lambda path: write_states(path, cache.token_ids, held, self.identity))

    def restore(self, conversation: Conversation) -> str | None:
        """Give `conversation` the messages, and the states where they are whole and of this model.

        Returns why the next reply computes the conversation again, None where it need not. A session that does not
        exist changes nothing. Raises FileError for messages that are damaged.
        """
        file = self.place / TEXT
        if not file.exists():
            return None
        try:
            data = parse_json(file.read_text(encoding="utf-8"))
            system, messages = data["system"], messages_of(data)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{file} is no saved conversation ({error!r}); delete the session {self.name}") from error
        conversation.take_up(system, messages)
        return self._restore_states(conversation) if messages else None

    def drop_states(self) -> None:
        """Remove keys and values, of a conversation that is to be forgotten. Raises FileError where that cannot be."""
        try:
            (self.place / STATES).unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"cannot remove {self.place / STATES} ({error.strerror})") from error

    def delete(self) -> None:
        """Remove it. Raises FileError where there is none."""
        if not (self.place / TEXT).exists():
            raise FileError(f"there is no session {self.name} in {self.folder}")
        shutil.rmtree(self.place)

    def _restore_states(self, conversation: Conversation) -> str | None:
        try:
            saved = read_states(self.place / STATES, self.identity)
        except FileNotFoundError:
            return "no states were saved"
        except OtherModelError:
            return "the saved states are of another model, template or configuration (such as memory.kv_dtype)"
        except DamagedStatesError as error:
            return f"the saved states are damaged ({error})"
        if not conversation.cache.take_up(saved.token_ids, saved.held):
            return "the model keeps other states now"
        return None

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        """`write` writes a file whole or not at all."""
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            write(self.place / name)
        except OSError as error:
            raise FileError(f"cannot save the session in {self.place} ({error.strerror})") from error
