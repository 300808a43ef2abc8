"""Products of a few rows of activations with a matrix as a model holds it: rows of float32 or bfloat16, not packed.

dot_rows(weights, weight_bytes, n_outputs, n_in, x, x_bytes, n_rows, out, out_bytes)

out[r, o] = weights[o] . x[r]: weights are n_outputs rows of n_in elements, weight_bytes apart; x are n_rows rows of
float32 [n_in], x_bytes apart; out are rows of float32, out_bytes apart.

A row of weights is read and widened once for up to ROW_BLOCK rows of activations, so that a step for several sequences
costs little more than one of a single sequence (bfloat16 [50304, 2048]: 1 row 10.9 ms, 4 rows 16.7 ms; row by row 34 to
38 ms; Zen 1, 2 threads, measured). Two rows of weights at once read activations half as often, but as two streams: 20 %
more time for a single row. The additions of a sum are in the same order for every number of rows:
a sequence gets the same bits alone and among others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from llvmlite import ir

from cpu_kernels.format.layout import LINE_BYTES
from cpu_kernels.host.isa import Isa, is_zen
from cpu_kernels.simd.vectors import F32, I16, I32, I64, POINTER, VOID, Simd

ROW_BLOCK = 4
"""Rows of activations that share one reading of weights: with SUMS each, half of AVX2's 16 registers."""
SUMS = 2
"""Vectors that a sum is kept in: a multiply-add waits for the one before it in its vector."""

FAR_BYTES = 4096
"""How far ahead of its use a line of weights is asked for, where each is."""


@dataclass(frozen=True, slots=True)
class DotRowsKernel:
    """`dot_rows` for weights stored as `dtype`. far: each line of weights is asked for, far ahead of its use. Intel's
    prefetchers alone leave half of the memory's rate unused; Zen was measured without."""

    dtype: Literal["bfloat16", "float32"]
    far: bool = field(default_factory=lambda: not is_zen())
    symbol: ClassVar[str] = "dot_rows"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"dot-rows-{self.dtype}" + "-far" * self.far

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight."""
        return 2 if self.dtype == "bfloat16" else 4

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `dot_rows`."""
        module = ir.Module(self.name)
        kinds = [POINTER, I64, I64, I64, POINTER, I64, I64, POINTER, I64]
        function = ir.Function(module, ir.FunctionType(VOID, kinds), self.symbol)
        weights, weight_bytes, n_outputs, n_in, x, x_bytes, n_rows, out, out_bytes = function.args
        s = Simd(ir.IRBuilder(function.append_basic_block()), isa)
        blocked = s.b.mul(s.b.sdiv(n_rows, s.const(ROW_BLOCK)), s.const(ROW_BLOCK))
        left = s.b.sub(n_rows, blocked)
        with s.loop(s.const(0), n_outputs) as output:
            row = s.offset(weights, s.b.mul(output, weight_bytes))
            target = s.offset(out, s.b.mul(output, s.const(4)))
            with s.loop(s.const(0), blocked, ROW_BLOCK) as first:
                self._block(s, row, n_in, x, x_bytes, first, target, out_bytes, ROW_BLOCK)
            for count in range(1, ROW_BLOCK):
                with s.b.if_then(s.b.icmp_signed("==", left, s.const(count))):
                    self._block(s, row, n_in, x, x_bytes, blocked, target, out_bytes, count)
        s.b.ret_void()
        return module

    def _block(
        self, s: Simd, weights: ir.Value, n_in: ir.Value, x: ir.Value, x_bytes: ir.Value, first: ir.Value,
        out: ir.Value, out_bytes: ir.Value, count: int,
    ) -> None:  # fmt: skip
        """One row of weights with `count` rows of activations from `first` on."""
        rows = [s.b.add(first, s.const(i)) for i in range(count)]
        sources = [s.offset(x, s.b.mul(row, x_bytes)) for row in rows]
        totals: list[ir.Value] = [s.zero(s.f32)] * (SUMS * count)
        line = LINE_BYTES // self.element_bytes
        step = SUMS * s.lanes
        whole = s.const(0)
        for columns in (max(line, step), step):
            begin, whole = whole, s.b.mul(s.b.sdiv(n_in, s.const(columns)), s.const(columns))
            add = partial(self._add_columns, s, weights, sources, columns, self.far and columns >= line)
            totals = s.fold(begin, whole, columns, totals, add)
        for i, (row, source) in enumerate(zip(rows, sources, strict=True)):
            value = s.sum_floats(s.b.fadd(*totals[SUMS * i : SUMS * (i + 1)]))
            (value,) = s.fold(whole, n_in, 1, [value], partial(self._add_column, s, weights, source))
            s.store(value, s.offset(out, s.b.mul(row, out_bytes)), 4)

    def _add_columns(
        self, s: Simd, weights: ir.Value, sources: Sequence[ir.Value], n_columns: int, far: bool, column: ir.Value,
        totals: Sequence[ir.Value],
    ) -> list[ir.Value]:  # fmt: skip
        """The totals, row by row, with n_columns more; far: whose lines are asked for ahead."""
        added = list(totals)
        here = s.offset(weights, s.b.mul(column, s.const(self.element_bytes)))
        for n_bytes in range(0, n_columns * self.element_bytes if far else 0, LINE_BYTES):
            s.prefetch(s.offset(here, FAR_BYTES + n_bytes))
        for part in range(n_columns // s.lanes):
            at = s.b.add(column, s.const(part * s.lanes))
            place = s.offset(weights, s.b.mul(at, s.const(self.element_bytes)))
            weight = s.load_bf16(place) if self.dtype == "bfloat16" else s.load(place, s.f32)
            for i, source in enumerate(sources):
                values = s.load(s.offset(source, s.b.mul(at, s.const(4))), s.f32)
                total = SUMS * i + part % SUMS
                added[total] = s.mul_add(weight, values, added[total])
        return added

    def _add_column(
        self, s: Simd, weights: ir.Value, source: ir.Value, column: ir.Value, totals: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """The total with one of the last columns, which do not fill a vector, more."""
        place = s.offset(weights, s.b.mul(column, s.const(self.element_bytes)))
        if self.dtype == "bfloat16":
            bits = s.b.zext(s.load(place, I16, 2), I32)
            weight = s.b.bitcast(s.b.shl(bits, ir.Constant(I32, 16)), F32)
        else:
            weight = s.load(place, F32, 4)
        value = s.load(s.offset(source, s.b.mul(column, s.const(4))), F32, 4)
        return [s.b.fadd(totals[0], s.b.fmul(weight, value))]
