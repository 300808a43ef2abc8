"""Attention of a step's rows over the KV cache: runs of cached tokens, then their join, head by head.

A run has RUN tokens, or up to CHUNK in a long context (`_run_tokens`): by what a row sees, never by who else is there.

Rows of one sequence that follow each other see the same keys and values in all runs but the last ones. Where fewer
heads share keys than a kernel takes, such rows share them instead: the kernel is given the queries of several rows.
Each query's result has the same bits, whoever shares its keys.

Behind an index (`step.index`) a row that sees more than TOP_K tokens attends to those of them that were chosen.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cpu_kernels.host.isa import BY_NAME, Isa
from cpu_kernels.jit.compiled import Real, Truth, Whole, Worker, float_kernel, inline_kernel
from cpu_kernels.jit.primitives import call_attend, call_attend_chosen, floats_at, int32s_at, int64s_at, take_ticket
from cpu_kernels.simd.attention import CHUNK, HEAD_BLOCK, LOWEST, RUN, AttendKernel
from cpu_kernels.simd.coded_attention import CodedAttendKernel, takes_columns
from cpu_kernels.simd.compile import VectorKernel, kernel_address
from cpu_kernels.step.cached import K_TOKEN, KIND, V_TOKEN, key_address, place_of, rows_of, value_address
from cpu_kernels.step.floats import BFLOAT16, FLOAT32, copy, fill
from cpu_kernels.step.heads import Source
from cpu_kernels.step.program import (
    MASK,
    MASK_ROW,
    N_ROWS,
    N_THREADS,
    PADDING,
    SCRATCH,
    SCRATCH_BYTES,
    SEEN,
    SEQUENCE,
    STATE_SIZE,
    Part,
    Program,
)
from cpu_kernels.step.stored import INT4, INT8, N_KINDS, is_turned, read_stored, row_bytes, turn

(STATE, NEXT, NEXT_JOIN, N_HEADS, N_KV_HEADS, DIM, V_DIM, SHARED, WINDOW, IN_BLOCKS, SINKS, QUERY, PARTS, STATS,
 MAX_CHUNKS, OUT, OUT_ROW, GATE, GATE_ROW, GATE_HEAD, GATE_COLUMNS, GATE_KIND, ZEROS, PLACES, TOP_K, CHOSEN,
 KERNELS) = range(27)  # fmt: skip
# From KERNELS on, by how rows are stored: addresses of the kernels for HEAD_BLOCK heads and for fewer, those of chosen
# tokens, and how many "fewer" are; 0: there are none.
BLOCK, REST, CHOSEN_BLOCK, CHOSEN_REST, REST_HEADS, KIND_KERNELS = range(6)
ATTEND_CALL = KERNELS + KIND_KERNELS * N_KINDS
KERNEL_DTYPES: dict[int, Literal["float32", "bfloat16"]] = {FLOAT32: "float32", BFLOAT16: "bfloat16"}
KERNEL_BITS: dict[int, Literal[8, 4]] = {INT8: 8, INT4: 4}
TASK_HEADS = 4 * HEAD_BLOCK
"""Query heads of a task at most: many heads that share one head of keys are work for several threads."""
SHARING_ROWS = HEAD_BLOCK
"""Rows of a task: with any number of heads for each head of keys they are whole blocks of queries."""
FEWEST_RUNS = 8
"""Runs become longer where a row has so many of them nevertheless: each costs 1 to 2 us beside its tokens. Not where
more heads than HEAD_BLOCK share keys, which read a run again, from L2. With OLMoE's heads and 8,000 tokens runs of 512
take 0.91 and of 1,024 take 0.88 of the time in bfloat16, 0.92 and 0.88 in int8 (a Xeon, 2 threads, AVX-512)."""
TICKET_TASKS, TICKETS = 4, 8
"""A ticket is TICKET_TASKS tasks, of which most follow each other in memory and each asks for the beginning of the next
(bfloat16, OLMoE's heads: 4 to 8 % more of the memory's rate with earlier loops over values; a Xeon, 2 threads), or
fewer, so that each thread has TICKETS tickets to even out."""
GATHERED = SCRATCH_BYTES // 2
"""Where in a thread's scratch the queries of several rows lie, and behind them their results and statistics."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a row looks at: all tokens up to itself, the last `window` of them, or (in_blocks) those in its own block of
    `window` tokens, counted from the first that is no padding."""

    window: int = 0
    in_blocks: bool = False


EVERYTHING = Sight()
SIGMOID_GATE, SOFTPLUS_GATE = range(2)
SOFTPLUS_LINEAR = 20.0
"""From here on softplus(x) is x, as torch has it."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What each head's result is multiplied with: a function (`kind`) of v_dim columns for each head, or of one."""

    source: Source
    columns: int
    kind: int = SIGMOID_GATE


def _attend(call_address: int, thread: int) -> None:
    """Worker. Task: a run of cached tokens of one head of keys and values, for up to TASK_HEADS heads of a row, or of
    SHARING_ROWS rows. Tasks that read the same run follow each other, then those of the next run."""
    call = int64s_at(call_address, ATTEND_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    scores = state[SCRATCH] + thread * SCRATCH_BYTES
    group, n_rows = call[N_HEADS] // call[N_KV_HEADS], state[N_ROWS]
    n_parts = (group + TASK_HEADS - 1) // TASK_HEADS
    longest = 0
    for row in range(n_rows):
        longest = max(longest, _n_chunks(call, rows[row]))
    together = SHARING_ROWS if _may_share(call, rows, group) else 1
    n_groups = (n_rows + together - 1) // together
    n_tasks = call[N_KV_HEADS] * n_parts * longest * n_groups
    each = max(1, min(TICKET_TASKS, n_tasks // (TICKETS * state[N_THREADS])))
    while True:
        begin = take_ticket(call[NEXT]) * each
        if begin >= n_tasks:
            return
        for task in range(begin, min(n_tasks, begin + each)):
            rest, row = task // n_groups, task % n_groups * together
            heads, chunk = rest // longest, rest % longest
            kv_head, first = heads // n_parts, heads % n_parts * TASK_HEADS
            head_stop, row_stop = min(group, first + TASK_HEADS), min(n_rows, row + together)
            if row_stop - row == together > 1 and _share_run(call, rows, row, row_stop, chunk):
                _run_of_rows(call, state, rows, row, row_stop, kv_head, first, head_stop, chunk, scores)
                continue
            while row < row_stop:
                if chunk < _n_chunks(call, rows[row]):
                    _run(call, state, rows[row], row, kv_head, first, head_stop, chunk, scores)
                row += 1


@inline_kernel
def _may_share(call: np.ndarray, rows: np.ndarray, group: Whole) -> Truth:
    """Whether rows may share runs: several of one sequence, too few heads for a kernel, and room for the queries."""
    if rows.shape[0] == 1 or group % HEAD_BLOCK == 0 or rows[0, SEQUENCE] != rows[1, SEQUENCE]:
        return False
    if call[WINDOW] or call[TOP_K]:
        return False
    n_floats = call[DIM] + call[SHARED] + call[V_DIM] + 2
    return 4 * HEAD_BLOCK * n_floats <= SCRATCH_BYTES - GATHERED


@inline_kernel
def _share_run(call: np.ndarray, rows: np.ndarray, row: Whole, stop: Whole, chunk: Whole) -> Truth:
    """Whether rows from `row` to `stop` see all tokens of a run of one sequence, and kernels read them."""
    n_tokens = _run_tokens(call, rows[row])
    if n_tokens != _run_tokens(call, rows[stop - 1]):
        return False
    kind = place_of(call[PLACES], rows[row, SEQUENCE])[KIND]
    whole = call[KERNELS + KIND_KERNELS * kind + BLOCK] != 0 and rows[row, SEQUENCE] == rows[stop - 1, SEQUENCE]
    return whole and rows[row, SEEN] >= (chunk + 1) * n_tokens


@inline_kernel
def _run_of_rows(
    call: np.ndarray, state: np.ndarray, rows: np.ndarray, row: Whole, stop: Whole, kv_head: Whole, head: Whole,
    head_stop: Whole, chunk: Whole, scores: Whole,
) -> None:  # fmt: skip
    """A run that rows from `row` to `stop` share, HEAD_BLOCK of their queries at a time."""
    seen = rows[row]
    n_tokens = _run_tokens(call, seen)
    first = chunk * n_tokens
    place = place_of(call[PLACES], seen[SEQUENCE])
    keys, key_bytes, values, value_bytes, more, more_bytes, bias = _memory(call, state, seen, place, kv_head, first)
    block = call[KERNELS + KIND_KERNELS * place[KIND] + BLOCK]
    n_heads, v_dim, width = call[N_HEADS], call[V_DIM], call[DIM] + call[SHARED]
    own = kv_head * (n_heads // call[N_KV_HEADS]) + head
    n_own = head_stop - head
    queries = scores + GATHERED
    results = queries + 4 * HEAD_BLOCK * width
    stats = results + 4 * HEAD_BLOCK * v_dim
    for begin in range(0, (stop - row) * n_own, HEAD_BLOCK):
        for i in range(HEAD_BLOCK):
            source = (row + (begin + i) // n_own) * n_heads + own + (begin + i) % n_own
            copy(floats_at(call[QUERY] + 4 * source * width, width), floats_at(queries + 4 * i * width, width))
        call_attend(
            block, queries, keys, key_bytes, values, value_bytes, bias, n_tokens, call[DIM], v_dim, scores,
            stats, results, more, more_bytes, call[SHARED],
        )  # fmt: skip
        for i in range(HEAD_BLOCK):
            of_row = (row + (begin + i) // n_own) * call[MAX_CHUNKS] + chunk
            part = of_row * n_heads + own + (begin + i) % n_own
            copy(floats_at(results + 4 * i * v_dim, v_dim), floats_at(call[PARTS] + 4 * part * v_dim, v_dim))
            copy(floats_at(stats + 8 * i, 2), floats_at(call[STATS] + 8 * part, 2))


@inline_kernel
def _memory(
    call: np.ndarray, state: np.ndarray, seen: np.ndarray, place: np.ndarray, kv_head: Whole, first: Whole
) -> tuple[Whole, Whole, Whole, Whole, Whole, Whole, Whole]:
    """Where a run from token `first` on lies: keys, values and the more columns of keys, each with the bytes from token
    to token; and what is added to its scores."""
    keys, key_bytes = key_address(place, kv_head, first), place[K_TOKEN]
    more, more_bytes = value_address(place, kv_head, first), place[V_TOKEN]
    bias = state[MASK] + 4 * (seen[SEQUENCE] * state[MASK_ROW] + first) if state[MASK] else call[ZEROS]
    if call[SHARED]:
        return keys, key_bytes, keys, key_bytes, more, more_bytes, bias
    return keys, key_bytes, more, more_bytes, more, more_bytes, bias


@inline_kernel
def _first_seen(call: np.ndarray, place: np.ndarray) -> Whole:
    """The first cached token that a row looks at."""
    window, padding = call[WINDOW], place[PADDING]
    if window == 0:
        return 0
    if call[IN_BLOCKS] and place[SEEN] > padding:
        return padding + (place[SEEN] - 1 - padding) // window * window
    return max(0, place[SEEN] - window)


@inline_kernel
def _n_attended(call: np.ndarray, place: np.ndarray) -> Whole:
    """Tokens that a row attends to."""
    n_seen = place[SEEN] - _first_seen(call, place)
    return min(n_seen, call[TOP_K]) if call[TOP_K] else n_seen


@inline_kernel
def _n_chunks(call: np.ndarray, place: np.ndarray) -> Whole:
    n_tokens = _run_tokens(call, place)
    return (_n_attended(call, place) + n_tokens - 1) // n_tokens


@inline_kernel
def _run_tokens(call: np.ndarray, place: np.ndarray) -> Whole:
    """Tokens of each run of a row."""
    n_tokens = RUN
    if call[N_HEADS] // call[N_KV_HEADS] > HEAD_BLOCK:
        return n_tokens
    n_seen = _n_attended(call, place)
    while n_tokens < CHUNK and n_seen > 2 * n_tokens * (FEWEST_RUNS - 1):
        n_tokens *= 2
    return n_tokens


@inline_kernel
def _run(
    call: np.ndarray, state: np.ndarray, seen: np.ndarray, row: Whole, kv_head: Whole, head: Whole, stop: Whole,
    chunk: Whole, scores: Whole,
) -> None:  # fmt: skip
    """The run `chunk` of a row, for query heads from `head` to `stop` of those that share a head of keys."""
    n_tokens = _run_tokens(call, seen)
    begin = chunk * n_tokens
    n_tokens = min(n_tokens, _n_attended(call, seen) - begin)
    place = place_of(call[PLACES], seen[SEQUENCE])
    is_chosen = 0 < call[TOP_K] < seen[SEEN]
    first = 0 if is_chosen else _first_seen(call, seen) + begin
    positions = call[CHOSEN] + 4 * (row * call[TOP_K] + begin) if is_chosen else 0
    keys, key_bytes, values, value_bytes, more, more_bytes, bias = _memory(call, state, seen, place, kv_head, first)
    if is_chosen and state[MASK]:
        bias = _gathered(bias, positions, n_tokens, scores + GATHERED)
    kind = place[KIND]
    kernels = call[KERNELS + KIND_KERNELS * kind :]
    n_rest = kernels[REST_HEADS]
    block, rest = kernels[CHOSEN_BLOCK if is_chosen else BLOCK], kernels[CHOSEN_REST if is_chosen else REST]
    dim, v_dim, shared = call[DIM], call[V_DIM], call[SHARED]
    while head < stop:
        many = stop - head >= HEAD_BLOCK and block != 0
        n_now = HEAD_BLOCK if many else max(1, n_rest)
        own = kv_head * (call[N_HEADS] // call[N_KV_HEADS]) + head
        part = (row * call[MAX_CHUNKS] + chunk) * call[N_HEADS] + own
        query = call[QUERY] + 4 * (row * call[N_HEADS] + own) * (dim + shared)
        stats, out = call[STATS] + 8 * part, call[PARTS] + 4 * part * v_dim
        if n_rest == 0:
            _attend_plainly(
                call, kind, query, keys, key_bytes, values, value_bytes, bias, n_tokens, scores, stats, out, more,
                more_bytes, positions,
            )  # fmt: skip
        elif is_chosen:
            call_attend_chosen(
                block if many else rest, query, keys, key_bytes, values, value_bytes, bias, n_tokens, dim, v_dim,
                scores, stats, out, more, more_bytes, shared, positions,
            )  # fmt: skip
        else:
            call_attend(
                block if many else rest, query, keys, key_bytes, values, value_bytes, bias, n_tokens, dim, v_dim,
                scores, stats, out, more, more_bytes, shared,
            )  # fmt: skip
        head += n_now


@inline_kernel
def _gathered(source: Whole, positions: Whole, n: Whole, target: Whole) -> Whole:
    """The address of n floats, those of `source` at the positions int32 [n]."""
    places, values = int32s_at(positions, n), floats_at(target, n)
    for i in range(n):
        values[i] = floats_at(source + 4 * places[i], 1)[0]
    return target


@float_kernel
def _attend_plainly(
    call: np.ndarray, kind: Whole, query: Whole, keys: Whole, key_bytes: Whole, values: Whole, value_bytes: Whole,
    bias: Whole, n_tokens: Whole, scores: Whole, stats: Whole, out: Whole, more: Whole, more_bytes: Whole,
    positions: Whole,
) -> None:  # fmt: skip
    """What `attend` of `cpu_kernels.simd.attention` does, for head sizes that are no whole number of vectors.
    positions: of chosen tokens; 0: there are none."""
    dim, v_dim, shared = call[DIM], call[V_DIM], call[SHARED]
    q, added, weights = floats_at(query, dim + shared), floats_at(bias, n_tokens), floats_at(scores, n_tokens)
    row = floats_at(scores + 4 * CHUNK, max(dim + shared, v_dim))
    top = np.float32(LOWEST)
    for token in range(n_tokens):
        number = np.int64(int32s_at(positions, n_tokens)[token]) if positions else token
        read_stored(kind, keys + number * key_bytes, row[:dim], np.float32(1))
        if shared:
            read_stored(kind, more + number * more_bytes, row[dim : dim + shared], np.float32(1))
        total = np.float32(0)
        for i in range(q.size):
            total += q[i] * row[i]
        weights[token] = total + added[token]
        top = max(top, weights[token])
    result, kept = floats_at(out, v_dim), floats_at(stats, 2)
    fill(result, np.float32(0))
    total = np.float32(0)
    for token in range(n_tokens):
        weight = np.exp(weights[token] - top)
        total += weight
        number = np.int64(int32s_at(positions, n_tokens)[token]) if positions else token
        read_stored(kind, values + number * value_bytes, row[:v_dim], weight)
        for i in range(v_dim):
            result[i] += row[i]
    kept[0], kept[1] = top, total


ATTEND_WORK = Worker(_attend)


def _join(call_address: int, thread: int) -> None:
    """Worker. Task: a query head of a row: its runs, in their order, become its result."""
    call = int64s_at(call_address, ATTEND_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    n_heads, v_dim = call[N_HEADS], call[V_DIM]
    while True:
        task = take_ticket(call[NEXT_JOIN])
        if task >= state[N_ROWS] * n_heads:
            return
        row, head = task // n_heads, task % n_heads
        n_chunks = _n_chunks(call, rows[row])
        first = row * call[MAX_CHUNKS] * n_heads + head
        stats = floats_at(call[STATS] + 8 * first, 2 * n_chunks * n_heads)
        sink = floats_at(call[SINKS] + 4 * head, 1)[0] if call[SINKS] else np.float32(LOWEST)
        result = floats_at(call[OUT] + 4 * (row * call[OUT_ROW] + head * v_dim), v_dim)
        _join_runs(stats, call[PARTS] + 4 * first * v_dim, n_heads, n_chunks, sink, result)
        if is_turned(place_of(call[PLACES], rows[row, SEQUENCE])[KIND]):
            turn(result)
        if call[GATE]:
            gate = floats_at(call[GATE] + 4 * (row * call[GATE_ROW] + head * call[GATE_HEAD]), call[GATE_COLUMNS])
            _pass_gate(call[GATE_KIND], gate, result)


@float_kernel
def _pass_gate(kind: Whole, gate: np.ndarray, result: np.ndarray) -> None:
    """result = result * what the gate lets through, by column or as a whole."""
    if gate.size == 1:
        factor = _opened(kind, gate[0])
        for i in range(result.size):
            result[i] *= factor
    elif kind == SIGMOID_GATE:
        for i in range(result.size):
            result[i] *= _opened(SIGMOID_GATE, gate[i])
    else:
        for i in range(result.size):
            result[i] *= _opened(SOFTPLUS_GATE, gate[i])


@inline_kernel
def _opened(kind: Whole, x: Real) -> Real:
    """What a gate lets through."""
    if kind == SIGMOID_GATE:
        return np.float32(1) / (np.float32(1) + np.exp(-x))
    return x if x > np.float32(SOFTPLUS_LINEAR) else np.log1p(np.exp(x))


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
    program: Program, n_heads: int, n_kv_heads: int, dim: int, v_dim: int, query: int, places: int, out: int, *,
    sight: Sight = EVERYTHING, sinks: np.ndarray | None = None, gate: Gate | None = None, shared: int = 0,
    top_k: int = 0, chosen: int = 0,
) -> np.ndarray:  # fmt: skip
    """Adds out float32 [rows, n_heads * v_dim] = attention of query float32 [rows, n_heads, dim + shared]; returns its
    call. `give_room` must have set where runs are kept, and `set_kernels` those of the caches' kinds.

    places: address of the table that says where the caches lie. sinks float32 [n_heads]: scores without values. shared:
    columns that the cache keeps where values are otherwise; keys are dim columns of the cache's keys and then these,
    and values are the first v_dim columns of the cache's keys. chosen: where int32 [rows, top_k] tell the tokens that a
    row which sees more than top_k attends to (top_k 0: every row attends to all that it sees).
    """
    call = program.zeros(ATTEND_CALL, np.int64)
    call[[STATE, N_HEADS, N_KV_HEADS, DIM, V_DIM]] = program.state.ctypes.data, n_heads, n_kv_heads, dim, v_dim
    call[[WINDOW, IN_BLOCKS, SHARED]] = sight.window, sight.in_blocks, shared
    call[[QUERY, PLACES, OUT, OUT_ROW]] = query, places, out, n_heads * v_dim
    call[[TOP_K, CHOSEN]] = top_k, chosen
    call[SINKS] = 0 if sinks is None else program.keep(np.ascontiguousarray(sinks, np.float32))
    if gate is not None:
        call[[GATE, GATE_ROW, GATE_HEAD]] = gate.source.address, gate.source.row, gate.source.head
        call[[GATE_COLUMNS, GATE_KIND]] = gate.columns, gate.kind
    call[ZEROS] = program.floats("zeros", CHUNK)
    program.count(call, NEXT)
    program.count(call, NEXT_JOIN)
    program.add(ATTEND_WORK, call, Part.ATTENTION)
    program.add(JOIN_WORK, call, Part.ATTENTION)
    return call


def set_kernels(call: np.ndarray, kind: int, isa_name: str) -> None:
    """Sets the kernels for rows that are stored as `kind`, where they can take its numbers of columns (else rows are
    read by plain loops). Raises LayoutError for heads that cannot be stored so."""
    own = call[KERNELS + KIND_KERNELS * kind :][:KIND_KERNELS]
    if own[REST_HEADS]:
        return
    isa, sizes = BY_NAME[isa_name], [int(call[at]) for at in (DIM, V_DIM, SHARED)]
    for size in sizes:
        row_bytes(kind, size)
    group = int(call[N_HEADS] // call[N_KV_HEADS])
    if kind in KERNEL_DTYPES and all(size % isa.lanes == 0 for size in sizes):
        dtype = KERNEL_DTYPES[kind]
        _set(own, AttendKernel(HEAD_BLOCK, dtype), AttendKernel(1, dtype), isa)
        if call[TOP_K]:
            own[CHOSEN_BLOCK] = kernel_address(AttendKernel(HEAD_BLOCK, dtype, chosen=True), isa_name)
            own[CHOSEN_REST] = kernel_address(AttendKernel(1, dtype, chosen=True), isa_name)
    elif kind in KERNEL_BITS and not call[TOP_K] and all(takes_columns(KERNEL_BITS[kind], size) for size in sizes):
        bits, split = KERNEL_BITS[kind], bool(call[SHARED])
        fewer = CodedAttendKernel(group % HEAD_BLOCK or 1, bits, split)
        _set(own, CodedAttendKernel(HEAD_BLOCK, bits, split), fewer, isa)


def _set(own: np.ndarray, block: VectorKernel, rest: AttendKernel | CodedAttendKernel, isa: Isa) -> None:
    own[BLOCK] = kernel_address(block, isa.name)
    own[REST], own[REST_HEADS] = kernel_address(rest, isa.name), rest.n_heads


def most_runs(call: np.ndarray, n_tokens: int) -> int:
    """Runs of a row that sees up to `n_tokens`, at most."""
    n_tokens = min(n_tokens, int(call[TOP_K]) or n_tokens)
    if call[N_HEADS] // call[N_KV_HEADS] > HEAD_BLOCK:
        return -(-n_tokens // RUN)
    return max(min(-(-n_tokens // RUN), 2 * (FEWEST_RUNS - 1)), -(-n_tokens // CHUNK))


def room_bytes(call: np.ndarray, n_rows: int, n_tokens: int) -> tuple[int, int]:
    """Bytes of (results, statistics) of all runs of `n_tokens` cached tokens, for each of n_rows rows."""
    n_runs = n_rows * int(call[N_HEADS]) * most_runs(call, n_tokens)
    return 4 * n_runs * int(call[V_DIM]), 8 * n_runs


def give_room(call: np.ndarray, parts: int, stats: int, n_tokens: int) -> None:
    """Lets runs of up to `n_tokens` cached tokens be kept at the addresses; `room_bytes` says how much they need."""
    call[[PARTS, STATS, MAX_CHUNKS]] = parts, stats, most_runs(call, n_tokens)
