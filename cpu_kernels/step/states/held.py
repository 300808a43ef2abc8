"""Where the states of a step's sequences lie, in layers that keep a state in place of keys and values.

A layer has up to two, which each token changes where they lie: the last inputs of a convolution over time, and a matrix
of each head. A sequence may be read at one place and written at another, so that a step that fails has changed nothing.
"""

import numpy as np

from cpu_kernels.jit.compiled import Whole, inline_kernel
from cpu_kernels.jit.primitives import int64s_at
from cpu_kernels.step.program import N_ROWS, SEQUENCE

# A place: addresses at which one sequence's last inputs [channels, taps] are read and written, and how they are stored
# (`floats`); the same of its matrices [heads, rows, columns].
INPUTS, NEW_INPUTS, INPUTS_KIND, MATRICES, NEW_MATRICES, MATRICES_KIND, STATES_SIZE = range(7)


@inline_kernel
def states_of(places: Whole, sequence: Whole) -> np.ndarray:
    """int64 [STATES_SIZE]: the place of a sequence. places: address of the table."""
    return int64s_at(places + 8 * STATES_SIZE * sequence, STATES_SIZE)


@inline_kernel
def n_sequences(state: np.ndarray, rows: np.ndarray) -> Whole:
    """Sequences of a step; each has as many rows as the others, one after another."""
    return rows[state[N_ROWS] - 1, SEQUENCE] + 1
