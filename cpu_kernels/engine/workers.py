"""What the threads of the team run: preparing tokens, the first and the second half of the experts.

Threads take tasks (an expert x 64 packed rows) from a counter, so unequal loads and a busy core even out: most of them
in runs, whose weights lie one behind the other, the last ones singly.
"""

import numpy as np

from cpu_kernels.engine.call import (
    BLOCK_BYTES,
    CALL_SIZE,
    DOWN,
    DOWN_BIAS,
    FINISH,
    FLAT,
    GATE_BIAS,
    GATED,
    H_PANEL,
    HAS_BIAS,
    IN,
    IN_TRUE,
    INEXACT,
    INPUT,
    INTER,
    INTER_TRUE,
    N_EXPERTS,
    N_THREADS,
    N_TOKENS,
    NEXT_DOWN,
    NEXT_TOKEN,
    NEXT_UP,
    NOT_FINITE,
    OUT,
    OUT_ROWS,
    OUT_TRUE,
    PARAMETERS,
    PREPARE,
    RECORDS,
    STARTS,
    TOKENS,
    UP_BIAS,
    WANTED,
    WEIGHTS,
    X_BYTES,
    X_PANEL,
    H,
    X,
    counter_address,
    row_bytes_of,
)
from cpu_kernels.format.layout import BLOCK_COLUMNS, BLOCK_ROWS, INTERLEAVE, PANEL_ROWS
from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import (
    bytes_at,
    call_finish,
    call_panel,
    call_prepare,
    floats_at,
    int32s_at,
    int64s_at,
    take_ticket,
)
from cpu_kernels.simd import formats

ROW_CHUNK = 128  # tokens a task handles at a time: its float32 results (32 KiB) and their activations stay in L2
PANEL_BLOCKS = PANEL_ROWS // BLOCK_ROWS
# A thread takes about 6 runs, 3/4 of all tasks together. Long runs keep the prefetchers, ours and the CPU's, on
# what the same thread reads next: 4 to 8 % less time at 1 token, up to 11 % at 4, than single tasks (Zen 4, 2 threads).
RUNS_OF_A_THREAD, RUN_SHARE = 6, (3, 4)


def _prepare(call_address: int, thread: int) -> None:
    """Worker: writes the wanted tokens into X in the format that the panel reads."""
    call = int64s_at(call_address, CALL_SIZE)
    wanted = bytes_at(call[WANTED], call[N_TOKENS])
    n_true, row_bytes = call[IN_TRUE], row_bytes_of(call, IN)
    while True:
        token = take_ticket(counter_address(call, NEXT_TOKEN))
        if token >= wanted.size:
            return
        if not wanted[token]:
            continue
        source, target = call[INPUT] + 4 * n_true * token, call[X] + row_bytes * token
        flags = call_prepare(call[PREPARE], source, n_true, target)
        if flags & formats.NOT_FINITE:
            int64s_at(counter_address(call, NOT_FINITE), 1)[0] = token + 1
        if flags & formats.INEXACT:
            int64s_at(counter_address(call, INEXACT), 1)[0] = 1


@inline_kernel
def _fill(buffer: np.ndarray, bias: np.ndarray, n_rows: Whole) -> None:
    """Each of n_rows rows of 64 = bias."""
    for row in range(n_rows):
        for i in range(PANEL_ROWS):
            buffer[row * PANEL_ROWS + i] = bias[i]


@inline_kernel
def _products(
    call: np.ndarray, panel: Whole, matrix: Whole, n_blocks: Whole, x: Whole, row_ids: Whole, n_rows: Whole, out: Whole
) -> None:
    """Adds 64 matrix rows times n_rows activation rows to `out`."""
    row_block_bytes = n_blocks * call[BLOCK_BYTES]
    call_panel(panel, matrix, row_block_bytes, n_blocks, x, n_blocks * call[X_BYTES], row_ids, n_rows, out)


@inline_kernel
def _take_run(call: np.ndarray, counter: Whole, n_tasks: Whole) -> tuple[Whole, Whole]:
    """First task of the next run and the one after its last; the first is n_tasks or more when none is left."""
    share, whole = RUN_SHARE
    length = max(1, n_tasks * share // (whole * RUNS_OF_A_THREAD * call[N_THREADS]))
    n_runs = n_tasks * share // whole // length
    ticket = take_ticket(counter_address(call, counter))
    if ticket < n_runs:
        return ticket * length, (ticket + 1) * length
    single = n_runs * length + ticket - n_runs
    return single, single + 1


def _up(call_address: int, thread: int) -> None:
    """Worker of region 1. Task: 32 (gated) or 64 intermediate columns of an expert for all its tokens."""
    call = int64s_at(call_address, CALL_SIZE)
    records, starts = int64s_at(call[RECORDS], call[N_EXPERTS]), int64s_at(call[STARTS], call[N_EXPERTS] + 1)
    n_columns = INTERLEAVE if call[GATED] else PANEL_ROWS
    n_panels, n_blocks = call[INTER] // n_columns, call[IN] // BLOCK_COLUMNS
    buffer = np.empty(ROW_CHUNK * PANEL_ROWS, np.float32)
    bias, sums = np.zeros(PANEL_ROWS, np.float32), buffer.ctypes.data
    while True:
        first, stop = _take_run(call, NEXT_UP, records.size * n_panels)
        if first >= records.size * n_panels:
            return
        for task in range(first, stop):
            expert, panel = task // n_panels, task % n_panels
            matrix = records[expert] + panel * PANEL_BLOCKS * n_blocks * call[BLOCK_BYTES]
            _read_up_bias(call, records[expert], panel * n_columns, bias)
            for start in range(starts[expert], starts[expert + 1], ROW_CHUNK):
                n_rows = min(ROW_CHUNK, starts[expert + 1] - start)
                _fill(buffer, bias, n_rows)
                _products(call, call[X_PANEL], matrix, n_blocks, call[X], call[TOKENS] + 4 * start, n_rows, sums)
                _finish_up(call, sums, panel * n_columns, start, n_rows)


@inline_kernel
def _read_up_bias(call: np.ndarray, record: Whole, column: Whole, bias: np.ndarray) -> None:
    """Starting values of a panel's rows: gate bias [32], up bias [32], or up bias [64] if ungated."""
    if not call[HAS_BIAS]:
        return
    gated = call[GATED]
    up = record + call[UP_BIAS] + 4 * column
    first = floats_at(record + call[GATE_BIAS] + 4 * column if gated else up, INTERLEAVE)
    second = floats_at(up if gated else up + 4 * INTERLEAVE, INTERLEAVE)
    for i in range(INTERLEAVE):
        bias[i] = first[i]
        bias[INTERLEAVE + i] = second[i]


@inline_kernel
def _finish_up(call: np.ndarray, sums: Whole, column: Whole, start: Whole, n_rows: Whole) -> None:
    """Activation of n_rows rows of sums, written to columns from `column` of rows start .. of H; padding becomes 0."""
    row_bytes = row_bytes_of(call, INTER)
    n_true = max(0, min(PANEL_ROWS, call[INTER_TRUE] - column))
    target = call[H] + start * row_bytes
    call_finish(call[FINISH], sums, n_rows, call[PARAMETERS], n_true, target, row_bytes, column)


def _down(call_address: int, thread: int) -> None:
    """Worker of region 2. Task: 64 output columns of an expert for all its tokens."""
    call = int64s_at(call_address, CALL_SIZE)
    records, starts = int64s_at(call[RECORDS], call[N_EXPERTS]), int64s_at(call[STARTS], call[N_EXPERTS] + 1)
    n_panels, n_blocks = call[OUT] // PANEL_ROWS, call[INTER] // BLOCK_COLUMNS
    buffer = np.empty(ROW_CHUNK * PANEL_ROWS, np.float32)
    bias = np.zeros(PANEL_ROWS, np.float32)
    ids = np.arange(ROW_CHUNK).astype(np.int32)
    while True:
        first, stop = _take_run(call, NEXT_DOWN, records.size * n_panels)
        if first >= records.size * n_panels:
            return
        for task in range(first, stop):
            expert, panel = task // n_panels, task % n_panels
            matrix = records[expert] + call[DOWN] + panel * PANEL_BLOCKS * n_blocks * call[BLOCK_BYTES]
            _read_down_bias(call, records[expert], panel * PANEL_ROWS, bias)
            for start in range(starts[expert], starts[expert + 1], ROW_CHUNK):
                n_rows = min(ROW_CHUNK, starts[expert + 1] - start)
                _fill(buffer, bias, n_rows)
                h = call[H] + start * row_bytes_of(call, INTER)
                _products(call, call[H_PANEL], matrix, n_blocks, h, ids.ctypes.data, n_rows, buffer.ctypes.data)
                _finish_down(call, buffer, panel * PANEL_ROWS, start, n_rows)


@inline_kernel
def _read_down_bias(call: np.ndarray, record: Whole, column: Whole, bias: np.ndarray) -> None:
    """Starting values of a panel's rows."""
    if call[HAS_BIAS]:
        source = floats_at(record + call[DOWN_BIAS] + 4 * column, PANEL_ROWS)
        for i in range(PANEL_ROWS):
            bias[i] = source[i]


@inline_kernel
def _finish_down(call: np.ndarray, buffer: np.ndarray, column: Whole, start: Whole, n_rows: Whole) -> None:
    """Rows of `buffer` times their routing weight, to columns column .. column + 64 of their rows of OUT_ROWS."""
    flat = int32s_at(call[FLAT] + 4 * start, n_rows)
    n_columns = min(PANEL_ROWS, call[OUT_TRUE] - column)
    for row in range(n_rows):
        values = buffer[row * PANEL_ROWS : (row + 1) * PANEL_ROWS]
        target = floats_at(call[OUT_ROWS] + 4 * (flat[row] * call[OUT_TRUE] + column), n_columns)
        weight = floats_at(call[WEIGHTS] + 4 * flat[row], 1)[0] if call[WEIGHTS] else np.float32(1)
        for i in range(n_columns):
            target[i] = weight * values[i]


PREPARE_WORK, UP_WORK, DOWN_WORK = Worker(_prepare), Worker(_up), Worker(_down)
