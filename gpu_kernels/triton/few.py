# ruff: noqa: ANN001, ANN201, ANN202 - what Triton compiles has no Python types
# mypy: ignore-errors
"""Kernels for one to four tokens an expert, where the time is that of reading the record.

A program walks over the columns of some rows of a matrix. Each of its threads takes 16 bytes at a time, the words of
four rows in a line, and adds into registers of its own; the sum over columns is made once, at the end. int8 and int4
codes meet int8 activations in integer dot products of four bytes (dp4a, which the layout suits as it does vpdpbusd on
the CPU), so a row's value is that of the CPU's kernels but for the order of summation. In both, codes become signed by
one XOR: int4 codes stay in the high half of their byte, 16 times as large, which is taken back at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.triton.formats import ANY_CALL, act, gated, int8_codes, record_of, row_words, store_int8


@triton.jit
def _dot4(left, right, total, DP4A: tl.constexpr):
    """total + the four products of the signed bytes of two words."""
    if DP4A:
        left, right = tl.broadcast(left, right)
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [left, right, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            total += ((left << (24 - 8 * byte)) >> 24) * ((right << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _add_codes(total, words, x_ptrs, inside, INT4: tl.constexpr, DP4A: tl.constexpr):
    """total + the products of the codes in `words` with the activations at x_ptrs."""
    first = tl.load(x_ptrs, mask=inside, other=0)[:, None]
    if INT4:
        total = _dot4(((words << 4) & -252645136) ^ -2139062144, first, total, DP4A)  # 0xf0f0f0f0, 0x80808080
        second = tl.load(x_ptrs + 4, mask=inside, other=0)[:, None]
        total = _dot4((words & -252645136) ^ -2139062144, second, total, DP4A)
    else:
        total = _dot4(words ^ -2139062144, first, total, DP4A)
    return total


@triton.jit
def _add_group(sums, products, scales, x_ptr, group, n_groups, inside):
    """sums + the integer products of a group times both scales."""
    x_scale = tl.load(x_ptr.to(tl.pointer_type(tl.float32)) + n_groups * 8 + group, mask=inside, other=0.0)
    return sums + products.to(tl.float32) * (scales * x_scale[:, None])


@triton.jit
def _over_columns(sums0, sums1, sums2, sums3, factor, TOKENS: tl.constexpr):
    """float32 [ROWS] for each token: the one sum over threads, after the loop."""
    row0 = tl.sum(sums0, axis=0) * factor
    row1, row2, row3 = row0, row0, row0
    if TOKENS == 4:
        row1, row2, row3 = (
            tl.sum(sums1, axis=0) * factor,
            tl.sum(sums2, axis=0) * factor,
            tl.sum(sums3, axis=0) * factor,
        )
    return row0, row1, row2, row3


@triton.jit
def _quantised_rows(
    weights_ptr, n_blocks, x0, x1, x2, x3,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, INT4: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS] for each of four rows of activations (one, if TOKENS is 1). UNITS: groups at once."""
    half_lines: tl.constexpr = 4 if INT4 else 8
    block_words: tl.constexpr = 2 * half_lines * 16 + 16
    n_groups = 2 * n_blocks
    units = tl.arange(0, UNITS)
    unit_words = (units // 2) * block_words + (units % 2) * (half_lines * 16)
    word_ptrs = weights_ptr + unit_words[:, None] + row_words(n_blocks, block_words, ROWS)[None, :]
    row = tl.arange(0, ROWS)
    scale_places = ((units // 2) * (2 * block_words) + (units % 2) * 16)[:, None]
    scale_places += ((row // 16) * (n_blocks * 2 * block_words) + row % 16)[None, :]
    # Four at a time, like words: Triton would take eight, and exchange them between threads.
    scale_places = tl.max_contiguous(scale_places, (1, 4))
    scale_ptrs = (weights_ptr + 2 * half_lines * 16).to(tl.pointer_type(tl.int16)) + scale_places
    sums0 = tl.zeros((UNITS, ROWS), tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, n_groups, UNITS):
        group = first + units
        inside = group < n_groups
        products0 = tl.zeros((UNITS, ROWS), tl.int32)
        products1, products2, products3 = products0, products0, products0
        scales = tl.load(scale_ptrs, mask=inside[:, None], other=0).to(tl.int32) << 16
        scales = scales.to(tl.float32, bitcast=True)
        for line in tl.static_range(half_lines):
            words = tl.load(word_ptrs + 16 * line, mask=inside[:, None], other=0, eviction_policy="evict_first")
            at = group * 8 + line
            products0 = _add_codes(products0, words, x0 + at, inside, INT4, DP4A)
            if TOKENS == 4:
                products1 = _add_codes(products1, words, x1 + at, inside, INT4, DP4A)
                products2 = _add_codes(products2, words, x2 + at, inside, INT4, DP4A)
                products3 = _add_codes(products3, words, x3 + at, inside, INT4, DP4A)
        sums0 = _add_group(sums0, products0, scales, x0, group, n_groups, inside)
        if TOKENS == 4:
            sums1 = _add_group(sums1, products1, scales, x1, group, n_groups, inside)
            sums2 = _add_group(sums2, products2, scales, x2, group, n_groups, inside)
            sums3 = _add_group(sums3, products3, scales, x3, group, n_groups, inside)
        word_ptrs += UNITS // 2 * block_words
        scale_ptrs += UNITS // 2 * 2 * block_words
    factor: tl.constexpr = 0.0625 if INT4 else 1.0
    return _over_columns(sums0, sums1, sums2, sums3, factor, TOKENS)


@triton.jit
def _add_floats(sums, words, x_ptrs, column, n_columns, BFLOAT16: tl.constexpr):
    """sums + the products of the weights in `words` with the activations of their columns."""
    if BFLOAT16:
        first = tl.load(x_ptrs + column, mask=column < n_columns, other=0.0)
        second = tl.load(x_ptrs + column + 1, mask=column + 1 < n_columns, other=0.0)
        sums += (words & -65536).to(tl.float32, bitcast=True) * second[:, None]
        sums += (words << 16).to(tl.float32, bitcast=True) * first[:, None]
    else:
        x = tl.load(x_ptrs + column, mask=column < n_columns, other=0.0)
        sums += words.to(tl.float32, bitcast=True) * x[:, None]
    return sums


@triton.jit
def _float_rows(
    weights_ptr, n_blocks, n_columns, x0, x1, x2, x3,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS] for each of four rows of activations (one, if TOKENS is 1). UNITS: times 4 lines at once."""
    block_lines: tl.constexpr = 32 if BFLOAT16 else 64
    line_columns: tl.constexpr = 2 if BFLOAT16 else 1
    n_lines = n_blocks * block_lines
    units = tl.arange(0, UNITS)
    word_ptrs = weights_ptr + units[:, None] * 64 + row_words(n_blocks, block_lines * 16, ROWS)[None, :]
    sums0 = tl.zeros((UNITS, ROWS), tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, n_lines, 4 * UNITS):
        for line in tl.static_range(4):
            at = first + 4 * units + line
            words = tl.load(word_ptrs + 16 * line, mask=(at < n_lines)[:, None], other=0, eviction_policy="evict_first")
            column = at * line_columns
            sums0 = _add_floats(sums0, words, x0, column, n_columns, BFLOAT16)
            if TOKENS == 4:
                sums1 = _add_floats(sums1, words, x1, column, n_columns, BFLOAT16)
                sums2 = _add_floats(sums2, words, x2, column, n_columns, BFLOAT16)
                sums3 = _add_floats(sums3, words, x3, column, n_columns, BFLOAT16)
        word_ptrs += 64 * UNITS
    return _over_columns(sums0, sums1, sums2, sums3, 1.0, TOKENS)


@triton.jit
def _rows(
    weights_ptr, n_blocks, n_columns, x0, x1, x2, x3,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    if DTYPE < 2:
        sums = _quantised_rows(weights_ptr, n_blocks, x0, x1, x2, x3, ROWS, TOKENS, UNITS, DTYPE == 0, DP4A)
    else:
        sums = _float_rows(weights_ptr, n_blocks, n_columns, x0, x1, x2, x3, ROWS, TOKENS, UNITS, DTYPE == 2)
    return sums


@triton.jit
def _finish_up(
    sums, record_ptr, unit, n_rows, alpha, gate_max, act_max, up_limit, up_offset, gate_bias_word, up_bias_word,
    KIND: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """float32 [1, 32]: 32 columns of the intermediate from the sums of gate and up; 0 beyond the last."""
    columns = unit * 32 + tl.arange(0, 32)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, 32)), (1, 0)))
        if HAS_BIAS:
            gate += tl.load(record_ptr + gate_bias_word + columns).to(tl.float32, bitcast=True)
            up += tl.load(record_ptr + up_bias_word + columns).to(tl.float32, bitcast=True)
        value = gated(gate, up, alpha, gate_max, act_max, up_limit, up_offset, KIND)
    else:
        up = sums
        if HAS_BIAS:
            up += tl.load(record_ptr + up_bias_word + columns).to(tl.float32, bitcast=True)
        value = act(up, alpha, KIND)
    return tl.where(columns < n_rows, value, 0.0)[None, :]


@triton.jit
def _store_inner(value, inner_ptr, at, end, unit, inner_quads, inner_blocks, QUANTISED: tl.constexpr):
    """One group of one row of the intermediate."""
    if at < end:
        row_ptr = inner_ptr + at.to(tl.int64) * (inner_quads * 4)
        if QUANTISED:
            codes, scales = int8_codes(value)
            store_int8(row_ptr, unit + tl.arange(0, 1), 2 * inner_blocks, codes, scales)
        else:
            place = row_ptr.to(tl.pointer_type(tl.float32)) + unit * 32 + tl.arange(0, 32)
            tl.store(place[None, :], value)


@triton.jit
def _token_row(x_ptr, x_quads, rows_ptr, at, end, top_k):
    """Where the activations of a group's row begin; those of row 0 where there is none."""
    return x_ptr + tl.load(rows_ptr + at, mask=at < end, other=0) // top_k * (x_quads * 4)


@triton.jit(**ANY_CALL)
def up_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, x_ptr, inner_ptr,
    x_quads, inner_quads, n_columns, n_rows, n_blocks, inner_blocks, top_k, gate_bias_word, up_bias_word,
    alpha, gate_max, act_max, up_limit, up_offset,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Gate, up, activation and, for int8 and int4 experts, its rounding: 32 columns of the intermediate of one expert,
    for TOKENS of its tokens. Program (unit of 32 columns, expert, tile of tokens)."""
    unit, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, expert)
    at = tl.load(offsets_ptr + expert) + tile * TOKENS
    end = tl.load(offsets_ptr + expert + 1)
    if (at >= end) | (tl.load(slot_ids_ptr + expert) < 0):
        return
    block_words: tl.constexpr = 144 if DTYPE == 0 else (272 if DTYPE == 1 else (512 if DTYPE == 2 else 1024))
    n_parts: tl.constexpr = 4 if GATED else 2
    x0 = _token_row(x_ptr, x_quads, rows_ptr, at, end, top_k)
    x1, x2, x3 = x0, x0, x0
    if TOKENS == 4:
        x1 = _token_row(x_ptr, x_quads, rows_ptr, at + 1, end, top_k)
        x2 = _token_row(x_ptr, x_quads, rows_ptr, at + 2, end, top_k)
        x3 = _token_row(x_ptr, x_quads, rows_ptr, at + 3, end, top_k)
    sums = _rows(
        record_ptr + unit.to(tl.int64) * n_blocks * (n_parts * block_words), n_blocks, n_columns, x0, x1, x2, x3,
        16 * n_parts, TOKENS, UNITS, DTYPE, DP4A,
    )  # fmt: skip
    for token in tl.static_range(TOKENS):
        value = _finish_up(
            sums[token], record_ptr, unit, n_rows, alpha, gate_max, act_max, up_limit, up_offset,
            gate_bias_word, up_bias_word, KIND, GATED, HAS_BIAS,
        )  # fmt: skip
        _store_inner(value, inner_ptr, at + token, end, unit, inner_quads, inner_blocks, DTYPE < 2)


@triton.jit(**ANY_CALL)
def down_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, x_ptr, weights_ptr, out_ptr,
    x_quads, n_columns, n_rows, n_blocks, down_line, down_bias_word,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    DP4A: tl.constexpr,
):  # fmt: skip
    """Down and the routing weight: ROWS columns of the result of one expert, for TOKENS of its tokens. Program (part of
    ROWS columns, expert, tile of tokens)."""
    part, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, expert)
    at = tl.load(offsets_ptr + expert) + tile * TOKENS
    end = tl.load(offsets_ptr + expert + 1)
    if (at >= end) | (tl.load(slot_ids_ptr + expert) < 0):
        return
    block_words: tl.constexpr = 144 if DTYPE == 0 else (272 if DTYPE == 1 else (512 if DTYPE == 2 else 1024))
    x0 = x_ptr + at.to(tl.int64) * (x_quads * 4)
    x1 = x_ptr + tl.minimum(at + 1, end - 1).to(tl.int64) * (x_quads * 4)
    x2 = x_ptr + tl.minimum(at + 2, end - 1).to(tl.int64) * (x_quads * 4)
    x3 = x_ptr + tl.minimum(at + 3, end - 1).to(tl.int64) * (x_quads * 4)
    sums = _rows(
        record_ptr + down_line * 16 + part.to(tl.int64) * n_blocks * (ROWS // 16 * block_words), n_blocks, n_columns,
        x0, x1, x2, x3, ROWS, TOKENS, UNITS, DTYPE, DP4A,
    )  # fmt: skip
    columns = part * ROWS + tl.arange(0, ROWS)
    for token in tl.static_range(TOKENS):
        value = sums[token]
        if HAS_BIAS:
            value += tl.load(record_ptr + down_bias_word + columns).to(tl.float32, bitcast=True)
        inside = at + token < end
        row = tl.load(rows_ptr + at + token, mask=inside, other=0)
        value *= tl.load(weights_ptr + row, mask=inside, other=0.0)
        tl.store(out_ptr + row * n_rows + columns, value, mask=inside & (columns < n_rows))
