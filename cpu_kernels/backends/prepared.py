"""Experts in the form of another library, kept between calls in a cache of bounded size."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from cpu_kernels.errors import BackendError
from cpu_kernels.format.spec import ExpertSpec

SAMPLE_WORDS = 512  # 8-byte words of a record whose order is checked, beside the exclusive or of all
T = TypeVar("T")
Fingerprint = tuple[int, bytes]


@dataclass(slots=True)
class _Entry(Generic[T]):
    fingerprint: Fingerprint
    n_bytes: int
    value: T


class PreparedExperts(Generic[T]):
    """Least recently used experts first out; at most `limit_bytes`, but always the one asked for last.

    An expert is known by its spec and the address of its record. Memory is reused and records are rewritten, so each
    look-up reads the record once and compares a fingerprint: a stale expert is prepared anew. Safe between threads;
    two threads that ask for the same absent expert both prepare it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[tuple[ExpertSpec, int], _Entry[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, spec: ExpertSpec, record: np.ndarray, prepare: Callable[[], tuple[T, int]]) -> T:
        """The prepared form of `record` (uint8 [record_bytes]); `prepare` makes it and says how many bytes it takes."""
        key, mark = (spec, record.ctypes.data), fingerprint(record)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.fingerprint == mark:
                self._entries.move_to_end(key)
                return entry.value
        value, n_bytes = prepare()
        with self._lock:
            self._store(key, _Entry(mark, n_bytes, value))
        return value

    def _store(self, key: tuple[ExpertSpec, int], entry: _Entry[T]) -> None:
        replaced = self._entries.pop(key, None)
        self.used_bytes += entry.n_bytes - (replaced.n_bytes if replaced else 0)
        self._entries[key] = entry
        while self.used_bytes > self.limit_bytes and len(self._entries) > 1:
            self.used_bytes -= self._entries.popitem(last=False)[1].n_bytes


def fingerprint(record: np.ndarray) -> Fingerprint:
    """Exclusive or of all 8-byte words of a record (at memory bandwidth) and some of them, evenly spread."""
    words = record.view(np.uint64)
    step = max(1, words.size // SAMPLE_WORDS)
    return int(np.bitwise_xor.reduce(words)), words[::step].tobytes()


_SHARED_LOCK = threading.Lock()
_shared: weakref.WeakValueDictionary[str, PreparedExperts[Any]] = weakref.WeakValueDictionary()


def shared_cache(name: str, variable: str, default_gib: float) -> PreparedExperts[Any]:
    """The cache called `name`, one for all layers and models of this process; freed with the last backend that has it.

    Its limit is the environment variable `variable` in GiB, else `default_gib`, at the time it is made.
    Raises BackendError for a variable that is not a size.
    """
    with _SHARED_LOCK:
        cache = _shared.get(name)
        if cache is None:
            cache = _shared[name] = PreparedExperts(limit_bytes(variable, default_gib))
        return cache


def limit_bytes(variable: str, default_gib: float) -> int:
    """Bytes from an environment variable in GiB; raises BackendError if it is not a size."""
    text = os.environ.get(variable) or str(default_gib)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise BackendError(f"{variable}={text!r} is not a size in GiB, such as 4 or 0.5")
    return int(gib * 2**30)
