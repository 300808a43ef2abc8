"""Slots as llama-server has them: what the latest reply in a place computed, saved in a file and restored from it.

A slot is a place of the batch. While its file is written or read no reply begins there; the others go on, and the
generating thread does nothing for it but hand the place out and take it back.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hybrimoe.errors import ConfigError
from hybrimoe.generation.saved.states_file import (
    DamagedStatesError,
    OtherModelError,
    SavedStates,
    has_states,
    read_states,
    write_states,
)
from hybrimoe.generation.vocabulary import check_token_ids
from hybrimoe.server.errors import SERVER_ERROR, ClientLeftError, DrainingError, RequestError
from hybrimoe.server.fields import shown

if TYPE_CHECKING:
    from hybrimoe.generation.kv_cache import PrefixCache
    from hybrimoe.server.worker import Worker

__all__ = ["SlotFiles", "Slots", "Transfer"]

NAME = re.compile(r'[^\x00-\x20\x7f-\x9f/\\:*?"<>|.][^\x00-\x1f\x7f-\x9f/\\:*?"<>|]*(?<![ .])')
"""Of a file in the folder itself, on any system; hidden ones are those that are being written."""
MOST_NAME_BYTES = 200
BUSY_WAIT_S = 0.02
"""Until a slot that computes a reply is asked for again."""


class NoSpaceError(RequestError):
    """The disk does not take the file."""

    status: ClassVar[int] = 507
    kind: ClassVar[str] = SERVER_ERROR
    code: ClassVar[str] = "insufficient_storage"


@dataclass(frozen=True, slots=True)
class SlotFiles:
    """`folder`: of the files. identity: of all that keys and values depend on; model: its name in errors."""

    folder: Path
    identity: str
    model: str = ""

    @staticmethod
    def check(folder: Path) -> None:
        """Make the folder. Raises ConfigError where it cannot be used."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(
                f"server.slot_save_path: cannot use {folder} ({error.strerror}); expected a folder that can be"
                " written to"
            ) from error
        if not usable:
            raise ConfigError(f"server.slot_save_path: {folder} cannot be read and written; expected a folder that can")

    def path(self, name: str | None) -> Path:
        """The file with a name. Raises RequestError for what is no name of a file in this very folder."""
        if name is None:
            raise RequestError("filename: expected the name of a file in the folder of slots", "filename")
        if not NAME.fullmatch(name) or len(name.encode()) > MOST_NAME_BYTES:
            raise RequestError(
                f"filename: {shown(name)} is no name of a file: expected one without a folder, and without any of"
                ' / \\ : * ? " < > | and control characters, that does not begin with a dot',
                "filename",
            )
        return self.folder / name

    def write(self, name: str, cache: PrefixCache) -> int:
        """What `cache` holds; returns the bytes of the file. Raises RequestError."""
        path, held = self.path(name), cache.keys_and_values()
        if not cache.token_ids:
            raise RequestError("the slot is empty: no reply ran in it, or its memory went to other replies", "id_slot")
        if held is None:
            raise RequestError(
                "the slot cannot be saved: it holds an image, or states other than keys and values of each token"
                " (sliding windows, linear attention)",
                "id_slot",
            )
        if os.path.lexists(path) and not has_states(path):
            raise RequestError(f"filename: {name} is there, and no saved slot; it stays as it is", "filename")
        try:
            return write_states(path, cache.token_ids, held, self.identity, self.model)
        except OSError as error:
            raise NoSpaceError(f"the slot cannot be saved as {name} ({_reason(error)}); nothing was changed") from error

    def read(self, name: str) -> SavedStates:
        """What is in a file. Raises RequestError."""
        path = self.path(name)
        try:
            return read_states(path, self.identity)
        except FileNotFoundError as error:
            raise RequestError(f"filename: there is no saved slot {name}", "filename") from error
        except OtherModelError as error:
            other = f"{error}" or "another one"
            said = (
                "of this model, saved with another template, configuration or version"
                if other == self.model
                else f"of the model {other}, and this is {self.model or 'another one'}"
            )
            raise RequestError(f"filename: {name} is {said}", "filename") from error
        except DamagedStatesError as error:
            raise RequestError(f"filename: {name} is damaged, or no saved slot ({error})", "filename") from error


@dataclass(frozen=True, slots=True)
class Transfer:
    """What was saved, restored or erased."""

    n_tokens: int
    n_bytes: int
    ms: float


class Slots:
    """The slots of a worker. files: None where none may be written.

    Every method takes time, and waits while a reply is under way in its slot: call it beside the event loop.
    left: set once the client has gone. All raise RequestError and PromptError, also for what there is no slot for.
    """

    def __init__(self, worker: Worker, files: SlotFiles | None) -> None:
        self._worker, self._files = worker, files

    def save(self, number: int, name: str | None, left: threading.Event) -> Transfer:
        """Write what a slot holds into a file."""
        files = self._checked(name)
        assert name is not None
        cache = self._hold(lambda: self._worker.engine.hold(number), left)
        began_s = time.monotonic()
        try:
            n_tokens, n_bytes = len(cache.token_ids), files.write(name, cache)
        finally:
            self._release(cache)
        return Transfer(n_tokens, n_bytes, _ms_since(began_s))

    def restore(self, number: int, name: str | None, left: threading.Event) -> Transfer:
        """Take a file's tokens, keys and values into a slot; any prompt that begins alike may use them."""
        files = self._checked(name)
        assert name is not None
        began_s = time.monotonic()
        saved, n_bytes = files.read(name), files.path(name).stat().st_size
        n_tokens, generator = len(saved.token_ids), self._worker.generator
        limit = generator.context_tokens
        if limit is not None and n_tokens > limit:
            raise RequestError(f"filename: {name} has {n_tokens} tokens, the context {limit}", "filename")
        check_token_ids(generator.model, saved.token_ids, what=f"filename: {name}")
        cache = self._hold(lambda: self._worker.engine.hold(number, n_tokens), left)
        is_new = False
        try:
            is_new = cache.take_up(saved.token_ids, saved.held)
            if not is_new:
                raise RequestError(f"filename: {name} holds states that this model does not keep", "filename")
        finally:
            self._release(cache, is_new=is_new)
        return Transfer(n_tokens, n_bytes, _ms_since(began_s))

    def erase(self, number: int, left: threading.Event) -> Transfer:
        """Forget what a slot holds, in the prefix cache, too."""
        self._checked("erased")
        began_s = time.monotonic()
        cache = self._hold(lambda: self._worker.engine.hold(number), left)
        n_tokens = len(cache.token_ids)
        try:
            self._worker.between_steps(cache.forget).result()
        finally:
            self._release(cache)
        return Transfer(n_tokens, 0, _ms_since(began_s))

    def _checked(self, name: str | None) -> SlotFiles:
        if self._files is None:
            raise RequestError(
                "this server saves, restores and erases no slots: start it with --slot-save-path FOLDER, or"
                " server.slot_save_path in its deployment file"
            )
        self._files.path(name)
        return self._files

    def _hold(self, hold: Callable[[], PrefixCache | None], left: threading.Event) -> PrefixCache:
        """The cache of a slot, once no reply is under way there."""
        while (cache := self._worker.between_steps(hold).result()) is None:
            if left.wait(BUSY_WAIT_S):
                raise ClientLeftError("the client has left")
        return cache

    def _release(self, cache: PrefixCache, *, is_new: bool = False) -> None:
        with suppress(DrainingError):  # then nothing begins there any more
            self._worker.between_steps(lambda: self._worker.engine.release(cache, is_new=is_new)).result()


def _ms_since(began_s: float) -> float:
    return round(1000 * (time.monotonic() - began_s), 3)


def _reason(error: OSError) -> str:
    """In words, what safetensors says of the system's errors among them."""
    if error.errno == errno.ENOSPC or "code: 28" in str(error):
        return "no space left on the disk"
    return error.strerror or str(error)
