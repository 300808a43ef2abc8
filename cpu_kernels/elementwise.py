"""Elementwise float32 code between the matrix products, written so that LLVM vectorises the loops.

No fast-math: the same input gives the same bits, whatever is computed beside it, and NaN stays NaN.
"""

import numpy as np

from cpu_kernels.compiled import Real, Truth, Whole, inline_kernel
from cpu_kernels.layout import GROUP, INTERLEAVE
from cpu_kernels.primitives import float_from_bits
from cpu_kernels.simd.tiles import X_BLOCK_BYTES, X_CORRECTIONS, X_SCALES
from cpu_kernels.spec import KINDS

SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, IDENTITY = (KINDS.index(kind) for kind in KINDS if kind != "custom")
# Places in the float32 parameter vector of an activation (cpu_kernels.backends.numba_backend writes it).
ALPHA, GATE_MAX, ACT_MAX, UP_LIMIT, UP_OFFSET = range(5)

f32 = np.float32
INFINITY_BITS = np.int32(0x7F800000)
ABSOLUTE_BITS = np.int32(0x7FFFFFFF)
ROUND = f32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest even integer
LOG2_E = f32(1.4426950408889634)
LN2_HIGH, LN2_LOW = f32(0.693145751953125), f32(1.428606765330187e-06)  # Cody and Waite's split of ln 2
EXP_MIN, EXP_MAX = f32(-87.0), f32(88.0)
# exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2) / 2; coefficients of Cephes' expf, relative error below 2e-7
E0, E1, E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
E3, E4, E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
# erf after N. Juffa's erff (two polynomials, below 1 ulp each)
ERF_SPLIT = f32(0.9052734375)
GELU_TANH_A, GELU_TANH_B = f32(0.7978845608028654), f32(0.044715)
SQRT_HALF = f32(0.7071067811865476)


@inline_kernel
def exp(x: Real) -> Real:
    """e ** x, clamped to the range of normal float32."""
    x = min(max(x, EXP_MIN), EXP_MAX)
    n = (x * LOG2_E + ROUND) - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    p = p * r * r + r + f32(1)
    return p * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@inline_kernel
def sigmoid(x: Real) -> Real:
    """1 / (1 + e ** -x)."""
    return f32(1) / (f32(1) + exp(-x))


@inline_kernel
def erf(x: Real) -> Real:
    """The error function."""
    t, s = abs(x), x * x
    r = f32(-1.72853470e-5) * t + f32(3.83197126e-4)
    u = f32(-3.88396438e-3) * t + f32(2.42546219e-2)
    r = r * s + u
    r = ((r * t + f32(-1.06777877e-1)) * t + f32(-6.34846687e-1)) * t + f32(-1.28717512e-1)
    far = f32(1) - exp(r * t - t)
    p = ((f32(-5.96761703e-4) * s + f32(4.99119423e-3)) * s + f32(-2.67681349e-2)) * s + f32(1.12819925e-1)
    p = (p * s + f32(-3.76125336e-1)) * s + f32(1.28379166e-1)
    near = p * x + x
    return near if t <= ERF_SPLIT else (far if x > 0 else -far)


@inline_kernel
def activate(kind: Whole, alpha: Real, x: np.ndarray) -> None:
    """x[:32] = act(x[:32]) in place (a constant length, so that LLVM needs no loop). The kinds of spec but `custom`."""
    if kind == SILU:
        for i in range(INTERLEAVE):
            x[i] = x[i] * sigmoid(alpha * x[i])
    elif kind == GELU:
        for i in range(INTERLEAVE):
            x[i] = f32(0.5) * x[i] * (f32(1) + erf(x[i] * SQRT_HALF))
    elif kind == GELU_TANH:
        for i in range(INTERLEAVE):
            inner = GELU_TANH_A * (x[i] + GELU_TANH_B * x[i] * x[i] * x[i])
            x[i] = x[i] * sigmoid(inner + inner)
    elif kind in (RELU, RELU2):
        for i in range(INTERLEAVE):
            x[i] = max(x[i], f32(0)) * (max(x[i], f32(0)) if kind == RELU2 else f32(1))
    elif kind == SIGMOID:
        for i in range(INTERLEAVE):
            x[i] = sigmoid(x[i])


@inline_kernel
def gate_times_up(kind: Whole, parameters: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
    """gate[:32] = the gated activation of gate[:32] and up[:32]; limits that do not apply are infinite."""
    for i in range(INTERLEAVE):
        gate[i] = min(gate[i], parameters[GATE_MAX])
    activate(kind, parameters[ALPHA], gate)
    limit, offset, highest = parameters[UP_LIMIT], parameters[UP_OFFSET], parameters[ACT_MAX]
    for i in range(INTERLEAVE):
        gate[i] = min(gate[i], highest) * (min(max(up[i], -limit), limit) + offset)


@inline_kernel
def quantise_block(x: np.ndarray, place: Whole, size: Whole, code_offset: Whole, out: np.ndarray) -> Truth:
    """Writes float32 x[:size], size 32 or 64, as columns place .. place + size of a quantised block.

    out: uint8 [X_BLOCK_BYTES] (cpu_kernels.simd.tiles). Returns False if a value is not finite.
    """
    codes = out.view(np.int8)
    scales = out[X_SCALES:X_CORRECTIONS].view(np.float32)
    corrections = out[X_CORRECTIONS:X_BLOCK_BYTES].view(np.int32)
    finite: Truth = True
    for start in range(0, size, GROUP):
        target = place + start
        scale, total = quantise_group(x[start : start + GROUP], codes[target : target + GROUP])
        finite &= scale < f32(np.inf)
        scales[target // GROUP] = scale
        corrections[target // GROUP] = -np.int32(code_offset) * total
    return finite


@inline_kernel
def quantise_group(x: np.ndarray, codes: np.ndarray) -> tuple[Real, Whole]:
    """float32 [32] -> int8 [32], scale (infinite if a value is not finite) and sum of the codes."""
    bits = x.view(np.int32)
    largest = np.int32(0)
    for i in range(GROUP):  # as integers, so that the reduction is exact in any order and sees NaN
        largest = max(largest, bits[i] & ABSOLUTE_BITS)
    if largest >= INFINITY_BITS:  # codes 0 times an infinite scale: the results become NaN, as in float arithmetic
        codes[:] = np.int8(0)
        return f32(np.inf), np.int32(0)
    extreme = float_from_bits(largest)
    inverse = f32(127) / extreme if extreme > f32(1e-30) else f32(0)
    total = np.int32(0)
    for i in range(GROUP):
        code = np.int32((x[i] * inverse + ROUND) - ROUND)
        codes[i] = np.int8(code)
        total += code
    return extreme * f32(1 / 127), total
