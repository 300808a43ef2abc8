"""Linear attention: each head keeps a matrix S in place of keys and values, which every token fades and adds to.

One task is a head of a sequence, for all its tokens in their order. With a token's query q, key k, value v::

    rule      S before the token is faded: S' = a S, row by row where the fading has a value for each column of a key
    DELTA     S = S' + k (beta (v - S'^T k))^T      y = S^T q       (gated delta net, Yang et al., arXiv 2412.06464)
    SUM       S = S' + k v^T                        y = S^T q       (lightning attention, arXiv 2405.17381)
    SCAN      S = S' + (step v) k^T                 y = S q + skip v    (Mamba 2, Dao and Gu, arXiv 2405.21060)

S is [columns of a key, columns of a value], in SCAN the other way round. Several heads of values may share a head of
keys and queries. beta is a sigmoid. How much is kept::

    STEADY        a = rate
    BY_SOFTPLUS   a = e ** -(rate * step), step = softplus(x + bias)
    BY_SIGMOID    a = e ** (limit * sigmoid(rate * (x + bias)))
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.errors import LayoutError
from cpu_kernels.jit.compiled import Real, Truth, Whole, Worker, float_kernel, inline_kernel
from cpu_kernels.jit.primitives import floats_at, halves_at, int64s_at, take_ticket
from cpu_kernels.step.cached import rows_of
from cpu_kernels.step.floats import FLOAT32, bits_of, fill, float_of, read_row, softplus, write_row
from cpu_kernels.step.program import N_ROWS, SCRATCH, SCRATCH_BYTES, STATE_SIZE, Part, Program
from cpu_kernels.step.states.held import MATRICES, MATRICES_KIND, NEW_MATRICES, n_sequences, states_of

(STATE, NEXT, RULE, N_HEADS, N_KEY_HEADS, K_DIM, V_DIM, CHANNELS, CHANNELS_ROW, Q, K, V, BETA, BETA_ROW, FADING, FADES,
 FADES_ROW, FADES_EACH, RATE, BIAS, LOW, HIGH, SKIP, OUT, PLACES, RECURRENCE_CALL) = range(26)  # fmt: skip
DELTA, SUM, SCAN = range(3)
STEADY, BY_SOFTPLUS, BY_SIGMOID = range(3)
NO_LIMIT = 3.0e38
ROOM_FLOATS = SCRATCH_BYTES // 4


@dataclass(frozen=True, slots=True)
class Places:
    """Where float32 values of each head lie in a projection: addresses of the first row's, floats from row to row."""

    addresses: tuple[int, ...]
    row: int


@dataclass(frozen=True, slots=True)
class Fading:
    """How much of a head's matrix is kept. kind: see above; rate float32 [heads]; bias float32 [heads] or (each: a
    value for each column of a key) [heads * columns]. low, high: limits of a step where several tokens of a sequence
    are computed at once (as in transformers, which has none for a single one); low is also that of BY_SIGMOID."""

    kind: int
    rate: np.ndarray
    bias: np.ndarray | None = None
    each: bool = False
    low: float = 0.0
    high: float = NO_LIMIT


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes, and where queries, keys and values begin in the channels: heads of each follow each other."""

    n: int
    n_keys: int
    k_dim: int
    v_dim: int
    q: int
    k: int
    v: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """The channels float32 [rows, width] at an address, and beside them what beta and the fading are made from; skip
    float32 [heads]."""

    channels: int
    width: int
    beta: Places | None = None
    fades: Places | None = None
    skip: np.ndarray | None = None


def _recur(call_address: int, thread: int) -> None:
    """Worker. Task: a head of a sequence."""
    call = int64s_at(call_address, RECURRENCE_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    n_heads, count = call[N_HEADS], n_sequences(state, rows)
    n_new = state[N_ROWS] // count
    size = call[K_DIM] * call[V_DIM]
    room = state[SCRATCH] + thread * SCRATCH_BYTES
    while True:
        task = take_ticket(call[NEXT])
        if task >= count * n_heads:
            return
        sequence, head = task // n_heads, task % n_heads
        place = states_of(call[PLACES], sequence)
        kind = place[MATRICES_KIND]
        at = head * size * (4 if kind == FLOAT32 else 2)
        source, target = place[MATRICES] + at, place[NEW_MATRICES] + at
        if source != target:
            _copy_words(source, target, size * (4 if kind == FLOAT32 else 2) // 2)
        for row in range(sequence * n_new, (sequence + 1) * n_new):
            _token(call, row, head, kind, target, room, n_new > 1)


@inline_kernel
def _copy_words(source: Whole, target: Whole, n: Whole) -> None:
    """n words of two bytes from one address to the other."""
    from_, to = halves_at(source, n), halves_at(target, n)
    for i in range(n):
        to[i] = from_[i]


@inline_kernel
def _token(
    call: np.ndarray, row: Whole, head: Whole, kind: Whole, matrix: Whole, room: Whole, is_limited: Truth
) -> None:
    """One token of a head. room: for the values that a token adds, what is kept of each row, and a row."""
    k_dim, v_dim = call[K_DIM], call[V_DIM]
    channels = call[CHANNELS] + 4 * row * call[CHANNELS_ROW]
    key_head = head // (call[N_HEADS] // call[N_KEY_HEADS])
    q = floats_at(channels + 4 * (call[Q] + key_head * k_dim), k_dim)
    k = floats_at(channels + 4 * (call[K] + key_head * k_dim), k_dim)
    v = floats_at(channels + 4 * (call[V] + head * v_dim), v_dim)
    out = floats_at(call[OUT] + 4 * (row * call[N_HEADS] + head) * v_dim, v_dim)
    added, kept = floats_at(room, v_dim), floats_at(room + 4 * v_dim, k_dim)
    spare = room + 4 * (v_dim + k_dim)
    step = _fade(call, row, head, kept, is_limited)
    if call[RULE] == DELTA:
        beta = np.float32(1)
        if call[BETA]:
            beta /= np.float32(1) + np.exp(-_value(call[BETA], call[BETA_ROW], head, row))
        _delta(kind, matrix, q, k, v, beta, kept, added, spare, out)
    elif call[RULE] == SUM:
        _sum(kind, matrix, q, k, v, kept, spare, out)
    else:
        _scan(kind, matrix, q, k, v, kept[0], step, spare, out)
        if call[SKIP]:
            skip = floats_at(call[SKIP] + 4 * head, 1)[0]
            for i in range(v_dim):
                out[i] += skip * v[i]


@inline_kernel
def _value(table: Whole, row_floats: Whole, head: Whole, row: Whole) -> Real:
    """A head's value of a row. table: address of the addresses of the first row's."""
    return floats_at(int64s_at(table, head + 1)[head] + 4 * row * row_floats, 1)[0]


@inline_kernel
def _fade(call: np.ndarray, row: Whole, head: Whole, kept: np.ndarray, is_limited: Truth) -> Real:
    """kept [columns of a key] = how much of them is kept; returns the step of BY_SOFTPLUS, of the last one."""
    rate, step = floats_at(call[RATE] + 4 * head, 1)[0], np.float32(1)
    if call[FADING] == STEADY:
        fill(kept, rate)
        return step
    n = kept.size if call[FADES_EACH] else 1
    x = floats_at(int64s_at(call[FADES], head + 1)[head] + 4 * row * call[FADES_ROW], n)
    bias = floats_at(call[BIAS] + 4 * head * n, n)
    low, high = float_of(call[LOW]), float_of(call[HIGH])
    for i in range(n):
        if call[FADING] == BY_SOFTPLUS:
            step = softplus(x[i] + bias[i])
            if is_limited:
                step = low if step < low else high if step > high else step
            kept[i] = np.exp(-rate * step)
        else:
            kept[i] = np.exp(low / (np.float32(1) + np.exp(-rate * (x[i] + bias[i]))))
    if n == 1:
        fill(kept[1:], kept[0])
    return step


@inline_kernel
def _row_of(kind: Whole, matrix: Whole, number: Whole, n: Whole, spare: Whole) -> np.ndarray:
    """A row of a matrix as floats: where it lies, or read into `spare`."""
    if kind == FLOAT32:
        return floats_at(matrix + 4 * number * n, n)
    row = floats_at(spare, n)
    read_row(kind, matrix + 2 * number * n, row, np.float32(1))
    return row


@float_kernel
def _delta(
    kind: Whole, matrix: Whole, q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: Real, kept: np.ndarray,
    added: np.ndarray, spare: Whole, out: np.ndarray,
) -> None:  # fmt: skip
    fill(added, np.float32(0))
    for i in range(k.size):
        row, factor = _row_of(kind, matrix, i, v.size, spare), kept[i] * k[i]
        for j in range(v.size):
            added[j] += row[j] * factor
    for j in range(v.size):
        added[j] = (v[j] - added[j]) * beta
    _add_outer(kind, matrix, q, k, added, kept, spare, out)


@float_kernel
def _sum(
    kind: Whole, matrix: Whole, q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray, spare: Whole,
    out: np.ndarray,
) -> None:  # fmt: skip
    _add_outer(kind, matrix, q, k, v, kept, spare, out)


@inline_kernel
def _add_outer(
    kind: Whole, matrix: Whole, q: np.ndarray, k: np.ndarray, added: np.ndarray, kept: np.ndarray, spare: Whole,
    out: np.ndarray,
) -> None:  # fmt: skip
    """matrix = kept * matrix + k added^T; out = matrix^T q."""
    fill(out, np.float32(0))
    for i in range(k.size):
        row, keep, factor, weight = _row_of(kind, matrix, i, added.size, spare), kept[i], k[i], q[i]
        for j in range(added.size):
            value = keep * row[j] + factor * added[j]
            row[j] = value
            out[j] += weight * value
        if kind != FLOAT32:
            write_row(kind, matrix + 2 * i * added.size, row)


@float_kernel
def _scan(
    kind: Whole, matrix: Whole, q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: Real, step: Real, spare: Whole,
    out: np.ndarray,
) -> None:  # fmt: skip
    for i in range(v.size):
        row, factor, total = _row_of(kind, matrix, i, k.size, spare), step * v[i], np.float32(0)
        for j in range(k.size):
            value = keep * row[j] + factor * k[j]
            row[j] = value
            total += q[j] * value
        out[i] = total
        if kind != FLOAT32:
            write_row(kind, matrix + 2 * i * k.size, row)


RECURRENCE_WORK = Worker(_recur)


def add_recurrence(
    program: Program, rule: int, heads: Heads, inputs: Inputs, fading: Fading, out: int, places: int
) -> None:
    """Adds out float32 [rows, heads, v_dim]. places: address of the table that says where the sequences' matrices lie.

    Raises LayoutError for heads that do not fit a thread's scratch.
    """
    if heads.k_dim + heads.v_dim + max(heads.k_dim, heads.v_dim) > ROOM_FLOATS:
        raise LayoutError(f"heads of {heads.k_dim} and {heads.v_dim} columns, expected up to {ROOM_FLOATS // 3}")
    call = program.zeros(RECURRENCE_CALL, np.int64)
    call[[STATE, RULE, N_HEADS, N_KEY_HEADS]] = program.state.ctypes.data, rule, heads.n, heads.n_keys
    call[[K_DIM, V_DIM, Q, K, V]] = heads.k_dim, heads.v_dim, heads.q, heads.k, heads.v
    call[[CHANNELS, CHANNELS_ROW, OUT, PLACES]] = inputs.channels, inputs.width, out, places
    call[[FADING, FADES_EACH, LOW, HIGH]] = fading.kind, fading.each, bits_of(fading.low), bits_of(fading.high)
    call[RATE] = program.keep(np.ascontiguousarray(fading.rate, np.float32))
    bias = np.zeros(heads.n * (heads.k_dim if fading.each else 1)) if fading.bias is None else fading.bias
    call[BIAS] = program.keep(np.ascontiguousarray(bias, np.float32))
    for at, places_of_heads in ((BETA, inputs.beta), (FADES, inputs.fades)):
        if places_of_heads is not None:
            call[at] = program.keep(np.array(places_of_heads.addresses, np.int64))
            call[at + 1] = places_of_heads.row
    if inputs.skip is not None:
        call[SKIP] = program.keep(np.ascontiguousarray(inputs.skip, np.float32))
    program.count(call, NEXT)
    program.add(RECURRENCE_WORK, call, Part.ATTENTION)
