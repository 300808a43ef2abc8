"""Performs a program: one parallel region, whose threads wait for each other's tasks between operations.

A worker returns when no task of its operation is left to take. The operation is finished when every thread that began
it has returned: nobody waits for a thread that never came, or that another program keeps from its core between tasks.
Such a thread later finds each operation it missed without tasks, and passes.
"""

import numba
import numpy as np
from numba import types

from cpu_kernels.engine.layer import run_on_threads
from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel, kernel
from cpu_kernels.jit.primitives import atomic_add, atomic_load, call_worker, cycles, int64s_at
from cpu_kernels.step.program import (
    CALL,
    FIRST,
    MEETS,
    N_THREADS,
    OP_SIZE,
    OPERATIONS,
    PART,
    PRESENT,
    STATE_SIZE,
    STOP,
    TICKS,
    WORKER,
    Part,
    Program,
)

SPINS = 2000
"""Looks at a counter before a thread offers its core to others: about 20 us, longer than most waits of a step."""
BEGAN, ENDED = 1 << 32, 1
"""What a thread adds to PRESENT when it begins an operation, and when it ends it."""
N_PARTS = len(Part)
_yield = types.ExternalFunction("sched_yield", types.int32())


def _step(state_address: int, thread: int) -> None:
    """Worker: all operations from FIRST to STOP."""
    state = int64s_at(state_address, STATE_SIZE)
    table = int64s_at(state[OPERATIONS], OP_SIZE * state[STOP]).reshape(state[STOP], OP_SIZE)
    ticks = int64s_at(state[TICKS], N_PARTS)
    open_from = state[FIRST]
    last = cycles()
    for number in range(state[FIRST], state[STOP]):
        atomic_add(table[number, PRESENT], BEGAN)
        call_worker(table[number, WORKER], table[number, CALL], thread)
        atomic_add(table[number, PRESENT], ENDED)
        if table[number, MEETS]:
            for earlier in range(open_from, number + 1):
                _finish(table[earlier, PRESENT])
            open_from = number + 1
        if thread == 0:
            now = cycles()
            ticks[table[number, PART]] += now - last
            last = now


@inline_kernel
def _finish(place: Whole) -> None:
    """Waits until every thread that began the operation has ended it. Its tasks are all taken by then."""
    looks = 0
    while True:
        present = atomic_load(place)
        if present >> 32 == present & (BEGAN - 1):
            return
        looks += 1
        if looks > SPINS:
            _yield()


STEP_WORK = Worker(_step)


@kernel
def run_step(worker: int, state: np.ndarray, counters: np.ndarray, first: int, stop: int) -> None:
    """Operations first to stop of a sealed program, on the rows that its state names."""
    for i in range(counters.size):
        counters[i] = 0
    state[FIRST], state[STOP] = first, stop
    if state[N_THREADS] == 1:
        call_worker(worker, state.ctypes.data, 0)
    else:
        run_on_threads(worker, state.ctypes.data, state[N_THREADS])


def perform(program: Program) -> None:
    """Runs a sealed program."""
    if program.n_threads > 1:
        numba.set_num_threads(program.n_threads)
    run_step(STEP_WORK.address, program.state, program.counters, 0, len(program))
