"""The driver: all experts of a layer in one compiled call, in two parallel regions.

Region 1 does gate, up, activation and requantisation, region 2 down and the routing weight. Threads take tasks (an
expert x 64 packed rows) from a counter, so unequal loads and a busy core even out. Each output row depends on its own
token only, so results are the same bits for any thread count, order, or split of the experts over calls.
"""

import numpy as np
from numba import prange

from cpu_kernels.compiled import Worker, inline_kernel, kernel, parallel_kernel
from cpu_kernels.elementwise import ABSOLUTE_BITS, INFINITY_BITS, activate, gate_times_up, quantise_block
from cpu_kernels.layout import BLOCK_COLUMNS, BLOCK_ROWS, INTERLEAVE
from cpu_kernels.primitives import bytes_at, call_panel, call_worker, floats_at, int32s_at, int64s_at, take_ticket
from cpu_kernels.simd.tiles import PANEL_ROWS

# A call, as the workers see it, is an int64 vector. First the plan of its spec (written by the numba backend; sizes are
# padded unless called TRUE), then what `run_layer` adds: sizes and addresses.
(PANEL, HIDDEN_TRUE, INTER_TRUE, HIDDEN, INTER, BLOCK_BYTES, X_BYTES, CODE_OFFSET, GATED, KIND, DOWN, HAS_BIAS,
 GATE_BIAS, UP_BIAS, DOWN_BIAS, SPLIT_BLOCKS, PREPARE_WORKER, UP_WORKER, DOWN_WORKER, PLAN_SIZE) = range(20)  # fmt: skip
(N_EXPERTS, N_TOKENS, N_ROWS, PARAMETERS, RECORDS, INPUT, WEIGHTS, OUT_ROWS, STARTS, TOKENS, FLAT, WANTED, X, H,
 COUNTERS, CALL_SIZE) = range(PLAN_SIZE, PLAN_SIZE + 16)  # fmt: skip

ROW_CHUNK = 128  # tokens a task handles at a time: its float32 results (32 KiB) and their activations stay in L2
SMALL_ROWS = 8  # up to this many tokens a task streams its weights once, over all columns
SMALL_TOKENS = 8  # up to this many tokens are prepared by the calling thread
LINE = 64  # bytes: sections of the workspace and counters are this far apart
# Counters (int64, a cache line each): next token, next task of region 1 and 2, 1 + a token that is not finite
NEXT_TOKEN, NEXT_UP, NEXT_DOWN, NOT_FINITE, N_COUNTERS = range(5)
PANEL_BLOCKS = PANEL_ROWS // BLOCK_ROWS
N_PARAMETERS = 5


def workspace_bytes(n_experts: int, n_tokens: int, n_rows: int, x_row_bytes: int, h_row_bytes: int) -> int:
    """Workspace that `run_layer` needs for a call."""
    tables = 8 * CALL_SIZE + LINE * N_COUNTERS + 8 * (n_experts + 1) + 8 * n_rows + n_tokens
    return tables + n_tokens * x_row_bytes + n_rows * h_row_bytes + 10 * LINE


@kernel
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
    workspace: np.ndarray,
    n_threads: int,
) -> int:
    """out_rows[r] = weights[r] * FFN(hidden[r // top_k]); returns -1, or a token whose input is not finite.

    plan int64 [PLAN_SIZE]; parameters float32, see `elementwise`; records uint64 [n], positions int32 [n]; offsets,
    rows, weights, top_k: fields of a Dispatch; hidden float32 [T, H]; workspace uint8 [workspace_bytes(...)].
    """
    address = (workspace.ctypes.data + LINE - 1) // LINE * LINE
    call = int64s_at(address, CALL_SIZE)
    for i in range(PLAN_SIZE):
        call[i] = plan[i]
    call[N_EXPERTS], call[N_TOKENS] = positions.size, hidden.shape[0]
    call[PARAMETERS], call[RECORDS] = parameters.ctypes.data, records.ctypes.data
    call[INPUT], call[WEIGHTS], call[OUT_ROWS] = hidden.ctypes.data, weights.ctypes.data, out_rows.ctypes.data
    _lay_out(call, address + 8 * CALL_SIZE, positions, offsets, rows, top_k)
    _region(plan[PREPARE_WORKER], address, 1 if hidden.shape[0] <= SMALL_TOKENS else n_threads)
    not_finite = int64s_at(call[COUNTERS] + LINE * NOT_FINITE, 1)[0]
    if not_finite > 0:
        return not_finite - 1
    _region(plan[UP_WORKER], address, n_threads)
    _region(plan[DOWN_WORKER], address, n_threads)
    return -1


@inline_kernel
def _region(worker: int, call: int, n_threads: int) -> None:
    if n_threads == 1:
        call_worker(worker, call, 0)
    else:
        run_on_threads(worker, call, n_threads)


@parallel_kernel
def run_on_threads(worker: int, call: int, n_threads: int) -> None:
    """Runs the worker at an address once on each of n_threads threads of the pool."""
    for thread in prange(n_threads):
        call_worker(worker, call, thread)


@inline_kernel
def _lay_out(
    call: np.ndarray, free: int, positions: np.ndarray, offsets: np.ndarray, rows: np.ndarray, top_k: int
) -> None:
    """Divides the workspace and fills its tables: first local row of each expert, token and flat row of each local row."""
    n_rows = 0
    for position in positions:
        n_rows += offsets[position + 1] - offsets[position]
    call[N_ROWS] = n_rows
    n_tokens = call[N_TOKENS]
    free = _section(call, COUNTERS, free, LINE * N_COUNTERS)
    free = _section(call, STARTS, free, 8 * (positions.size + 1))
    free = _section(call, TOKENS, free, 4 * n_rows)
    free = _section(call, FLAT, free, 4 * n_rows)
    free = _section(call, WANTED, free, n_tokens)
    free = _section(call, X, free, n_tokens * _row_bytes(call, HIDDEN))
    _section(call, H, free, n_rows * _row_bytes(call, INTER))
    int64s_at(call[COUNTERS], 8 * N_COUNTERS)[:] = 0
    starts, wanted = int64s_at(call[STARTS], positions.size + 1), bytes_at(call[WANTED], n_tokens)
    tokens, flat = int32s_at(call[TOKENS], n_rows), int32s_at(call[FLAT], n_rows)
    wanted[:] = 0
    n = 0
    for index in range(positions.size):
        starts[index] = n
        for place in range(offsets[positions[index]], offsets[positions[index] + 1]):
            flat[n] = rows[place]
            tokens[n] = rows[place] // top_k
            wanted[tokens[n]] = 1
            n += 1
    starts[positions.size] = n


@inline_kernel
def _section(call: np.ndarray, name: int, free: int, n_bytes: int) -> int:
    start = (free + LINE - 1) // LINE * LINE
    call[name] = start
    return start + n_bytes


@inline_kernel
def _row_bytes(call: np.ndarray, size: int) -> int:
    """Bytes of a row of activations of HIDDEN or INTER columns."""
    return call[size] // BLOCK_COLUMNS * call[X_BYTES]


@inline_kernel
def _counter(call: np.ndarray, name: int) -> int:
    return call[COUNTERS] + LINE * name


def _prepare(call_address: int, thread: int) -> None:
    """Worker: quantises (or copies, padded) the wanted tokens into X."""
    call = int64s_at(call_address, CALL_SIZE)
    wanted = bytes_at(call[WANTED], call[N_TOKENS])
    n_true, row_bytes, block_bytes = call[HIDDEN_TRUE], _row_bytes(call, HIDDEN), call[X_BYTES]
    padded = np.zeros(BLOCK_COLUMNS, np.float32)
    while True:
        token = take_ticket(_counter(call, NEXT_TOKEN))
        if token >= wanted.size:
            return
        if not wanted[token]:
            continue
        source = floats_at(call[INPUT] + 4 * n_true * token, n_true)
        target = bytes_at(call[X] + row_bytes * token, row_bytes)
        for block in range(call[HIDDEN] // BLOCK_COLUMNS):
            columns = source[block * BLOCK_COLUMNS : (block + 1) * BLOCK_COLUMNS]
            if columns.size < BLOCK_COLUMNS:
                for i in range(columns.size):
                    padded[i] = columns[i]
                columns = padded
            if not _write_block(call, columns, 0, BLOCK_COLUMNS, target[block * block_bytes : (block + 1) * block_bytes]):
                int64s_at(_counter(call, NOT_FINITE), 1)[0] = token + 1


@inline_kernel
def _write_block(call: np.ndarray, values: np.ndarray, place: int, size: int, out: np.ndarray) -> bool:
    """values[:size] as columns place .. place + size of a block of activations; False if a value is not finite."""
    if call[CODE_OFFSET] > 0:
        return quantise_block(values, place, size, call[CODE_OFFSET], out)
    target = out.view(np.float32)
    bits = values.view(np.int32)
    largest = np.int32(0)
    for i in range(size):
        target[place + i] = values[i]
        largest = max(largest, bits[i] & ABSOLUTE_BITS)
    return largest < INFINITY_BITS


@inline_kernel
def _fill(buffer: np.ndarray, bias: np.ndarray, n_rows: int) -> None:
    """Each of n_rows rows of 64 = bias."""
    for row in range(n_rows):
        for i in range(PANEL_ROWS):
            buffer[row * PANEL_ROWS + i] = bias[i]


@inline_kernel
def _products(
    call: np.ndarray, matrix: int, n_blocks: int, x: int, row_ids: int, n_rows: int, out: int
) -> None:
    """Adds 64 matrix rows times n_rows activation rows to `out`, in column parts that fit L1 if there are many rows."""
    row_block_bytes = n_blocks * call[BLOCK_BYTES]
    part = n_blocks if n_rows <= SMALL_ROWS else call[SPLIT_BLOCKS]
    for block in range(0, n_blocks, part):
        call_panel(
            call[PANEL],
            matrix + block * call[BLOCK_BYTES],
            row_block_bytes,
            min(part, n_blocks - block),
            x + block * call[X_BYTES],
            n_blocks * call[X_BYTES],
            row_ids,
            n_rows,
            out,
        )


def _up(call_address: int, thread: int) -> None:
    """Worker of region 1. Task: 32 (gated) or 64 intermediate columns of an expert for all its tokens."""
    call = int64s_at(call_address, CALL_SIZE)
    records, starts = int64s_at(call[RECORDS], call[N_EXPERTS]), int64s_at(call[STARTS], call[N_EXPERTS] + 1)
    n_columns = INTERLEAVE if call[GATED] else PANEL_ROWS
    n_panels, n_blocks = call[INTER] // n_columns, call[HIDDEN] // BLOCK_COLUMNS
    buffer = np.empty(ROW_CHUNK * PANEL_ROWS, np.float32)
    bias = np.zeros(PANEL_ROWS, np.float32)
    while True:
        task = take_ticket(_counter(call, NEXT_UP))
        if task >= records.size * n_panels:
            return
        expert, panel = task // n_panels, task % n_panels
        matrix = records[expert] + panel * PANEL_BLOCKS * n_blocks * call[BLOCK_BYTES]
        _read_up_bias(call, records[expert], panel * n_columns, bias)
        for start in range(starts[expert], starts[expert + 1], ROW_CHUNK):
            n_rows = min(ROW_CHUNK, starts[expert + 1] - start)
            _fill(buffer, bias, n_rows)
            _products(call, matrix, n_blocks, call[X], call[TOKENS] + 4 * start, n_rows, buffer.ctypes.data)
            _finish_up(call, buffer, panel * n_columns, n_columns, start, n_rows)


@inline_kernel
def _read_up_bias(call: np.ndarray, record: int, column: int, bias: np.ndarray) -> None:
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
def _finish_up(call: np.ndarray, buffer: np.ndarray, column: int, n_columns: int, start: int, n_rows: int) -> None:
    """Activation of each row of `buffer`, written to columns column .. column + n_columns of the rows of H."""
    parameters = floats_at(call[PARAMETERS], N_PARAMETERS)
    n_true = max(0, min(n_columns, call[INTER_TRUE] - column))  # padding stays 0
    target = call[H] + start * _row_bytes(call, INTER) + column // BLOCK_COLUMNS * call[X_BYTES]
    for row in range(n_rows):
        values = buffer[row * PANEL_ROWS : (row + 1) * PANEL_ROWS]
        if call[GATED]:
            gate_times_up(call[KIND], parameters, values[:INTERLEAVE], values[INTERLEAVE:], n_true)
        else:
            activate(call[KIND], parameters[0], values, n_true)
        out = bytes_at(target + row * _row_bytes(call, INTER), call[X_BYTES])
        _write_block(call, values, column % BLOCK_COLUMNS, n_columns, out)


def _down(call_address: int, thread: int) -> None:
    """Worker of region 2. Task: 64 output columns of an expert for all its tokens."""
    call = int64s_at(call_address, CALL_SIZE)
    records, starts = int64s_at(call[RECORDS], call[N_EXPERTS]), int64s_at(call[STARTS], call[N_EXPERTS] + 1)
    n_panels, n_blocks = call[HIDDEN] // PANEL_ROWS, call[INTER] // BLOCK_COLUMNS
    buffer = np.empty(ROW_CHUNK * PANEL_ROWS, np.float32)
    bias = np.zeros(PANEL_ROWS, np.float32)
    ids = np.arange(ROW_CHUNK).astype(np.int32)
    while True:
        task = take_ticket(_counter(call, NEXT_DOWN))
        if task >= records.size * n_panels:
            return
        expert, panel = task // n_panels, task % n_panels
        matrix = records[expert] + call[DOWN] + panel * PANEL_BLOCKS * n_blocks * call[BLOCK_BYTES]
        if call[HAS_BIAS]:
            source = floats_at(records[expert] + call[DOWN_BIAS] + 4 * panel * PANEL_ROWS, PANEL_ROWS)
            for i in range(PANEL_ROWS):
                bias[i] = source[i]
        for start in range(starts[expert], starts[expert + 1], ROW_CHUNK):
            n_rows = min(ROW_CHUNK, starts[expert + 1] - start)
            _fill(buffer, bias, n_rows)
            h = call[H] + start * _row_bytes(call, INTER)
            _products(call, matrix, n_blocks, h, ids.ctypes.data, n_rows, buffer.ctypes.data)
            _finish_down(call, buffer, panel * PANEL_ROWS, start, n_rows)


@inline_kernel
def _finish_down(call: np.ndarray, buffer: np.ndarray, column: int, start: int, n_rows: int) -> None:
    """Rows of `buffer` times their routing weight, to columns column .. column + 64 of their rows of OUT_ROWS."""
    flat = int32s_at(call[FLAT] + 4 * start, n_rows)
    n_columns = min(PANEL_ROWS, call[HIDDEN_TRUE] - column)
    for row in range(n_rows):
        values = buffer[row * PANEL_ROWS : (row + 1) * PANEL_ROWS]
        target = floats_at(call[OUT_ROWS] + 4 * (flat[row] * call[HIDDEN_TRUE] + column), n_columns)
        weight = floats_at(call[WEIGHTS] + 4 * flat[row], 1)[0]
        for i in range(n_columns):
            target[i] = weight * values[i]


PREPARE, UP, DOWN_PROJECTION = Worker(_prepare), Worker(_up), Worker(_down)
