"""Performs a program: one parallel region, whose threads wait for each other's tasks between operations.

A worker returns when no task of its operation is left to take. The operation is finished when every thread that began
it has returned: nobody waits for a thread that never came, or that another program keeps from its core between tasks.
Such a thread later finds each operation it missed without tasks, and passes.
"""

import numpy as np

from cpu_kernels.engine.team import ALL, run_on_team, start_team
from cpu_kernels.engine.waiting import SPIN_NS, team_address, wait_while, wake
from cpu_kernels.jit.atomics import add, load
from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel, kernel
from cpu_kernels.jit.primitives import call_worker, cycles, int64s_at
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

BEGAN, ENDED = 1 << 32, 1
"""What a thread adds to PRESENT when it begins an operation, and when it ends it."""
N_PARTS = len(Part)


def _step(state_address: int, thread: int) -> None:
    """Worker: all operations from FIRST to STOP."""
    state = int64s_at(state_address, STATE_SIZE)
    table = int64s_at(state[OPERATIONS], OP_SIZE * state[STOP]).reshape(state[STOP], OP_SIZE)
    ticks = int64s_at(state[TICKS], N_PARTS)
    open_from = state[FIRST]
    last = cycles()
    for number in range(state[FIRST], state[STOP]):
        add(table[number, PRESENT], BEGAN)
        call_worker(table[number, WORKER], table[number, CALL], thread)
        add(table[number, PRESENT], ENDED)
        wake(table[number, PRESENT], ALL)
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
    while True:
        present = load(place)
        if present >> 32 == present & (BEGAN - 1):
            return
        wait_while(place, present, load(team_address() + SPIN_NS))


STEP_WORK = Worker(_step)


@kernel
def run_step(worker: int, state: np.ndarray, counters: np.ndarray, first: int, stop: int) -> None:
    """Operations first to stop of a sealed program, on the rows that its state names."""
    for i in range(counters.size):
        counters[i] = 0
    state[FIRST], state[STOP] = first, stop
    run_on_team(worker, state.ctypes.data, state[N_THREADS])


def perform(program: Program) -> None:
    """Runs a sealed program."""
    start_team(program.n_threads)
    run_step(STEP_WORK.address, program.state, program.counters, 0, len(program))
