"""Attention of a step's rows over the KV cache: runs of CHUNK cached tokens, then their join, head by head."""

import numpy as np

from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.jit.compiled import Real, Whole, Worker, float_kernel, inline_kernel
from cpu_kernels.jit.primitives import call_attend, floats_at, int64s_at, take_ticket
from cpu_kernels.simd.attention import CHUNK, HEAD_BLOCK, LOWEST, AttendKernel
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.step.floats import FLOAT32, fill, read_row
from cpu_kernels.step.heads import (
    CACHE_SIZE,
    K_HEAD_BYTES,
    K_SEQUENCE,
    K_TOKEN,
    KEYS,
    KIND,
    PAST_FIRST,
    V_HEAD_BYTES,
    V_SEQUENCE,
    V_TOKEN,
    VALUES,
)
from cpu_kernels.step.program import (
    MASK,
    MASK_ROW,
    MAX_ROWS,
    N_ROWS,
    ROW_SIZE,
    ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    SEEN,
    SEQUENCE,
    STATE_SIZE,
    Part,
    Program,
)

(STATE, NEXT, NEXT_JOIN, N_HEADS, N_KV_HEADS, DIM, V_DIM, WINDOW, SINKS, QUERY, PARTS, STATS, MAX_CHUNKS, OUT, OUT_ROW,
 BLOCK_FLOATS, ONE_FLOATS, BLOCK_HALVES, ONE_HALVES, ZEROS, ATTEND_CALL) = range(21)  # fmt: skip
CACHE = ATTEND_CALL


def _attend(call_address: int, thread: int) -> None:
    """Worker. Task: a run of cached tokens of one head of keys and values, for a row's query heads that share it."""
    call = int64s_at(call_address, CACHE + CACHE_SIZE)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = int64s_at(state[ROWS], ROW_SIZE * state[N_ROWS]).reshape(state[N_ROWS], ROW_SIZE)
    scores = state[SCRATCH] + thread * SCRATCH_BYTES
    longest = 0
    for row in range(state[N_ROWS]):
        longest = max(longest, _n_chunks(call, rows[row, SEEN]))
    while True:
        task = take_ticket(call[NEXT])
        if task >= state[N_ROWS] * call[N_KV_HEADS] * longest:
            return
        row, pair = task // (call[N_KV_HEADS] * longest), task % (call[N_KV_HEADS] * longest)
        kv_head, chunk = pair // longest, pair % longest
        if chunk < _n_chunks(call, rows[row, SEEN]):
            _run(call, state, rows[row], row, kv_head, chunk, scores)


@inline_kernel
def _first_seen(call: np.ndarray, seen: Whole) -> Whole:
    """The first cached token that a row looks at."""
    return max(0, seen - call[WINDOW]) if call[WINDOW] else 0


@inline_kernel
def _n_chunks(call: np.ndarray, seen: Whole) -> Whole:
    return (seen - _first_seen(call, seen) + CHUNK - 1) // CHUNK


@inline_kernel
def _run(
    call: np.ndarray, state: np.ndarray, place: np.ndarray, row: Whole, kv_head: Whole, chunk: Whole, scores: Whole
) -> None:
    first = _first_seen(call, place[SEEN]) + chunk * CHUNK
    n_tokens = min(CHUNK, place[SEEN] - first)
    held = first - call[CACHE + PAST_FIRST]
    keys = call[CACHE + KEYS] + place[SEQUENCE] * call[CACHE + K_SEQUENCE] + kv_head * call[CACHE + K_HEAD_BYTES]
    values = call[CACHE + VALUES] + place[SEQUENCE] * call[CACHE + V_SEQUENCE] + kv_head * call[CACHE + V_HEAD_BYTES]
    keys += held * call[CACHE + K_TOKEN]
    values += held * call[CACHE + V_TOKEN]
    bias = state[MASK] + 4 * (place[SEQUENCE] * state[MASK_ROW] + first) if state[MASK] else call[ZEROS]
    group = call[N_HEADS] // call[N_KV_HEADS]
    floats = call[CACHE + KIND] == FLOAT32
    block, one = (call[BLOCK_FLOATS], call[ONE_FLOATS]) if floats else (call[BLOCK_HALVES], call[ONE_HALVES])
    head, dim, v_dim = 0, call[DIM], call[V_DIM]
    while head < group:
        many = group - head >= HEAD_BLOCK and block != 0
        own = kv_head * group + head
        part = (row * call[MAX_CHUNKS] + chunk) * call[N_HEADS] + own
        query = call[QUERY] + 4 * (row * call[N_HEADS] + own) * dim
        stats, out = call[STATS] + 8 * part, call[PARTS] + 4 * part * v_dim
        if one != 0:
            call_attend(
                block if many else one, query, keys, call[CACHE + K_TOKEN], values, call[CACHE + V_TOKEN], bias,
                n_tokens, dim, v_dim, scores, stats, out,
            )  # fmt: skip
        else:
            _attend_plainly(call, query, keys, values, bias, n_tokens, scores, stats, out)
        head += HEAD_BLOCK if many else 1


@float_kernel
def _attend_plainly(
    call: np.ndarray, query: Whole, keys: Whole, values: Whole, bias: Whole, n_tokens: Whole, scores: Whole,
    stats: Whole, out: Whole,
) -> None:  # fmt: skip
    """What `attend` of `cpu_kernels.simd.attention` does, for head sizes that are no whole number of vectors."""
    kind, dim, v_dim = call[CACHE + KIND], call[DIM], call[V_DIM]
    q, added, weights = floats_at(query, dim), floats_at(bias, n_tokens), floats_at(scores, n_tokens)
    row = floats_at(scores + 4 * CHUNK, max(dim, v_dim))
    top = np.float32(LOWEST)
    for token in range(n_tokens):
        read_row(kind, keys + token * call[CACHE + K_TOKEN], row[:dim], np.float32(1))
        total = np.float32(0)
        for i in range(dim):
            total += q[i] * row[i]
        weights[token] = total + added[token]
        top = max(top, weights[token])
    result, kept = floats_at(out, v_dim), floats_at(stats, 2)
    fill(result, np.float32(0))
    total = np.float32(0)
    for token in range(n_tokens):
        weight = np.exp(weights[token] - top)
        total += weight
        read_row(kind, values + token * call[CACHE + V_TOKEN], row[:v_dim], weight)
        for i in range(v_dim):
            result[i] += row[i]
    kept[0], kept[1] = top, total


ATTEND_WORK = Worker(_attend)


def _join(call_address: int, thread: int) -> None:
    """Worker. Task: a query head of a row: its runs, in their order, become its result."""
    call = int64s_at(call_address, CACHE + CACHE_SIZE)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = int64s_at(state[ROWS], ROW_SIZE * state[N_ROWS]).reshape(state[N_ROWS], ROW_SIZE)
    n_heads, v_dim = call[N_HEADS], call[V_DIM]
    while True:
        task = take_ticket(call[NEXT_JOIN])
        if task >= state[N_ROWS] * n_heads:
            return
        row, head = task // n_heads, task % n_heads
        n_chunks = _n_chunks(call, rows[row, SEEN])
        first = row * call[MAX_CHUNKS] * n_heads + head
        stats = floats_at(call[STATS] + 8 * first, 2 * n_chunks * n_heads)
        sink = floats_at(call[SINKS] + 4 * head, 1)[0] if call[SINKS] else np.float32(LOWEST)
        result = floats_at(call[OUT] + 4 * (row * call[OUT_ROW] + head * v_dim), v_dim)
        _join_runs(stats, call[PARTS] + 4 * first * v_dim, n_heads, n_chunks, sink, result)


@inline_kernel
def _join_runs(
    stats: np.ndarray, parts: Whole, n_heads: Whole, n_chunks: Whole, sink: Real, result: np.ndarray
) -> None:
    """stats: m and sum of each run, parts: its weighted values, n_heads of them apart. sink: a score without a value
    (LOWEST: none)."""
    top = sink
    for chunk in range(n_chunks):
        top = max(top, stats[2 * chunk * n_heads])
    total = np.exp(sink - top) if sink > np.float32(LOWEST) else np.float32(0)
    fill(result, np.float32(0))
    for chunk in range(n_chunks):
        share = np.exp(stats[2 * chunk * n_heads] - top)
        total += share * stats[2 * chunk * n_heads + 1]
        values = floats_at(parts + 4 * chunk * n_heads * result.size, result.size)
        for i in range(result.size):
            result[i] += share * values[i]
    inverse = np.float32(1) / total
    for i in range(result.size):
        result[i] *= inverse


JOIN_WORK = Worker(_join)


def add_attention(
    program: Program, n_heads: int, n_kv_heads: int, dim: int, v_dim: int, query: int, out: int, isa_name: str, *,
    window: int = 0, sinks: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Adds out float32 [rows, n_heads * v_dim] = attention of query float32 [rows, n_heads, dim]; returns its call.

    window: tokens that a row looks back at, itself included; 0: all. sinks float32 [n_heads]: scores without values.
    From CACHE on the call vector says where the cache lies; `give_room` must have set where runs are kept.
    """
    call = program.zeros(CACHE + CACHE_SIZE, np.int64)
    call[[STATE, N_HEADS, N_KV_HEADS, DIM, V_DIM]] = program.state.ctypes.data, n_heads, n_kv_heads, dim, v_dim
    call[[WINDOW, QUERY, OUT, OUT_ROW]] = window, query, out, n_heads * v_dim
    call[SINKS] = 0 if sinks is None else program.keep(np.ascontiguousarray(sinks, np.float32))
    lanes = BY_NAME[isa_name].lanes
    if dim % lanes == 0 == v_dim % lanes:
        call[[BLOCK_FLOATS, ONE_FLOATS, BLOCK_HALVES, ONE_HALVES]] = [
            kernel_address(AttendKernel(n, dtype), isa_name)
            for dtype in ("float32", "bfloat16")
            for n in (HEAD_BLOCK, 1)
        ]
    call[ZEROS] = program.floats("zeros", CHUNK)
    program.count(call, NEXT)
    program.count(call, NEXT_JOIN)
    program.add(ATTEND_WORK, call, Part.ATTENTION)
    program.add(JOIN_WORK, call, Part.ATTENTION)
    return call


def room_bytes(call: np.ndarray, n_tokens: int) -> tuple[int, int]:
    """Bytes of (results, statistics) of all runs of `n_tokens` cached tokens."""
    n_runs = MAX_ROWS * int(call[N_HEADS]) * -(-n_tokens // CHUNK)
    return 4 * n_runs * int(call[V_DIM]), 8 * n_runs


def give_room(call: np.ndarray, parts: int, stats: int, n_tokens: int) -> None:
    """Lets runs of up to `n_tokens` cached tokens be kept at the addresses; `room_bytes` says how much they need."""
    call[[PARTS, STATS, MAX_CHUNKS]] = parts, stats, -(-n_tokens // CHUNK)
