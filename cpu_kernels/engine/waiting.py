"""How threads of the team wait for each other: spin for a moment, then sleep until they are woken.

Who spins keeps its core from others, who sleeps needs 30 to 60 us to come back (measured on a virtual machine). So the
moment is long while the machine is free, and short for a while after a thread was found to have lost its core to
another program: then the core is worth more than the time to wake up.
"""

import ctypes
import platform
import sys
from typing import Any

import numpy as np
from llvmlite import binding

from cpu_kernels.jit.atomics import (
    add,
    call_system,
    call_with_one,
    call_with_two,
    load,
    pause,
    store,
    symbol_address,
)
from cpu_kernels.jit.compiled import Whole, inline_kernel

LINE_WORDS = 8
"""int64 of a cache line. Words that different threads write lie on lines of their own."""
N_LAUNCHES = 8
"""Calls that can share the team at once; a further one runs on its own thread alone."""

# Byte offsets of the words in MEMORY. EVENT changes with each launch: idle helpers sleep on it.
EVENT, STOPPING, SYSTEM, FUTEX, CLOCK, SLEEP, SPIN_NS, IDLE_SPIN_NS, BUSY_SPIN_NS, BUSY_UNTIL_NS = (
    8 * word for word in (0, 8, 9, 10, 11, 12, 13, 14, 15, 16)
)
LAUNCHES = 8 * 3 * LINE_WORDS
"""Where the launches start (their words: `cpu_kernels.engine.team`)."""
LAUNCH_BYTES = 8 * 3 * LINE_WORDS
SLEEPERS = 8
"""From a word that threads sleep on to the number of those that do."""
N_WORDS = (LAUNCHES + N_LAUNCHES * LAUNCH_BYTES) // 8

MONOTONIC = 1
SPINS_BETWEEN_LOOKS = 16
"""At the clock: about 1 us."""
LOST_CORE_NS = 100_000
"""Between two looks: so long only if the thread was off its core."""
BUSY_NS = 200_000_000
"""So long a machine counts as busy after a thread lost its core."""
LONGEST_SLEEP_US = 1_000
"""Where the system cannot wake a thread: between two looks at the word."""
WAIT, WAKE = 128, 129
"""Operations of ``futex`` inside one process."""
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}
"""Linux's number of the system call ``futex`` by architecture."""
SYMBOL = "hybrimoe_team"


def _aligned_words(n: int) -> np.ndarray:
    """int64 [n] of zeros at the start of a cache line."""
    room = np.zeros(n + LINE_WORDS, np.int64)
    first = -room.ctypes.data // 8 % LINE_WORDS
    return room[first : first + n]


def library_functions() -> dict[int, int]:
    """Addresses of what waiting needs of the system, by word; 0 where this system has none."""
    found = dict.fromkeys((SYSTEM, FUTEX, CLOCK, SLEEP), 0)
    if sys.platform == "win32":
        return found
    library = ctypes.CDLL(None)
    found[CLOCK], found[SLEEP] = _address(library.clock_gettime), _address(library.usleep)
    if sys.platform == "linux" and platform.machine() in FUTEX_NUMBERS:
        found[SYSTEM], found[FUTEX] = _address(library.syscall), FUTEX_NUMBERS[platform.machine()]
    return found


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


MEMORY = _aligned_words(N_WORDS)
binding.add_symbol(SYMBOL, MEMORY.ctypes.data)
team_address = symbol_address(SYMBOL)
"""For compiled code: the address of MEMORY."""


@inline_kernel
def now_ns() -> Whole:
    """Monotonic time in ns; 0 where the system has no clock for compiled code."""
    team = team_address()
    clock = load(team + CLOCK)
    if clock == 0:
        return 0
    time = np.empty(2, np.int64)
    call_with_two(clock, MONOTONIC, time.ctypes.data)
    return time[0] * 1_000_000_000 + time[1]


@inline_kernel
def wait_while(word: Whole, value: Whole, spin_ns: Whole) -> None:
    """Returns when the int64 at `word` is no longer `value`; its writer calls `wake` after the change.

    `word` is followed by the number of its sleepers. spin_ns: how long to spin before sleeping.
    """
    if not _spin_while(word, value, spin_ns):
        _sleep_while(word, value)


@inline_kernel
def _spin_while(word: Whole, value: Whole, spin_ns: Whole) -> bool:
    """Whether the word changed while this thread spun."""
    start = last = now_ns()
    team = team_address()
    if start == 0:  # no clock
        spin_ns = 0
    if start < load(team + BUSY_UNTIL_NS):
        spin_ns = min(spin_ns, load(team + BUSY_SPIN_NS))
    while True:
        for _ in range(SPINS_BETWEEN_LOOKS):
            if load(word) != value:
                return True
            pause()
        now = now_ns()
        if now - last > LOST_CORE_NS:
            store(team + BUSY_UNTIL_NS, now + BUSY_NS)
            return False
        if now - start >= spin_ns:
            return False
        last = now


@inline_kernel
def _sleep_while(word: Whole, value: Whole) -> None:
    team = team_address()
    system, length_us = load(team + SYSTEM), 20
    add(word + SLEEPERS, 1)
    while load(word) == value:
        if system:
            call_system(system, load(team + FUTEX), word, WAIT, value & 0xFFFFFFFF, 0)
        else:
            call_with_one(load(team + SLEEP), length_us)
            length_us = min(2 * length_us, LONGEST_SLEEP_US)
    add(word + SLEEPERS, -1)


@inline_kernel
def wake(word: Whole, most: Whole) -> None:
    """Wakes up to `most` threads that sleep on `word`, which this thread has changed."""
    team = team_address()
    if load(word + SLEEPERS) and load(team + SYSTEM):
        call_system(load(team + SYSTEM), load(team + FUTEX), word, WAKE, most, 0)
