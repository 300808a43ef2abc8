"""Reads of one file into memory that the caller owns: several in flight, urgent ones first, none of them twice.

Where the file system can, reads go past the page cache (O_DIRECT): the memory that experts take is then the caller's
alone. Elsewhere what a read left in the page cache is given back at once.
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from time import perf_counter_ns

from cpu_kernels import page_aligned
from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import ByteArray

BLOCK_BYTES = 4096
"""Direct reads begin and end at multiples of this in file and memory: the largest logical block of a disk."""
READS_IN_FLIGHT = 4
"""Threads that read where nobody has measured the disk. Of 1, 2, 4 and 8 the fewest that reach the full rate of the
disks tried (docs/tiers.md)."""
LEAST_IN_FLIGHT = 2
"""With one, the disk would wait while its thread waits for the interpreter."""


class Urgency(IntEnum):
    """What is read first: what a call waits for, what a later layer is expected to need, what fills free memory."""

    NEEDED = 0
    AHEAD = 1
    PREHEAT = 2


class State(IntEnum):
    """How far a read is."""

    QUEUED = 0
    RUNNING = 1
    ENDED = 2
    CANCELLED = 3


class Read:
    """One read: `n_bytes` of the file from `offset_bytes` on must arrive in `into`, which may be longer.

    offset_bytes and the length of `into` are multiples of BLOCK_BYTES; so is its address. `name`: what it is called in
    errors. start_us, end_us: of `perf_counter`, once it has begun and ended.
    """

    __slots__ = ("end_us", "error", "into", "key", "n_bytes", "name", "offset_bytes", "start_us", "state", "urgency")

    def __init__(
        self, key: int, into: memoryview, offset_bytes: int, n_bytes: int, urgency: Urgency, name: str
    ) -> None:
        self.key, self.into, self.offset_bytes, self.n_bytes = key, into, offset_bytes, n_bytes
        self.urgency, self.name, self.state = urgency, name, State.QUEUED
        self.start_us = self.end_us = 0.0
        self.error: CheckpointError | None = None


class RecordReader:
    """The open file, its threads and their queues. All methods are called by one thread at a time. A process made by
    fork has none of the threads: it starts its own, and reads again what was under way.

    `direct`: whether reads go past the page cache. `n_threads`: reads in flight at most. Raises CheckpointError where
    the file cannot be opened.
    """

    def __init__(self, path: Path, *, n_threads: int = READS_IN_FLIGHT, direct: bool = True) -> None:
        self.path, self.n_threads = path, n_threads
        try:
            self._descriptor, self.direct = _open(path, direct)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        self._stamp = _stamp(self._descriptor)
        self._changed = threading.Condition()
        self._queues: tuple[deque[Read], ...] = tuple(deque() for _ in Urgency)
        self._ended: deque[Read] = deque()
        self._threads: list[threading.Thread] = []
        self._running: set[Read] = set()
        self._busy_from_us, self._busy_us, self._bytes = 0.0, 0.0, 0
        self._closed = False
        _READERS.add(self)

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
        self._finalizer()

    def submit(self, read: Read) -> None:
        """Queues a read behind those that are as urgent."""
        with self._changed:
            self._queues[read.urgency].append(read)
            self._changed.notify()
        if len(self._threads) < self.n_threads:
            self._start_a_thread()

    def hurry(self, read: Read) -> None:
        """A read that somebody waits for now; one that runs goes on as it is."""
        with self._changed:
            if read.state is State.QUEUED and read.urgency is not Urgency.NEEDED:
                read.urgency = Urgency.NEEDED
                self._queues[Urgency.NEEDED].append(read)  # its place in the other queue is passed over
                self._changed.notify()
            read.urgency = Urgency.NEEDED

    def cancel(self, read: Read) -> bool:
        """Whether the read was still queued, and is not going to happen."""
        with self._changed:
            if read.state is not State.QUEUED:
                return False
            read.state = State.CANCELLED
            return True

    def take_ended(self) -> Sequence[Read]:
        """The reads that have ended since the last call, well or with an `error`."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def wait(self) -> None:
        """Until a read has ended that `take_ended` has not given yet. There must be one queued or running."""
        if not self._threads:
            self._start_a_thread()
        with self._changed:
            while not self._ended:
                self._changed.wait()

    def now(self, offset_bytes: int, n_bytes: int, name: str) -> ByteArray:
        """uint8 [n_bytes] of the file from `offset_bytes` on, in memory of its own, read by the calling thread.

        Raises CheckpointError.
        """
        lead = offset_bytes % BLOCK_BYTES
        buffer = page_aligned(-(-(lead + n_bytes) // BLOCK_BYTES) * BLOCK_BYTES)
        read = Read(0, buffer.data, offset_bytes - lead, lead + n_bytes, Urgency.NEEDED, name)
        self._fill(read)
        return buffer[lead : lead + n_bytes]

    @property
    def rate(self) -> tuple[float, int]:
        """us in which at least one read was running, and the bytes that arrived in them."""
        with self._changed:
            return self._busy_us, self._bytes

    def close(self) -> None:
        """Ends the threads; reads that are queued do not happen. `now` still works."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _start_a_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"reads of {self.path.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _begin_anew(self) -> None:
        """In a process that fork has made: a thread that is not here may have held the lock."""
        self._changed, self._threads = threading.Condition(), []
        for read in self._running:
            read.state, read.urgency = State.QUEUED, Urgency.NEEDED
            self._queues[Urgency.NEEDED].append(read)
        self._running.clear()

    def _work(self) -> None:
        while (read := self._next()) is not None:
            try:
                self._fill(read)
            except CheckpointError as error:
                read.error = error
            self._end(read)

    def _next(self) -> Read | None:
        """The most urgent read that waits, or the next that comes; None once the reader is closed."""
        with self._changed:
            while not self._closed:
                for queue in self._queues:
                    while queue:
                        read = queue.popleft()
                        if read.state is not State.QUEUED:
                            continue
                        read.state, read.start_us = State.RUNNING, perf_counter_ns() * 1e-3
                        if not self._running:
                            self._busy_from_us = read.start_us
                        self._running.add(read)
                        return read
                self._changed.wait()
        return None

    def _end(self, read: Read) -> None:
        with self._changed:
            read.end_us, read.state = perf_counter_ns() * 1e-3, State.ENDED
            self._running.discard(read)
            if not self._running:
                self._busy_us += read.end_us - self._busy_from_us
            if read.error is None:
                self._bytes += read.n_bytes
            self._ended.append(read)
            self._changed.notify_all()

    def _fill(self, read: Read) -> None:
        """Raises CheckpointError where the bytes do not arrive, or are not those of the file that was opened."""
        descriptor, into, done = self._descriptor, read.into, 0
        try:
            while done < read.n_bytes:
                count = _read_at(descriptor, into[done:], read.offset_bytes + done)
                end = done + count
                if end < read.n_bytes and self.direct:
                    end -= end % BLOCK_BYTES  # a direct read begins at a block
                if end <= done:
                    break
                done = end
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, read.offset_bytes, len(into), os.POSIX_FADV_DONTNEED)
            size, changed_ns = _stamp(descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {read.name} (bytes {read.offset_bytes} to {read.offset_bytes + read.n_bytes}) cannot be"
                f" read: {error.strerror or error}; check the disk, and the file with hybrimoe verify"
            ) from error
        if done < read.n_bytes or size < self._stamp[0]:
            raise CheckpointError(
                f"{self.path} was cut short while it was in use, {read.name} cannot be read: the file had"
                f" {self._stamp[0]} bytes and has {size}; start again to pack the model anew"
            )
        if (size, changed_ns) != self._stamp:
            raise CheckpointError(
                f"{self.path} was written to while it was in use, {read.name} may be of other weights; start again"
            )


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache. Raises OSError."""
    if direct and hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            os.preadv(descriptor, [page_aligned(BLOCK_BYTES).data], 0)
            return descriptor, True
        except OSError:  # a file system without direct reads
            if descriptor >= 0:
                os.close(descriptor)
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), False


def _stamp(descriptor: int) -> tuple[int, int]:
    """Size and time of the latest change: others once somebody has written into the open file."""
    known = os.fstat(descriptor)
    return known.st_size, known.st_mtime_ns


_READERS: weakref.WeakSet[RecordReader] = weakref.WeakSet()


def _after_fork() -> None:
    for reader in _READERS:
        reader._begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_seeking = threading.Lock()


def _read_at(descriptor: int, into: memoryview, offset_bytes: int) -> int:
    """Reads at a place of the file; how many bytes have come."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset_bytes)
    with _seeking, io.FileIO(descriptor, closefd=False) as file:  # Windows: one position for all threads
        file.seek(offset_bytes)
        return file.readinto(into) or 0
