"""Performs a program: one parallel region, whose threads meet between operations at a spinning barrier."""

import numpy as np
from numba import types

from cpu_kernels.engine.layer import run_on_threads
from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel, kernel
from cpu_kernels.jit.primitives import atomic_add, atomic_load, atomic_store, call_worker, cycles, int64s_at
from cpu_kernels.step.program import (
    CALL,
    FIRST,
    JOINED,
    MEETS,
    MET,
    N_THREADS,
    OP_SIZE,
    OPERATIONS,
    PART,
    STATE_SIZE,
    STOP,
    TEAM,
    TICKS,
    WORKER,
    Program,
)

SPINS = 2000
"""Looks at a counter before a thread lets others have its core: about 20 us, more than most waits in a step take."""
PATIENCE = 100_000
"""Looks of the first thread for the others, at the start of a step: with more, one that gets no core holds up all."""
CLOSED = 1 << 32
"""Added to JOINED by the first thread: who comes later takes no part."""
_yield = types.ExternalFunction("sched_yield", types.int32())


def _step(state_address: int, thread: int) -> None:
    """Worker: all operations from FIRST to STOP, with the threads that came in time."""
    state = int64s_at(state_address, STATE_SIZE)
    ticks = int64s_at(state[TICKS], 1 + PART)
    own, n_threads = _join(state_address, state[N_THREADS])
    if own < 0:
        return
    meeting = 0
    last = cycles()
    for number in range(state[FIRST], state[STOP]):
        operation = int64s_at(state[OPERATIONS] + 8 * OP_SIZE * number, OP_SIZE)
        call_worker(operation[WORKER], operation[CALL], own)
        if operation[MEETS] and n_threads > 1:
            meeting += n_threads
            _meet(state_address + 8 * MET, meeting)
        if own == 0:
            now = cycles()
            ticks[operation[PART]] += now - last
            last = now


@inline_kernel
def _join(state: Whole, n_wanted: Whole) -> tuple[Whole, Whole]:
    """(own number, number of threads) of the team; -1 for a thread that came when it had begun."""
    if n_wanted == 1:
        return 0, 1
    own = atomic_add(state + 8 * JOINED, 1)
    if own >= CLOSED:
        return -1, 0
    if own == 0:
        looks = 0
        while atomic_load(state + 8 * JOINED) < n_wanted and looks < PATIENCE:
            looks += 1
            if looks > SPINS:
                _yield()
        size = atomic_add(state + 8 * JOINED, CLOSED)
        atomic_store(state + 8 * TEAM, size)
        return 0, size
    looks = 0
    while atomic_load(state + 8 * TEAM) == 0:
        looks += 1
        if looks > SPINS:
            _yield()
    return own, atomic_load(state + 8 * TEAM)


@inline_kernel
def _meet(place: Whole, expected: Whole) -> None:
    """Waits until all threads have come: the counter at `place` has then reached `expected`."""
    if atomic_add(place, 1) + 1 >= expected:
        return
    looks = 0
    while atomic_load(place) < expected:
        looks += 1
        if looks > SPINS:
            _yield()


STEP_WORK = Worker(_step)


@kernel
def run_step(worker: int, state: np.ndarray, counters: np.ndarray, first: int, stop: int) -> None:
    """Operations first to stop of a sealed program, on the rows that its state names."""
    for i in range(counters.size):
        counters[i] = 0
    state[JOINED], state[TEAM], state[MET] = 0, 0, 0
    state[FIRST], state[STOP] = first, stop
    if state[N_THREADS] == 1:
        call_worker(worker, state.ctypes.data, 0)
    else:
        run_on_threads(worker, state.ctypes.data, state[N_THREADS])


def perform(program: Program, first: int = 0, stop: int | None = None) -> None:
    """Runs the operations first .. stop (all) of a sealed program."""
    import numba

    if program.n_threads > 1:
        numba.set_num_threads(program.n_threads)
    run_step(STEP_WORK.address, program.state, program.counters, first, len(program) if stop is None else stop)
