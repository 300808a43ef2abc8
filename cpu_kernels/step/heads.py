"""Between the projections and attention: norm of queries and keys, rotary embedding, and the KV cache's new rows.

One task is one head of one row: a query head is normalised, rotated, scaled and kept; a key head is normalised, rotated
and stored in the cache; a value head is stored in the cache (`stored`: where as codes, the query is turned as they
are). Rotation is of ROT columns from ROT_FIRST::

    halves            (x[i], x[i + ROT / 2])  rotated in place
    pairs             (x[2 i], x[2 i + 1])    rotated in place
    pairs to halves   (x[2 i], x[2 i + 1])    rotated to (y[i], y[i + ROT / 2])
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.jit.compiled import Real, Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import floats_at, int64s_at, take_ticket
from cpu_kernels.step.cached import KIND, key_address, place_of, rows_of, value_address
from cpu_kernels.step.floats import bits_of, copy, float_of, square_sum
from cpu_kernels.step.program import N_ROWS, POSITION, SCRATCH, SCRATCH_BYTES, SEEN, SEQUENCE, STATE_SIZE, Part, Program
from cpu_kernels.step.stored import is_turned, store_row, turn

(STATE, NEXT, N_HEADS, N_KV_HEADS, DIM, V_DIM, ROT, ROT_FIRST, ROT_KIND, COS, SIN, NORM, NORM_LAST, EPS, Q_WEIGHT,
 K_WEIGHT, SCALE, TUNING, CLIP, Q, Q_ROW, Q_HEAD, K, K_ROW, K_HEAD, V, V_ROW, V_HEAD, V_SCALE,
 V_WEIGHT, QUERY, PLACES, HEADS_CALL) = range(33)  # fmt: skip
NO_NORM, HEAD_NORM, ROW_NORM = range(3)
HALVES, PAIRS, PAIRS_TO_HALVES = range(3)
NO_CLIP = 3.0e38


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each query and key head (weights [dim]), or of all heads of a row as one (weights [heads * dim]).

    v_weight [v_dim]: of each value head, too.
    """

    q_weight: np.ndarray
    k_weight: np.ndarray
    eps: float
    whole_row: bool = False
    after_rotation: bool = False
    v_weight: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """Queries grow with their place: by 1 + factor * log(1 + floor(place / step)). The place of the first token is 1,
    or (by_position) it is where the model says that a token stands."""

    factor: float
    step: float
    by_position: bool = False

    def packed(self, program: Program) -> int:
        """Address of its numbers, as `tuned` reads them."""
        return program.keep(np.array([bits_of(self.factor), bits_of(self.step), self.by_position], np.int64))


@dataclass(frozen=True, slots=True)
class Rotary:
    """`n` columns from `first` are rotated by the angles whose cosines and sines lie in float32 [MAX_ROWS, n / 2]."""

    n: int
    first: int
    kind: int
    cos: int
    sin: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where a projection's heads lie: address, floats from one row and from one head to the next."""

    address: int
    row: int
    head: int


def _heads(call_address: int, thread: int) -> None:
    """Worker. Task: a head of a row: first all queries, then keys, then values."""
    call = int64s_at(call_address, HEADS_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    head_room = floats_at(state[SCRATCH] + thread * SCRATCH_BYTES, max(2 * call[DIM], call[V_DIM]))
    n_heads, n_kv_heads = call[N_HEADS], call[N_KV_HEADS]
    per_row = n_heads + 2 * n_kv_heads
    while True:
        task = take_ticket(call[NEXT])
        if task >= state[N_ROWS] * per_row:
            return
        row, head = task // per_row, task % per_row
        place, token = place_of(call[PLACES], rows[row, SEQUENCE]), rows[row, SEEN] - 1
        if head < n_heads:
            source = call[Q] + 4 * (row * call[Q_ROW] + head * call[Q_HEAD])
            query = floats_at(call[QUERY] + 4 * (row * n_heads + head) * call[DIM], call[DIM])
            _place(call, row, head, n_heads, source, call[Q_WEIGHT], head_room, query)
            scale = tuned(call[TUNING], rows[row], float_of(call[SCALE]))
            for i in range(query.size):
                query[i] *= scale
            if is_turned(place[KIND]):
                turn(query)
        elif head < n_heads + n_kv_heads:
            head -= n_heads
            source = call[K] + 4 * (row * call[K_ROW] + head * call[K_HEAD])
            key = head_room[call[DIM] : 2 * call[DIM]]
            _place(call, row, head, n_kv_heads, source, call[K_WEIGHT], head_room, key)
            store_row(place[KIND], key_address(place, head, token), key)
        else:
            head -= n_heads + n_kv_heads
            value = head_room[: call[V_DIM]]
            _value(call, call[V] + 4 * (row * call[V_ROW] + head * call[V_HEAD]), value)
            store_row(place[KIND], value_address(place, head, token), value)


@inline_kernel
def _value(call: np.ndarray, source: Whole, value: np.ndarray) -> None:
    """value = the head at `source`, normalised or clipped, and scaled."""
    copy(floats_at(source, value.size), value)
    if call[V_WEIGHT]:
        factor = root_factor(square_sum(value), value.size, call[EPS])
        scale_by(value, factor, floats_at(call[V_WEIGHT], value.size))
    _clip(value, float_of(call[CLIP]))
    scale = float_of(call[V_SCALE])
    if scale != np.float32(1):
        for i in range(value.size):
            value[i] *= scale


@inline_kernel
def tuned(tuning: Whole, row: np.ndarray, scale: Real) -> Real:
    """The scale of a row's query, which a tuning at an address (0: none) changes."""
    if tuning == 0:
        return scale
    factor, step, by_position = int64s_at(tuning, 3)
    place = row[POSITION] if by_position else row[SEEN]
    return scale * (np.float32(1) + float_of(factor) * np.log1p(np.floor(np.float32(place) / float_of(step))))


@inline_kernel
def _place(
    call: np.ndarray, row: Whole, head: Whole, n_heads: Whole, source: Whole, weights: Whole, room: np.ndarray,
    result: np.ndarray,
) -> None:  # fmt: skip
    """result = the head at `source`, normalised and rotated."""
    dim = call[DIM]
    x = room[:dim]
    copy(floats_at(source, dim), x)
    if call[NORM] == HEAD_NORM and not call[NORM_LAST]:
        scale_by(x, root_factor(square_sum(x), dim, call[EPS]), floats_at(weights, dim))
    elif call[NORM] == ROW_NORM:
        whole = floats_at(source - 4 * head * dim, n_heads * dim)
        factor = root_factor(square_sum(whole), whole.size, call[EPS])
        scale_by(x, factor, floats_at(weights + 4 * head * dim, dim))
    _clip(x, float_of(call[CLIP]))
    copy(x, result[:dim])
    if call[ROT]:
        half = call[ROT] // 2
        cos, sin = floats_at(call[COS] + 4 * row * half, half), floats_at(call[SIN] + 4 * row * half, half)
        rotate(call[ROT_KIND], cos, sin, x[call[ROT_FIRST] :], result[call[ROT_FIRST] :])
    if call[NORM] == HEAD_NORM and call[NORM_LAST]:
        scale_by(result, root_factor(square_sum(result[:dim]), dim, call[EPS]), floats_at(weights, dim))


@inline_kernel
def _clip(x: np.ndarray, limit: Real) -> None:
    """x within -limit .. limit; NaN stays NaN."""
    if limit < np.float32(NO_CLIP):
        for i in range(x.size):
            if x[i] > limit:
                x[i] = limit
            elif x[i] < -limit:
                x[i] = -limit


@inline_kernel
def root_factor(total: Real, n: Whole, eps: Whole) -> Real:
    """1 / sqrt(total / n + eps), eps as its bits."""
    return np.float32(1) / np.sqrt(total / np.float32(n) + float_of(eps))


@inline_kernel
def scale_by(x: np.ndarray, factor: Real, weights: np.ndarray) -> None:
    """x = x * factor * weights."""
    for i in range(weights.size):
        x[i] = x[i] * factor * weights[i]


@inline_kernel
def rotate(kind: Whole, cos: np.ndarray, sin: np.ndarray, x: np.ndarray, result: np.ndarray) -> None:
    """The first 2 * cos.size columns of result = those of x, rotated."""
    half = cos.size
    for i in range(half):
        first, second = (i, i + half) if kind == HALVES else (2 * i, 2 * i + 1)
        a, b = x[first], x[second]
        first, second = (2 * i, 2 * i + 1) if kind == PAIRS else (i, i + half)
        result[first] = a * cos[i] - b * sin[i]
        result[second] = b * cos[i] + a * sin[i]


HEADS_WORK = Worker(_heads)


def add_heads(
    program: Program, n_heads: int, n_kv_heads: int, dim: int, v_dim: int, q: Source, k: Source, v: Source, query: int,
    places: int, *, scale: float, norm: HeadNorm | None = None, rotary: Rotary | None = None, clip: float = NO_CLIP,
    tuning: Tuning | None = None, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """Adds the operation.

    places: address of the table that says where the caches lie. query: where float32 [rows, n_heads, dim] go,
    multiplied with `scale` and what `tuning` says. v_scale: of the values in the cache.
    """
    call = program.zeros(HEADS_CALL, np.int64)
    call[[STATE, N_HEADS, N_KV_HEADS, DIM, V_DIM]] = program.state.ctypes.data, n_heads, n_kv_heads, dim, v_dim
    call[[SCALE, CLIP, QUERY, PLACES]] = bits_of(scale), bits_of(clip), query, places
    call[V_SCALE] = bits_of(v_scale)
    call[[Q, Q_ROW, Q_HEAD]] = q.address, q.row, q.head
    call[[K, K_ROW, K_HEAD]] = k.address, k.row, k.head
    call[[V, V_ROW, V_HEAD]] = v.address, v.row, v.head
    if tuning is not None:
        call[TUNING] = tuning.packed(program)
    if rotary is not None:
        call[[ROT, ROT_FIRST, ROT_KIND, COS, SIN]] = rotary.n, rotary.first, rotary.kind, rotary.cos, rotary.sin
    if norm is not None:
        call[[NORM, NORM_LAST, EPS]] = ROW_NORM if norm.whole_row else HEAD_NORM, norm.after_rotation, bits_of(norm.eps)
        call[Q_WEIGHT] = program.keep(np.ascontiguousarray(norm.q_weight, np.float32))
        call[K_WEIGHT] = program.keep(np.ascontiguousarray(norm.k_weight, np.float32))
        if norm.v_weight is not None:
            call[V_WEIGHT] = program.keep(np.ascontiguousarray(norm.v_weight, np.float32))
    program.count(call, NEXT)
    program.add(HEADS_WORK, call, Part.ATTENTION)
