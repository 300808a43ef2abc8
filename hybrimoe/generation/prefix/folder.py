"""The folder of files on disk: each written whole or not at all, together within a budget, used by several processes.

A file is written under another name, synced, and renamed; its name then says which text it continues. Processes write
one after another (a lock), and read whenever they like. What a file's time says is when it was last used: the longest
unused leaves first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cpu_kernels.host.memory import page_aligned
from hybrimoe.generation.prefix.keys import NAME, Kind

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows
    HAS_LOCKS = False

HAS_DIRECT = hasattr(os, "O_DIRECT") and hasattr(os, "readv")

__all__ = ["Folder", "room_bytes"]

PARTIAL = ".partial-"
MARK_BYTES = 16
LOCK = ".lock"
PAGE_BYTES = 4096
"""Past the page cache a file is read into whole pages, in one call: the disk writes where the bytes will lie."""
FREED_SHARE = 16
"""Where there is no room, a sixteenth of the budget is freed at once: looking for the longest unused takes a while."""
FILE_MODE, FOLDER_MODE = 0o600, 0o700
"""The files hold what was said in conversations: their user alone may read them."""


class Folder:
    """Files of at most `max_bytes` together. Any thread may call. Raises OSError where it cannot be made."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        self.path = path
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.n_evicted = 0
        """Files that made room for others."""
        self._own_mark = uuid.uuid4().bytes[:MARK_BYTES]
        """Stands in the lock file while no other process has changed the folder since."""
        self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, FILE_MODE)
        self._turn = threading.Lock()
        """Of threads that change the folder: one after another, as processes do."""
        self._mutex = threading.Lock()
        """Of what is known of the folder; nobody holds it for long."""
        self._files: dict[str, tuple[int, int]] = {}
        """Size and time of last use, in ns, by name."""
        self._by_parent: dict[str, set[str]] = {}
        self._seen_ns = -1
        with self._alone():
            self._make_room(0)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where there is none."""
        return self._files.get(name, (0, 0))[0]

    def after(self, key: bytes, kind: Kind) -> list[tuple[int, str]]:
        """What is kept after the text with `key`: numbers of tokens and names, the latest used first."""
        with self._mutex:
            names = sorted(self._by_parent.get(key.hex(), ()), key=lambda one: self._files[one][1], reverse=True)
        matches = map(NAME.fullmatch, names)
        return [(int(match["n"]), match[0]) for match in matches if match is not None and match["kind"] == kind]

    def refresh(self) -> None:
        """Look again at what there is, if another process has changed the folder."""
        if not self._turn.acquire(blocking=False):
            return  # a file is being written; there will be another prompt
        try:
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime_ns != self._seen_ns:
                    self._scan()
        finally:
            self._turn.release()

    def read(self, name: str, room: np.ndarray | None = None) -> np.ndarray | None:
        """The bytes (uint8 [n]) of a file; None where it is no longer there. Raises OSError.

        room: memory in which they lie, page aligned, where it has `room_bytes` of them. Where the system can, no copy
        stays in the page cache.
        """
        path = f"{self.path}/{name}"
        try:
            if HAS_DIRECT:
                with contextlib.suppress(_NotDirect):
                    return _read(path, os.O_RDONLY | os.O_DIRECT, room)
            return _read(path, os.O_RDONLY, room)
        except FileNotFoundError:
            self._forget(name)
            return None

    def write(self, name: str, pieces: Sequence[memoryview], used_ns: int) -> bool:
        """Add a file; False where it is larger than the budget. Raises OSError; what was there stays."""
        n_bytes = sum(piece.nbytes for piece in pieces)
        if n_bytes > self.max_bytes:
            return False
        partial = self.path / f"{PARTIAL}{uuid.uuid4().hex}"
        with self._alone():
            if name in self._files:
                return True
            self._make_room(n_bytes)
            try:
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
                with os.fdopen(descriptor, "wb", buffering=0) as file:
                    for piece in pieces:
                        _write_all(file.fileno(), piece)
                    os.utime(partial, ns=(used_ns, used_ns))
                    os.fsync(file.fileno())
                    _leave_page_cache(file.fileno())
                os.replace(partial, self.path / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
            with self._mutex:
                self._enter(name, n_bytes, used_ns)
        return True

    def used(self, names: Sequence[str], used_ns: int) -> None:
        """The files of a text, in its order, are used now; none of them will leave before what follows it."""
        for number, name in enumerate(names):
            if name in self._files:
                time_ns = used_ns - 1000 * number  # some file systems tell microseconds apart, and no less
                with contextlib.suppress(OSError):
                    os.utime(self.path / name, ns=(time_ns, time_ns))
                    with self._mutex:
                        if name in self._files:
                            self._files[name] = self._files[name][0], time_ns

    def delete(self, name: str) -> None:
        """Remove a file, whether or not it is there."""
        with self._alone():
            self._unlink(name)

    def close(self) -> None:
        """Nothing more is written."""
        with self._turn:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # Under the lock ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within, no other thread or process changes the folder, and what is known of it is right."""
        with self._turn:
            if HAS_LOCKS:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                if self._seen_ns < 0 or (HAS_LOCKS and os.pread(self._lock, MARK_BYTES, 0) != self._own_mark):
                    if HAS_LOCKS:
                        os.pwrite(self._lock, self._own_mark, 0)
                    self._sweep()
                    self._scan()
                yield
                self._seen_ns = self.path.stat().st_mtime_ns
            finally:
                if HAS_LOCKS:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _sweep(self) -> None:
        """Remove what killed processes left half written: whoever writes has the lock."""
        for left in self.path.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):
                left.unlink()

    def _scan(self) -> None:
        found: list[tuple[str, int, int]] = []
        self._seen_ns = self.path.stat().st_mtime_ns
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if NAME.fullmatch(entry.name):
                        facts = entry.stat(follow_symlinks=False)
                        found.append((entry.name, facts.st_size, facts.st_mtime_ns))
        with self._mutex:
            self._files, self._by_parent, self.n_bytes = {}, {}, 0
            for name, n_bytes, used_ns in found:
                self._enter(name, n_bytes, used_ns)

    def _make_room(self, n_bytes: int) -> None:
        """Let the longest unused files go until n_bytes more fit; those that another process has used since last."""
        most = self.max_bytes - n_bytes - (self.max_bytes - n_bytes) // FREED_SHARE
        for spared in (True, False):
            if self.n_bytes + n_bytes <= self.max_bytes:
                return
            for name in sorted(self._files, key=lambda one: self._files[one][1]):
                if self.n_bytes <= most:
                    return
                if not (spared and self._used_by_others(name)):
                    self.n_evicted += 1
                    self._unlink(name)

    def _used_by_others(self, name: str) -> bool:
        """Whether another process has used a file since this one looked."""
        try:
            used_ns = (self.path / name).stat().st_mtime_ns
        except OSError:
            return False
        with self._mutex:
            size, known_ns = self._files[name]
            self._files[name] = size, max(used_ns, known_ns)
        return used_ns > known_ns

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()
        self._forget(name)

    def _enter(self, name: str, n_bytes: int, used_ns: int) -> None:
        """Know of a file; the caller has the mutex."""
        self._files[name] = n_bytes, used_ns
        self._by_parent.setdefault(_parent(name), set()).add(name)
        self.n_bytes += n_bytes

    def _forget(self, name: str) -> None:
        with self._mutex:
            if name in self._files:
                self.n_bytes -= self._files.pop(name)[0]
                siblings = self._by_parent[_parent(name)]
                siblings.discard(name)
                if not siblings:
                    del self._by_parent[_parent(name)]


def room_bytes(n_bytes: int) -> int:
    """Memory that a file of n_bytes is read into: whole pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


class _NotDirect(Exception):  # not an error: the file is read in the ordinary way
    """A file system does not read past the page cache."""


def _read(path: str, flags: int, room: np.ndarray | None) -> np.ndarray:
    """All of a file, as `Folder.read`. Raises OSError, and _NotDirect where `flags` ask for what cannot be."""
    direct = HAS_DIRECT and bool(flags & os.O_DIRECT)
    descriptor = -1
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        n_bytes = os.fstat(descriptor).st_size
        if room is None or len(room) < room_bytes(n_bytes):
            room = page_aligned(room_bytes(n_bytes))
        at = 0
        while at < n_bytes and (n := _read_once(descriptor, room[at:], direct)):
            at += n
        if not direct:
            _leave_page_cache(descriptor)
        return room[:at]
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            raise _NotDirect from error
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _read_once(descriptor: int, room: np.ndarray, direct: bool) -> int:
    """Bytes that one call has read from where the file stands."""
    if direct:
        return os.readv(descriptor, [room.data])
    with io.FileIO(descriptor, closefd=False) as file:
        return file.readinto(room.data) or 0


def _parent(name: str) -> str:
    """The key of the text before, as it stands in a name."""
    return name.split("-")[1]


def _write_all(descriptor: int, data: memoryview) -> None:
    data = data.cast("B") if data.nbytes else data
    at = 0
    while at < data.nbytes:
        at += os.write(descriptor, data[at:])


def _leave_page_cache(descriptor: int) -> None:
    """The tree in memory holds what was read or written; a second copy would take memory from the experts."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
