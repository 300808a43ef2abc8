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
from hybrimoe.text_files import parse_json

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.chat import Conversation

__all__ = ["Session", "identity_of", "session_names"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
TEXT, STATES = "conversation.json", "states.safetensors"
TOKENS = "token_ids"
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
        self._write(TEXT, lambda path: path.write_text(text, encoding="utf-8"))

    def save_states(self, conversation: Conversation) -> None:
        """Write keys and values, when the conversation pauses. Nothing is written for a model with other states
        (sliding windows, linear attention), nor for a conversation with images: they are computed again. Raises as
        `save_text`."""
        import torch
        from safetensors.torch import save_file

        cache = conversation.cache
        held = cache.keys_and_values()
        if held is None:
            return
        tensors = {TOKENS: torch.tensor(cache.token_ids, dtype=torch.long)}
        for index, (keys, values) in enumerate(held):
            tensors |= {f"keys.{index}": keys.cpu().contiguous(), f"values.{index}": values.cpu().contiguous()}
        metadata = {"identity": self.identity, "sha256": _checksum(tensors)}
        self._write(STATES, lambda path: save_file(tensors, path, metadata=metadata))

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
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.place / STATES, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return "the saved states are of another model, template or configuration (such as memory.kv_dtype)"
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        except FileNotFoundError:
            return "no states were saved"
        except (OSError, ValueError, SafetensorError) as error:
            return f"the saved states are damaged ({error})"
        if metadata.get("sha256") != _checksum(tensors):
            return "the saved states are damaged (their checksum is another)"
        token_ids = tensors.pop(TOKENS).tolist()
        held = [(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(len(tensors) // 2)]
        if not conversation.cache.take_up(token_ids, held):
            return "the model keeps other states now"
        return None

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        """A file under another name first, which takes its own when it is complete and on the disk."""
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            write_whole(self.place / name, write)
        except OSError as error:
            raise FileError(f"cannot save the session in {self.place} ({error.strerror})") from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
