"""The activation between the two halves of a dense MLP or shared expert, written as its second half reads it."""

import numpy as np

from cpu_kernels.format.layout import INTERLEAVE, padded
from cpu_kernels.format.spec import Activation
from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import call_finish, floats_at, int64s_at, take_ticket
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.simd.formats import Format
from cpu_kernels.simd.rows import SUM_COLUMNS, FinishKernel
from cpu_kernels.step.program import N_ROWS, SCRATCH, SCRATCH_BYTES, STATE_SIZE, Part, Program
from cpu_kernels.step.stream import Target

(STATE, NEXT, GATE, GATE_ROW, UP, UP_ROW, INTER, COLUMNS, N_GROUPS, FINISH, PARAMETERS, PLACE, ROW_BYTES,
 GATED_CALL) = range(14)  # fmt: skip


def _gated(call_address: int, thread: int) -> None:
    """Worker. Task: COLUMNS columns of a row."""
    call = int64s_at(call_address, GATED_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    sums = state[SCRATCH] + thread * SCRATCH_BYTES
    n_groups = call[N_GROUPS]
    while True:
        task = take_ticket(call[NEXT])
        if task >= state[N_ROWS] * n_groups:
            return
        row, column = task // n_groups, task % n_groups * call[COLUMNS]
        n_true = max(0, min(call[COLUMNS], call[INTER] - column))  # columns behind are written as zeros
        if call[GATE]:
            _copy(call[GATE] + 4 * (row * call[GATE_ROW] + column), sums, n_true)
            _copy(call[UP] + 4 * (row * call[UP_ROW] + column), sums + 4 * INTERLEAVE, n_true)
        else:
            _copy(call[UP] + 4 * (row * call[UP_ROW] + column), sums, n_true)
        target = call[PLACE] + row * call[ROW_BYTES]
        call_finish(call[FINISH], sums, 1, call[PARAMETERS], n_true, target, call[ROW_BYTES], column)


@inline_kernel
def _copy(source: Whole, target: Whole, n: Whole) -> None:
    """n floats from one address to the other."""
    values, copied = floats_at(source, n), floats_at(target, n)
    for i in range(n):
        copied[i] = values[i]


GATED_WORK = Worker(_gated)


def add_gated(
    program: Program, part: Part, activation: Activation, form: Format, gate: tuple[int, int] | None,
    up: tuple[int, int], inter: int, target: Target, parameters: np.ndarray, isa_name: str, *, meets: bool,
) -> int:  # fmt: skip
    """Adds target = act(gate) * up, or act(up) where gate is None; returns the operation's number.

    gate, up: address of float32 rows, and floats from one row to the next. parameters: as in an expert's plan.
    """
    call = program.zeros(GATED_CALL, np.int64)
    call[[STATE, INTER]] = program.state.ctypes.data, inter
    call[[GATE, GATE_ROW]] = (0, 0) if gate is None else gate
    call[[UP, UP_ROW]] = up
    call[COLUMNS] = SUM_COLUMNS if gate is None else INTERLEAVE
    call[N_GROUPS] = padded(inter) // call[COLUMNS]
    call[FINISH] = kernel_address(FinishKernel(form, activation.kind, gate is not None), isa_name)
    call[[PARAMETERS, PLACE, ROW_BYTES]] = program.keep(parameters), target.address, target.row_bytes
    program.count(call, NEXT)
    return program.add(GATED_WORK, call, part, meets=meets)
