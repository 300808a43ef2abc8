"""What happens to rows of float32 around the matrix products: written as activations, and an expert's activation.

Two kernels, each in a module of its own::

    prepare(source, n_true, target) -> flags
    finish(sums, n_rows, parameters, n_true, target, target_bytes, column)

`prepare` writes a row float32 [n_true] in a format, padded with 0 to whole blocks; flags: `formats.NOT_FINITE` and
`INEXACT`. `finish` takes sums float32 [n_rows, 64]: gate and up of 32 columns (gated), or 64 columns; it writes the
activation of each row to columns column .. of a row of blocks at target + row * target_bytes. Columns from n_true on
become 0.
"""

from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from cpu_kernels.format.layout import BLOCK_COLUMNS, GROUP
from cpu_kernels.host.isa import Isa
from cpu_kernels.simd.formats import Format, or_flags, write_group
from cpu_kernels.simd.functions import activation
from cpu_kernels.simd.vectors import F32, I32, I64, POINTER, VOID, Simd

SUM_COLUMNS = 64
# Places in the float32 parameters of an activation (cpu_kernels.engine.plans writes them).
ALPHA, GATE_MAX, ACT_MAX, UP_LIMIT, UP_OFFSET, N_PARAMETERS = range(6)


@dataclass(frozen=True, slots=True)
class PrepareKernel:
    """`prepare` for a format."""

    form: Format
    symbol: ClassVar[str] = "prepare"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"prepare-{self.form.kind}-{self.form.offset}"

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `prepare`."""
        return _prepare_module(self, isa)


@dataclass(frozen=True, slots=True)
class FinishKernel:
    """`finish` for the format of its result and an activation kind of `cpu_kernels.format.spec`."""

    form: Format
    kind: str
    gated: bool
    symbol: ClassVar[str] = "finish"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"finish-{self.form.kind}-{self.form.offset}-{self.kind}-{'gated' if self.gated else 'plain'}"

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `finish`."""
        return _finish_module(self, isa)


def _prepare_module(kernel: PrepareKernel, isa: Isa) -> ir.Module:
    form = kernel.form
    module = ir.Module(kernel.name)
    function = ir.Function(module, ir.FunctionType(I64, [POINTER, I64, POINTER]), kernel.symbol)
    source, n_true, target = function.args
    s = Simd(ir.IRBuilder(function.append_basic_block()), isa)
    flags, padded = s.b.alloca(I64), s.scratch(4 * BLOCK_COLUMNS)
    s.b.store(s.const(0), flags)
    n_whole = s.b.sdiv(n_true, s.const(BLOCK_COLUMNS))
    with s.loop(s.const(0), n_whole) as block:
        x = s.offset(source, s.b.mul(block, s.const(4 * BLOCK_COLUMNS)))
        _write_block(s, form, x, s.offset(target, s.b.mul(block, s.const(form.block_bytes))), flags)
    done = s.b.mul(n_whole, s.const(BLOCK_COLUMNS))
    with s.b.if_then(s.b.icmp_signed("<", done, n_true)):
        for place in range(0, BLOCK_COLUMNS, s.lanes):
            s.store(s.zero(s.f32), s.offset(padded, 4 * place))
        with s.loop(done, n_true) as column:
            x = s.load(s.offset(source, s.b.mul(column, s.const(4))), F32, 4)
            s.store(x, s.offset(padded, s.b.mul(s.b.sub(column, done), s.const(4))), 4)
        _write_block(s, form, padded, s.offset(target, s.b.mul(n_whole, s.const(form.block_bytes))), flags)
    s.b.ret(s.b.load(flags, typ=I64))
    return module


def _write_block(s: Simd, form: Format, source: ir.Value, block: ir.Value, flags: ir.Value) -> None:
    for group in range(BLOCK_COLUMNS // GROUP):
        or_flags(s, flags, write_group(s, form, _group(s, s.offset(source, 4 * GROUP * group)), block, s.const(group)))


def _group(s: Simd, place: ir.Value) -> list[ir.Value]:
    """32 float32 as vectors."""
    return [s.load(s.offset(place, 4 * lane), s.f32) for lane in range(0, GROUP, s.lanes)]


def _finish_module(kernel: FinishKernel, isa: Isa) -> ir.Module:
    form, kind, gated = kernel.form, kernel.kind, kernel.gated
    module = ir.Module(kernel.name)
    arguments = [POINTER, I64, POINTER, I64, POINTER, I64, I64]
    function = ir.Function(module, ir.FunctionType(VOID, arguments), kernel.symbol)
    sums, n_rows, parameters, n_true, target, target_bytes, column = function.args
    s = Simd(ir.IRBuilder(function.append_basic_block()), isa)
    limits = [s.splat_load(s.offset(parameters, 4 * i), F32) for i in range(N_PARAMETERS)]
    first_block = s.b.mul(s.b.sdiv(column, s.const(BLOCK_COLUMNS)), s.const(form.block_bytes))
    first_group = s.b.sdiv(s.b.srem(column, s.const(BLOCK_COLUMNS)), s.const(GROUP))
    masks = [_columns_below(s, n_true, start) for start in range(0, SUM_COLUMNS // (2 if gated else 1), GROUP)]
    with s.loop(s.const(0), n_rows) as row:
        here = s.offset(sums, s.b.mul(row, s.const(4 * SUM_COLUMNS)))
        block = s.offset(s.offset(target, s.b.mul(row, target_bytes)), first_block)
        parts = [_group(s, s.offset(here, 4 * GROUP * i)) for i in range(SUM_COLUMNS // GROUP)]
        if gated:
            results = [[_gated(s, kind, limits, gate, up) for gate, up in zip(*parts, strict=True)]]
        else:
            results = [[activation(s, kind, limits[ALPHA], x) for x in part] for part in parts]
        for index, (values, mask) in enumerate(zip(results, masks, strict=True)):
            kept = [s.b.select(m, x, s.zero(s.f32)) for m, x in zip(mask, values, strict=True)]
            write_group(s, form, kept, block, s.b.add(first_group, s.const(index)))
    s.b.ret_void()
    return module


def _gated(s: Simd, kind: str, limits: list[ir.Value], gate: ir.Value, up: ir.Value) -> ir.Value:
    """The gated activation of `cpu_kernels.format.spec.Activation`; limits that do not apply are infinite."""
    active = activation(s, kind, limits[ALPHA], s.minimum(limits[GATE_MAX], gate))
    bound = s.minimum(limits[UP_LIMIT], s.maximum(s.b.fneg(limits[UP_LIMIT]), up))
    return s.b.fmul(s.minimum(limits[ACT_MAX], active), s.b.fadd(bound, limits[UP_OFFSET]))


def _columns_below(s: Simd, n_true: ir.Value, start: int) -> list[ir.Value]:
    """For 32 columns from `start`: whether each is below n_true, by vectors."""
    limit = s.splat(s.b.trunc(n_true, I32))
    masks = []
    for first in range(start, start + GROUP, s.lanes):
        columns = ir.Constant(s.i32, list(range(first, first + s.lanes)))
        masks.append(s.b.icmp_signed("<", columns, limit))
    return masks
