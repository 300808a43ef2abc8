"""Latent attention around the cache (DeepSeek-V2, arXiv 2405.04434): it holds one short vector of each token.

All heads share that vector c and a rotated part r. A head's keys are [K c, r] and its values V c, where K and V are
blocks of one matrix `up`. They are never made: a head's query [own, rotated] meets c through K, and its result comes
from what it gathered of c through V::

    own . (K c) + rotated . r = (K^T own) . c + rotated . r        sum of p (V c) = V (sum of p c)
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import floats_at, int64s_at, take_ticket
from cpu_kernels.step.cached import KIND, key_address, place_of, rows_of, value_address
from cpu_kernels.step.floats import (
    ELEMENT_BYTES,
    add_row,
    bits_of,
    copy,
    dot,
    fill,
    float_of,
    square_sum,
)
from cpu_kernels.step.heads import Rotary, Tuning, root_factor, rotate, scale_by, tuned
from cpu_kernels.step.products import Product
from cpu_kernels.step.program import N_ROWS, SCRATCH, SCRATCH_BYTES, SEEN, SEQUENCE, STATE_SIZE, Part, Program
from cpu_kernels.step.stored import is_turned, store_row, turn
from cpu_kernels.step.stream import Norm

(STATE, NEXT, N_HEADS, OWN, ROT, RANK, V_DIM, UP, UP_KIND, UP_ROW, Q, QUERY, SCALE, JOINED, WEIGHT, EPS, ROT_KIND, COS,
 SIN, GATHERED, OUT, PLACES, TUNING, ROT_WEIGHT, ROT_EPS, LATENT_CALL) = range(26)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """own, rotated: columns of a head's query; v_dim: of its result; rank: of the vector that the cache holds."""

    n_heads: int
    own: int
    rotated: int
    v_dim: int
    rank: int


def _absorb(call_address: int, thread: int) -> None:
    """Worker. Task: a head's queries of all rows, or what a row's token leaves in the cache."""
    call = int64s_at(call_address, LATENT_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    room = state[SCRATCH] + thread * SCRATCH_BYTES
    while True:
        task = take_ticket(call[NEXT])
        if task >= call[N_HEADS] + state[N_ROWS]:
            return
        if task < call[N_HEADS]:
            for row in range(state[N_ROWS]):
                _absorb_query(call, rows[row], row, task)
        else:
            _store(call, rows[task - call[N_HEADS]], task - call[N_HEADS], room)


@inline_kernel
def _absorb_query(call: np.ndarray, seen: np.ndarray, row: Whole, head: Whole) -> None:
    """query [rank + rotated] = scale * [K^T own, rotated], each turned where the cache stores codes."""
    own, rot, rank, scale = call[OWN], call[ROT], call[RANK], tuned(call[TUNING], seen, float_of(call[SCALE]))
    number = row * call[N_HEADS] + head
    source = floats_at(call[Q] + 4 * number * (own + rot), own + rot)
    query = floats_at(call[QUERY] + 4 * number * (rank + rot), rank + rot)
    fill(query, np.float32(0))
    matrix = call[UP] + head * (own + call[V_DIM]) * call[UP_ROW]
    for i in range(own):
        add_row(call[UP_KIND], matrix + i * call[UP_ROW], query[:rank], scale * source[i])
    _rotate(call, row, source[own:], query[rank:])
    for i in range(rank, query.size):
        query[i] *= scale
    if is_turned(place_of(call[PLACES], seen[SEQUENCE])[KIND]):
        turn(query[:rank])
        turn(query[rank:])


@inline_kernel
def _store(call: np.ndarray, seen: np.ndarray, row: Whole, room: Whole) -> None:
    """Writes a token's vector, normalised, and its rotated part into the cache. room: for both."""
    rot, rank = call[ROT], call[RANK]
    joined = floats_at(call[JOINED] + 4 * row * (rank + rot), rank + rot)
    vector, rotated = floats_at(room, rank), floats_at(room + 4 * rank, rot)
    copy(joined, vector)
    scale_by(vector, root_factor(square_sum(vector), rank, call[EPS]), floats_at(call[WEIGHT], rank))
    if call[ROT_WEIGHT]:
        part = floats_at(room + 4 * (rank + rot), rot)
        copy(joined[rank:], part)
        scale_by(part, root_factor(square_sum(part), rot, call[ROT_EPS]), floats_at(call[ROT_WEIGHT], rot))
        _rotate(call, row, part, rotated)
    else:
        _rotate(call, row, joined[rank:], rotated)
    place, token = place_of(call[PLACES], seen[SEQUENCE]), seen[SEEN] - 1
    store_row(place[KIND], key_address(place, 0, token), vector)
    store_row(place[KIND], value_address(place, 0, token), rotated)


@inline_kernel
def _rotate(call: np.ndarray, row: Whole, x: np.ndarray, result: np.ndarray) -> None:
    """result = x by the angles of a row, or as it is where there are none."""
    if call[COS] == 0:
        copy(x, result)
        return
    half = call[ROT] // 2
    cos, sin = floats_at(call[COS] + 4 * row * half, half), floats_at(call[SIN] + 4 * row * half, half)
    rotate(call[ROT_KIND], cos, sin, x, result)


ABSORB_WORK = Worker(_absorb)


def _expand(call_address: int, thread: int) -> None:
    """Worker. Task: a head's results of all rows."""
    call = int64s_at(call_address, LATENT_CALL)
    n_rows = int64s_at(call[STATE], STATE_SIZE)[N_ROWS]
    n_heads, v_dim, rank = call[N_HEADS], call[V_DIM], call[RANK]
    while True:
        head = take_ticket(call[NEXT])
        if head >= n_heads:
            return
        matrix = call[UP] + (head * (call[OWN] + v_dim) + call[OWN]) * call[UP_ROW]
        for row in range(n_rows):
            gathered = floats_at(call[GATHERED] + 4 * (row * n_heads + head) * rank, rank)
            result = floats_at(call[OUT] + 4 * (row * n_heads + head) * v_dim, v_dim)
            for i in range(v_dim):
                result[i] = dot(call[UP_KIND], matrix + i * call[UP_ROW], gathered)


EXPAND_WORK = Worker(_expand)


def add_absorption(
    program: Program, sizes: LatentSizes, up: Product, norm: Norm, rotary: Rotary | None, q: int, joined: int,
    query: int, places: int, *, scale: float, tuning: Tuning | None = None, rotated_norm: Norm | None = None,
) -> None:  # fmt: skip
    """Adds query float32 [rows, n_heads, rank + rotated] from q float32 [rows, n_heads, own + rotated], and the cache's
    new rows from joined float32 [rows, rank + rotated]. places: address of the table that says where the caches lie.

    up: rows [n_heads, own + v_dim, rank] that are not packed. norm: over the rank columns, a plain RMS norm.
    """
    call = _latent_call(program, sizes, up)
    if rotated_norm is not None:
        call[ROT_WEIGHT] = program.keep(np.ascontiguousarray(rotated_norm.weight, np.float32))
        call[ROT_EPS] = bits_of(rotated_norm.eps)
    call[TUNING] = 0 if tuning is None else tuning.packed(program)
    call[[Q, JOINED, QUERY, PLACES, SCALE]] = q, joined, query, places, bits_of(scale)
    call[[WEIGHT, EPS]] = program.keep(np.ascontiguousarray(norm.weight, np.float32)), bits_of(norm.eps)
    if rotary is not None:
        call[[ROT_KIND, COS, SIN]] = rotary.kind, rotary.cos, rotary.sin
    program.add(ABSORB_WORK, call, Part.ATTENTION)


def add_expansion(program: Program, sizes: LatentSizes, up: Product, gathered: int, out: int) -> None:
    """Adds out float32 [rows, n_heads * v_dim] from what heads gathered of the cache, float32 [rows, n_heads, rank]."""
    call = _latent_call(program, sizes, up)
    call[[GATHERED, OUT]] = gathered, out
    program.add(EXPAND_WORK, call, Part.ATTENTION)


def _latent_call(program: Program, sizes: LatentSizes, up: Product) -> np.ndarray:
    call = program.zeros(LATENT_CALL, np.int64)
    call[[STATE, N_HEADS, OWN, ROT]] = program.state.ctypes.data, sizes.n_heads, sizes.own, sizes.rotated
    call[[RANK, V_DIM]] = sizes.rank, sizes.v_dim
    call[[UP, UP_KIND, UP_ROW]] = up.address, up.kind, sizes.rank * ELEMENT_BYTES[up.kind]
    program.count(call, NEXT)
    return call
