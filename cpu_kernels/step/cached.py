"""Where a step's rows stand in a KV cache: the part of a call vector that says where keys and values lie.

Heads write there, attention reads there; `compiled` binds both to the cache of a call.
"""

import numpy as np

from cpu_kernels.jit.compiled import Whole, inline_kernel
from cpu_kernels.jit.primitives import int64s_at
from cpu_kernels.step.program import N_ROWS, ROW_SIZE, ROWS

# Addresses of keys and values, each with the bytes from one sequence, head and token to the next; how they are stored
# (`floats.FLOAT32` or `BFLOAT16`); the number of the first token that is held.
(KEYS, K_SEQUENCE, K_HEAD, K_TOKEN, VALUES, V_SEQUENCE, V_HEAD, V_TOKEN, KIND, PAST_FIRST,
 CACHE_SIZE) = range(11)  # fmt: skip


@inline_kernel
def rows_of(state: np.ndarray) -> np.ndarray:
    """int64 [rows, ROW_SIZE]: the rows of a step."""
    return int64s_at(state[ROWS], ROW_SIZE * state[N_ROWS]).reshape(state[N_ROWS], ROW_SIZE)


@inline_kernel
def key_address(call: np.ndarray, cache: Whole, sequence: Whole, head: Whole, token: Whole) -> Whole:
    """Of a cached key. cache: where in `call` the positions above begin; token: its number in the conversation."""
    place = call[cache + KEYS] + sequence * call[cache + K_SEQUENCE] + head * call[cache + K_HEAD]
    return place + (token - call[cache + PAST_FIRST]) * call[cache + K_TOKEN]


@inline_kernel
def value_address(call: np.ndarray, cache: Whole, sequence: Whole, head: Whole, token: Whole) -> Whole:
    """Of a cached value, as `key_address`."""
    place = call[cache + VALUES] + sequence * call[cache + V_SEQUENCE] + head * call[cache + V_HEAD]
    return place + (token - call[cache + PAST_FIRST]) * call[cache + V_TOKEN]
