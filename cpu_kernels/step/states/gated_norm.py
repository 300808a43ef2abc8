"""The norm behind linear attention, and its gate: a branch of the projections that the result is multiplied with.

One task is a group of columns of a row, which is changed where it lies::

    x = x * act(gate)                               where the gate comes first
    x = x / sqrt(mean(x ** 2) + eps) * weight
    x = x * act(gate)                               where it comes last
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import floats_at, int64s_at, take_ticket
from cpu_kernels.step.floats import bits_of, sigmoid, silu, square_sum
from cpu_kernels.step.heads import root_factor, scale_by
from cpu_kernels.step.program import N_ROWS, STATE_SIZE, Part, Program
from cpu_kernels.step.states.recurrence import Places

(STATE, NEXT, ROWS, N_GROUPS, GROUP, WEIGHT, EPS, GATE, GATE_ROW, FIRST, SIGMOID, NORM_CALL) = range(12)


@dataclass(frozen=True, slots=True)
class GatedNorm:
    """weight float32 [columns of a row]; the RMS is of each `group` columns. has_sigmoid: the gate's activation, else
    silu. gate_first: before the norm."""

    weight: np.ndarray
    eps: float
    group: int
    has_sigmoid: bool = False
    gate_first: bool = False


def _norm(call_address: int, thread: int) -> None:
    """Worker. Task: a group of a row."""
    call = int64s_at(call_address, NORM_CALL)
    n_rows = int64s_at(call[STATE], STATE_SIZE)[N_ROWS]
    n_groups, size = call[N_GROUPS], call[GROUP]
    while True:
        task = take_ticket(call[NEXT])
        if task >= n_rows * n_groups:
            return
        row, group = task // n_groups, task % n_groups
        x = floats_at(call[ROWS] + 4 * task * size, size)
        if call[GATE] and call[FIRST]:
            _gate(call, row, group, x)
        weight = floats_at(call[WEIGHT] + 4 * group * size, size)
        scale_by(x, root_factor(square_sum(x), size, call[EPS]), weight)
        if call[GATE] and not call[FIRST]:
            _gate(call, row, group, x)


@inline_kernel
def _gate(call: np.ndarray, row: Whole, group: Whole, x: np.ndarray) -> None:
    gate = floats_at(int64s_at(call[GATE], group + 1)[group] + 4 * row * call[GATE_ROW], x.size)
    if call[SIGMOID]:
        for i in range(x.size):
            x[i] *= sigmoid(gate[i])
    else:
        for i in range(x.size):
            x[i] *= silu(gate[i])


NORM_WORK = Worker(_norm)


def add_gated_norm(program: Program, norm: GatedNorm, rows: int, gate: Places | None) -> None:
    """Adds the norm of rows float32 [rows, columns]. gate: where that of each group lies; None: there is none."""
    call = program.zeros(NORM_CALL, np.int64)
    call[[STATE, ROWS, GROUP]] = program.state.ctypes.data, rows, norm.group
    call[[N_GROUPS, EPS]] = norm.weight.size // norm.group, bits_of(norm.eps)
    call[[FIRST, SIGMOID]] = norm.gate_first, norm.has_sigmoid
    call[WEIGHT] = program.keep(np.ascontiguousarray(norm.weight, np.float32))
    if gate is not None:
        call[GATE], call[GATE_ROW] = program.keep(np.array(gate.addresses, np.int64)), gate.row
    program.count(call, NEXT)
    program.add(NORM_WORK, call, Part.ATTENTION)
