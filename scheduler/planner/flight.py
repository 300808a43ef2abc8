"""Transfers under way, in the order of their link, on flat arrays that the compiled decision reads and adds to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled, straight
from scheduler.views import ints_at

Ints = npt.NDArray[np.int64]

COUNT, N_SLOTS, KEYS, SLOTS, N_WORDS = range(5)
"""Places of ``Flight.words``: how many are under way, how many there is room for, addresses of their keys and slots."""


class Flight:
    """The experts that are under way into slots: ``keys``, ``slots`` int64[n_slots], of which the first ``len`` places
    are taken, in link order. No two of them have one slot. Compiled code finds all that by ``address``; a copy is made
    by ``resized``."""

    def __init__(self, n_slots: int) -> None:
        self.keys, self.slots = np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64)
        self.words = np.array([0, n_slots, self.keys.ctypes.data, self.slots.ctypes.data], np.int64)
        self.address = self.words.ctypes.data
        self._add, self._drop = add_flight, drop_flight

    def __len__(self) -> int:
        return self.words.item(COUNT)

    def add(self, key: int, slot: int) -> None:
        """A transfer starts, behind all others."""
        self._add(self.address, key, slot)
        if self._add is add_flight:
            self._add = straight(add_flight)

    def drop(self, key: int) -> None:
        """The transfer of a key is not waited for any more, if there was one."""
        self._drop(self.address, key)
        if self._drop is drop_flight:
            self._drop = straight(drop_flight)

    def resized(self, n_slots: int) -> Flight:
        """The same, where there are so many slots."""
        made, n = Flight(n_slots), len(self)
        made.keys[:n], made.slots[:n], made.words[COUNT] = self.keys[:n], self.slots[:n], n
        return made


@compiled
def add_flight(address: int, key: int, slot: int) -> None:
    """``Flight.add``."""
    words = ints_at(address, N_WORDS)
    n = words[COUNT]
    ints_at(words[KEYS], words[N_SLOTS])[n], ints_at(words[SLOTS], words[N_SLOTS])[n] = key, slot
    words[COUNT] = n + 1


@compiled
def drop_flight(address: int, key: int) -> None:
    """``Flight.drop``."""
    words = ints_at(address, N_WORDS)
    keys, slots, kept = ints_at(words[KEYS], words[N_SLOTS]), ints_at(words[SLOTS], words[N_SLOTS]), 0
    for i in range(words[COUNT]):
        if keys[i] != key:
            keys[kept], slots[kept] = keys[i], slots[i]
            kept += 1
    words[COUNT] = kept


@compiled
def flight_slots(address: int) -> Ints:
    """The slots of those that are under way, in link order."""
    words = ints_at(address, N_WORDS)
    return ints_at(words[SLOTS], words[N_SLOTS])[: words[COUNT]]
