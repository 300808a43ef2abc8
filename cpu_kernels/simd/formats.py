"""How rows of activations lie in memory for the matrix kernels, and the vector code that writes them.

A row is a list of blocks of 64 columns:

| format    | block                                                                                        | bytes |
|-----------|----------------------------------------------------------------------------------------------|-------|
| plain     | float32 [64]                                                                                 | 256   |
| paired    | float32 [64], then the high halves of the same values as bfloat16 [64]                       | 384   |
| split     | bfloat16 [64] of each float32, cut off; then of what that leaves; then of what is left still  | 384   |
| quantised | int8 [64], float32 scale [2], int32 correction [2] (= -offset * sum of the codes), by groups | 80    |

The second half of a paired block is for vdpbf16ps, where the values are bfloat16: those of a bfloat16 model are. Split
blocks are for AMX. The sum of the three parts is the value, but for what is lost where they are subnormal; of a value
that is bfloat16 the two lower parts are 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from cpu_kernels.format.layout import BLOCK_COLUMNS, GROUP, OFFSET, is_quantised
from cpu_kernels.host.isa import Isa
from cpu_kernels.simd.vectors import F32, I1, I32, I64, Simd

GROUPS = BLOCK_COLUMNS // GROUP
X_SCALES = BLOCK_COLUMNS
X_CORRECTIONS = X_SCALES + 4 * GROUPS
X_BLOCK_BYTES = X_CORRECTIONS + 4 * GROUPS
PAIRS = 4 * BLOCK_COLUMNS  # where the bfloat16 of a paired block begin
PARTS, PART_BYTES = 3, 2 * BLOCK_COLUMNS
SPLIT_BYTES = PARTS * PART_BYTES
NOT_FINITE, INEXACT = 1, 2
"""Flags: a value is not finite; one is more than its (first) bfloat16, or is subnormal in a paired block."""

ABSOLUTE_BITS, INFINITY_BITS = 0x7FFFFFFF, 0x7F800000
LOW_HALF, HIGH_HALF = 0xFFFF, 0xFFFF0000
SMALLEST_NORMAL_BITS = 0x00800000
ROUND_BITS = 0x4B400000  # of 1.5 * 2**23: adding it rounds to the nearest even integer, which is the change of the bits
ROUND = 12582912.0
CODE_MAX = 127
TINY = 1e-30  # groups below are stored as zeros


@dataclass(frozen=True, slots=True)
class Format:
    """One of the formats; `offset` is that of the weight codes that meet quantised activations."""

    kind: Literal["plain", "paired", "split", "quantised"]
    offset: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of 64 columns of a row."""
        sizes = {"plain": PAIRS, "paired": PAIRS + PART_BYTES, "split": SPLIT_BYTES, "quantised": X_BLOCK_BYTES}
        return sizes[self.kind]

    @property
    def holds_bf16(self) -> bool:
        """Whether values that are bfloat16 can be read as such."""
        return self.kind in ("paired", "split")


def format_of(dtype: str, isa: Isa) -> Format:
    """The format of activations that the kernels of a weight dtype read."""
    if is_quantised(dtype):
        return Format("quantised", OFFSET[dtype])
    if dtype != "bfloat16" or not isa.bf16_dot:
        return Format("plain")
    return Format("split" if isa.bf16_tiles else "paired")


def write_group(s: Simd, form: Format, values: Sequence[ir.Value], block: ir.Value, group: ir.Value) -> ir.Value:
    """Writes 32 columns (vectors of float32) as group 0 or 1 (int64) of a block; returns flags (int64)."""
    if form.kind == "quantised":
        return _write_quantised(s, form.offset, values, block, group)
    if form.kind != "split":
        for i, x in enumerate(values):
            s.store(x, s.offset(s.offset(block, s.b.mul(group, s.const(4 * GROUP))), 4 * s.lanes * i))
    bad = _flag(s, s.b.icmp_unsigned(">=", largest_bits(s, values), ir.Constant(I32, INFINITY_BITS)), NOT_FINITE)
    if form.kind == "plain":
        return bad
    write = _write_pairs if form.kind == "paired" else _write_parts
    return s.b.or_(bad, write(s, values, block, group))


def largest_bits(s: Simd, values: Sequence[ir.Value]) -> ir.Value:
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
    bits = largest_bits(s, values)
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


def _write_pairs(s: Simd, values: Sequence[ir.Value], block: ir.Value, group: ir.Value) -> ir.Value:
    """The bfloat16 of a paired block; flags where products with them are not those of the values (vdpbf16ps takes
    subnormal values as 0)."""
    lost: ir.Value | None = None
    first = s.offset(s.offset(block, s.b.mul(group, s.const(2 * GROUP))), PAIRS)
    for i, x in enumerate(values):
        bits = s.as_words(x)
        s.store(s.narrow(s.b.lshr(bits, s.constant(s.i32, 16)), 16), s.offset(first, 2 * s.lanes * i))
        size = s.b.and_(bits, s.constant(s.i32, ABSOLUTE_BITS))
        subnormal = s.b.icmp_unsigned("<", size, s.constant(s.i32, SMALLEST_NORMAL_BITS))
        low = s.b.select(subnormal, size, s.b.and_(bits, s.constant(s.i32, LOW_HALF)))
        lost = low if lost is None else s.b.or_(lost, low)
    return _flag(s, s.b.icmp_unsigned("!=", s.reduce(lost, "or"), ir.Constant(I32, 0)), INEXACT)


def _write_parts(s: Simd, values: Sequence[ir.Value], block: ir.Value, group: ir.Value) -> ir.Value:
    """The three bfloat16 of a split block, each cut off, not rounded; flags where the lower ones are not 0."""
    lost: ir.Value | None = None
    first = s.offset(block, s.b.mul(group, s.const(2 * GROUP)))
    for i, x in enumerate(values):
        rest = x
        for part in range(PARTS):
            bits = s.as_words(rest)
            s.store(
                s.narrow(s.b.lshr(bits, s.constant(s.i32, 16)), 16),
                s.offset(first, PART_BYTES * part + 2 * s.lanes * i),
            )
            high = s.as_floats(s.b.and_(bits, s.constant(s.i32, HIGH_HALF)))
            # of an infinity nothing is left
            rest = s.b.select(s.b.fcmp_ordered("==", rest, high), s.zero(s.f32), s.b.fsub(rest, high))
            if part == 0:
                lost = s.as_words(rest) if lost is None else s.b.or_(lost, s.as_words(rest))
    return _flag(s, s.b.icmp_unsigned("!=", s.reduce(lost, "or"), ir.Constant(I32, 0)), INEXACT)


def or_flags(s: Simd, place: ir.Value, flags: ir.Value) -> None:
    """Adds flags to the int64 at `place` (an alloca)."""
    s.b.store(s.b.or_(s.b.load(place, typ=I64), flags), place)
