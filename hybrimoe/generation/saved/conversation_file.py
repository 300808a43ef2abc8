"""A conversation as a file: a JSON list of messages, in the form in which chat APIs take them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybrimoe.errors import FileError
from hybrimoe.generation.images.messages import as_json, content_from_json
from hybrimoe.text_files import read_text

__all__ = ["messages_of", "read_messages", "write_messages", "write_whole"]

TURN = ("user", "assistant")


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The messages of a file that `write_messages` or another program wrote; see `messages_of`.

    Raises FileError where it cannot be read, or is no conversation.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is no file: expected one with a JSON list of messages")
        return messages_of(json.loads(read_text(path)))
    except OSError as error:
        raise FileError(
            f"cannot read {path} ({error.strerror}): expected a file that exists, as /save writes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no conversation: {error}") from error


def write_messages(path: Path, messages: Sequence[dict[str, Any]]) -> None:
    """Write `messages`, whole or not at all, readable by their user alone; an earlier conversation is replaced.

    Raises FileError where that cannot be, or where the file is something else, which stays as it is.
    """
    text = json.dumps(as_json(messages), ensure_ascii=False, indent=1) + "\n"
    try:
        if path.exists():
            read_messages(path)
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except FileError as error:
        raise FileError(f"{error}; it stays as it is: give a name that is free") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(
            f"cannot write {path} ({reason}): expected a file in a folder that can be written to"
        ) from error


def messages_of(data: Any) -> list[dict[str, Any]]:
    """Role and content of each message in `data`: a list of messages, or an object that has one as `messages`.

    Raises ValueError with what is wrong unless they are at most one system message, then a user's and an assistant's
    in turn, each with a text as its content, a user's also with parts: texts, and images as data: URLs.
    """
    given = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(given, list):
        raise ValueError("expected a JSON list of messages, or an object with such a list as messages")
    messages = [_message_of(message, number) for number, message in enumerate(given, 1)]
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for index, message in enumerate(messages[first:]):
        if message["role"] != TURN[index % 2]:
            raise ValueError(
                f"message {first + index + 1}: expected the role {TURN[index % 2]}, found {message['role']}"
            )
    if (len(messages) - first) % 2:
        raise ValueError("the last message has no reply: leave it out of the file, and send it")
    return messages


def _message_of(message: Any, number: int) -> dict[str, Any]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or (role != "user" and not isinstance(content, str)):
        raise ValueError(f"message {number}: expected an object with role and content, both texts")
    return {"role": role, "content": content_from_json(content, f"message {number}")}


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` a file under another name, which takes the name `path` when it is complete and on the disk.

    Only its user can read it. Raises OSError; what was at `path` is still there then.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        write(partial)
        partial.chmod(0o600)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
