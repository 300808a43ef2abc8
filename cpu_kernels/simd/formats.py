"""How rows of activations lie in memory for the matrix kernels, and the vector code that writes them.

A row is a list of blocks of 64 columns:

| format    | block                                                                                        | bytes |
|-----------|----------------------------------------------------------------------------------------------|-------|
| plain     | float32 [64]                                                                                 | 256   |
| split     | bfloat16 [64] x rounded, bfloat16 [64] what is left of x: together 16 bits or more of it     | 256   |
| quantised | int8 [64], float32 scale [2], int32 correction [2] (= -offset * sum of the codes), by groups | 80    |

Values that are bfloat16 already, as those of a bfloat16 model, leave nothing: their second part is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from cpu_kernels.isa import Isa
from cpu_kernels.layout import BLOCK_COLUMNS, GROUP, OFFSET, is_quantised
from cpu_kernels.simd.vectors import F32, I1, I32, I64, Simd

GROUPS = BLOCK_COLUMNS // GROUP
X_SCALES = BLOCK_COLUMNS
X_CORRECTIONS = X_SCALES + 4 * GROUPS
X_BLOCK_BYTES = X_CORRECTIONS + 4 * GROUPS
LOW_PARTS = 2 * BLOCK_COLUMNS  # bytes of the first parts of a split block
NOT_FINITE, INEXACT = 1, 2  # flags: a value is not finite; a second part of a split block is not 0

ABSOLUTE_BITS, INFINITY_BITS = 0x7FFFFFFF, 0x7F800000
HIGH_HALF = 0xFFFF0000
LARGEST_ROUNDED = 0x7F7F8000  # float32 bits from here on are no finite bfloat16 when rounded
ROUND_BITS = 0x4B400000  # of 1.5 * 2**23: adding it rounds to the nearest even integer, which is the change of the bits
ROUND = 12582912.0
CODE_MAX = 127
TINY = 1e-30  # groups below are stored as zeros


@dataclass(frozen=True, slots=True)
class Format:
    """One of the formats; `offset` is that of the weight codes that meet quantised activations."""

    kind: Literal["plain", "split", "quantised"]
    offset: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of 64 columns of a row."""
        return X_BLOCK_BYTES if self.kind == "quantised" else 4 * BLOCK_COLUMNS


def format_of(dtype: str, isa: Isa) -> Format:
    """The format of activations that the kernels of a weight dtype read."""
    if is_quantised(dtype):
        return Format("quantised", OFFSET[dtype])
    return Format("split" if dtype == "bfloat16" and isa.bf16_dot else "plain")


def write_group(s: Simd, form: Format, values: Sequence[ir.Value], block: ir.Value, group: ir.Value) -> ir.Value:
    """Writes 32 columns (vectors of float32) as group 0 or 1 (int64) of a block; returns flags (int64)."""
    if form.kind == "quantised":
        return _write_quantised(s, form.offset, values, block, group)
    if form.kind == "split":
        return _write_split(s, values, block, group)
    for i, x in enumerate(values):
        s.store(x, s.offset(s.offset(block, s.b.mul(group, s.const(4 * GROUP))), 4 * s.lanes * i))
    return _flag(s, s.b.icmp_unsigned(">=", _largest(s, values), ir.Constant(I32, INFINITY_BITS)), NOT_FINITE)


def _largest(s: Simd, values: Sequence[ir.Value]) -> ir.Value:
    """The largest absolute value, as its bits (int32): exact in any order, and NaN is above infinity."""
    absolute = s.constant(s.i32, ABSOLUTE_BITS)
    found = s.b.and_(s.as_words(values[0]), absolute)
    for x in values[1:]:
        found = s.max_words(found, s.b.and_(s.as_words(x), absolute))
    return s.reduce(found, "umax")


def _flag(s: Simd, condition: ir.Value, flag: int) -> ir.Value:
    return s.b.select(condition, s.const(flag), s.const(0))


def _write_quantised(s: Simd, offset: int, values: Sequence[ir.Value], block: ir.Value, group: ir.Value) -> ir.Value:
    """Codes of the largest absolute value / 127; where a value is not finite, codes 0 and an infinite scale, so that
    the results become NaN as they would in float arithmetic."""
    bits = _largest(s, values)
    finite = s.b.icmp_unsigned("<", bits, ir.Constant(I32, INFINITY_BITS))
    extreme = s.b.bitcast(bits, F32)
    usable = s.b.and_(finite, s.b.fcmp_ordered(">", extreme, s.real(TINY)))
    inverse = s.splat(s.b.select(usable, s.b.fdiv(s.real(CODE_MAX), extreme), s.real(0)))
    keep = s.splat(s.b.sext(finite, I32))
    total: ir.Value | None = None
    first = s.offset(block, s.b.mul(group, s.const(GROUP)))
    for i, x in enumerate(values):
        rounded = s.as_words(s.b.fadd(s.b.fmul(x, inverse), s.constant(s.f32, ROUND)))
        codes = s.b.and_(s.b.sub(rounded, s.constant(s.i32, ROUND_BITS)), keep)
        total = codes if total is None else s.b.add(total, codes)
        s.store(s.narrow(codes, 8), s.offset(first, s.lanes * i))
    scale = s.b.select(finite, s.b.fmul(extreme, s.real(1 / CODE_MAX)), s.real(float("inf")))
    place = s.offset(block, s.b.mul(group, s.const(4)))
    s.store(scale, s.offset(place, X_SCALES), 4)
    s.store(s.b.mul(s.reduce(total, "add"), ir.Constant(I32, -offset)), s.offset(place, X_CORRECTIONS), 4)
    return _flag(s, s.b.icmp_unsigned("==", finite, ir.Constant(I1, 0)), NOT_FINITE)


def _write_split(s: Simd, values: Sequence[ir.Value], block: ir.Value, group: ir.Value) -> ir.Value:
    """x rounded to bfloat16 (cut where that would be infinite), then the rest rounded; 0 where x is not finite."""
    left: ir.Value | None = None
    first = s.offset(block, s.b.mul(group, s.const(2 * GROUP)))
    for i, x in enumerate(values):
        size = s.b.and_(s.as_words(x), s.constant(s.i32, ABSOLUTE_BITS))
        cut = s.b.and_(s.as_words(x), s.constant(s.i32, HIGH_HALF))
        large = s.b.icmp_unsigned(">=", size, s.constant(s.i32, LARGEST_ROUNDED))
        high = s.b.select(large, cut, _rounded(s, x))
        rest = _rounded(s, s.b.fsub(x, s.as_floats(high)))
        finite = s.b.icmp_unsigned("<", size, s.constant(s.i32, INFINITY_BITS))
        low = s.b.select(finite, rest, s.zero(s.i32))
        for part, place in ((high, 0), (low, LOW_PARTS)):
            halves = s.narrow(s.b.lshr(part, s.constant(s.i32, 16)), 16)
            s.store(halves, s.offset(first, place + 2 * s.lanes * i))
        left = low if left is None else s.b.or_(left, low)
    bad = _flag(s, s.b.icmp_unsigned(">=", _largest(s, values), ir.Constant(I32, INFINITY_BITS)), NOT_FINITE)
    inexact = _flag(s, s.b.icmp_unsigned("!=", s.reduce(left, "or"), ir.Constant(I32, 0)), INEXACT)
    return s.b.or_(bad, inexact)


def _rounded(s: Simd, x: ir.Value) -> ir.Value:
    """x rounded to the nearest even bfloat16, as the high half of int32 lanes."""
    bits = s.as_words(x)
    odd = s.b.and_(s.b.lshr(bits, s.constant(s.i32, 16)), s.constant(s.i32, 1))
    up = s.b.add(s.b.add(bits, s.constant(s.i32, 0x7FFF)), odd)
    return s.b.and_(up, s.constant(s.i32, HIGH_HALF))


def or_flags(s: Simd, place: ir.Value, flags: ir.Value) -> None:
    """Adds flags to the int64 at `place` (an alloca)."""
    s.b.store(s.b.or_(s.b.load(place, typ=I64), flags), place)
