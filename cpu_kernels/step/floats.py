"""Plain loops over float32 that the operations share; LLVM makes vector code of them."""

import numpy as np

from cpu_kernels.jit.compiled import Real, Whole, float_kernel, inline_kernel
from cpu_kernels.jit.primitives import bits_of_float, float_from_bits, floats_at, halves_at

FLOAT32, BFLOAT16 = 0, 1
"""How elements of a weight, an embedding or a KV cache are stored."""
ELEMENT_BYTES = (4, 2)
LOWEST_EXPONENT, LARGEST_EXPONENT = -87.0, 88.0
"""Where e ** x is a normal float32."""
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693145751953125, 1.42860682030941723212e-6
"""ln(2) in two parts, of which the first has few enough bits that n times it is exact (Cody and Waite)."""


@inline_kernel
def float_of(bits: Whole) -> Real:
    """A float32 that a call vector holds as its bits."""
    return float_from_bits(np.int32(bits))


def bits_of(value: float) -> int:
    """The bits of a float32, for a call vector."""
    return int(np.float32(value).view(np.int32))


@inline_kernel
def from_half(half: Whole) -> Real:
    """The float32 of a bfloat16's bits."""
    return float_from_bits(np.int32(np.uint32(half) << np.uint32(16)))


@inline_kernel
def to_half(value: Real) -> Whole:
    """The bits of the nearest bfloat16 (ties to even), as torch rounds; NaN stays NaN."""
    bits = np.uint32(bits_of_float(value))
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@float_kernel
def square_sum(x: np.ndarray) -> Real:
    """Sum of squares."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@float_kernel
def deviation_sum(x: np.ndarray, mean: Real) -> Real:
    """Sum of squared distances from `mean`."""
    total = np.float32(0)
    for i in range(x.size):
        total += (x[i] - mean) * (x[i] - mean)
    return total


@float_kernel
def plain_sum(x: np.ndarray) -> Real:
    """Sum of all values."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    return total


@float_kernel
def dot_floats(weights: np.ndarray, x: np.ndarray) -> Real:
    """Product of a row of float32 weights with x."""
    total = np.float32(0)
    for i in range(x.size):
        total += weights[i] * x[i]
    return total


@float_kernel
def dot_halves(weights: np.ndarray, x: np.ndarray) -> Real:
    """Product of a row of bfloat16 weights (their bits) with x."""
    total = np.float32(0)
    for i in range(x.size):
        total += from_half(weights[i]) * x[i]
    return total


@inline_kernel
def fill(values: np.ndarray, value: Real) -> None:
    """Every element = value (a loop: Numba takes a second longer to compile each assignment to a slice)."""
    for i in range(values.size):
        values[i] = value


@inline_kernel
def copy(source: np.ndarray, target: np.ndarray) -> None:
    """target = source, element by element."""
    for i in range(target.size):
        target[i] = source[i]


@inline_kernel
def dot(kind: Whole, weights: Whole, x: np.ndarray) -> Real:
    """Product of a row of weights at an address, stored as `kind`, with x."""
    if kind == FLOAT32:
        return dot_floats(floats_at(weights, x.size), x)
    return dot_halves(halves_at(weights, x.size), x)


@float_kernel
def add_row(kind: Whole, source: Whole, values: np.ndarray, scale: Real) -> None:
    """values += scale * what is stored at an address as `kind`."""
    if kind == FLOAT32:
        floats = floats_at(source, values.size)
        for i in range(values.size):
            values[i] += scale * floats[i]
    else:
        halves = halves_at(source, values.size)
        for i in range(values.size):
            values[i] += scale * from_half(halves[i])


@inline_kernel
def write_row(kind: Whole, target: Whole, values: np.ndarray) -> None:
    """Stores float32 values at an address as `kind`."""
    if kind == FLOAT32:
        floats = floats_at(target, values.size)
        for i in range(values.size):
            floats[i] = values[i]
    else:
        halves = halves_at(target, values.size)
        for i in range(values.size):
            halves[i] = to_half(values[i])


@inline_kernel
def read_row(kind: Whole, source: Whole, values: np.ndarray, scale: Real) -> None:
    """values = scale * what is stored at an address as `kind`."""
    if kind == FLOAT32:
        floats = floats_at(source, values.size)
        for i in range(values.size):
            values[i] = scale * floats[i]
    else:
        halves = halves_at(source, values.size)
        for i in range(values.size):
            values[i] = scale * from_half(halves[i])


@inline_kernel
def exp_of(x: Real) -> Real:
    """e ** x, to about 1e-7 of itself, in a form of which LLVM makes vector code; NaN stays NaN.

    2 ** n * e ** r with |r| <= ln(2) / 2, by its Taylor polynomial; beyond the range of float32 its last values.
    """
    x = np.float32(LOWEST_EXPONENT) if x < np.float32(LOWEST_EXPONENT) else x
    x = np.float32(LARGEST_EXPONENT) if x > np.float32(LARGEST_EXPONENT) else x
    n = np.rint(x * np.float32(LOG2_E)) if x == x else np.float32(0)
    r = (x - n * np.float32(LN2_HIGH)) - n * np.float32(LN2_LOW)
    power = np.float32(1 / 5040)
    power = power * r + np.float32(1 / 720)
    power = power * r + np.float32(1 / 120)
    power = power * r + np.float32(1 / 24)
    power = power * r + np.float32(1 / 6)
    power = power * r + np.float32(0.5)
    power = power * r + np.float32(1)
    power = power * r + np.float32(1)
    return power * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@inline_kernel
def sigmoid(x: Real) -> Real:
    """1 / (1 + e ** -x)."""
    return np.float32(1) / (np.float32(1) + exp_of(-x))


@inline_kernel
def silu(x: Real) -> Real:
    """x * sigmoid(x)."""
    return x / (np.float32(1) + exp_of(-x))


@inline_kernel
def softplus(x: Real) -> Real:
    """log(1 + e ** x), as torch does: x itself above 20."""
    return x if x > np.float32(20) else np.log1p(np.exp(x))
