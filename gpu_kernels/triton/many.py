# ruff: noqa: ANN001, ANN201, ANN202 - what Triton compiles has no Python types
# mypy: ignore-errors
"""Kernels for five and more tokens an expert: products on tensor cores, TOKENS tokens and 32 or 64 rows a program.

int8 and int4 codes meet int8 activations in integer products of 32 columns, whose sums are scaled as on the CPU: the
same integers, the same scales, another order of summation. bfloat16 weights meet each activation as the sum of two
bfloat16; sums are float32. float32 weights are multiplied in float32, without tensor cores. Nothing is rounded to TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.triton.formats import ANY_CALL, act, gated, int8_codes, record_of, row_words, two_bfloat16


@triton.jit
def _bytes(words):
    """int8 [ROWS, 4 * LINES]: the bytes of int32 [ROWS, LINES]."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def _codes(word_ptrs, INT4: tl.constexpr):
    """int8 [ROWS, 32] of a group; int4 codes are 16 times as large."""
    words = tl.load(word_ptrs)
    if INT4:
        low = _bytes(((words << 4) & -252645136) ^ -2139062144)  # 0xf0f0f0f0, 0x80808080
        high = _bytes((words & -252645136) ^ -2139062144)
        codes = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (words.shape[0], 32))
    else:
        codes = _bytes(words ^ -2139062144)
    return codes


@triton.jit
def _quantised_tile(
    weights_ptr, n_blocks, x_row_ptrs, ROWS: tl.constexpr, TOKENS: tl.constexpr, INT4: tl.constexpr
):  # fmt: skip
    """float32 [ROWS, TOKENS]; x_row_ptrs int32 pointers [TOKENS]."""
    half_lines: tl.constexpr = 4 if INT4 else 8
    block_words: tl.constexpr = 2 * half_lines * 16 + 16
    word_ptrs = weights_ptr + row_words(n_blocks, block_words, ROWS)[:, None] + 16 * tl.arange(0, half_lines)[None, :]
    row = tl.arange(0, ROWS)
    scale_ptrs = (weights_ptr + 2 * half_lines * 16).to(tl.pointer_type(tl.int16))
    scale_ptrs += (row // 16) * n_blocks * (2 * block_words) + row % 16
    x_code_ptrs = x_row_ptrs.to(tl.pointer_type(tl.int8))[None, :] + tl.arange(0, 32)[:, None]
    x_scale_ptrs = x_row_ptrs.to(tl.pointer_type(tl.float32)) + n_blocks * 16
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for _block in range(n_blocks):
        for half in tl.static_range(2):
            codes = _codes(word_ptrs + half * (half_lines * 16), INT4)
            products = tl.dot(codes, tl.load(x_code_ptrs + half * 32), out_dtype=tl.int32)
            scales = (tl.load(scale_ptrs + half * 16).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            x_scales = tl.load(x_scale_ptrs + half)
            sums += products.to(tl.float32) * (scales[:, None] * x_scales[None, :])
        word_ptrs += block_words
        scale_ptrs += 2 * block_words
        x_code_ptrs += 64
        x_scale_ptrs += 2
    return sums * (0.0625 if INT4 else 1.0)


@triton.jit
def _bfloat16_tile(weights_ptr, n_blocks, x_row_ptrs, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """float32 [ROWS, TOKENS]; x_row_ptrs int32 pointers [TOKENS]."""
    word_ptrs = weights_ptr + row_words(n_blocks, 512, ROWS)[:, None] + 16 * tl.arange(0, 32)[None, :]
    high_ptrs = x_row_ptrs.to(tl.pointer_type(tl.bfloat16))[None, :] + tl.arange(0, 64)[:, None]
    low_ptrs = high_ptrs + n_blocks * 64
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for _block in range(n_blocks):
        words = tl.load(word_ptrs)
        pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        weights = tl.reshape(pairs, (ROWS, 64)).to(tl.bfloat16, bitcast=True)
        products = tl.dot(weights, tl.load(low_ptrs))
        sums += tl.dot(weights, tl.load(high_ptrs), products)  # a tensor core cuts off what an addition would round
        word_ptrs += 512
        high_ptrs += 64
        low_ptrs += 64
    return sums


@triton.jit
def _float32_tile(weights_ptr, n_blocks, n_columns, x_row_ptrs, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """float32 [ROWS, TOKENS]; x_row_ptrs float32 pointers [TOKENS]."""
    word_ptrs = weights_ptr + row_words(n_blocks, 1024, ROWS)[:, None] + 16 * tl.arange(0, 32)[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, n_blocks * 64, 32):
        at = first + tl.arange(0, 32)
        x = tl.load(x_row_ptrs[None, :] + at[:, None], mask=(at < n_columns)[:, None], other=0.0)
        weights = tl.load(word_ptrs).to(tl.float32, bitcast=True)
        sums = tl.dot(weights, x, sums, input_precision="ieee")
        word_ptrs += 512
    return sums


@triton.jit
def _tile(
    weights_ptr, n_blocks, n_columns, x_row_ptrs, ROWS: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    if DTYPE < 2:
        sums = _quantised_tile(weights_ptr, n_blocks, x_row_ptrs, ROWS, TOKENS, DTYPE == 0)
    elif DTYPE == 2:
        sums = _bfloat16_tile(weights_ptr, n_blocks, x_row_ptrs, ROWS, TOKENS)
    else:
        sums = _float32_tile(weights_ptr, n_blocks, n_columns, x_row_ptrs, ROWS, TOKENS)
    return sums


@triton.jit(**ANY_CALL)
def up_tile_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, x_ptr, inner_ptr,
    x_quads, inner_quads, n_columns, n_rows, n_blocks, inner_blocks, top_k, gate_bias_word, up_bias_word,
    alpha, gate_max, act_max, up_limit, up_offset,
    TOKENS: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As `few.up_kernel`, for a tile of TOKENS tokens."""
    unit, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, expert)
    at = tl.load(offsets_ptr + expert) + tile * TOKENS + tl.arange(0, TOKENS)
    end = tl.load(offsets_ptr + expert + 1)
    if (tl.load(offsets_ptr + expert) + tile * TOKENS >= end) | (tl.load(slot_ids_ptr + expert) < 0):
        return
    block_words: tl.constexpr = 144 if DTYPE == 0 else (272 if DTYPE == 1 else (512 if DTYPE == 2 else 1024))
    n_parts: tl.constexpr = 4 if GATED else 2
    matrix_ptr = record_ptr + unit.to(tl.int64) * n_blocks * (n_parts * block_words)
    tokens = tl.load(rows_ptr + at, mask=at < end, other=0).to(tl.int32) // top_k
    sums = _tile(
        matrix_ptr, n_blocks, n_columns,
        x_ptr + tokens.to(tl.int64) * (x_quads * 4), 16 * n_parts, TOKENS, DTYPE,
    )  # fmt: skip
    columns = unit * 32 + tl.arange(0, 32)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, 32, TOKENS)), (1, 2, 0)))
        if HAS_BIAS:
            gate += tl.load(record_ptr + gate_bias_word + columns).to(tl.float32, bitcast=True)[:, None]
            up += tl.load(record_ptr + up_bias_word + columns).to(tl.float32, bitcast=True)[:, None]
        value = gated(gate, up, alpha, gate_max, act_max, up_limit, up_offset, KIND)
    else:
        up = sums
        if HAS_BIAS:
            up += tl.load(record_ptr + up_bias_word + columns).to(tl.float32, bitcast=True)[:, None]
        value = act(up, alpha, KIND)
    value = tl.trans(tl.where((columns < n_rows)[:, None], value, 0.0))
    row_ptrs = inner_ptr + at.to(tl.int64) * (inner_quads * 4)
    inside = (at < end)[:, None]
    if DTYPE < 2:
        codes, scales = int8_codes(value)
        tl.store(row_ptrs.to(tl.pointer_type(tl.int8))[:, None] + columns[None, :], codes, mask=inside)
        scale_ptrs = row_ptrs.to(tl.pointer_type(tl.float32)) + inner_blocks * 16 + unit
        tl.store(scale_ptrs, scales, mask=at < end)
    elif DTYPE == 2:
        high, low = two_bfloat16(value)
        ptrs = row_ptrs.to(tl.pointer_type(tl.bfloat16))[:, None] + columns[None, :]
        tl.store(ptrs, high, mask=inside)
        tl.store(ptrs + inner_blocks * 64, low, mask=inside)
    else:
        tl.store(row_ptrs[:, None] + columns[None, :], value, mask=inside)


@triton.jit
def _store_rows(sums, rows_ptr, weights_ptr, out_ptr, at, end, columns, n_rows):
    """Sums [ROWS, T] of the tokens `at`, times their routing weights, to their rows of the result."""
    rows = tl.load(rows_ptr + at, mask=at < end, other=0)
    sums *= tl.load(weights_ptr + rows, mask=at < end, other=0.0)[None, :]
    inside = (at < end)[:, None] & (columns < n_rows)[None, :]
    tl.store(out_ptr + rows[:, None] * n_rows + columns[None, :], tl.trans(sums), mask=inside)


@triton.jit(**ANY_CALL)
def down_tile_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, x_ptr, weights_ptr, out_ptr,
    x_quads, n_columns, n_rows, n_blocks, down_line, down_bias_word,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As `few.down_kernel`, for a tile of TOKENS tokens."""
    part, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, expert)
    at = tl.load(offsets_ptr + expert) + tile * TOKENS + tl.arange(0, TOKENS)
    end = tl.load(offsets_ptr + expert + 1)
    if (tl.load(offsets_ptr + expert) + tile * TOKENS >= end) | (tl.load(slot_ids_ptr + expert) < 0):
        return
    block_words: tl.constexpr = 144 if DTYPE == 0 else (272 if DTYPE == 1 else (512 if DTYPE == 2 else 1024))
    matrix_ptr = record_ptr + down_line * 16 + part.to(tl.int64) * n_blocks * (ROWS // 16 * block_words)
    sums = _tile(
        matrix_ptr, n_blocks, n_columns,
        x_ptr + tl.minimum(at, end - 1).to(tl.int64) * (x_quads * 4), ROWS, TOKENS, DTYPE,
    )  # fmt: skip
    columns = part * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS:
        sums += tl.load(record_ptr + down_bias_word + columns).to(tl.float32, bitcast=True)[:, None]
    if TOKENS > 64:  # By halves, and read again: registers would not suffice for all places beside all sums.
        at = tl.load(offsets_ptr + expert, volatile=True) + tile * TOKENS + tl.arange(0, TOKENS)
        at0, at1 = tl.split(tl.trans(tl.reshape(at, (2, TOKENS // 2))))
        sums0, sums1 = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, TOKENS // 2)), (0, 2, 1)))
        _store_rows(sums0, rows_ptr, weights_ptr, out_ptr, at0, end, columns, n_rows)
        _store_rows(sums1, rows_ptr, weights_ptr, out_ptr, at1, end, columns, n_rows)
    else:
        _store_rows(sums, rows_ptr, weights_ptr, out_ptr, at, end, columns, n_rows)
