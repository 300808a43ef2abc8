"""Copies into slots and launches of graphs by compiled code. All is told by the address of one vector (`Queue.words`).

A launch that reads slots comes after the copies into them (`await_slot`). A copy waits for no launch: who submits it
has seen the end of every launch that read its slot (`has_ended`, for all that was launched before), and no later one
reads it. Copies end in order; their entries are a ring.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

from cpu_kernels.jit.compiled import Whole, inline_kernel
from cpu_kernels.jit.primitives import call_c_four, call_c_one, call_c_three, call_c_two, floats_at, int64s_at
from gpu_kernels.driver.functions import (
    AWAIT,
    COPY,
    ELAPSED,
    LAUNCH,
    N_FUNCTIONS,
    NOT_READY,
    QUERY,
    QUERY_STREAM,
    RECORD,
    Driver,
    require,
)

CAPACITY = 64
"""Copies under way at once; whoever has more waits for one in Python."""
MOST_WRITTEN = 4096
"""Slots that are noted as written between two readings of `Queue.take_written`."""
(COMPUTE, COPIES, SLOTS, STRIDE, FIRST, COUNT, ENTRIES, WRITTEN, N_WRITTEN, FAILED, MS,
 N_WORDS) = range(N_FUNCTIONS, N_FUNCTIONS + 12)  # fmt: skip
"""Places of `Queue.words` behind the driver's functions. COMPUTE, COPIES: streams; SLOTS, STRIDE: address of the first
slot and bytes to the next. FIRST, COUNT: the oldest entry, and how many there are. FAILED: the driver's error number of
a call that gave one. MS: a float32."""
KEY, SLOT, START, END, SUBMITTED_NS, IS_TIMED, ENTRY_SIZE = range(7)
"""Places of an entry: the expert, its slot, events around its copy, when it was submitted, whether the time between the
events is the copy's."""


@inline_kernel
def _is_done(queue: np.ndarray, code: Whole) -> bool:
    """Whether a call did what it was asked; its error number is kept otherwise."""
    if code != 0 and queue[FAILED] == 0:
        queue[FAILED] = code
    return bool(code == 0)


@inline_kernel
def launch(queue: np.ndarray, graph: Whole) -> bool:
    """Launches a graph on the compute stream. False: the driver has refused, and says why in FAILED."""
    return _is_done(queue, call_c_two(queue[LAUNCH], graph, queue[COMPUTE]))


@inline_kernel
def has_ended(queue: np.ndarray) -> bool:
    """Whether the compute stream has done everything. False also where the driver has failed (FAILED)."""
    code = call_c_one(queue[QUERY_STREAM], queue[COMPUTE])
    return False if code == NOT_READY else _is_done(queue, code)


@inline_kernel
def mark(queue: np.ndarray, event: Whole) -> bool:
    """Records an event on the compute stream."""
    return _is_done(queue, call_c_two(queue[RECORD], event, queue[COMPUTE]))


@inline_kernel
def entry_of(queue: np.ndarray, number: Whole) -> np.ndarray:
    """The entry `number` places behind the oldest."""
    at = (queue[FIRST] + number) % CAPACITY
    return int64s_at(queue[ENTRIES] + 8 * ENTRY_SIZE * at, ENTRY_SIZE)


@inline_kernel
def submit_copy(queue: np.ndarray, key: Whole, slot: Whole, source: Whole, n_bytes: Whole, now_ns: Whole) -> bool:
    """Copies a record of the host into a slot that nothing reads any more, behind all copies before. There must be
    room. False: as for `launch`."""
    copies = queue[COPIES]
    entry = entry_of(queue, queue[COUNT])
    if not _is_done(queue, call_c_two(queue[RECORD], entry[START], copies)):
        return False
    target = queue[SLOTS] + slot * queue[STRIDE]
    if not _is_done(queue, call_c_four(queue[COPY], target, source, n_bytes, copies)):
        return False
    if not _is_done(queue, call_c_two(queue[RECORD], entry[END], copies)):
        return False
    entry[KEY], entry[SLOT], entry[SUBMITTED_NS], entry[IS_TIMED] = key, slot, now_ns, 1
    queue[COUNT] += 1
    if queue[N_WRITTEN] < MOST_WRITTEN:
        int64s_at(queue[WRITTEN], MOST_WRITTEN)[queue[N_WRITTEN]] = slot
    queue[N_WRITTEN] += 1
    return True


@inline_kernel
def await_slot(queue: np.ndarray, slot: Whole) -> bool:
    """What follows on the compute stream waits for the copy into a slot, if one is under way."""
    for number in range(queue[COUNT]):
        entry = entry_of(queue, number)
        if entry[SLOT] == slot and not _is_done(queue, call_c_three(queue[AWAIT], queue[COMPUTE], entry[END], 0)):
            return False
    return True


@inline_kernel
def oldest_has_ended(queue: np.ndarray) -> bool:
    """Whether the oldest copy under way has ended; it is dropped by `drop_oldest`."""
    if queue[COUNT] == 0:
        return False
    code = call_c_one(queue[QUERY], entry_of(queue, 0)[END])
    return False if code == NOT_READY else _is_done(queue, code)


@inline_kernel
def oldest_has_begun(queue: np.ndarray) -> bool:
    """Whether the oldest copy under way has begun."""
    return bool(call_c_one(queue[QUERY], entry_of(queue, 0)[START]) == 0)


@inline_kernel
def took_us(queue: np.ndarray, start: Whole, end: Whole) -> float:
    """us between two events that have passed; 0 where the driver does not know."""
    code = call_c_three(queue[ELAPSED], queue.ctypes.data + 8 * MS, start, end)
    return 1e3 * float(floats_at(queue.ctypes.data + 8 * MS, 1)[0]) if code == 0 else 0.0


@inline_kernel
def drop_oldest(queue: np.ndarray) -> None:
    """The oldest copy is under way no more."""
    queue[FIRST] = (queue[FIRST] + 1) % CAPACITY
    queue[COUNT] -= 1


@inline_kernel
def has_room(queue: np.ndarray, n: Whole) -> bool:
    """Whether `n` more copies can be submitted, and noted."""
    return bool(queue[COUNT] + n <= CAPACITY and queue[N_WRITTEN] + n <= MOST_WRITTEN)


class Queue:
    """The memory that these functions work on, at `address`. copies: the stream of copies as the driver names it;
    slots: address of the first slot; stride: bytes to the next. Its events are given back with it."""

    def __init__(self, driver: Driver, copies: int, slots: int, stride: int) -> None:
        self.driver = driver
        self.words = np.zeros(N_WORDS, np.int64)
        self.entries = np.zeros((CAPACITY, ENTRY_SIZE), np.int64)
        self._written = np.zeros(MOST_WRITTEN, np.int64)
        words = self.words
        words[:N_FUNCTIONS] = driver.addresses
        words[[COPIES, SLOTS, STRIDE]] = copies, slots, stride
        words[[ENTRIES, WRITTEN]] = self.entries.ctypes.data, self._written.ctypes.data
        self._events: list[int] = []
        weakref.finalize(self, _free, driver, self._events).atexit = False
        for entry in self.entries:
            entry[START], entry[END] = self.new_event(), self.new_event()
        self.address = words.ctypes.data

    def new_event(self) -> int:
        """An event that lives as long as the queue. Raises DriverError."""
        event = self.driver.new_event()
        self._events.append(event)
        return event

    def begin(self, compute: int) -> None:
        """From here on launches go to this stream."""
        self.words[COMPUTE] = compute

    def take_over(self, key: int, slot: int) -> None:
        """A copy that others have submitted to the stream is under way, too, from now on behind all others; how long it
        takes is not known. There must be room. Raises DriverError."""
        first, count = self.words[[FIRST, COUNT]].tolist()
        entry = self.entries[(first + count) % CAPACITY]
        for event in (START, END):
            require(self.driver, self.driver.call(RECORD, int(entry[event]), int(self.words[COPIES])))
        entry[[KEY, SLOT, SUBMITTED_NS, IS_TIMED]] = key, slot, 0, 0
        self.words[COUNT] += 1

    def under_way(self) -> list[npt.NDArray[np.int64]]:
        """The entries of copies under way, oldest first."""
        first, count = self.words[[FIRST, COUNT]].tolist()
        return [self.entries[(first + number) % CAPACITY] for number in range(count)]

    def keep(self, n: int) -> None:
        """Only the latest `n` copies are still under way: the others' ends were seen elsewhere."""
        gone = int(self.words[COUNT]) - n
        self.words[FIRST] = (self.words[FIRST] + gone) % CAPACITY
        self.words[COUNT] = n

    def take_written(self) -> list[int]:
        """The slots that were written since the last call, in order."""
        slots: list[int] = self._written[: self.words[N_WRITTEN]].tolist()
        self.words[N_WRITTEN] = 0
        return slots


def _free(driver: Driver, events: list[int]) -> None:
    for event in events:
        driver.free_event(event)
