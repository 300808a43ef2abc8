"""The driver: all experts of a layer in one compiled call, in two parallel regions.

Region 1 does gate, up, activation and requantisation, region 2 down and the routing weight. Threads take tasks (an
expert x 64 packed rows) from a counter, so unequal loads and a busy core even out. Each output row depends on its own
token only, so results are the same bits for any thread count, order, or split of the experts over calls.
"""

import numpy as np
from numba import prange

from cpu_kernels.compiled import inline_kernel, parallel_kernel
from cpu_kernels.elementwise import ABSOLUTE_BITS, INFINITY_BITS, activate, gate_times_up, quantise_block
from cpu_kernels.layout import BLOCK_COLUMNS, BLOCK_ROWS, INTERLEAVE
from cpu_kernels.primitives import call_panel, floats_at, take_ticket
from cpu_kernels.simd.tiles import PANEL_ROWS

# Places in the int64 plan of a spec (written by `cpu_kernels.backends.numba_backend`). Sizes are padded unless said.
(PANEL, HIDDEN_TRUE, INTER_TRUE, HIDDEN, INTER, BLOCK_BYTES, X_BYTES, CODE_OFFSET, GATED, KIND, DOWN, HAS_BIAS,
 GATE_BIAS, UP_BIAS, DOWN_BIAS, SPLIT_BLOCKS, PLAN_SIZE) = range(17)  # fmt: skip

ROW_CHUNK = 128  # tokens a task handles at a time: its float32 results (32 KiB) and their activations stay in L2
SMALL_ROWS = 8  # up to this many tokens a task streams its weights once, over all columns
SMALL_TOKENS = 8  # up to this many tokens are prepared by the calling thread
COUNTER_STRIDE = 8  # int64 per counter: one cache line each
REGION_1, REGION_2, NOT_FINITE, COUNTERS = 0, COUNTER_STRIDE, 2 * COUNTER_STRIDE, 3 * COUNTER_STRIDE
PANEL_BLOCKS = PANEL_ROWS // BLOCK_ROWS


@parallel_kernel
def run_layer(
    plan: np.ndarray,
    parameters: np.ndarray,
    records: np.ndarray,
    positions: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    top_k: int,
    hidden: np.ndarray,
    out_rows: np.ndarray,
    x: np.ndarray,
    h: np.ndarray,
    n_threads: int,
) -> int:
    """out_rows[r] = weights[r] * FFN(hidden[r // top_k]); returns -1, or a token whose input is not finite.

    plan int64, parameters float32: see above and `elementwise`. records uint64 [n], positions int32 [n]; offsets, rows,
    weights, top_k: fields of a Dispatch. hidden float32 [T, H]; x and h: uint8 workspaces for T and N quantised (or
    padded) rows.
    """
    counters = np.zeros(COUNTERS, np.int64)
    starts = _starts(positions, offsets)
    tokens, flat = _local_rows(positions, offsets, rows, top_k)
    wanted = _wanted(tokens, hidden.shape[0])
    if n_threads == 1 or hidden.shape[0] <= SMALL_TOKENS:
        _prepare(plan, wanted, hidden, x, counters, 0, 1)
    else:
        for thread in prange(n_threads):
            _prepare(plan, wanted, hidden, x, counters, thread, n_threads)
    if counters[NOT_FINITE] > 0:
        return counters[NOT_FINITE] - 1
    if n_threads == 1:
        _up(plan, parameters, records, starts, tokens, x, h, counters)
        _down(plan, records, starts, flat, weights, h, out_rows, counters)
        return -1
    for _ in prange(n_threads):
        _up(plan, parameters, records, starts, tokens, x, h, counters)
    for _ in prange(n_threads):
        _down(plan, records, starts, flat, weights, h, out_rows, counters)
    return -1


@inline_kernel
def _starts(positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """First local row of each expert that runs, and the number of rows at the end."""
    starts = np.zeros(positions.size + 1, np.int64)
    for index in range(positions.size):
        position = positions[index]
        starts[index + 1] = starts[index] + offsets[position + 1] - offsets[position]
    return starts


@inline_kernel
def _local_rows(
    positions: np.ndarray, offsets: np.ndarray, rows: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token and flat row of each local row (rows of the experts that run, one after another)."""
    tokens = np.empty(rows.size, np.int32)
    flat = np.empty(rows.size, np.int32)
    n = 0
    for position in positions:
        for place in range(offsets[position], offsets[position + 1]):
            flat[n] = rows[place]
            tokens[n] = rows[place] // top_k
            n += 1
    return tokens[:n], flat[:n]


@inline_kernel
def _wanted(tokens: np.ndarray, n_tokens: int) -> np.ndarray:
    wanted = np.zeros(n_tokens, np.bool_)
    for token in tokens:
        wanted[token] = True
    return wanted


@inline_kernel
def _prepare(
    plan: np.ndarray, wanted: np.ndarray, hidden: np.ndarray, x: np.ndarray, counters: np.ndarray, first: int, step: int
) -> None:
    """Quantises (or copies, padded) the wanted tokens first, first + step, ..."""
    row_bytes = plan[HIDDEN] // BLOCK_COLUMNS * plan[X_BYTES]
    padded = np.zeros(BLOCK_COLUMNS, np.float32)
    for token in range(first, wanted.size, step):
        if not wanted[token]:
            continue
        source = hidden[token]
        target = x[token * row_bytes : (token + 1) * row_bytes]
        for block in range(plan[HIDDEN] // BLOCK_COLUMNS):
            columns = source[block * BLOCK_COLUMNS : (block + 1) * BLOCK_COLUMNS]
            place = target[block * plan[X_BYTES] : (block + 1) * plan[X_BYTES]]
            if columns.size < BLOCK_COLUMNS:
                padded[: columns.size] = columns
                columns = padded
            if not _write_block(plan, columns, 0, BLOCK_COLUMNS, place):
                counters[NOT_FINITE] = token + 1


@inline_kernel
def _write_block(plan: np.ndarray, values: np.ndarray, place: int, size: int, out: np.ndarray) -> bool:
    """values[:size] as columns place .. place + size of a block of activations; False if a value is not finite."""
    if plan[CODE_OFFSET] > 0:
        return quantise_block(values, place, size, plan[CODE_OFFSET], out)
    target = out.view(np.float32)
    bits = values.view(np.int32)
    largest = np.int32(0)
    for i in range(size):
        target[place + i] = values[i]
        largest = max(largest, bits[i] & ABSOLUTE_BITS)
    return largest < INFINITY_BITS


@inline_kernel
def _fill(buffer: np.ndarray, first: np.ndarray, second: np.ndarray, n_rows: int) -> None:
    """Each of n_rows rows of 64 = first, then second."""
    for row in range(n_rows):
        target = buffer[row * PANEL_ROWS : (row + 1) * PANEL_ROWS]
        target[: first.size] = first
        target[first.size : first.size + second.size] = second


@inline_kernel
def _products(
    plan: np.ndarray, matrix: int, n_blocks: int, x: int, row_ids: int, n_rows: int, out: int
) -> None:
    """Adds 64 matrix rows times n_rows activation rows to `out`, in column parts that fit L1 if there are many rows."""
    row_block_bytes = n_blocks * plan[BLOCK_BYTES]
    part = n_blocks if n_rows <= SMALL_ROWS else plan[SPLIT_BLOCKS]
    for block in range(0, n_blocks, part):
        call_panel(
            plan[PANEL],
            matrix + block * plan[BLOCK_BYTES],
            row_block_bytes,
            min(part, n_blocks - block),
            x + block * plan[X_BYTES],
            n_blocks * plan[X_BYTES],
            row_ids,
            n_rows,
            out,
        )


@inline_kernel
def _up(
    plan: np.ndarray,
    parameters: np.ndarray,
    records: np.ndarray,
    starts: np.ndarray,
    tokens: np.ndarray,
    x: np.ndarray,
    h: np.ndarray,
    counters: np.ndarray,
) -> None:
    """Tasks of region 1: 32 (gated) or 64 intermediate columns of an expert for all its tokens."""
    n_columns = INTERLEAVE if plan[GATED] else PANEL_ROWS
    n_panels = plan[INTER] // n_columns
    n_blocks = plan[HIDDEN] // BLOCK_COLUMNS
    buffer = np.empty(ROW_CHUNK * PANEL_ROWS, np.float32)
    while True:
        task = take_ticket(counters.ctypes.data + 8 * REGION_1)
        if task >= records.size * n_panels:
            return
        expert, panel = divmod(task, n_panels)
        record = np.int64(records[expert])
        matrix = record + panel * PANEL_BLOCKS * n_blocks * plan[BLOCK_BYTES]
        gate_bias, up_bias = _up_biases(plan, record, panel, n_columns)
        for start in range(starts[expert], starts[expert + 1], ROW_CHUNK):
            n_rows = min(ROW_CHUNK, starts[expert + 1] - start)
            _fill(buffer, gate_bias, up_bias, n_rows)
            ids = tokens.ctypes.data + 4 * start
            _products(plan, matrix, n_blocks, x.ctypes.data, ids, n_rows, buffer.ctypes.data)
            _finish_up(plan, parameters, buffer, panel * n_columns, n_columns, start, n_rows, h)


@inline_kernel
def _up_biases(plan: np.ndarray, record: int, panel: int, n_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Starting values of a panel's rows: gate and up biases, or zeros (gate is empty if ungated)."""
    first = np.zeros(n_columns if plan[GATED] else 0, np.float32)
    second = np.zeros(n_columns, np.float32)
    if plan[HAS_BIAS]:
        first[:] = floats_at(record + plan[GATE_BIAS] + 4 * panel * n_columns, first.size)
        second[:] = floats_at(record + plan[UP_BIAS] + 4 * panel * n_columns, second.size)
    return first, second


@inline_kernel
def _finish_up(
    plan: np.ndarray,
    parameters: np.ndarray,
    buffer: np.ndarray,
    column: int,
    n_columns: int,
    start: int,
    n_rows: int,
    h: np.ndarray,
) -> None:
    """Activation of each row of `buffer`, written to columns column .. column + n_columns of the rows of `h`."""
    row_bytes = plan[INTER] // BLOCK_COLUMNS * plan[X_BYTES]
    n_true = max(0, min(n_columns, plan[INTER_TRUE] - column))  # padding stays 0
    block = column // BLOCK_COLUMNS * plan[X_BYTES]
    for row in range(n_rows):
        values = buffer[row * PANEL_ROWS : (row + 1) * PANEL_ROWS]
        if plan[GATED]:
            gate_times_up(plan[KIND], parameters, values[:INTERLEAVE], values[INTERLEAVE:], n_true)
        else:
            activate(plan[KIND], parameters[0], values, n_true)
        target = (start + row) * row_bytes + block
        _write_block(plan, values, column % BLOCK_COLUMNS, n_columns, h[target : target + plan[X_BYTES]])


@inline_kernel
def _down(
    plan: np.ndarray,
    records: np.ndarray,
    starts: np.ndarray,
    flat: np.ndarray,
    weights: np.ndarray,
    h: np.ndarray,
    out_rows: np.ndarray,
    counters: np.ndarray,
) -> None:
    """Tasks of region 2: 64 output columns of an expert for all its tokens."""
    n_panels = plan[HIDDEN] // PANEL_ROWS
    n_blocks = plan[INTER] // BLOCK_COLUMNS
    buffer = np.empty(ROW_CHUNK * PANEL_ROWS, np.float32)
    bias = np.zeros(PANEL_ROWS, np.float32)
    ids = np.arange(ROW_CHUNK).astype(np.int32)
    row_bytes = n_blocks * plan[X_BYTES]
    while True:
        task = take_ticket(counters.ctypes.data + 8 * REGION_2)
        if task >= records.size * n_panels:
            return
        expert, panel = divmod(task, n_panels)
        record = np.int64(records[expert])
        matrix = record + plan[DOWN] + panel * PANEL_BLOCKS * n_blocks * plan[BLOCK_BYTES]
        if plan[HAS_BIAS]:
            bias[:] = floats_at(record + plan[DOWN_BIAS] + 4 * panel * PANEL_ROWS, PANEL_ROWS)
        for start in range(starts[expert], starts[expert + 1], ROW_CHUNK):
            n_rows = min(ROW_CHUNK, starts[expert + 1] - start)
            _fill(buffer, bias, bias[:0], n_rows)
            source = h.ctypes.data + start * row_bytes
            _products(plan, matrix, n_blocks, source, ids.ctypes.data, n_rows, buffer.ctypes.data)
            _finish_down(buffer, panel * PANEL_ROWS, flat[start : start + n_rows], weights, out_rows)


@inline_kernel
def _finish_down(
    buffer: np.ndarray, column: int, flat: np.ndarray, weights: np.ndarray, out_rows: np.ndarray
) -> None:
    """Rows of `buffer` times their routing weight, to columns column .. column + 64 of the rows `flat`."""
    for row in range(flat.size):
        values = buffer[row * PANEL_ROWS : (row + 1) * PANEL_ROWS]
        target = out_rows[flat[row], column : column + PANEL_ROWS]
        weight = weights[flat[row]]
        for i in range(target.size):
            target[i] = weight * values[i]
