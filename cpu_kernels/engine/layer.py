"""The drivers: all experts of a layer (or one linear layer) in one compiled call.

Two parallel regions: gate, up, activation and requantisation; then down and the routing weight. Each output row depends
on its own token only, so results are the same bits for any thread count, order, or split of the experts over calls.
"""

import numpy as np

from cpu_kernels.engine.call import (
    CALL_SIZE,
    COUNTERS,
    DOWN_WORKER,
    EXACT_PANEL,
    FLAT,
    H_PANEL,
    IN,
    INEXACT,
    INPUT,
    INTER,
    LINE,
    N_COUNTERS,
    N_EXPERTS,
    N_ROWS,
    N_THREADS,
    N_TOKENS,
    NOT_FINITE,
    OUT_ROWS,
    PANEL,
    PARAMETERS,
    PLAN_SIZE,
    PREPARE_WORKER,
    RECORDS,
    STARTS,
    TOKENS,
    UP_WORKER,
    WANTED,
    WEIGHTS,
    X_PANEL,
    H,
    X,
    counter_address,
    row_bytes_of,
)
from cpu_kernels.engine.team import run_on_team
from cpu_kernels.jit.compiled import Whole, inline_kernel, kernel
from cpu_kernels.jit.primitives import bytes_at, int32s_at, int64s_at

SMALL_TOKENS = 8  # up to this many tokens are prepared by the calling thread


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

    plan int64 [PLAN_SIZE]; parameters float32, see `simd.rows`; records uint64 [n], positions int32 [n]; offsets,
    rows, weights, top_k: fields of a Dispatch; hidden float32 [T, H]; workspace uint8 [workspace_bytes(...)].
    """
    address = (workspace.ctypes.data + LINE - 1) // LINE * LINE
    call = int64s_at(address, CALL_SIZE)
    for i in range(PLAN_SIZE):
        call[i] = plan[i]
    call[N_EXPERTS], call[N_TOKENS], call[N_THREADS] = positions.size, hidden.shape[0], n_threads
    call[PARAMETERS], call[RECORDS] = parameters.ctypes.data, records.ctypes.data
    call[INPUT], call[WEIGHTS], call[OUT_ROWS] = hidden.ctypes.data, weights.ctypes.data, out_rows.ctypes.data
    _lay_out(call, address + 8 * CALL_SIZE, positions, offsets, rows, top_k)
    run_on_team(plan[PREPARE_WORKER], address, 1 if hidden.shape[0] <= SMALL_TOKENS else n_threads)
    bad: int = _not_finite(call)
    if bad >= 0:
        return bad
    call[X_PANEL], call[H_PANEL] = _panel_for_x(call), call[PANEL]
    run_on_team(plan[UP_WORKER], address, n_threads)
    run_on_team(plan[DOWN_WORKER], address, n_threads)
    return -1


@kernel
def run_linear_layer(
    plan: np.ndarray, record: int, x: np.ndarray, out: np.ndarray, workspace: np.ndarray, n_threads: int
) -> int:
    """out = x @ W.T for one packed matrix; returns -1, or a row of x that is not finite.

    x float32 [T, K], out float32 [T, N], workspace as for one expert with T rows.
    """
    address = (workspace.ctypes.data + LINE - 1) // LINE * LINE
    call = int64s_at(address, CALL_SIZE)
    for i in range(PLAN_SIZE):
        call[i] = plan[i]
    n_tokens = x.shape[0]
    call[N_EXPERTS], call[N_TOKENS], call[N_ROWS], call[WEIGHTS] = 1, n_tokens, n_tokens, 0
    call[INPUT], call[OUT_ROWS], call[N_THREADS] = x.ctypes.data, out.ctypes.data, n_threads
    free = address + 8 * CALL_SIZE
    free = _section(call, COUNTERS, free, LINE * N_COUNTERS)
    free = _section(call, RECORDS, free, 8)
    free = _section(call, STARTS, free, 16)
    free = _section(call, FLAT, free, 4 * n_tokens)
    free = _section(call, WANTED, free, n_tokens)
    _section(call, X, free, n_tokens * row_bytes_of(call, IN))
    call[H] = call[X]
    _clear_counters(call)
    int64s_at(call[RECORDS], 1)[0] = record
    starts = int64s_at(call[STARTS], 2)
    starts[0], starts[1] = 0, n_tokens
    flat, wanted = int32s_at(call[FLAT], n_tokens), bytes_at(call[WANTED], n_tokens)
    for token in range(n_tokens):
        flat[token], wanted[token] = token, 1
    run_on_team(plan[PREPARE_WORKER], address, 1 if n_tokens <= SMALL_TOKENS else n_threads)
    bad: int = _not_finite(call)
    if bad >= 0:
        return bad
    call[H_PANEL] = _panel_for_x(call)
    run_on_team(plan[DOWN_WORKER], address, n_threads)
    return -1


@inline_kernel
def _lay_out(
    call: np.ndarray, free: int, positions: np.ndarray, offsets: np.ndarray, rows: np.ndarray, top_k: int
) -> None:
    """Divides the workspace and fills its tables: first row of each expert, token and flat row of each row."""
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
    free = _section(call, X, free, n_tokens * row_bytes_of(call, IN))
    _section(call, H, free, n_rows * row_bytes_of(call, INTER))
    _clear_counters(call)
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
def _clear_counters(call: np.ndarray) -> None:
    for name in range(N_COUNTERS):
        int64s_at(counter_address(call, name), 1)[0] = 0


@inline_kernel
def _panel_for_x(call: np.ndarray) -> Whole:
    """The panel for the prepared tokens: that of bfloat16 pairs where they are bfloat16 (the bits are the same)."""
    return call[PANEL] if int64s_at(counter_address(call, INEXACT), 1)[0] else call[EXACT_PANEL]


@inline_kernel
def _not_finite(call: np.ndarray) -> Whole:
    """A token whose input is not finite, or -1."""
    return int64s_at(counter_address(call, NOT_FINITE), 1)[0] - 1
