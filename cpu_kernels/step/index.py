"""The index that chooses which cached tokens attention reads, where there are more than it may (a lightning indexer).

The cache has a short key of each token beside its keys and values. A row's score of a token is

    sum over heads of weight * max(0, query . key)

in float32, and the `top_k` tokens of the largest scores are chosen; of equal scores those that came first. (torch's
topk leaves open which of them it takes.) Queries and keys are rotated in ROT columns from ROT_FIRST, keys are
normalised before. Rows that see no more than top_k tokens have no scores: they attend to all of them.

What is chosen of a row is a list of token numbers in ascending order. Attention of later layers may read it again.

Source: DeepSeek Sparse Attention (DeepSeek-AI, DeepSeek-V3.2, 2025).
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.jit.atomics import store
from cpu_kernels.jit.compiled import Real, Truth, Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import bits_of_float, call_index_scores, floats_at, int32s_at, int64s_at, take_ticket
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.simd.index_scores import IndexScoresKernel, heads_at_once
from cpu_kernels.step.cached import I_KIND, I_TOKEN, index_address, place_of, rows_of
from cpu_kernels.step.floats import FLOAT32, bits_of, copy, deviation_sum, plain_sum, square_sum, write_row
from cpu_kernels.step.heads import Rotary, root_factor, rotate, scale_by
from cpu_kernels.step.program import (
    MASK,
    MASK_ROW,
    N_ROWS,
    NOT_FINITE,
    SCRATCH,
    SCRATCH_BYTES,
    SEEN,
    SEQUENCE,
    STATE_SIZE,
    Part,
    Program,
)
from cpu_kernels.step.stream import Norm

(STATE, NEXT, NEXT_SCORES, NEXT_CHOICE, N_HEADS, DIM, WIDTH, TOP_K, ROT, ROT_FIRST, ROT_KIND, COS, SIN, CENTRED, WEIGHT,
 BIAS, EPS, Q, K, W, QUERIES, WEIGHTS, SCORES, MAX_TOKENS, CHOSEN, PLACES, LAYER, KERNELS) = range(28)  # fmt: skip
# From KERNELS on: addresses of the kernels for keys of float32 and of bfloat16.
INDEX_CALL = KERNELS + 2
TASK_HEADS = 8
"""Heads of a query that one task prepares: a half of a cache line of a row of queries."""
TASK_TOKENS = 256
"""Tokens whose scores one task computes."""
DIGITS = ((21, 11), (10, 11), (0, 10))
"""The digits by which scores are sorted into buckets, the highest first: (shift, bits)."""


@dataclass(frozen=True, slots=True)
class IndexSizes:
    """n_heads, dim: of the queries; a key has dim columns. top_k: tokens that are chosen."""

    n_heads: int
    dim: int
    top_k: int


def _prepare(call_address: int, thread: int) -> None:
    """Worker. Task: some heads of a row's query, or the row's key and weights."""
    call = int64s_at(call_address, INDEX_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    room = floats_at(state[SCRATCH] + thread * SCRATCH_BYTES, 2 * call[DIM])
    n_groups = call[WIDTH] // TASK_HEADS
    while True:
        task = take_ticket(call[NEXT])
        if task >= state[N_ROWS] * (n_groups + 1):
            return
        row, part = task // (n_groups + 1), task % (n_groups + 1)
        if part < n_groups:
            for head in range(part * TASK_HEADS, (part + 1) * TASK_HEADS):
                _prepare_query(call, row, head, room)
        else:
            _store_key(call, rows[row], row, room)
            _fill_weights(call, row)


@inline_kernel
def _prepare_query(call: np.ndarray, row: Whole, head: Whole, room: np.ndarray) -> None:
    """A column of queries float32 [rows, dim, width]: the head's query, rotated; zeros for heads that there are not."""
    dim, width = call[DIM], call[WIDTH]
    queries = floats_at(call[QUERIES] + 4 * row * dim * width, dim * width)
    result = room[dim:]
    if head < call[N_HEADS]:
        copy(floats_at(call[Q] + 4 * (row * call[N_HEADS] + head) * dim, dim), room[:dim])
        _rotate(call, row, room[:dim], result)
        for i in range(dim):
            queries[i * width + head] = result[i]
    else:
        for i in range(dim):
            queries[i * width + head] = np.float32(0)


@inline_kernel
def _store_key(call: np.ndarray, seen: np.ndarray, row: Whole, room: np.ndarray) -> None:
    """Writes a token's key, normalised and rotated, into the cache."""
    dim = call[DIM]
    key, result = room[:dim], room[dim:]
    copy(floats_at(call[K] + 4 * row * dim, dim), key)
    mean = np.float32(0)
    total = square_sum(key)
    if call[CENTRED]:
        mean = plain_sum(key) / np.float32(dim)
        total = deviation_sum(key, mean)
    for i in range(dim):
        key[i] -= mean
    scale_by(key, root_factor(total, dim, call[EPS]), floats_at(call[WEIGHT], dim))
    if call[BIAS]:
        bias = floats_at(call[BIAS], dim)
        for i in range(dim):
            key[i] += bias[i]
    _rotate(call, row, key, result)
    place = place_of(call[PLACES], seen[SEQUENCE])
    write_row(place[I_KIND], index_address(place, seen[SEEN] - 1), result)


@inline_kernel
def _fill_weights(call: np.ndarray, row: Whole) -> None:
    weights = floats_at(call[WEIGHTS] + 4 * row * call[WIDTH], call[WIDTH])
    source = floats_at(call[W] + 4 * row * call[N_HEADS], call[N_HEADS])
    for head in range(weights.size):
        weights[head] = source[head] if head < source.size else np.float32(0)


@inline_kernel
def _rotate(call: np.ndarray, row: Whole, x: np.ndarray, result: np.ndarray) -> None:
    copy(x, result)
    if call[ROT]:
        half = call[ROT] // 2
        cos, sin = floats_at(call[COS] + 4 * row * half, half), floats_at(call[SIN] + 4 * row * half, half)
        rotate(call[ROT_KIND], cos, sin, x[call[ROT_FIRST] :], result[call[ROT_FIRST] :])


PREPARE_WORK = Worker(_prepare)


def _score(call_address: int, thread: int) -> None:
    """Worker. Task: TASK_TOKENS cached tokens of a row that sees more than are chosen. Rows that read the same keys
    follow each other."""
    call = int64s_at(call_address, INDEX_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    n_rows, longest = state[N_ROWS], 0
    for row in range(n_rows):
        if rows[row, SEEN] > call[TOP_K]:
            longest = max(longest, rows[row, SEEN])
    n_tasks = (longest + TASK_TOKENS - 1) // TASK_TOKENS * n_rows
    while True:
        task = take_ticket(call[NEXT_SCORES])
        if task >= n_tasks:
            return
        row, first = task % n_rows, task // n_rows * TASK_TOKENS
        if rows[row, SEEN] > call[TOP_K] and rows[row, SEEN] > first:
            _score_run(call, state, rows[row], row, first)


@inline_kernel
def _score_run(call: np.ndarray, state: np.ndarray, seen: np.ndarray, row: Whole, first: Whole) -> None:
    place = place_of(call[PLACES], seen[SEQUENCE])
    n_tokens = min(TASK_TOKENS, seen[SEEN] - first)
    target = call[SCORES] + 4 * (row * call[MAX_TOKENS] + first)
    dim, width = call[DIM], call[WIDTH]
    call_index_scores(
        call[KERNELS + place[I_KIND]], call[QUERIES] + 4 * row * dim * width, call[WEIGHTS] + 4 * row * width, width,
        index_address(place, first), place[I_TOKEN], dim, n_tokens, target,
    )  # fmt: skip
    if state[MASK]:
        scores = floats_at(target, n_tokens)
        bias = floats_at(state[MASK] + 4 * (seen[SEQUENCE] * state[MASK_ROW] + first), n_tokens)
        for i in range(n_tokens):
            scores[i] += bias[i]


SCORE_WORK = Worker(_score)


def _choose(call_address: int, thread: int) -> None:
    """Worker. Task: a row that sees more tokens than are chosen."""
    call = int64s_at(call_address, INDEX_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    counts = int32s_at(state[SCRATCH] + thread * SCRATCH_BYTES, 1 << 11)
    while True:
        row = take_ticket(call[NEXT_CHOICE])
        if row >= state[N_ROWS]:
            return
        if rows[row, SEEN] > call[TOP_K]:
            scores = floats_at(call[SCORES] + 4 * row * call[MAX_TOKENS], rows[row, SEEN])
            chosen = int32s_at(call[CHOSEN] + 4 * row * call[TOP_K], call[TOP_K])
            if not take_largest(scores, counts, chosen):
                store(call[STATE] + 8 * NOT_FINITE, call[LAYER] + 1)


@inline_kernel
def take_largest(scores: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> Truth:
    """chosen = the places of the largest scores, ascending; of equal ones the first. There are more scores than places.

    counts: room for int32 [2048]. Returns False where a score is NaN.
    """
    found, left, is_ordered = 0, chosen.size, True
    for shift, bits in DIGITS:
        for i in range(1 << bits):
            counts[i] = 0
        for i in range(scores.size):
            order = _order(scores[i])
            if order >> (shift + bits) == found:
                counts[order >> shift & ((1 << bits) - 1)] += 1
        digit = (1 << bits) - 1
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        found = found << bits | digit
    n = 0
    for i in range(scores.size):
        order = _order(scores[i])
        is_ordered = is_ordered and scores[i] == scores[i]
        if order > found or (order == found and left > 0):
            chosen[n] = i
            n += 1
            left -= order == found
    return is_ordered


@inline_kernel
def _order(score: Real) -> Whole:
    """An integer 0 .. 2^32 - 1 that is the larger, the larger the score is; 0 and -0 have the same."""
    bits = np.int64(bits_of_float(score)) & 0xFFFFFFFF if score != np.float32(0) else np.int64(0)
    return 0xFFFFFFFF - bits if bits >> 31 else bits + 0x80000000


CHOOSE_WORK = Worker(_choose)


def add_index(
    program: Program, layer: int, sizes: IndexSizes, norm: Norm, rotary: Rotary | None, q: int, k: int, w: int,
    places: int, chosen: int, isa_name: str,
) -> np.ndarray:  # fmt: skip
    """Adds what prepares queries and writes the index's new keys into the cache; returns the call, for `add_choice`
    behind another operation, before which it need not be finished.

    q float32 [rows, n_heads, dim], k float32 [rows, dim], w float32 [rows, n_heads]: results of the index's products.
    norm: of keys. places: address of the table that says where the caches lie. chosen: where int32 [rows, top_k] go.
    """
    width = -(-sizes.n_heads // heads_at_once(BY_NAME[isa_name])) * heads_at_once(BY_NAME[isa_name])
    call = program.zeros(INDEX_CALL, np.int64)
    call[[STATE, N_HEADS, DIM, WIDTH]] = program.state.ctypes.data, sizes.n_heads, sizes.dim, width
    call[[TOP_K, Q, K, W, CHOSEN, PLACES, LAYER]] = sizes.top_k, q, k, w, chosen, places, layer
    call[QUERIES] = program.floats(f"index queries {width}", sizes.dim * width)
    call[WEIGHTS] = program.floats("index weights", width)
    call[[CENTRED, EPS]] = norm.centred, bits_of(norm.eps)
    call[WEIGHT] = program.keep(np.ascontiguousarray(norm.weight, np.float32))
    call[BIAS] = 0 if norm.bias is None else program.keep(np.ascontiguousarray(norm.bias, np.float32))
    if rotary is not None:
        call[[ROT, ROT_FIRST, ROT_KIND, COS, SIN]] = rotary.n, rotary.first, rotary.kind, rotary.cos, rotary.sin
    for next_task in (NEXT, NEXT_SCORES, NEXT_CHOICE):
        program.count(call, next_task)
    program.add(PREPARE_WORK, call, Part.ATTENTION, meets=False)
    return call


def add_choice(program: Program, call: np.ndarray) -> None:
    """Adds the scores of rows that see more tokens than are chosen, and the choice. `give_scores` must have set where
    scores are kept, and `set_index_kernel` those of the caches' kinds."""
    program.add(SCORE_WORK, call, Part.ATTENTION)
    program.add(CHOOSE_WORK, call, Part.ATTENTION)


def set_index_kernel(call: np.ndarray, kind: int, isa_name: str) -> None:
    """Sets the kernel for keys that are stored as `kind`, FLOAT32 or BFLOAT16."""
    if not call[KERNELS + kind]:
        kernel = IndexScoresKernel("float32" if kind == FLOAT32 else "bfloat16")
        call[KERNELS + kind] = kernel_address(kernel, isa_name)


def scores_bytes(call: np.ndarray, n_rows: int, n_tokens: int) -> int:
    """Bytes of the scores of `n_tokens` cached tokens, for each of n_rows rows."""
    return 4 * n_rows * n_tokens if n_tokens > call[TOP_K] else 0


def give_scores(call: np.ndarray, scores: int, n_tokens: int) -> None:
    """Lets scores of up to `n_tokens` cached tokens be kept at the address; `scores_bytes` says how much they need."""
    call[[SCORES, MAX_TOKENS]] = scores, n_tokens
