"""What the threads of the team run for attention: a run of cached tokens of one key and value head at a time."""

import numpy as np

from cpu_kernels.engine.call import LINE
from cpu_kernels.engine.team import run_on_team
from cpu_kernels.jit.compiled import Real, Whole, Worker, inline_kernel, kernel
from cpu_kernels.jit.primitives import (
    bits_of_float,
    call_attend,
    float_from_bits,
    floats_at,
    int64s_at,
    take_ticket,
)
from cpu_kernels.simd.attention import CHUNK, HEAD_BLOCK, LOWEST, RUN

# A call as the worker sees it: int64. Strides and sizes of keys and values in bytes, others in elements.
(ATTEND_BLOCK, ATTEND_ONE, WORKER, N_BATCH, N_KV_HEADS, GROUP_HEADS, N_TOKENS, DIM, V_DIM, QUERY, KEYS, K_BATCH, K_HEAD,
 K_TOKEN, VALUES, V_BATCH, V_HEAD, V_TOKEN, BIAS, PARTS, STATS, COUNTER, CALL_SIZE) = range(23)  # fmt: skip


def _attend(call_address: int, thread: int) -> None:
    """Worker. Task: RUN tokens of one head of keys and values, for the query heads that share it."""
    call = int64s_at(call_address, CALL_SIZE)
    scores = np.empty(HEAD_BLOCK * CHUNK, np.float32)
    n_chunks = _chunks(call[N_TOKENS])
    n_tasks = call[N_BATCH] * call[N_KV_HEADS] * n_chunks
    while True:
        task = take_ticket(call[COUNTER])
        if task >= n_tasks:
            return
        pair, chunk = task // n_chunks, task % n_chunks
        _attend_chunk(call, pair // call[N_KV_HEADS], pair % call[N_KV_HEADS], chunk, scores.ctypes.data)


@inline_kernel
def _attend_chunk(call: np.ndarray, batch: Whole, kv_head: Whole, chunk: Whole, scores: Whole) -> None:
    first = chunk * RUN
    n_tokens = min(RUN, call[N_TOKENS] - first)
    keys = call[KEYS] + batch * call[K_BATCH] + kv_head * call[K_HEAD] + first * call[K_TOKEN]
    values = call[VALUES] + batch * call[V_BATCH] + kv_head * call[V_HEAD] + first * call[V_TOKEN]
    bias = call[BIAS] + 4 * (batch * call[N_TOKENS] + first)
    group = call[GROUP_HEADS]
    first_head = (batch * call[N_KV_HEADS] + kv_head) * group
    head = 0
    while head < group:
        whole = group - head >= HEAD_BLOCK
        row = first_head + head
        part = chunk * call[N_BATCH] * call[N_KV_HEADS] * group + row
        call_attend(
            call[ATTEND_BLOCK] if whole else call[ATTEND_ONE],
            call[QUERY] + 4 * row * call[DIM], keys, call[K_TOKEN], values, call[V_TOKEN], bias, n_tokens,
            call[DIM], call[V_DIM], scores, call[STATS] + 8 * part, call[PARTS] + 4 * part * call[V_DIM],
            keys, 0, 0,
        )  # fmt: skip
        head += HEAD_BLOCK if whole else 1


@inline_kernel
def _chunks(n_tokens: Whole) -> Whole:
    return (n_tokens + RUN - 1) // RUN


ATTEND_WORK = Worker(_attend)


def attention_bytes(n_rows: int, n_batch: int, n_tokens: int, dim: int, v_dim: int) -> int:
    """Workspace that `run_attention` needs for a call of n_rows = batch * heads query rows."""
    n_chunks = -(-n_tokens // RUN)
    return 8 * (CALL_SIZE + 1) + 4 * (n_rows * dim + n_batch * n_tokens + n_chunks * n_rows * (v_dim + 2)) + 7 * LINE


@kernel
def run_attention(
    kernels: tuple[int, int, int], sizes: tuple[int, int, int, int, int, int], scale: float, query: np.ndarray,
    keys: tuple[int, int, int, int], values: tuple[int, int, int, int], bias: np.ndarray, out: np.ndarray,
    workspace: np.ndarray, n_threads: int,
) -> None:  # fmt: skip
    """out = softmax(scale * query . keys + bias) . values, of bfloat16 as its bits in int16.

    kernels: addresses of `attend` for HEAD_BLOCK heads, for one, and of the worker. sizes: batch, kv_heads, heads that
    share one, tokens, dim, v_dim. query int16 [rows * dim], out int16 [rows * v_dim], rows = batch * heads. keys,
    values: address, then the bytes from one batch, head and token to the next. bias float32 [batch * tokens] of at
    least LOWEST, or empty. workspace uint8 [attention_bytes(...)].

    The same bits for any number of threads: a run is always the same tokens, and runs are joined in their order.
    """
    n_batch, n_kv_heads, group, n_tokens, dim, _ = sizes
    n_rows, n_chunks = n_batch * n_kv_heads * group, _chunks(n_tokens)
    address = _aligned(workspace.ctypes.data)
    call = int64s_at(address, CALL_SIZE)
    call[ATTEND_BLOCK], call[ATTEND_ONE], call[WORKER] = kernels
    call[N_BATCH], call[N_KV_HEADS], call[GROUP_HEADS], call[N_TOKENS], call[DIM], call[V_DIM] = sizes
    call[KEYS], call[K_BATCH], call[K_HEAD], call[K_TOKEN] = keys
    call[VALUES], call[V_BATCH], call[V_HEAD], call[V_TOKEN] = values
    call[COUNTER] = _aligned(address + 8 * CALL_SIZE)
    call[QUERY] = _aligned(call[COUNTER] + 8)
    call[BIAS] = _aligned(call[QUERY] + 4 * n_rows * dim)
    call[STATS] = _aligned(call[BIAS] + 4 * n_batch * n_tokens)
    call[PARTS] = _aligned(call[STATS] + 8 * n_chunks * n_rows)
    int64s_at(call[COUNTER], 1)[0] = 0
    _prepare(call, query, np.float32(scale), bias)
    run_on_team(call[WORKER], address, n_threads)
    _join_all(call, out)


@inline_kernel
def _aligned(address: Whole) -> Whole:
    return (address + LINE - 1) // LINE * LINE


@inline_kernel
def _prepare(call: np.ndarray, query: np.ndarray, scale: Real, bias: np.ndarray) -> None:
    """Writes the scaled query and the bias, which is 0 where there is none, to the workspace."""
    scaled = floats_at(call[QUERY], query.size)
    for i in range(query.size):
        scaled[i] = scale * float_from_bits(np.int32(query[i]) << 16)
    added = floats_at(call[BIAS], call[N_BATCH] * call[N_TOKENS])
    if bias.size:
        added[:] = bias
    else:
        added[:] = 0


@inline_kernel
def _join_all(call: np.ndarray, out: np.ndarray) -> None:
    n_rows, n_chunks = call[N_BATCH] * call[N_KV_HEADS] * call[GROUP_HEADS], _chunks(call[N_TOKENS])
    v_dim = call[V_DIM]
    parts = floats_at(call[PARTS], n_chunks * n_rows * v_dim).reshape(n_chunks, n_rows, v_dim)
    stats = floats_at(call[STATS], n_chunks * n_rows * 2).reshape(n_chunks, n_rows, 2)
    joined = np.empty(v_dim, np.float32)
    for row in range(n_rows):
        _join(parts[:, row], stats[:, row], joined)
        for i in range(v_dim):
            out[row * v_dim + i] = _bf16_bits(joined[i])


@inline_kernel
def _join(parts: np.ndarray, stats: np.ndarray, result: np.ndarray) -> None:
    """result = the attention of one row from its runs: parts [chunks, v_dim], stats [chunks, 2]."""
    top = np.float32(LOWEST)
    for chunk in range(stats.shape[0]):
        top = max(top, stats[chunk, 0])
    total = np.float32(0)
    result[:] = 0
    for chunk in range(stats.shape[0]):
        share = np.exp(stats[chunk, 0] - top)
        total += share * stats[chunk, 1]
        for i in range(result.size):
            result[i] += share * parts[chunk, i]
    for i in range(result.size):
        result[i] /= total


@inline_kernel
def _bf16_bits(x: Real) -> Whole:
    """The bits of x, rounded to the nearest bfloat16 (ties to even); NaN stays NaN."""
    bits = bits_of_float(x)
    if x != x:
        return (bits >> 16) | 64
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
