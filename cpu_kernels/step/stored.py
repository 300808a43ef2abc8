"""How a KV cache stores the keys or values of one head and token: as floats, or turned and as integer codes.

A stored row of n columns::

    FLOAT32, BFLOAT16   the values
    INT8                int8 [n] codes, then their scale as float32
    INT4                uint8 [n / 2], then scales as bfloat16 [n / 32]: byte i has the codes (0 .. 15 for -8 .. 7) of
                        column i in its low half and of column i + n / 2 in its high half; a scale for 32 columns

Codes are of `turn(x)`, not of x. Keys have columns of many times the others' size, which alone would set the scale;
a Hadamard transform spreads each column over all (Ashkboos et al., QuaRot, 2024). It is orthogonal and its own inverse:
turned queries give the same scores, and a sum of turned values is turned back once.
"""

import numpy as np

from cpu_kernels.errors import LayoutError
from cpu_kernels.jit.compiled import Real, Truth, Whole, inline_kernel
from cpu_kernels.jit.primitives import bytes_at, floats_at, halves_at
from cpu_kernels.step.floats import BFLOAT16, FLOAT32, from_half, read_row, to_half, write_row

INT8, INT4 = 2, 3
N_KINDS = 4
KIND_OF = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "int4": INT4}
"""How rows are stored, by the name of it that deployments use."""
SCALED_COLUMNS = 32
"""Columns of an INT4 row that share a scale."""
LARGEST_INT8, LOWEST_INT4 = 127, -8
TOP_INT4 = 15
"""The largest stored code, which stands for 7."""
IN_REGISTERS = 8
LARGEST_FLOAT = np.float32(3.4028235e38)
TINY = np.float32(1e-30)
"""Rows below are stored as zeros."""


def row_bytes(kind: int, n: int) -> int:
    """Bytes of a stored row of n columns. Raises LayoutError for an odd number of columns in 4 bit."""
    if kind == INT4 and n % 2:
        raise LayoutError(f"keys and values in 4 bit lie two in a byte, found heads of {n} columns; choose int8")
    return (4 * n, 2 * n, n + 4, n // 2 + 2 * -(-n // SCALED_COLUMNS))[kind]


@inline_kernel
def turn(x: np.ndarray) -> None:
    """x = H x: Hadamard transforms of the largest power of two that divides the number of columns, one after another.

    Orthogonal, symmetric, and so its own inverse. Source: Sylvester's construction, as butterflies. The first three
    steps are taken in registers: LLVM makes no vectors of pairs that lie so close together.
    """
    n, width = x.size, 1
    block = n & -n
    if block >= IN_REGISTERS:
        width = IN_REGISTERS
        for i in range(0, n, IN_REGISTERS):
            _turn_eight(x[i : i + IN_REGISTERS])
    while width < block:
        for first in range(0, n, 2 * width):
            low, high = x[first : first + width], x[first + width : first + 2 * width]
            for i in range(width):
                a, b = low[i], high[i]
                low[i], high[i] = a + b, a - b
        width *= 2
    factor = np.float32(1) / np.sqrt(np.float32(block))
    for i in range(n):
        x[i] *= factor


@inline_kernel
def _turn_eight(x: np.ndarray) -> None:
    """The steps of `turn` within eight columns, without the factor."""
    a0, a1, a2, a3 = x[0] + x[4], x[1] + x[5], x[2] + x[6], x[3] + x[7]
    a4, a5, a6, a7 = x[0] - x[4], x[1] - x[5], x[2] - x[6], x[3] - x[7]
    b0, b1, b2, b3 = a0 + a2, a1 + a3, a0 - a2, a1 - a3
    b4, b5, b6, b7 = a4 + a6, a5 + a7, a4 - a6, a5 - a7
    x[0], x[1], x[2], x[3] = b0 + b1, b0 - b1, b2 + b3, b2 - b3
    x[4], x[5], x[6], x[7] = b4 + b5, b4 - b5, b6 + b7, b6 - b7


@inline_kernel
def store_row(kind: Whole, target: Whole, values: np.ndarray) -> None:
    """Stores float32 values at an address. Codes: `values` are turned in place; a value that is not finite makes all of
    the row (INT8) or of its group NaN."""
    if kind == INT8:
        turn(values)
        _store_int8(target, values)
    elif kind == INT4:
        turn(values)
        _store_int4(target, values)
    else:
        write_row(kind, target, values)


@inline_kernel
def _store_int8(target: Whole, x: np.ndarray) -> None:
    top, finite = np.float32(0), True
    for i in range(x.size):
        size = abs(x[i])
        top = max(top, size)
        finite = finite and size <= LARGEST_FLOAT
    usable = finite and top > TINY
    inverse = np.float32(LARGEST_INT8) / top if usable else np.float32(0)
    codes = bytes_at(target, x.size)
    if usable:
        for i in range(x.size):
            codes[i] = np.uint8(np.int32(np.rint(x[i] * inverse)))
    else:
        for i in range(x.size):
            codes[i] = np.uint8(0)
    scale = floats_at(target + x.size, 1)
    scale[0] = top / np.float32(LARGEST_INT8) if finite else np.float32(np.nan)


@inline_kernel
def _store_int4(target: Whole, x: np.ndarray) -> None:
    """The value of largest size of a group becomes the code -8, so that its scale may be negative."""
    half = x.size // 2
    codes = bytes_at(target, half)
    n_scales = (x.size + SCALED_COLUMNS - 1) // SCALED_COLUMNS
    scales = halves_at(target + half, n_scales)
    for group in range(n_scales):
        first, stop = group * SCALED_COLUMNS, min(x.size, (group + 1) * SCALED_COLUMNS)
        extreme, finite = np.float32(0), True
        for i in range(first, stop):
            finite = finite and abs(x[i]) <= LARGEST_FLOAT
            if abs(x[i]) > abs(extreme):
                extreme = x[i]
        scales[group] = to_half(extreme / np.float32(LOWEST_INT4) if finite else np.float32(np.nan))
        scale = from_half(scales[group])
        usable = finite and abs(scale) > TINY
        inverse = np.float32(1) / scale if usable else np.float32(0)
        for i in range(first, stop):
            shifted = np.int32(np.rint(x[i] * inverse) if usable else np.float32(0)) - LOWEST_INT4
            code = np.uint8(0 if shifted < 0 else TOP_INT4 if shifted > TOP_INT4 else shifted)
            if i < half:
                codes[i] = code
            else:
                codes[i - half] |= np.uint8(code << 4)


@inline_kernel
def read_stored(kind: Whole, source: Whole, values: np.ndarray, scale: Real) -> None:
    """values = scale * what is stored at an address: of codes still turned."""
    if kind == INT8:
        codes, own = bytes_at(source, values.size), floats_at(source + values.size, 1)[0] * scale
        for i in range(values.size):
            values[i] = own * np.float32(np.int8(codes[i]))
    elif kind == INT4:
        _read_int4(source, values, scale)
    else:
        read_row(kind, source, values, scale)


@inline_kernel
def _read_int4(source: Whole, values: np.ndarray, scale: Real) -> None:
    n = values.size
    half = n // 2
    codes, low, high = bytes_at(source, half), values[:half], values[half:]
    for i in range(half):
        low[i] = np.float32(np.int32(codes[i] & 15) + LOWEST_INT4)
        high[i] = np.float32(np.int32(codes[i] >> 4) + LOWEST_INT4)
    scales = halves_at(source + half, (n + SCALED_COLUMNS - 1) // SCALED_COLUMNS)
    for group in range(scales.size):
        own = scale * from_half(scales[group])
        for i in range(group * SCALED_COLUMNS, min(n, (group + 1) * SCALED_COLUMNS)):
            values[i] *= own


@inline_kernel
def is_turned(kind: Whole) -> Truth:
    """Whether rows of a kind are turned, so that the query that meets them must be, too."""
    return kind >= INT8
