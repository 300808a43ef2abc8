"""Where a step's rows stand in KV caches: a table of places, one for each sequence of the step.

Heads write there, attention reads there; `compiled` binds the table to the caches of a call. Sequences may lie in one
cache or in caches of their own, and may have different lengths.
"""

import numpy as np

from cpu_kernels.jit.compiled import Whole, inline_kernel
from cpu_kernels.jit.primitives import int64s_at
from cpu_kernels.step.program import N_ROWS, ROW_SIZE, ROWS

# A place: addresses of one sequence's keys and values in one layer, each with the bytes from one head and token to the
# next; how they are stored (`stored.KIND_OF`); the number of the first token that is held; the keys of its index, with
# the bytes from one token to the next and how they are stored.
(KEYS, K_HEAD, K_TOKEN, VALUES, V_HEAD, V_TOKEN, KIND, PAST_FIRST, INDEX, I_TOKEN, I_KIND, PLACE_SIZE) = range(12)


@inline_kernel
def rows_of(state: np.ndarray) -> np.ndarray:
    """int64 [rows, ROW_SIZE]: the rows of a step."""
    return int64s_at(state[ROWS], ROW_SIZE * state[N_ROWS]).reshape(state[N_ROWS], ROW_SIZE)


@inline_kernel
def place_of(places: Whole, sequence: Whole) -> np.ndarray:
    """int64 [PLACE_SIZE]: the place of a sequence. places: address of the table."""
    return int64s_at(places + 8 * PLACE_SIZE * sequence, PLACE_SIZE)


@inline_kernel
def key_address(place: np.ndarray, head: Whole, token: Whole) -> Whole:
    """Of a cached key. token: its number in the conversation."""
    return place[KEYS] + head * place[K_HEAD] + (token - place[PAST_FIRST]) * place[K_TOKEN]


@inline_kernel
def value_address(place: np.ndarray, head: Whole, token: Whole) -> Whole:
    """Of a cached value, as `key_address`."""
    return place[VALUES] + head * place[V_HEAD] + (token - place[PAST_FIRST]) * place[V_TOKEN]


@inline_kernel
def index_address(place: np.ndarray, token: Whole) -> Whole:
    """Of the key that an index has of a token, as `key_address`."""
    return place[INDEX] + (token - place[PAST_FIRST]) * place[I_TOKEN]
