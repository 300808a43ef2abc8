"""The disk level of the prefix cache: what prompts and replies computed, for later processes and for what memory gives
up.

A thread writes, so that no token waits; threads read what a prompt begins with, all of it at once. Whatever goes wrong
with a file is a miss: it is computed again. Where nothing can be written, the level warns once and writes no more.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.host.ready_memory import ReadyMemory
from hybrimoe.generation.images.tokens import identities
from hybrimoe.generation.prefix.encoding import ALIGNMENT, decode, encode, facts_of
from hybrimoe.generation.prefix.folder import Folder, room_bytes
from hybrimoe.generation.prefix.keys import KINDS, Kind, Record, first_key, n_alike, name_of, next_key, own_key

__all__ = ["DiskLevel", "Readings"]

READERS = 4
"""Threads: a disk serves several reads at once, and most of the time they wait for it."""
ROOM_BYTES = 32 << 20
"""Memory into which several files are read, neighbours in a text: new memory in small pieces takes longer than reading.
It is free again when nothing holds any of them."""
TURN_BYTES = 4 << 20
"""Of files that one thread reads one after another: several threads would clear the same huge page of new memory."""
MOST_READY_BYTES = 2 << 30
"""Of memory that is made ready for a text before it is asked for, in each of the two places where it will lie."""
REPLY_SHARE, REPLY_BLOCKS = 1.25, 8
"""A reply that goes on with a text has room for more than the text: times what it takes, and so many blocks."""
MOST_LENT_BYTES = 256 << 20
"""Of what memory has given up, that waits to be written; more is left out rather than held in memory."""
MOST_LOOKED_AT = 16
"""Files whose beginnings a prompt reads to see which block has most of its next tokens."""
log = logging.getLogger("hybrimoe.generation.prefix")


@dataclass(frozen=True, slots=True)
class Readings:
    """Files that are read: what each holds, None of one that is gone or damaged; and those that nobody has begun."""

    results: list[Future[Any]]
    waiting: deque[Any]


class DiskLevel:
    """Files of at most `max_bytes` in `folder`, of the model with `identity`. The generating thread calls the methods;
    the counters may be read by any.

    reason: why nothing is written any more, None while it is.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: str) -> None:
        self.first_key = first_key(identity)
        self.reason: str | None = None
        self.n_read_bytes = self.n_written_bytes = 0
        self.n_damaged = 0
        """Files that were not as they had been written, and were deleted."""
        self.n_left_out = 0
        """Blocks and states that memory gave up faster than the disk took them."""
        self._folder = Folder(folder, max_bytes)
        self._changed = threading.Condition()
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._lent: dict[str, int] = {}
        """Bytes of waiting records that memory has given up, by name."""
        self._errands: deque[Callable[[], None]] = deque()
        self._writing = self._closing = False
        self.ready = ReadyMemory(())
        """For the first text that is read: whoever starts a program again goes on with what was said before."""
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="hybrimoe-prefix-read")
        self._writer = threading.Thread(target=self._write, name="hybrimoe-prefix-write", daemon=True)
        self._writer.start()
        self._readers.submit(_load_checksum)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def max_bytes(self) -> int:
        """What the files may take together, whatever model they are of."""
        return self._folder.max_bytes

    @property
    def n_bytes(self) -> int:
        """What they take."""
        return self._folder.n_bytes

    @property
    def n_files(self) -> int:
        """Blocks and states that are kept."""
        return len(self._folder)

    @property
    def n_evicted(self) -> int:
        """Those that made room for others."""
        return self._folder.n_evicted

    # Reading -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """See what other processes have written."""
        self._folder.refresh()

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._folder

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where there is none."""
        return self._folder.size(name)

    def longest(self, kind: Kind, key: bytes, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` the longest block or state that is kept after the text with `key` has; 0: none."""
        if self.has(name_of(kind, key, token_ids)):
            return len(token_ids)
        numbers = {n for n, _ in self._folder.after(key, kind) if n <= len(token_ids)}
        return next((n for n in sorted(numbers, reverse=True) if self.has(name_of(kind, key, token_ids[:n]))), 0)

    def likest(self, key: bytes, token_ids: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """The tokens of a block after the text with `key`, and how many it and `token_ids` begin with alike; the most.

        A block that has others, too, is told by its file; of these a few are looked at, the latest used first.
        """
        n = self.longest("block", key, token_ids)
        best, most = tuple(token_ids[:n]), n
        others = (name for n_there, name in self._folder.after(key, "block") if n_there > n)
        for name in islice(others, MOST_LOOKED_AT if n < len(token_ids) else 0):
            known = self._tokens_of(name)
            alike = n_alike(known, token_ids)
            if alike > most:
                best, most = known, alike
        return best, most

    def _tokens_of(self, name: str) -> tuple[int, ...]:
        """As a file says; none where it is gone or damaged, which a reader will see, and where some are parts of
        images: such a block is found by its name alone."""
        try:
            with (self.path / name).open("rb") as file:
                known = facts_of(file)["token_ids"]
                return tuple(known) if all(isinstance(token, int) for token in known) else ()
        except (OSError, ValueError, LookupError, TypeError):
            return ()

    def read(self, kind: Kind, key: bytes, token_ids: Sequence[int]) -> Future[Any]:
        """What was kept, as the result of a thread; None where it is not there, or damaged: that file is deleted."""
        return self._readers.submit(self._read, name_of(kind, key, token_ids), token_ids)

    def read_each(self, files: Sequence[tuple[str, Sequence[int]]]) -> Readings:
        """The same of several, given by their names and tokens, in this order."""
        readings = Readings([Future() for _ in files], deque())
        sizes = [self._room_of(name) for name, _ in files]
        for together in _neighbours(sizes, ROOM_BYTES):
            room, at = self.ready.take(sum(sizes[n] for n in together)), 0
            for some in _neighbours([sizes[n] for n in together], TURN_BYTES):
                turn = []
                for n in (together[i] for i in some):
                    turn.append((*files[n], room[at : at + sizes[n]], readings.results[n]))
                    at += sizes[n]
                readings.waiting.append(turn)
        for _ in range(min(READERS, len(readings.waiting))):
            self._readers.submit(self._read_waiting, readings.waiting)
        return readings

    def _room_of(self, name: str) -> int:
        """Bytes of memory that a file is read into."""
        return room_bytes(self.size(name))

    def _read_waiting(self, waiting: deque[Any]) -> None:
        """A reading thread: the next files that nobody else has taken, until there are none."""
        while waiting:
            try:
                files = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            for name, token_ids, room, result in files:
                try:
                    result.set_result(None if self._closing else self._read(name, token_ids, room))
                except Exception as error:  # noqa: BLE001  # whoever waits for the file raises it
                    result.set_exception(error)

    def _read(self, name: str, token_ids: Sequence[int], room: np.ndarray | None = None) -> Any:
        import torch

        try:
            data = self._folder.read(name, room)
        except OSError as error:
            log.warning("the prefix cache cannot read %s: %s", self.path / name, error)
            return None
        if data is None:
            return None
        try:
            facts, content = decode(torch.from_numpy(data))
            if facts != {"name": name, "token_ids": identities(token_ids)}:
                raise ValueError("it is of another text")
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            self.n_damaged += 1
            log.warning("%s of the prefix cache is damaged and is deleted: %s", self.path / name, error)
            with contextlib.suppress(OSError):
                self._folder.delete(name)
            return None
        self.n_read_bytes += data.nbytes
        return content

    def make_ready(self, most_bytes: int, *, for_replies: bool) -> None:
        """Has memory written for the text that was used last, so that who goes on with it does not wait for memory:
        for its blocks, and as much again for the reply (for_replies), each of them at most `most_bytes`."""
        sizes = [self._room_of(name) for name in self._latest()]
        most = min(most_bytes, MOST_READY_BYTES)
        rooms = [sum(sizes[n] for n in some) for some in _neighbours(sizes, ROOM_BYTES)]
        rooms = [size for size, end in zip(rooms, accumulate(rooms), strict=True) if end <= most]
        of_reply = min(most, int(REPLY_SHARE * sum(rooms)) + REPLY_BLOCKS * max(sizes, default=0))
        self.ready = ReadyMemory([*rooms, of_reply] if rooms and for_replies else rooms)

    def _latest(self) -> Iterator[str]:
        """The blocks of the text that was used last."""
        key = self.first_key
        while known := self._folder.after(key, "block"):
            name = known[0][1]
            yield name
            key = own_key(name)

    # Writing -----------------------------------------------------------------------------------------------------

    def keep(self, record: Record) -> None:
        """Write a block or a checkpoint, which memory holds meanwhile."""
        with self._changed:
            if self._takes(record.name) and record.name not in self._records:
                self._records[record.name] = record
                self._changed.notify_all()

    def take_over(self, record: Record) -> None:
        """Write what memory gives up, if it is not on disk yet and not too much waits already."""
        with self._changed:
            if not self._takes(record.name):
                return
            if sum(self._lent.values()) + record.n_bytes > MOST_LENT_BYTES:
                self._records.pop(record.name, None)
                self.n_left_out += 1
                return
            self._records.setdefault(record.name, record)
            self._lent[record.name] = record.n_bytes
            self._changed.notify_all()

    def used(self, names: Sequence[str]) -> None:
        """The files of a text, in its order, are used now."""
        now_ns = time.time_ns()
        self._in_turn(lambda: self._folder.used(names, now_ns))

    def drop(self, name: str) -> None:
        """A file, written or not, that another one replaces."""
        with self._changed:
            self._records.pop(name, None)
        if self.has(name):
            self._in_turn(lambda: self._folder.delete(name))

    def forget(self, token_ids: Sequence[int], n_kept: int, block_tokens: int) -> None:
        """Delete the files of a text, those that wait included, from its end back to where another text goes on, or to
        its first `n_kept` tokens."""
        tokens = tuple(token_ids)

        def errand() -> None:
            blocks: list[tuple[bytes, tuple[int, ...]]] = []
            key = self.first_key
            for begin in range(0, len(tokens), block_tokens):
                block = tokens[begin : begin + block_tokens]
                blocks.append((key, block))
                key = next_key(key, block)
            for before, block in reversed(blocks[-(-n_kept // block_tokens) :]):
                if self._folder.after(next_key(before, block), "block"):
                    return
                for kind in KINDS:
                    for n in {n for n, _ in self._folder.after(before, kind) if n <= len(block)}:
                        name = name_of(kind, before, block[:n])
                        if self.has(name):
                            self._folder.delete(name)

        self._in_turn(errand)

    def wait(self, seconds: float) -> bool:
        """Wait until everything is written; False where it is not after so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._records or self._errands or self._writing), seconds)

    def close(self, seconds: float) -> None:
        """Write what waits, for so long at most, and end."""
        self.wait(seconds)
        with self._changed:
            self._closing = True
            self._records.clear()
            self._errands.clear()
            self._changed.notify_all()
        self._writer.join(seconds)
        self._readers.shutdown(wait=False)
        if not self._writer.is_alive():
            self._folder.close()

    def _takes(self, name: str) -> bool:
        return self.reason is None and not self._closing and not self.has(name)

    def _in_turn(self, errand: Callable[[], None]) -> None:
        """Have the writing thread do something, after what waits now."""
        with self._changed:
            if self.reason is None and not self._closing:
                self._errands.append(errand)
                self._changed.notify_all()

    def _write(self) -> None:
        """The writing thread: errands come after the records that waited before them, as of one text."""
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._records or self._errands or self._closing)
                if self._closing:
                    return
                record = self._records.popitem(last=False)[1] if self._records else None
                errand = self._errands.popleft() if record is None else None
                self._writing = True
            try:
                if record is not None:
                    self._write_record(record)
                elif errand is not None:
                    errand()
            except (OSError, TypeError) as error:
                self._give_up(error)

    def _write_record(self, record: Record) -> None:
        try:
            pieces = encode({"name": record.name, "token_ids": identities(record.token_ids)}, record.content)
            if self._folder.write(record.name, pieces, record.used_ns):
                self.n_written_bytes += record.n_bytes
        finally:
            with self._changed:
                self._lent.pop(record.name, None)

    def _give_up(self, error: Exception) -> None:
        """A full disk, a folder that is gone: nothing is written any more; what there is can still be read."""
        with self._changed:
            self.reason = str(error)
            self._records.clear()
            self._lent.clear()
            self._errands.clear()
        log.warning(
            "the prefix cache writes no more into %s (%s); what it keeps in memory is not affected", self.path, error
        )


def _neighbours(sizes: Sequence[int], n_bytes: int) -> Iterator[range]:
    """Numbers of files that follow each other and have at most `n_bytes` together, or are one."""
    first = held = 0
    for number, size in enumerate(sizes):
        if number > first and held + size > n_bytes:
            yield range(first, number)
            first, held = number, 0
        held += size
    if first < len(sizes):
        yield range(first, len(sizes))


def _load_checksum() -> None:
    """So that the first file that is read does not wait for compiled code."""
    from cpu_kernels.engine.checksum import checksum

    checksum(np.zeros(ALIGNMENT, np.uint8))
