"""The start of a step: each row's token becomes the row of the embedding that the stream begins with."""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.jit.compiled import Worker
from cpu_kernels.jit.primitives import floats_at, int64s_at, take_ticket
from cpu_kernels.step.floats import ELEMENT_BYTES, bits_of, float_of, read_row
from cpu_kernels.step.program import N_ROWS, ROW_SIZE, ROWS, STATE_SIZE, TOKEN, Part, Program

STATE, NEXT, KIND, ELEMENT, TABLE, WIDTH, SCALE, STREAM, EMBED_CALL = range(9)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of float32 or bfloat16 (`kind`) at an address, [n_tokens, width], and what they are multiplied with."""

    address: int
    n_tokens: int
    width: int
    kind: int
    scale: float = 1.0


def _embed(call_address: int, thread: int) -> None:
    """Worker. Task: a row."""
    call = int64s_at(call_address, EMBED_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = int64s_at(state[ROWS], ROW_SIZE * state[N_ROWS]).reshape(state[N_ROWS], ROW_SIZE)
    width = call[WIDTH]
    while True:
        row = take_ticket(call[NEXT])
        if row >= state[N_ROWS]:
            return
        source = call[TABLE] + rows[row, TOKEN] * width * call[ELEMENT]
        read_row(call[KIND], source, floats_at(call[STREAM] + 4 * row * width, width), float_of(call[SCALE]))


EMBED_WORK = Worker(_embed)


def add_embedding(program: Program, embedding: Embedding, stream: int) -> None:
    """Adds stream float32 [rows, width] = the embedding of each row's token."""
    call = program.zeros(EMBED_CALL, np.int64)
    call[[STATE, KIND]] = program.state.ctypes.data, embedding.kind
    call[[ELEMENT, TABLE]] = ELEMENT_BYTES[embedding.kind], embedding.address
    call[[WIDTH, SCALE, STREAM]] = embedding.width, bits_of(embedding.scale), stream
    program.count(call, NEXT)
    program.add(EMBED_WORK, call, Part.NORMS)
