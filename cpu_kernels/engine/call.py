"""A call as the compiled workers see it: one int64 vector of sizes, flags and addresses.

First the plan of its spec (`cpu_kernels.engine.plans`; sizes are padded unless called TRUE), then what a driver adds.
An expert maps IN columns (hidden) to INTER to OUT (hidden); a linear layer has INTER = IN and skips the first half.
"""

import numpy as np

from cpu_kernels.format.layout import BLOCK_COLUMNS
from cpu_kernels.jit.compiled import Whole, inline_kernel

(PANEL, EXACT_PANEL, PREPARE, FINISH, IN_TRUE, INTER_TRUE, OUT_TRUE, IN, INTER, OUT, BLOCK_BYTES, X_BYTES, GATED, DOWN,
 HAS_BIAS, GATE_BIAS, UP_BIAS, DOWN_BIAS, PREPARE_WORKER, UP_WORKER, DOWN_WORKER,
 PLAN_SIZE) = range(22)  # fmt: skip
(N_EXPERTS, N_TOKENS, N_ROWS, PARAMETERS, RECORDS, INPUT, WEIGHTS, OUT_ROWS, STARTS, TOKENS, FLAT, WANTED, X, H,
 COUNTERS, X_PANEL, H_PANEL, N_THREADS, CALL_SIZE) = range(PLAN_SIZE, PLAN_SIZE + 19)  # fmt: skip

LINE = 64  # bytes: sections of the workspace and counters are this far apart
# Counters (int64, a cache line each): next token, next task of region 1 and 2, 1 + a token that is not finite, 1 if a
# token is not bfloat16
NEXT_TOKEN, NEXT_UP, NEXT_DOWN, NOT_FINITE, INEXACT, N_COUNTERS = range(6)


@inline_kernel
def row_bytes_of(call: np.ndarray, size: Whole) -> Whole:
    """Bytes of a row of activations of IN or INTER columns."""
    return call[size] // BLOCK_COLUMNS * call[X_BYTES]


@inline_kernel
def counter_address(call: np.ndarray, name: Whole) -> Whole:
    """Address of a counter."""
    return call[COUNTERS] + LINE * name
