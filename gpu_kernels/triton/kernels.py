# ruff: noqa: ANN001, ANN201, ANN202 - what Triton compiles has no Python types
# mypy: ignore-errors
"""Triton kernels over packed expert records: gate, up and activation in one, down and routing weight in the other.

A program computes 16 rows of one expert for up to BLOCK_M of its tokens, and walks over the columns block by block
(layout: `cpu_kernels.format.layout`). Weights are unpacked in registers and multiplied with float32 activations, so
results agree with `reference_ffn` up to the order of summation. Meant for decode (few tokens an expert), where the
time is that of reading the record; prompts take the dequantised path, whose products are large enough for the BLAS.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT4, INT8, BFLOAT16, FLOAT32 = 0, 1, 2, 3
ANY_CALL = {
    "do_not_specialize": ["top_k"],
    "do_not_specialize_on_alignment": ["slot_ids_ptr", "offsets_ptr", "rows_ptr", "hidden_ptr", "weights_ptr"],
}
"""What differs from call to call must not decide what is compiled: the first reply would wait seconds for it."""
SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, IDENTITY = 0, 1, 2, 3, 4, 5, 6


@triton.jit
def _part(x_ptr, x_rows, mask, words, scales, columns, n_columns, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK_M, 16]: what one value of each word adds; `columns` [LINES] are the columns of these values."""
    if DTYPE == 0:
        weights = (((words >> SHIFT) & 15) - 8).to(tl.float32) * scales
    elif DTYPE == 1:
        weights = (((words >> SHIFT) & 255) - 128).to(tl.float32) * scales
    elif DTYPE == 2:
        if SHIFT == 0:
            weights = (words << 16).to(tl.float32, bitcast=True)
        else:
            weights = (words & -65536).to(tl.float32, bitcast=True)
    else:
        weights = words.to(tl.float32, bitcast=True)
    inside = mask[:, None] & (columns[None, :] < n_columns)
    x = tl.load(x_ptr + x_rows[:, None] * n_columns + columns[None, :], mask=inside, other=0.0)
    return tl.sum(x[:, :, None] * weights[None, :, :], axis=1)


@triton.jit
def _row_block(
    record_ptr, row_block, n_column_blocks, x_ptr, x_rows, mask, n_columns,
    BLOCK_M: tl.constexpr, LINES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, 16]: 16 rows of a packed matrix times the tokens' rows of x [*, n_columns]."""
    block_words: tl.constexpr = LINES * 16 + (16 if DTYPE < 2 else 0)
    lines = tl.arange(0, LINES)
    rows = tl.arange(0, 16)
    total = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    for block in range(n_column_blocks):
        base = record_ptr + (row_block * n_column_blocks + block) * block_words
        words = tl.load(base + lines[:, None] * 16 + rows[None, :])
        scales = words.to(tl.float32)
        first = block * 64
        if DTYPE < 2:
            group = lines // (LINES // 2)
            halves = (base + LINES * 16).to(tl.pointer_type(tl.int16))
            bits = tl.load(halves + group[:, None] * 16 + rows[None, :]).to(tl.int32)
            scales = (bits << 16).to(tl.float32, bitcast=True)
        if DTYPE == 0:
            columns = first + 32 * (lines // 4) + 4 * (lines % 4)
            for byte in tl.static_range(4):
                total += _part(x_ptr, x_rows, mask, words, scales, columns + byte, n_columns, 8 * byte, DTYPE)
                total += _part(x_ptr, x_rows, mask, words, scales, columns + 16 + byte, n_columns, 8 * byte + 4, DTYPE)
        elif DTYPE == 1:
            for byte in tl.static_range(4):
                total += _part(x_ptr, x_rows, mask, words, scales, first + 4 * lines + byte, n_columns, 8 * byte, DTYPE)
        elif DTYPE == 2:
            total += _part(x_ptr, x_rows, mask, words, scales, first + 2 * lines, n_columns, 0, DTYPE)
            total += _part(x_ptr, x_rows, mask, words, scales, first + 2 * lines + 1, n_columns, 16, DTYPE)
        else:
            total += _part(x_ptr, x_rows, mask, words, scales, first + lines, n_columns, 0, DTYPE)
    return total


@triton.jit
def _act(x, alpha, KIND: tl.constexpr):
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


@triton.jit(**ANY_CALL)
def up_kernel(
    slots_ptr, slot_words, slot_ids_ptr, offsets_ptr, rows_ptr, hidden_ptr, inner_ptr,
    hidden, inter, n_column_blocks, top_k, gate_bias_word, up_bias_word,
    alpha, gate_max, act_max, up_limit, up_offset,
    BLOCK_M: tl.constexpr, LINES: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """inner[position in rows, 16 p + r] = act(gate) * up for program (p, expert, tile of tokens)."""
    p, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = slots_ptr + tl.load(slot_ids_ptr + expert).to(tl.int64) * slot_words
    at = tl.load(offsets_ptr + expert) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = at < tl.load(offsets_ptr + expert + 1)
    tokens = tl.load(rows_ptr + at, mask=mask, other=0) // top_k
    columns = p * 16 + tl.arange(0, 16)
    if GATED:
        first = (p // 2) * 4 + p % 2
        gate = _row_block(record_ptr, first, n_column_blocks, hidden_ptr, tokens, mask, hidden, BLOCK_M, LINES, DTYPE)
        up = _row_block(record_ptr, first + 2, n_column_blocks, hidden_ptr, tokens, mask, hidden, BLOCK_M, LINES, DTYPE)
        if HAS_BIAS:
            gate += tl.load(record_ptr + gate_bias_word + columns).to(tl.float32, bitcast=True)[None, :]
            up += tl.load(record_ptr + up_bias_word + columns).to(tl.float32, bitcast=True)[None, :]
        value = tl.minimum(_act(tl.minimum(gate, gate_max), alpha, KIND), act_max)
        result = value * (tl.minimum(tl.maximum(up, -up_limit), up_limit) + up_offset)
    else:
        up = _row_block(record_ptr, p, n_column_blocks, hidden_ptr, tokens, mask, hidden, BLOCK_M, LINES, DTYPE)
        if HAS_BIAS:
            up += tl.load(record_ptr + up_bias_word + columns).to(tl.float32, bitcast=True)[None, :]
        result = _act(up, alpha, KIND)
    inside = mask[:, None] & (columns[None, :] < inter)
    tl.store(inner_ptr + at[:, None] * inter + columns[None, :], result, mask=inside)


@triton.jit(**ANY_CALL)
def down_kernel(
    slots_ptr, slot_words, slot_ids_ptr, offsets_ptr, rows_ptr, inner_ptr, weights_ptr, out_ptr,
    hidden, inter, n_column_blocks, down_word, down_bias_word,
    BLOCK_M: tl.constexpr, LINES: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out[row, 16 p + r] = routing weight of the row * (down @ inner) for program (p, expert, tile of tokens)."""
    p, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = slots_ptr + tl.load(slot_ids_ptr + expert).to(tl.int64) * slot_words
    at = tl.load(offsets_ptr + expert) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = at < tl.load(offsets_ptr + expert + 1)
    rows = tl.load(rows_ptr + at, mask=mask, other=0)
    columns = p * 16 + tl.arange(0, 16)
    result = _row_block(
        record_ptr + down_word, p, n_column_blocks, inner_ptr, at, mask, inter, BLOCK_M, LINES, DTYPE
    )  # fmt: skip
    if HAS_BIAS:
        result += tl.load(record_ptr + down_bias_word + columns).to(tl.float32, bitcast=True)[None, :]
    result *= tl.load(weights_ptr + rows, mask=mask, other=0.0)[:, None]
    inside = mask[:, None] & (columns[None, :] < hidden)
    tl.store(out_ptr + rows[:, None] * hidden + columns[None, :], result, mask=inside)
