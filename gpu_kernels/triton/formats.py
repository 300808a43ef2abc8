# ruff: noqa: ANN001, ANN201 - what Triton compiles has no Python types
# mypy: ignore-errors
"""What the kernels for few and for many tokens share: activations as int8, activation functions, where rows lie.

Activations of int8 and int4 experts are rounded to int8 exactly as on the CPU (`cpu_kernels.simd.formats`): one scale,
the largest absolute value / 127, for 32 columns; a group that is not finite gets an infinite scale and codes of 0, so
that its results are NaN. A row holds 8 words of codes for each group, then the groups' float32 scales.

Activations of bfloat16 and float32 experts stay float32, but for tensor cores: there bfloat16 experts meet each value
as the sum of two bfloat16, which differs from it by 2^-18 of its size at most. A row holds the first of each pair, then
the second. Rows begin every `quads` times 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

INT4, INT8, BFLOAT16, FLOAT32 = 0, 1, 2, 3
SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, IDENTITY = 0, 1, 2, 3, 4, 5, 6
PREPARED_GROUPS = 16
"""Groups of 32 columns that a program of `prepare_kernel` takes."""
SIZES = ["n_columns", "n_rows", "n_blocks", "inner_blocks", "slot_lines", "x_quads", "inner_quads", "top_k"]
SIZES += ["given_quads", "n_pairs"]
PLACES = ["down_line", "gate_bias_word", "up_bias_word", "down_bias_word"]
POINTERS = ["slot_ids_ptr", "offsets_ptr", "rows_ptr", "weights_ptr", "out_ptr", "source_ptr"]
ANY_CALL = {"do_not_specialize": [*SIZES, *PLACES], "do_not_specialize_on_alignment": POINTERS}
"""Shapes and what differs from call to call do not decide what is compiled: the first reply would wait seconds."""


@triton.jit
def int8_codes(x):
    """float32 [N, 32] -> (int8 codes [N, 32], float32 scales [N])."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # NaN is above infinity
    finite = bits < 0x7F800000
    largest = bits.to(tl.float32, bitcast=True)
    usable = finite & (largest > 1e-30)
    inverse = tl.where(usable, tl.div_rn(tl.full(bits.shape, 127.0, tl.float32), tl.where(usable, largest, 1.0)), 0.0)
    # The bounds change no value; they keep the compiler from rounding product and sum at once, as the CPU does not.
    y = tl.minimum(tl.maximum(x * inverse[:, None], -127.0), 127.0) + 12582912.0  # to the nearest even integer
    codes = tl.where(finite[:, None], y.to(tl.int32, bitcast=True) - 0x4B400000, 0)
    return codes.to(tl.int8), tl.where(finite, largest * (1 / 127), float("inf"))


@triton.jit
def two_bfloat16(x):
    """float32 -> the nearest bfloat16, and the one nearest to the rest."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit(**ANY_CALL)
def prepare_kernel(
    source_ptr, target_ptr, n_columns, n_blocks, x_quads,
    QUANTISED: tl.constexpr, GROUPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows of float32 [T, n_columns] as rows of int8 activations, or of pairs of bfloat16; program (row, part of GROUPS
    groups of 32 columns)."""
    if OVERLAP:
        gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = part * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(source_ptr + row * n_columns + columns, mask=columns < n_columns, other=0.0)
    row_ptr = target_ptr + row * (x_quads * 4)
    if QUANTISED:
        codes, scales = int8_codes(x)
        store_int8(row_ptr, groups, 2 * n_blocks, codes, scales)
    else:
        high, low = two_bfloat16(x)
        ptrs = row_ptr.to(tl.pointer_type(tl.bfloat16)) + columns
        tl.store(ptrs, high, mask=columns < n_blocks * 64)
        tl.store(ptrs + n_blocks * 64, low, mask=columns < n_blocks * 64)


@triton.jit
def store_int8(row_ptr, groups, n_groups, codes, scales):
    """Groups [N] of one row: codes [N, 32], scales [N]."""
    inside = groups < n_groups
    code_ptrs = row_ptr.to(tl.pointer_type(tl.int8)) + groups[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(code_ptrs, codes, mask=inside[:, None])
    tl.store(row_ptr.to(tl.pointer_type(tl.float32)) + n_groups * 8 + groups, scales, mask=inside)


@triton.jit
def round_row(given_ptr, given_quads, row_ptr, n_groups):
    """A row of float32 [given_quads * 4] as int8 activations at row_ptr, which the program that calls this has for
    itself: behind the barrier all of its threads read what each has written."""
    for first in range(0, n_groups, 64):
        groups = first + tl.arange(0, 64)
        columns = groups[:, None] * 32 + tl.arange(0, 32)[None, :]
        x = tl.load(given_ptr + columns, mask=columns // 4 < given_quads, other=0.0)
        codes, scales = int8_codes(x)
        store_int8(row_ptr, groups, n_groups, codes, scales)
    tl.debug_barrier()


@triton.jit
def act(x, alpha, KIND: tl.constexpr):
    """The activation functions of `cpu_kernels.format.spec`."""
    if KIND == 0:
        y = x / (1.0 + tl.exp(-alpha * x))
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * inner))
    elif KIND == 3:
        y = tl.maximum(x, 0.0)
    elif KIND == 4:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif KIND == 5:
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        y = x
    return y


@triton.jit
def gated(gate, up, alpha, gate_max, act_max, up_limit, up_offset, KIND: tl.constexpr):
    """The gated activation of `cpu_kernels.format.spec`; limits that do not apply are infinite."""
    value = tl.minimum(act(tl.minimum(gate, gate_max), alpha, KIND), act_max)
    return value * (tl.minimum(tl.maximum(up, -up_limit), up_limit) + up_offset)


@triton.jit
def record_of(slots_ptr, slot_lines, slot_ids_ptr, expert):
    """Where the record of a group's expert begins (int32 words)."""
    return slots_ptr + tl.load(slot_ids_ptr + expert).to(tl.int64) * slot_lines * 16


@triton.jit
def row_words(n_blocks, BLOCK_WORDS: tl.constexpr, ROWS: tl.constexpr):
    """int32 [ROWS]: where the words of consecutive rows lie in a line, beginning with the first row of a row block."""
    rows = tl.arange(0, ROWS)
    return (rows // 16) * (n_blocks * BLOCK_WORDS) + rows % 16
