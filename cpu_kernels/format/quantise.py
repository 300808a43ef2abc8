"""Group quantisation of weights: int8 to int2, symmetric, one bfloat16 scale per row and 32 columns.

Scales are bfloat16, not float16: the same 16 bits, but no underflow for small weights, a conversion that is one shift
on every CPU, and checkpoints that are int4 with bfloat16 scales already (Kimi K2) keep their scales. Codes are rounded
against the stored (rounded) scale, so the scale's own rounding adds no error.
"""

import numpy as np
import torch

from cpu_kernels.format.layout import BLOCK_COLUMNS, BLOCK_ROWS, GROUP, OFFSET, PLANES
from cpu_kernels.jit.compiled import Real, Truth, Whole, inline_kernel, kernel
from cpu_kernels.jit.primitives import bits_of_float, float_from_bits

INT8_MAX = 127
# Candidates for (extreme value of a group) / scale, as parts of the code range; the one with the least squared error
# wins. -1 uses all of the range, values nearer to 0 clip the extreme and round the rest more finely, those above 0 help
# groups with two extremes. Of normal weights (20,000 groups) a search over 26 candidates leaves 1 % less error in int4.
RANGE_PARTS = np.array([-1.0, -1.075, -0.9375, 0.875, 0.95], np.float32)
UNFITTED_BITS = 4
"""Codes of other numbers of bits have the scale fitted to them once (least squares), and are rounded again: 1 to 3 %
less error, within 1 % of the least that any scale leaves. int4 records are as they have always been."""
INT8_GRID_BITS = 6  # a power of two by which the extreme is at least 2**6: weights on such a grid (MXFP4) stay exact
ON_GRID = np.float32(1 / 256)  # how far from a whole number of steps a value may lie, in steps
TINY = np.float32(1e-30)  # groups below are stored as zeros
WORDS = GROUP // 4  # 32-bit words of the codes of a group
EACH_BYTE = 0x01010101
f32, i32 = np.float32, np.int32
INFINITY_BITS = i32(0x7F800000)
ABSOLUTE_BITS = i32(0x7FFFFFFF)
ROUND = f32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest even integer


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """Unsigned codes uint8 [N, K], scales bfloat16 [N, K / 32] -> float32 [N, K]; any device."""
    groups = codes.view(codes.shape[0], -1, GROUP).float() - OFFSET[dtype]
    return (groups * scales.float().unsqueeze(2)).view(codes.shape)


@kernel
def pack_quantised(
    source: np.ndarray, planes: np.ndarray, out: np.ndarray, block_bytes: Whole, first: Whole, step: Whole
) -> Truth:
    """Quantises float32 [N, K], N and K multiples of 64, into packed row blocks (layout: `cpu_kernels.format.layout`).

    planes: int64, the bits of each plane of a code (`planes_of`).
    Two row blocks (32 rows) go to places first, first + 1 of `out` (uint8), the next two to first + step, and so on.
    Returns False if a weight is not finite.
    """
    row_block_bytes = source.shape[1] // BLOCK_COLUMNS * block_bytes
    scale_place = block_bytes // 2 - 2 * BLOCK_ROWS  # in 16-bit units
    bits = planes.sum()
    codes = np.empty(GROUP, np.int8)
    words = codes.view(np.int32)
    largest: Whole = i32(0)
    for row in range(source.shape[0]):
        row_block, r = row // BLOCK_ROWS, row % BLOCK_ROWS
        place = (first + row_block // 2 * step + row_block % 2) * row_block_bytes
        for group in range(source.shape[1] // GROUP):
            start = place + group // 2 * block_bytes
            block = out[start : start + block_bytes]
            values = source[row, group * GROUP : (group + 1) * GROUP]
            extreme = _extreme(values)
            largest = max(largest, bits_of_float(extreme) & ABSOLUTE_BITS)
            scale = _int8_codes(values, extreme, codes) if bits == 8 else _low_codes(values, extreme, bits, codes)
            block.view(np.int16)[scale_place + (group % 2) * BLOCK_ROWS + r] = np.int16(scale)
            _store_codes(words, bits, planes, block.view(np.int32), group % 2, r)
    return largest < INFINITY_BITS


@inline_kernel
def _extreme(values: np.ndarray) -> Real:
    """The value with the largest magnitude; NaN and infinity count as largest."""
    bits = values.view(np.int32)
    largest: Whole = i32(0)
    for i in range(GROUP):
        largest = max(largest, bits[i] & ABSOLUTE_BITS)
    lowest = f32(0)
    for i in range(GROUP):
        lowest = min(lowest, values[i])
    magnitude = float_from_bits(largest)
    return -magnitude if lowest == -magnitude else magnitude


@inline_kernel
def _bfloat16_bits(x: Real) -> Whole:
    """The nearest bfloat16 (ties to even) in the low 16 bits."""
    bits = bits_of_float(x)
    return (bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) >> i32(16)


@inline_kernel
def _round(values: np.ndarray, scale: Real, low: Whole, high: Whole, codes: np.ndarray) -> Real:
    """codes = values / scale, rounded and clamped; returns the squared error."""
    inverse = f32(1) / scale if abs(scale) > TINY else f32(0)
    error = f32(0)
    for i in range(GROUP):
        code = min(max((values[i] * inverse + ROUND) - ROUND, f32(low)), f32(high))
        codes[i] = np.int8(i32(code))
        error += (code * scale - values[i]) * (code * scale - values[i])
    return error


@inline_kernel
def _on_grid(values: np.ndarray, step: Real) -> Truth:
    """Whether all values are whole numbers of steps. Weights that are not quantised are told by their first values."""
    if abs(step) <= TINY:
        return False
    inverse = f32(1) / step
    for i in range(GROUP):
        steps = values[i] * inverse
        if abs(steps - ((steps + ROUND) - ROUND)) > ON_GRID:
            return False
    return True


@inline_kernel
def _int8_codes(values: np.ndarray, extreme: Real, codes: np.ndarray) -> Whole:
    power = float_from_bits((bits_of_float(extreme) & INFINITY_BITS) - i32(INT8_GRID_BITS << 23))
    if abs(extreme) > TINY and _on_grid(values, power):
        _round(values, power, -INT8_MAX, INT8_MAX, codes)
        return bits_of_float(power) >> i32(16)
    scale = _bfloat16_bits(abs(extreme) / f32(INT8_MAX))
    _round(values, float_from_bits(scale << i32(16)), -INT8_MAX, INT8_MAX, codes)
    return scale


@inline_kernel
def _low_codes(values: np.ndarray, extreme: Real, bits: Whole, codes: np.ndarray) -> Whole:
    """Codes of 2 to 6 bits, and their scale: that with the least squared error of `RANGE_PARTS`, and of what the
    extreme may be coded as in weights that lie on such a grid already (Q4_0 of GGUF, GPTQ, AWQ), which so keep their
    codes."""
    half = 1 << bits - 1
    best: Whole = i32(0)
    least: Real = f32(np.inf)
    for part in RANGE_PARTS:
        scale = _bfloat16_bits(extreme / (part * f32(half)))
        error = _round(values, float_from_bits(scale << i32(16)), -half, half - 1, codes)
        if error < least:
            best, least = scale, error
    for code in range(1 - half, half - 1):
        if code != 0 and _on_grid(values, extreme / f32(code)):
            scale = _bfloat16_bits(extreme / f32(code))
            error = _round(values, float_from_bits(scale << i32(16)), -half, half - 1, codes)
            if error < least:
                best, least = scale, error
    _round(values, float_from_bits(best << i32(16)), -half, half - 1, codes)
    if bits != UNFITTED_BITS and least > f32(0):
        fitted = _bfloat16_bits(_fitted_scale(values, codes))
        if _round(values, float_from_bits(fitted << i32(16)), -half, half - 1, codes) < least:
            return fitted
        _round(values, float_from_bits(best << i32(16)), -half, half - 1, codes)
    return best


@inline_kernel
def _fitted_scale(values: np.ndarray, codes: np.ndarray) -> Real:
    """The scale with which these codes are nearest to the values; 0 where all codes are."""
    product, square = f32(0), f32(0)
    for i in range(GROUP):
        code = f32(codes[i])
        product += values[i] * code
        square += code * code
    return product / square if square > f32(0) else f32(0)


def planes_of(dtype: str) -> np.ndarray:
    """What `pack_quantised` is told of a dtype."""
    return np.array(PLANES[dtype], np.int64)


@inline_kernel
def _store_codes(
    words: np.ndarray, bits: Whole, planes: np.ndarray, block: np.ndarray, group: Whole, row: Whole
) -> None:
    """The codes of a group (int8 [32] as 8 words) to their lines of a block (as words)."""
    if bits == 8:
        for j in range(WORDS):
            block[(WORDS * group + j) * BLOCK_ROWS + row] = words[j] ^ i32(-0x7F7F7F80)  # + 128 per byte
        return
    line = bits * group
    below = bits  # of a code, under its plane
    for plane in planes:
        # Adding half of the range turns the highest bit over.
        turned = i32((EACH_BYTE << plane - 1) if below == bits else 0)
        below -= plane
        mask = i32(((1 << plane) - 1) * EACH_BYTE)
        for j in range(plane):
            word = i32(0)
            for part in range(8 // plane):
                field = ((words[j + part * plane] >> i32(below)) & mask) ^ turned
                word |= field << i32(part * plane)
            block[(line + j) * BLOCK_ROWS + row] = word
        line += plane


@kernel
def pack_words(source: np.ndarray, out: np.ndarray, first: Whole, step: Whole) -> None:
    """Like `pack_quantised` for float weights: int32 words [N, W], N and W multiples of 32, into `out` (int32)."""
    n_words = source.shape[1]
    for row_block in range(source.shape[0] // BLOCK_ROWS):
        place = (first + row_block // 2 * step + row_block % 2) * n_words * BLOCK_ROWS
        for start in range(0, n_words, 32):  # 16 x 32 words: 2 KiB, stays in L1
            for r in range(BLOCK_ROWS):
                values = source[row_block * BLOCK_ROWS + r]
                for word in range(start, start + 32):
                    out[place + word * BLOCK_ROWS + r] = values[word]
