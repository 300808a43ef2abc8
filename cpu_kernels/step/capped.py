"""Logits within bounds: x = cap * tanh(x / cap)."""

import numpy as np

from cpu_kernels.jit.compiled import Real, Worker, float_kernel
from cpu_kernels.jit.primitives import floats_at, int64s_at, take_ticket
from cpu_kernels.step.floats import bits_of, float_of
from cpu_kernels.step.program import N_ROWS, STATE_SIZE, Part, Program

STATE, NEXT, VALUES, WIDTH, CAP, CAPPED_CALL = range(6)
TASK_COLUMNS = 8192
"""Columns of a task: some ten microseconds."""


def _cap(call_address: int, thread: int) -> None:
    """Worker. Task: TASK_COLUMNS columns of a row."""
    call = int64s_at(call_address, CAPPED_CALL)
    width = call[WIDTH]
    n_tasks = (width + TASK_COLUMNS - 1) // TASK_COLUMNS
    while True:
        task = take_ticket(call[NEXT])
        if task >= int64s_at(call[STATE], STATE_SIZE)[N_ROWS] * n_tasks:
            return
        row, first = task // n_tasks, task % n_tasks * TASK_COLUMNS
        n_columns = min(TASK_COLUMNS, width - first)
        cap_row(floats_at(call[VALUES] + 4 * (row * width + first), n_columns), float_of(call[CAP]))


@float_kernel
def cap_row(values: np.ndarray, cap: Real) -> None:
    """Each value x = cap * tanh(x / cap)."""
    for i in range(values.size):
        share = np.float32(2) / (np.exp(np.float32(2) * values[i] / cap) + np.float32(1))
        values[i] = cap * (np.float32(1) - share)


CAP_WORK = Worker(_cap)


def add_cap(program: Program, state: np.ndarray, values: int, width: int, cap: float) -> None:
    """Adds the operation on float32 [rows, width] at `values`. state: of these rows."""
    call = program.zeros(CAPPED_CALL, np.int64)
    call[[STATE, VALUES, WIDTH, CAP]] = state.ctypes.data, values, width, bits_of(cap)
    program.count(call, NEXT)
    program.add(CAP_WORK, call, Part.OUTPUT_LAYER)
