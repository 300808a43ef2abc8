"""Row operations: what was computed is added to the stream, the stream is normalised and written for the products.

One task is one row, by one thread::

    stream = keep * stream + sum over summands of scale * gate * (sum of its parts)
    out = norm(stream) * weight + bias
    each target = out in the format that a product's kernel reads

The first operation of a whole step is of rows, too: each row's token becomes the row of the embedding that the stream
begins with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels.jit.atomics import store
from cpu_kernels.jit.compiled import Real, Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import call_prepare, floats_at, int64s_at, take_ticket
from cpu_kernels.simd.formats import NOT_FINITE as NOT_FINITE_FLAG
from cpu_kernels.step.cached import rows_of
from cpu_kernels.step.floats import (
    ELEMENT_BYTES,
    bits_of,
    deviation_sum,
    fill,
    float_of,
    plain_sum,
    read_row,
    square_sum,
)
from cpu_kernels.step.program import FIRST_ROW, N_ROWS, NOT_FINITE, STATE_SIZE, TOKEN, Part, Program

(STATE, NEXT, STREAM, WIDTH, KEEP, N_SUMMANDS, SUMMANDS, NORM, WEIGHT, BIAS, EPS, OUT, N_TARGETS, TARGETS, LAYER,
 STREAM_CALL) = range(16)  # fmt: skip
# The embedding: the same first positions, then how rows of the table are stored, the bytes of an element, the table's
# address, and the factor.
KIND, ELEMENT, TABLE, FACTOR, EMBED_CALL = range(WIDTH + 1, WIDTH + 6)
# A summand: float32 [rows * PARTS, WIDTH] at ADDRESS, ROW floats apart; GATE: float32 [rows], whose sigmoid it is
# multiplied with, or 0.
ADDRESS, PARTS, SCALE, GATE, ROW, SUMMAND_SIZE = range(6)
# A target: the prepare kernel's address, where rows are written, and the bytes of one.
PREPARE, PLACE, ROW_BYTES, TARGET_SIZE = range(4)
NO_NORM, RMS_NORM, LAYER_NORM = range(3)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of float32 or bfloat16 (`kind`) at an address, [n_tokens, width], and what they are multiplied with."""

    address: int
    n_tokens: int
    width: int
    kind: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Norm:
    """y = x / sqrt(mean(x ** 2) + eps) * weight, or (centred) the same of x - mean(x); then + bias. float32 [width]."""

    weight: np.ndarray
    eps: float
    bias: np.ndarray | None = None
    centred: bool = False


@dataclass(frozen=True, slots=True)
class Summand:
    """float32 [rows * parts, width] at an address; what it is multiplied with; where gates lie (0: none); floats from
    one row to the next (0: width)."""

    address: int
    parts: int = 1
    scale: float = 1.0
    gate: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a product reads its input, and the kernel that writes it."""

    prepare: int
    address: int
    row_bytes: int


def _stream(call_address: int, thread: int) -> None:
    """Worker. Task: a row. What it is written to is counted from the first row that is asked for."""
    call = int64s_at(call_address, STREAM_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    while True:
        row = take_ticket(call[NEXT])
        if row >= state[N_ROWS]:
            return
        from_row = state[FIRST_ROW] + row
        values = floats_at(call[STREAM] + 4 * from_row * call[WIDTH], call[WIDTH])
        _add_summands(call, from_row, values)
        out = floats_at(call[OUT] + 4 * row * call[WIDTH], call[WIDTH])
        if call[NORM] == RMS_NORM:
            _rms(call, values, out)
        elif call[NORM] == LAYER_NORM:
            _layer_norm(call, values, out)
        targets = int64s_at(call[TARGETS], TARGET_SIZE * call[N_TARGETS]).reshape(call[N_TARGETS], TARGET_SIZE)
        for i in range(call[N_TARGETS]):
            place = targets[i, PLACE] + row * targets[i, ROW_BYTES]
            if call_prepare(targets[i, PREPARE], out.ctypes.data, call[WIDTH], place) & NOT_FINITE_FLAG:
                store(call[STATE] + 8 * NOT_FINITE, call[LAYER] + 1)


@inline_kernel
def _add_summands(call: np.ndarray, row: Whole, values: np.ndarray) -> None:
    summands = int64s_at(call[SUMMANDS], SUMMAND_SIZE * call[N_SUMMANDS]).reshape(call[N_SUMMANDS], SUMMAND_SIZE)
    keep = float_of(call[KEEP])
    if keep == np.float32(0):
        fill(values, np.float32(0))
    elif keep != np.float32(1):
        for i in range(values.size):
            values[i] *= keep
    for i in range(call[N_SUMMANDS]):
        scale = float_of(summands[i, SCALE])
        if summands[i, GATE]:
            gate = floats_at(summands[i, GATE] + 4 * row, 1)[0]
            scale *= np.float32(1) / (np.float32(1) + np.exp(-gate))
        for part in range(row * summands[i, PARTS], (row + 1) * summands[i, PARTS]):
            source = floats_at(summands[i, ADDRESS] + 4 * part * summands[i, ROW], values.size)
            for column in range(values.size):
                values[column] += scale * source[column]


@inline_kernel
def _rms(call: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    weight = floats_at(call[WEIGHT], values.size)
    factor = _inverse_root(square_sum(values) / np.float32(values.size), float_of(call[EPS]))
    for i in range(values.size):
        out[i] = values[i] * factor * weight[i]
    _add_bias(call, out)


@inline_kernel
def _layer_norm(call: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    weight = floats_at(call[WEIGHT], values.size)
    mean = plain_sum(values) / np.float32(values.size)
    factor = _inverse_root(deviation_sum(values, mean) / np.float32(values.size), float_of(call[EPS]))
    for i in range(values.size):
        out[i] = (values[i] - mean) * factor * weight[i]
    _add_bias(call, out)


@inline_kernel
def _add_bias(call: np.ndarray, out: np.ndarray) -> None:
    if call[BIAS]:
        bias = floats_at(call[BIAS], out.size)
        for i in range(out.size):
            out[i] += bias[i]


@inline_kernel
def _inverse_root(variance: Real, eps: Real) -> Real:
    return np.float32(1) / np.sqrt(variance + eps)


STREAM_WORK = Worker(_stream)


def add_stream(
    program: Program, part: Part, layer: int, stream: int, width: int, *, keep: float, summands: Sequence[Summand] = (),
    norm: Norm | None = None, out: int = 0, targets: Sequence[Target] = (), state: np.ndarray | None = None,
) -> int:  # fmt: skip
    """Adds a row operation on float32 [rows, width] at `stream`; returns its number.

    keep: what the stream's own values are multiplied with; 0: they are not read. out: where the normalised rows go; 0:
    they stay the stream's. state: of the rows, where they are not all of the program's; `out` lies elsewhere than the
    stream then.
    """
    call = program.zeros(STREAM_CALL, np.int64)
    of_rows = program.state if state is None else state
    call[[STATE, STREAM, WIDTH, KEEP, LAYER]] = of_rows.ctypes.data, stream, width, bits_of(keep), layer
    call[OUT] = out or stream
    table = np.array(
        [[s.address, s.parts, bits_of(s.scale), s.gate, s.row or width] for s in summands] or [[0] * 5], np.int64
    )
    call[[N_SUMMANDS, SUMMANDS]] = len(summands), program.keep(table)
    written = np.array([[t.prepare, t.address, t.row_bytes] for t in targets] or [[0] * 3], np.int64)
    call[[N_TARGETS, TARGETS]] = len(targets), program.keep(written)
    if norm is not None:
        call[[NORM, EPS]] = LAYER_NORM if norm.centred else RMS_NORM, bits_of(norm.eps)
        call[WEIGHT] = program.keep(np.ascontiguousarray(norm.weight, np.float32))
        call[BIAS] = 0 if norm.bias is None else program.keep(np.ascontiguousarray(norm.bias, np.float32))
    program.count(call, NEXT)
    return program.add(STREAM_WORK, call, part)


def _embed(call_address: int, thread: int) -> None:
    """Worker. Task: a row."""
    call = int64s_at(call_address, EMBED_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    width = call[WIDTH]
    while True:
        row = take_ticket(call[NEXT])
        if row >= state[N_ROWS]:
            return
        source = call[TABLE] + rows[row, TOKEN] * width * call[ELEMENT]
        read_row(call[KIND], source, floats_at(call[STREAM] + 4 * row * width, width), float_of(call[FACTOR]))


EMBED_WORK = Worker(_embed)


def add_embedding(program: Program, embedding: Embedding, stream: int) -> None:
    """Adds stream float32 [rows, width] = the embedding of each row's token."""
    call = program.zeros(EMBED_CALL, np.int64)
    call[[STATE, KIND]] = program.state.ctypes.data, embedding.kind
    call[[ELEMENT, TABLE]] = ELEMENT_BYTES[embedding.kind], embedding.address
    call[[WIDTH, FACTOR, STREAM]] = embedding.width, bits_of(embedding.scale), stream
    program.count(call, NEXT)
    program.add(EMBED_WORK, call, Part.NORMS)
