"""Layer calls of few tokens from tensor to tensor in compiled calls: the router's tensors in, the layer's output out.

`run_routed` is a whole call; `read_call` and `sum_rows` are its two ends, where experts also run elsewhere.

The same arithmetic in the same order as `build_dispatch`, `run_layer` and `combine` one after another, so the same
bits. What it saves is the way between them: the kernels of each layer stream so many weights through the caches that
every array or tensor made in Python after them, and every function called, costs tens of microseconds.
"""

import numpy as np
import torch

from cpu_kernels.engine.call import LINE, PLAN_SIZE
from cpu_kernels.engine.dispatch import combine_rows, group_rows, group_rows_into, present_rows
from cpu_kernels.engine.layer import run_layer
from cpu_kernels.jit.compiled import Real, inline_kernel, kernel
from cpu_kernels.jit.primitives import bits_of_float, bytes_at, float_from_bits, floats_at, halves_at, int64s_at

MAX_TOKENS = 16
"""With more tokens the kernels take so long that the short way saves nothing."""
FLOATS = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of hidden states and routing weights that are read and written here, and how the compiled call names them."""
FLOAT32 = 0
REFUSED, NOT_FINITE = -1, -2
"""Results of `run_routed` and `read_call`: routing that `build_dispatch` refuses; of the former, NOT_FINITE - token: a
hidden state is not finite."""
(PLAN, PARAMETERS, N_PARAMETERS, RECORDS, N_RECORDS, WORKSPACE, WORKSPACE_BYTES, SCRATCH_BYTES, N_TOKENS, TOP_K, WIDTH,
 N_THREADS, SERIAL_EXPERTS, SHEET_SIZE) = range(14)  # fmt: skip
"""Places of a sheet int64[SHEET_SIZE], on which is written what stays the same from call to call of a layer: addresses
and sizes. Passing a number to compiled code takes a tenth of what an array takes."""
NAN_BITS = np.uint16(0x7FC0)
NO_PLACE = -1
"""Where a device and the CPU share a call's (token, expert) pairs: no slot of the device has the expert, and the pair's
row is not among those of the host. Every negative number means this."""


Places = tuple[int, int, int, int, int, int, int]
"""Of a call's tensors on the host: address of ids, address and kind of weights, tokens, experts of a token, address and
kind of hidden states; kinds as in FLOATS."""


def places_of(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, hidden_size: int
) -> Places | None:
    """Where `run_routed` and `read_call` read a call's tensors: few tokens on the host, contiguous, known dtypes,
    shapes that fit. None for others, and for those that are wrong: the long way tells what is."""
    shape, wide = top_k_index.shape, hidden.shape
    kind, weights_kind = FLOATS.get(hidden.dtype), FLOATS.get(top_k_weights.dtype)
    if (
        len(shape) == 2
        and 0 < shape[0] <= MAX_TOKENS
        and shape == top_k_weights.shape
        and wide[-1] == hidden_size
        and (wide[0] == shape[0] if len(wide) == 2 else hidden.numel() == shape[0] * hidden_size)
        and top_k_index.dtype is torch.int64
        and kind is not None
        and weights_kind is not None
        and hidden.is_cpu
        and top_k_index.is_cpu
        and top_k_weights.is_cpu
        and hidden.is_contiguous()
        and top_k_index.is_contiguous()
        and top_k_weights.is_contiguous()
    ):
        index, weights = top_k_index.data_ptr(), top_k_weights.data_ptr()
        return index, weights, weights_kind, shape[0], shape[1], hidden.data_ptr(), kind
    return None


def scratch_bytes(n_tokens: int, n_rows: int, hidden: int) -> int:
    """Workspace that `run_routed` needs beside that of `run_layer`: inputs and result rows in float32."""
    return 4 * (n_tokens + n_rows) * hidden + 2 * LINE


@kernel
def run_routed(
    sheet_address: int, index: int, weights: int, weights_kind: int, hidden: int, hidden_kind: int, out: int
) -> int:
    """out[t] = sum over j of weights[t, j] * FFN of expert index[t, j] (hidden[t]). Returns the number of active
    experts, REFUSED, or NOT_FINITE - token.

    index, weights, hidden, out: where int64 [T, k], floats [T, k], [T, H] and [T, H] lie; out has the dtype of hidden.
    The sheet has the plan, the records' addresses uint64 [E], and a workspace uint8, of which the last SCRATCH_BYTES
    are used here. Up to SERIAL_EXPERTS experts run on one thread.
    """
    sheet = int64s_at(sheet_address, SHEET_SIZE)
    n_tokens, top_k, hidden_size, scratch = sheet[N_TOKENS], sheet[TOP_K], sheet[WIDTH], sheet[SCRATCH_BYTES]
    plan, parameters = int64s_at(sheet[PLAN], PLAN_SIZE), floats_at(sheet[PARAMETERS], sheet[N_PARAMETERS])
    addresses = int64s_at(sheet[RECORDS], sheet[N_RECORDS]).view(np.uint64)
    workspace = bytes_at(sheet[WORKSPACE], sheet[WORKSPACE_BYTES])
    n_rows, size = n_tokens * top_k, n_tokens * hidden_size
    routing = _read(weights, n_rows, weights_kind)
    ids, offsets, rows, problem = group_rows(int64s_at(index, n_rows), routing, addresses.size)
    if problem >= 0:
        return REFUSED
    start = (workspace.ctypes.data + workspace.size - scratch + LINE - 1) // LINE * LINE
    inputs = floats_at(start, size)
    _read_into(inputs, hidden, hidden_kind)
    results = floats_at(start + 4 * size, n_rows * hidden_size).reshape(n_rows, hidden_size)
    threads = sheet[N_THREADS] if ids.size > sheet[SERIAL_EXPERTS] else 1
    if ids.size:
        positions = np.arange(ids.size).astype(np.int32)
        bad = run_layer(
            plan, parameters, addresses[ids], positions, offsets, rows, routing, top_k,
            inputs.reshape(n_tokens, hidden_size), results, workspace[: workspace.size - scratch], threads,
        )  # fmt: skip
        if bad >= 0:
            return NOT_FINITE - bad
    sums = floats_at(out, size) if hidden_kind == FLOAT32 else inputs
    combine_rows(results, present_rows(rows, n_rows), top_k, sums.reshape(n_tokens, hidden_size))
    if hidden_kind != FLOAT32:
        _write_halves(halves_at(out, size), sums)
    return int(ids.size)


@kernel
def run_some(
    sheet_address: int, records: np.ndarray, positions: np.ndarray, offsets: np.ndarray, rows: np.ndarray,
    weights: np.ndarray, hidden: np.ndarray, out_rows: np.ndarray,
) -> int:  # fmt: skip
    """`run_layer` of some experts of a call, with the plan and the workspace of a sheet."""
    sheet = int64s_at(sheet_address, SHEET_SIZE)
    return run_layer(
        int64s_at(sheet[PLAN], PLAN_SIZE), floats_at(sheet[PARAMETERS], sheet[N_PARAMETERS]), records, positions,
        offsets, rows, weights, sheet[TOP_K], hidden, out_rows,
        bytes_at(sheet[WORKSPACE], sheet[WORKSPACE_BYTES]),
        sheet[N_THREADS] if positions.size > sheet[SERIAL_EXPERTS] else 1,
    )  # fmt: skip


@kernel
def read_call(
    index: int, weights: int, weights_kind: int, n_tokens: int, top_k: int, hidden: int, hidden_kind: int,
    host_hidden: np.ndarray, routing: np.ndarray, counts: np.ndarray, expert_ids: np.ndarray, offsets: np.ndarray,
    rows: np.ndarray,
) -> int:  # fmt: skip
    """Fields of a Dispatch in memory of the caller. Returns the number of active experts, or REFUSED.

    index, weights, hidden: addresses as for `run_routed`; host_hidden float32 [T, H] is filled, and so are routing
    float32 [T * k], expert_ids, offsets and rows, as `group_rows_into` says; counts int32 [E] is overwritten.
    """
    n_rows = n_tokens * top_k
    _read_into(routing[:n_rows], weights, weights_kind)
    n_active, problem = group_rows_into(int64s_at(index, n_rows), routing, counts, expert_ids, offsets, rows)
    _read_into(host_hidden.reshape(host_hidden.size), hidden, hidden_kind)
    return REFUSED if problem >= 0 else n_active


@kernel
def sum_rows(results: np.ndarray, rows: np.ndarray, top_k: int, out: int, out_kind: int, n_tokens: int) -> None:
    """`combine` into floats [T, H] at address `out`: results float32 [T * k, H], rows as in a Dispatch."""
    width = results.shape[1]
    size = n_tokens * width
    sums = floats_at(out, size) if out_kind == FLOAT32 else np.empty(size, np.float32)
    combine_rows(results, present_rows(rows, results.shape[0]), top_k, sums.reshape(n_tokens, width))
    if out_kind != FLOAT32:
        _write_halves(halves_at(out, size), sums)


@inline_kernel
def _read(address: int, n: int, kind: int) -> np.ndarray:
    """float32 [n], a copy."""
    values = np.empty(n, np.float32)
    _read_into(values, address, kind)
    return values


@inline_kernel
def _read_into(target: np.ndarray, address: int, kind: int) -> None:
    if kind == FLOAT32:
        target[:] = floats_at(address, target.size)
    else:
        halves = halves_at(address, target.size)
        for i in range(target.size):
            target[i] = float_from_bits(np.int32(np.uint32(halves[i]) << np.uint32(16)))


@inline_kernel
def _write_halves(target: np.ndarray, values: np.ndarray) -> None:
    """Rounds to nearest, ties to even, as torch does."""
    for i in range(target.size):
        target[i] = _half_of(values[i])


@inline_kernel
def _half_of(value: Real) -> Real:
    if value != value:
        return NAN_BITS
    bits = np.uint32(bits_of_float(value))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
