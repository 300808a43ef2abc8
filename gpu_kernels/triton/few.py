# ruff: noqa: ANN001, ANN201, ANN202 - what Triton compiles has no Python types
# mypy: ignore-errors
"""Kernels for one to four tokens an expert, where the time is that of reading the record.

A program walks over the columns of some rows of a matrix. Each of its threads takes 16 bytes at a time, the words of
four rows in a line, and adds into registers of its own; the sum over columns is made once, at the end. int8 and int4
codes meet int8 activations in integer dot products of four bytes (dp4a, which the layout suits as it does vpdpbusd on
the CPU), so a row's value is that of the CPU's kernels but for the order of summation. In both, codes become signed by
one XOR: int4 codes stay in the high half of their byte, 16 times as large, which is taken back at the end.

A program's first weights are on their way before it has its activations. BEFORE says what stands between the two: 0
nothing; 1 the wait for the launch before; and in the kernel of one launch (`single`) 2 the rounding of a row of the
input, which begins at given_ptr and has given_quads * 4 values, to the activations at x0; 3 the wait until count_ptr
has n_awaited.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_kernels.triton.formats import (
    ANY_CALL,
    act,
    gated,
    int8_codes,
    record_of,
    round_row,
    row_words,
    store_int8,
)
from gpu_kernels.triton.tickets import wait_for


@triton.jit
def _dot4(left, right, total, NVIDIA: tl.constexpr):
    """total + the four products of the signed bytes of two words."""
    if NVIDIA:
        left, right = tl.broadcast(left, right)
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [left, right, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            total += ((left << (24 - 8 * byte)) >> 24) * ((right << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _four_lines(word_ptrs, inside, NVIDIA: tl.constexpr):
    """The words of four lines. All loads are on their way before anything that follows: left alone, NVIDIA's assembler
    saves registers and waits for one after the other."""
    mask = inside[:, None]
    words0 = tl.load(word_ptrs, mask=mask, other=0)
    words1 = tl.load(word_ptrs + 16, mask=mask, other=0)
    words2 = tl.load(word_ptrs + 32, mask=mask, other=0)
    words3 = tl.load(word_ptrs + 48, mask=mask, other=0)
    if NVIDIA:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
        )
    return words0, words1, words2, words3


@triton.jit
def _two_words(x_ptrs, inside):
    """Two words of each unit's activations by one load."""
    both = tl.load(x_ptrs, mask=inside, other=0)
    return both.to(tl.int32)[:, None], (both >> 32).to(tl.int32)[:, None]


@triton.jit
def _add_codes(total, words, x_ptrs, inside, INT4: tl.constexpr, NVIDIA: tl.constexpr):
    """total + the products of the codes in four lines with the activations from x_ptrs on."""
    for pair in tl.static_range(2):
        even, odd = _two_words(x_ptrs + pair, inside)
        if INT4:
            left, right = words[2 * pair] ^ -2004318072, words[2 * pair + 1] ^ -2004318072  # 0x88888888
            total = _dot4((left << 4) & -252645136, even, total, NVIDIA)  # 0xf0f0f0f0
            total = _dot4((right << 4) & -252645136, odd, total, NVIDIA)
            even, odd = _two_words(x_ptrs + 2 + pair, inside)
            total = _dot4(left & -252645136, even, total, NVIDIA)
            total = _dot4(right & -252645136, odd, total, NVIDIA)
        else:
            total = _dot4(words[2 * pair] ^ -2139062144, even, total, NVIDIA)  # 0x80808080
            total = _dot4(words[2 * pair + 1] ^ -2139062144, odd, total, NVIDIA)
    return total


@triton.jit
def _add_group(
    sums, words, more_words, scales, x_ptr, group, n_groups, inside, INT4: tl.constexpr, NVIDIA: tl.constexpr
):  # fmt: skip
    """sums + the integer products of a group, whose lines `words` and, of int8, `more_words` are, times both scales."""
    products = tl.zeros(scales.shape, tl.int32)
    products = _add_codes(products, words, x_ptr + group * 4, inside, INT4, NVIDIA)
    if not INT4:
        products = _add_codes(products, more_words, x_ptr + group * 4 + 2, inside, INT4, NVIDIA)
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
    matrix_ptr, n_blocks, x0, x1, x2, x3, given_ptr, given_quads, count_ptr, n_awaited,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, INT4: tl.constexpr, BEFORE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS] for each of four rows of activations (one, if TOKENS is 1). UNITS: groups at once."""
    half_lines: tl.constexpr = 4 if INT4 else 8
    block_words: tl.constexpr = 2 * half_lines * 16 + 16
    n_groups = 2 * n_blocks
    units = tl.arange(0, UNITS)
    unit_words = (units // 2) * block_words + (units % 2) * (half_lines * 16)
    word_ptrs = matrix_ptr + unit_words[:, None] + row_words(n_blocks, block_words, ROWS)[None, :]
    row = tl.arange(0, ROWS)
    scale_places = ((units // 2) * (2 * block_words) + (units % 2) * 16)[:, None]
    scale_places += ((row // 16) * (n_blocks * 2 * block_words) + row % 16)[None, :]
    # Four at a time, like words: Triton would take eight, and exchange them between threads.
    scale_places = tl.max_contiguous(scale_places, (1, 4))
    scale_ptrs = (matrix_ptr + 2 * half_lines * 16).to(tl.pointer_type(tl.int16)) + scale_places
    inside = units < n_groups
    words = _four_lines(word_ptrs, inside, NVIDIA)
    more_words = words if INT4 else _four_lines(word_ptrs + 64, inside, NVIDIA)
    bits = tl.load(scale_ptrs, mask=inside[:, None], other=0)
    sums0 = tl.zeros((UNITS, ROWS), tl.float32)
    if BEFORE == 1:
        gdc_wait()
    elif BEFORE == 2:
        round_row(given_ptr, given_quads, x0, n_groups)
    elif BEFORE == 3:
        sums0 += wait_for(count_ptr, n_awaited)
    x0, x1 = x0.to(tl.pointer_type(tl.int64)), x1.to(tl.pointer_type(tl.int64))
    x2, x3 = x2.to(tl.pointer_type(tl.int64)), x3.to(tl.pointer_type(tl.int64))
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, n_groups, UNITS):
        now, more_now, scales = words, more_words, (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        group, inside = first + units, first + units < n_groups
        follows = group + UNITS < n_groups
        word_ptrs += UNITS // 2 * block_words
        scale_ptrs += UNITS // 2 * 2 * block_words
        words = _four_lines(word_ptrs, follows, NVIDIA)
        more_words = words if INT4 else _four_lines(word_ptrs + 64, follows, NVIDIA)
        bits = tl.load(scale_ptrs, mask=follows[:, None], other=0)
        sums0 = _add_group(sums0, now, more_now, scales, x0, group, n_groups, inside, INT4, NVIDIA)
        if TOKENS == 4:
            sums1 = _add_group(sums1, now, more_now, scales, x1, group, n_groups, inside, INT4, NVIDIA)
            sums2 = _add_group(sums2, now, more_now, scales, x2, group, n_groups, inside, INT4, NVIDIA)
            sums3 = _add_group(sums3, now, more_now, scales, x3, group, n_groups, inside, INT4, NVIDIA)
    factor: tl.constexpr = 0.0625 if INT4 else 1.0
    return _over_columns(sums0, sums1, sums2, sums3, factor, TOKENS)


@triton.jit
def _add_floats(sums, words, x_ptr, column, n_columns, BFLOAT16: tl.constexpr):
    """sums + the products of the weights in four lines, the first of `column`, with the activations of their columns.
    A row of activations has zeros after an odd number of columns."""
    x_ptrs = x_ptr.to(tl.pointer_type(tl.int64)) + column // 2
    if BFLOAT16:
        for line in tl.static_range(4):
            even, odd = _two_words(x_ptrs + line, column + 2 * line < n_columns)
            sums += (words[line] & -65536).to(tl.float32, bitcast=True) * odd.to(tl.float32, bitcast=True)
            sums += (words[line] << 16).to(tl.float32, bitcast=True) * even.to(tl.float32, bitcast=True)
    else:
        for pair in tl.static_range(2):
            even, odd = _two_words(x_ptrs + pair, column + 2 * pair < n_columns)
            sums += words[2 * pair].to(tl.float32, bitcast=True) * even.to(tl.float32, bitcast=True)
            sums += words[2 * pair + 1].to(tl.float32, bitcast=True) * odd.to(tl.float32, bitcast=True)
    return sums


@triton.jit
def _float_rows(
    matrix_ptr, n_blocks, n_columns, x0, x1, x2, x3, count_ptr, n_awaited,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, BFLOAT16: tl.constexpr, BEFORE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS] for each of four rows of activations (one, if TOKENS is 1). UNITS: times 4 lines at once."""
    block_lines: tl.constexpr = 32 if BFLOAT16 else 64
    line_columns: tl.constexpr = 2 if BFLOAT16 else 1
    n_lines = n_blocks * block_lines
    units = tl.arange(0, UNITS)
    word_ptrs = matrix_ptr + units[:, None] * 64 + row_words(n_blocks, block_lines * 16, ROWS)[None, :]
    words = _four_lines(word_ptrs, 4 * units < n_lines, NVIDIA)
    sums0 = tl.zeros((UNITS, ROWS), tl.float32)
    if BEFORE == 1:
        gdc_wait()
    elif BEFORE == 3:
        sums0 += wait_for(count_ptr, n_awaited)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, n_lines, 4 * UNITS):
        now, line = words, first + 4 * units
        word_ptrs += 64 * UNITS
        words = _four_lines(word_ptrs, line + 4 * UNITS < n_lines, NVIDIA)
        sums0 = _add_floats(sums0, now, x0, line * line_columns, n_columns, BFLOAT16)
        if TOKENS == 4:
            sums1 = _add_floats(sums1, now, x1, line * line_columns, n_columns, BFLOAT16)
            sums2 = _add_floats(sums2, now, x2, line * line_columns, n_columns, BFLOAT16)
            sums3 = _add_floats(sums3, now, x3, line * line_columns, n_columns, BFLOAT16)
    return _over_columns(sums0, sums1, sums2, sums3, 1.0, TOKENS)


@triton.jit
def _rows(
    matrix_ptr, n_blocks, n_columns, x0, x1, x2, x3, given_ptr, given_quads, count_ptr, n_awaited,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr, BEFORE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    if DTYPE < 2:
        sums = _quantised_rows(
            matrix_ptr, n_blocks, x0, x1, x2, x3, given_ptr, given_quads, count_ptr, n_awaited,
            ROWS, TOKENS, UNITS, DTYPE == 0, BEFORE, NVIDIA,
        )  # fmt: skip
    else:
        sums = _float_rows(
            matrix_ptr, n_blocks, n_columns, x0, x1, x2, x3, count_ptr, n_awaited,
            ROWS, TOKENS, UNITS, DTYPE == 2, BEFORE, NVIDIA,
        )  # fmt: skip
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
def token_row(x_ptr, x_quads, rows_ptr, at, end, top_k):
    """Where the activations of a group's row begin; those of row 0 where there is none."""
    row = tl.load(rows_ptr + at, mask=at < end, other=0).to(tl.int32)  # dividing 64 bits takes a hundred cycles
    return x_ptr + (row // top_k).to(tl.int64) * (x_quads * 4)


@triton.jit
def up_columns(
    record_ptr, unit, at, end, x0, x1, x2, x3, inner_ptr, inner_quads, n_columns, n_rows, n_blocks, inner_blocks,
    gate_bias_word, up_bias_word, alpha, gate_max, act_max, up_limit, up_offset, given_ptr, given_quads,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BEFORE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """32 columns of the intermediate of one expert, for rows `at` to `end` of its group, TOKENS at most."""
    block_words: tl.constexpr = 144 if DTYPE == 0 else (272 if DTYPE == 1 else (512 if DTYPE == 2 else 1024))
    n_parts: tl.constexpr = 4 if GATED else 2
    matrix_ptr = record_ptr + unit.to(tl.int64) * n_blocks * (n_parts * block_words)
    sums = _rows(
        matrix_ptr, n_blocks, n_columns, x0, x1, x2, x3, given_ptr, given_quads, inner_ptr, 0,
        16 * n_parts, TOKENS, UNITS, DTYPE, BEFORE, NVIDIA,
    )  # fmt: skip
    for token in tl.static_range(TOKENS):
        value = _finish_up(
            sums[token], record_ptr, unit, n_rows, alpha, gate_max, act_max, up_limit, up_offset,
            gate_bias_word, up_bias_word, KIND, GATED, HAS_BIAS,
        )  # fmt: skip
        _store_inner(value, inner_ptr, at + token, end, unit, inner_quads, inner_blocks, DTYPE < 2)


@triton.jit
def down_columns(
    record_ptr, part, at, end, x_ptr, x_quads, rows_ptr, weights_ptr, out_ptr, n_columns, n_rows, n_blocks,
    down_line, down_bias_word, count_ptr, n_awaited,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BEFORE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ROWS columns of the result of one expert, for rows `at` to `end` of its group, TOKENS at most."""
    block_words: tl.constexpr = 144 if DTYPE == 0 else (272 if DTYPE == 1 else (512 if DTYPE == 2 else 1024))
    matrix_ptr = record_ptr + down_line * 16 + part.to(tl.int64) * n_blocks * (ROWS // 16 * block_words)
    x0 = x_ptr + at.to(tl.int64) * (x_quads * 4)
    x1 = x_ptr + tl.minimum(at + 1, end - 1).to(tl.int64) * (x_quads * 4)
    x2 = x_ptr + tl.minimum(at + 2, end - 1).to(tl.int64) * (x_quads * 4)
    x3 = x_ptr + tl.minimum(at + 3, end - 1).to(tl.int64) * (x_quads * 4)
    sums = _rows(
        matrix_ptr, n_blocks, n_columns, x0, x1, x2, x3, x_ptr, 0, count_ptr, n_awaited,
        ROWS, TOKENS, UNITS, DTYPE, BEFORE, NVIDIA,
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


@triton.jit(**ANY_CALL)
def up_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, x_ptr, inner_ptr,
    x_quads, inner_quads, n_columns, n_rows, n_blocks, inner_blocks, top_k, gate_bias_word, up_bias_word,
    alpha, gate_max, act_max, up_limit, up_offset,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, OVERLAP: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Gate, up, activation and, for int8 and int4 experts, its rounding: 32 columns of the intermediate of one expert,
    for TOKENS of its tokens. Program (unit of 32 columns, expert, tile of tokens)."""
    if OVERLAP:
        gdc_launch_dependents()
    unit, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, expert)
    at = tl.load(offsets_ptr + expert) + tile * TOKENS
    end = tl.load(offsets_ptr + expert + 1)
    if (at >= end) | (tl.load(slot_ids_ptr + expert) < 0):
        if OVERLAP:
            gdc_wait()  # a launch that has ended says that those before it have
        return
    x0 = token_row(x_ptr, x_quads, rows_ptr, at, end, top_k)
    x1, x2, x3 = x0, x0, x0
    if TOKENS == 4:
        x1 = token_row(x_ptr, x_quads, rows_ptr, at + 1, end, top_k)
        x2 = token_row(x_ptr, x_quads, rows_ptr, at + 2, end, top_k)
        x3 = token_row(x_ptr, x_quads, rows_ptr, at + 3, end, top_k)
    up_columns(
        record_ptr, unit, at, end, x0, x1, x2, x3, inner_ptr, inner_quads, n_columns, n_rows, n_blocks, inner_blocks,
        gate_bias_word, up_bias_word, alpha, gate_max, act_max, up_limit, up_offset, x_ptr, 0,
        TOKENS, UNITS, DTYPE, KIND, GATED, HAS_BIAS, 1 if OVERLAP else 0, NVIDIA,
    )  # fmt: skip


@triton.jit(**ANY_CALL)
def down_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, x_ptr, weights_ptr, out_ptr,
    x_quads, n_columns, n_rows, n_blocks, down_line, down_bias_word,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr, DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Down and the routing weight: ROWS columns of the result of one expert, for TOKENS of its tokens. Program (part of
    ROWS columns, expert, tile of tokens)."""
    part, expert, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, expert)
    at = tl.load(offsets_ptr + expert) + tile * TOKENS
    end = tl.load(offsets_ptr + expert + 1)
    if (at >= end) | (tl.load(slot_ids_ptr + expert) < 0):
        if OVERLAP:
            gdc_wait()  # a launch that has ended says that those before it have
        return
    down_columns(
        record_ptr, part, at, end, x_ptr, x_quads, rows_ptr, weights_ptr, out_ptr, n_columns, n_rows, n_blocks,
        down_line, down_bias_word, x_ptr, 0, TOKENS, UNITS, ROWS, DTYPE, HAS_BIAS, 1 if OVERLAP else 0, NVIDIA,
    )  # fmt: skip
