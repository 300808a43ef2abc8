"""Activation functions over float32 vectors. The same input gives the same bits in any lane; NaN stays NaN."""

from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.simd.formats import ROUND
from cpu_kernels.simd.vectors import Simd

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # Cody and Waite's split of ln 2
EXP_MIN, EXP_MAX = -87.0, 88.0
# exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2) / 2; coefficients of Cephes' expf, relative error below 2e-7
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# erf after N. Juffa's erff: two polynomials, below 1 ulp each; the outer one is in |x| and gives log(1 - erf) + |x|
ERF_SPLIT = 0.9052734375
ERF_FAR_ODD, ERF_FAR_EVEN = (-1.72853470e-5, 3.83197126e-4), (-3.88396438e-3, 2.42546219e-2)
ERF_FAR = (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1)
ERF_NEAR = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
GELU_TANH_A, GELU_TANH_B = 0.7978845608028654, 0.044715
SQRT_HALF = 0.7071067811865476


def activation(s: Simd, kind: str, alpha: ir.Value, x: ir.Value) -> ir.Value:
    """act(x) for a kind of `cpu_kernels.format.spec` but `custom`; alpha: vector, used by silu."""
    if kind == "silu":
        return s.b.fmul(x, sigmoid(s, s.b.fmul(alpha, x)))
    if kind == "gelu":
        return s.b.fmul(s.b.fmul(_real(s, 0.5), x), s.b.fadd(_real(s, 1), erf(s, s.b.fmul(x, _real(s, SQRT_HALF)))))
    if kind == "gelu_tanh":
        cube = s.b.fmul(s.b.fmul(x, x), s.b.fmul(x, _real(s, GELU_TANH_B)))
        return s.b.fmul(x, sigmoid(s, s.b.fmul(_real(s, 2 * GELU_TANH_A), s.b.fadd(x, cube))))
    if kind in ("relu", "relu2"):
        positive = s.maximum(s.zero(s.f32), x)
        return positive if kind == "relu" else s.b.fmul(positive, positive)
    return sigmoid(s, x) if kind == "sigmoid" else x


def exp(s: Simd, x: ir.Value) -> ir.Value:
    """e ** x, clamped to the range of normal float32."""
    x = s.minimum(_real(s, EXP_MAX), s.maximum(_real(s, EXP_MIN), x))
    shifted = s.mul_add(x, _real(s, LOG2_E), _real(s, ROUND))
    n = s.b.fsub(shifted, _real(s, ROUND))
    r = s.mul_add(n, _real(s, -LN2_LOW), s.mul_add(n, _real(s, -LN2_HIGH), x))
    p = s.mul_add(s.b.fmul(r, r), _polynomial(s, EXP, r), s.b.fadd(r, _real(s, 1)))
    power = s.b.shl(s.as_words(shifted), s.constant(s.i32, 23))  # the low bits of `shifted` are the integer n
    return s.b.fmul(p, s.as_floats(s.b.add(power, s.constant(s.i32, 127 << 23))))


def sigmoid(s: Simd, x: ir.Value) -> ir.Value:
    """1 / (1 + e ** -x)."""
    one = _real(s, 1)
    return s.b.fdiv(one, s.b.fadd(one, exp(s, s.b.fneg(x))))


def erf(s: Simd, x: ir.Value) -> ir.Value:
    """The error function."""
    absolute, square = s.absolute_floats(x), s.b.fmul(x, x)
    outer = s.mul_add(_polynomial(s, ERF_FAR_ODD, absolute), square, _polynomial(s, ERF_FAR_EVEN, absolute))
    for term in ERF_FAR:
        outer = s.mul_add(outer, absolute, _real(s, term))
    far = s.b.fsub(_real(s, 1), exp(s, s.mul_add(outer, absolute, s.b.fneg(absolute))))
    near = s.mul_add(_polynomial(s, ERF_NEAR, square), x, x)
    is_far = s.b.fcmp_ordered(">", absolute, _real(s, ERF_SPLIT))
    return s.b.select(is_far, s.copy_sign_floats(far, x), near)


def _real(s: Simd, value: float) -> ir.Constant:
    return s.constant(s.f32, value)


def _polynomial(s: Simd, terms: Sequence[float], x: ir.Value) -> ir.Value:
    """Horner's scheme, highest power first."""
    total: ir.Value = _real(s, terms[0])
    for term in terms[1:]:
        total = s.mul_add(total, x, _real(s, term))
    return total
