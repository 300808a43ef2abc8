"""Vector types and operations over LLVM IR: one definition per operation, the width comes from the ISA.

`Simd` writes instructions through an llvmlite builder. Values are LLVM values; a kernel body is a Python function that
calls these operations, and Python loops in it are unrolled code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from cpu_kernels.host.isa import Isa

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()


class _Bf16(ir.Type):  # type: ignore[misc] # llvmlite is not typed
    """LLVM's bfloat; only bit casts make and use it."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bf16)

    def __hash__(self) -> int:
        return hash(_Bf16)


class OrderedLoad(ir.LoadInstr):  # type: ignore[misc] # llvmlite is not typed
    """A volatile load: LLVM keeps these in the order in which they are written."""

    def descr(self, buf: list[str]) -> None:
        own: list[str] = []
        super().descr(own)
        buf.append("".join(own).replace("load", "load volatile", 1))


BF16 = _Bf16()
"""What LLVM has and llvmlite does not name."""


class Simd:
    """Operations of one ISA. A vector has `lanes` 32-bit lanes, which also hold 2 x 16 or 4 x 8 bits each."""

    def __init__(self, builder: ir.IRBuilder, isa: Isa, emulate_dot: bool = False) -> None:
        self.b = builder
        self.isa = isa
        self.lanes = isa.lanes
        self.emulate_dot = emulate_dot
        self.dot_kind = "generic" if emulate_dot else isa.dot
        self.f32 = ir.VectorType(F32, self.lanes)
        self.i32 = ir.VectorType(I32, self.lanes)
        self.i16 = ir.VectorType(I16, 2 * self.lanes)
        self.u8 = ir.VectorType(I8, 4 * self.lanes)
        self.half_words = ir.VectorType(I16, self.lanes)
        self.bf16 = ir.VectorType(BF16, 2 * self.lanes)
        self.bf16_dot = isa.bf16_dot and not emulate_dot

    # Scalars, addresses, control flow

    def const(self, value: int) -> ir.Constant:
        """A 64-bit integer."""
        return ir.Constant(I64, value)

    def offset(self, pointer: ir.Value, n_bytes: ir.Value | int) -> ir.Value:
        """pointer + n_bytes."""
        count = self.const(n_bytes) if isinstance(n_bytes, int) else n_bytes
        return self.b.gep(pointer, [count], source_etype=I8)

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: ir.Value | int = 1) -> Iterator[ir.Value]:
        """``for i in range(start, stop, step)``; yields i."""
        before = self.b.block
        head, body, after = (self.b.append_basic_block(name) for name in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(start, before)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, after)
        self.b.position_at_end(body)
        yield index
        increment = self.const(step) if isinstance(step, int) else step
        index.add_incoming(self.b.add(index, increment), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    def fold(
        self,
        start: ir.Value,
        stop: ir.Value,
        step: int,
        values: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """The values after ``for i in range(start, stop, step): values = body(i, values)``; they stay in registers."""
        before = self.b.block
        head, inside, after = (self.b.append_basic_block(name) for name in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        current = [self.b.phi(value.type) for value in values]
        index.add_incoming(start, before)
        for value, first in zip(current, values, strict=True):
            value.add_incoming(first, before)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), inside, after)
        self.b.position_at_end(inside)
        results = body(index, current)
        index.add_incoming(self.b.add(index, self.const(step)), self.b.block)
        for value, result in zip(current, results, strict=True):
            value.add_incoming(result, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return current

    def real(self, value: float) -> ir.Constant:
        """A float32 (rounded from `value`)."""
        return ir.Constant(F32, value)

    def smaller(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """min(x, y) of signed integers."""
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    # Memory

    def scratch(self, n_bytes: int) -> ir.Value:
        """n_bytes of stack, on a cache line boundary; for the entry block of a function."""
        place = self.b.alloca(I8, self.const(n_bytes))
        place.align = 64
        place.type = POINTER  # whatever is loaded from it
        return place

    def load(self, pointer: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
        """An (unaligned) load of any type."""
        return self.b.load(pointer, typ=kind, align=align)

    def load_in_order(self, pointer: ir.Value, kind: ir.Type) -> ir.Value:
        """An (unaligned) load that comes after all loads in order before it, also in the machine code."""
        loaded = OrderedLoad(self.b.block, pointer, typ=kind)
        loaded.align = 1
        self.b._insert(loaded)
        return loaded

    def store(self, value: ir.Value, pointer: ir.Value, align: int = 1) -> None:
        """An (unaligned) store."""
        self.b.store(value, pointer, align=align)

    def prefetch(self, pointer: ir.Value, once: bool = False) -> None:
        """Asks for the cache line of `pointer` in L2; harmless for any address. once: it will be read once, and is to
        leave what the caches hold in place."""
        read, level, data = (ir.Constant(I32, value) for value in (0, 0 if once else 2, 1))
        self.call("llvm.prefetch.p0", VOID, [pointer, read, level, data])

    def splat(self, scalar: ir.Value) -> ir.Value:
        """All lanes = scalar."""
        return self.splat_of(scalar, self.lanes)

    def splat_of(self, scalar: ir.Value, count: int) -> ir.Value:
        """A vector of `count` times scalar."""
        kind = ir.VectorType(scalar.type, count)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        mask = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)

    def splat_load(self, pointer: ir.Value, kind: ir.Type) -> ir.Value:
        """All lanes = the 32-bit value at `pointer`."""
        return self.splat(self.load(pointer, kind, 4))

    # Arithmetic

    def zero(self, kind: ir.Type) -> ir.Constant:
        """All bits 0."""
        return ir.Constant(kind, None)

    def constant(self, kind: ir.VectorType, value: float) -> ir.Constant:
        """All elements = value."""
        return ir.Constant(kind, [value] * kind.count)

    def mul_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, with one rounding where the ISA has the instruction."""
        name = "fma" if self.isa.fused else "fmuladd"
        return self.call(f"llvm.{name}.v{self.lanes}f32", self.f32, [x, y, z])

    def minimum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """min(x, y) of floats; y where one of them is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def maximum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """max(x, y) of floats; y where one of them is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def max_words(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """max(x, y) of unsigned 32-bit integers."""
        return self.call(f"llvm.umax.v{self.lanes}i32", self.i32, [x, y])

    def reduce(self, x: ir.Value, operation: str) -> ir.Value:
        """int32 from all lanes of int32; operation: add, or, umax."""
        return self.call(f"llvm.vector.reduce.{operation}.v{self.lanes}i32", I32, [x])

    def sum_floats(self, x: ir.Value) -> ir.Value:
        """float32 sum of all lanes, by halves: the same order on every CPU of the ISA."""
        return self._halved(x, self.b.fadd)

    def max_float(self, x: ir.Value) -> ir.Value:
        """float32 maximum of all lanes."""
        return self._halved(x, self.maximum)

    def sum_each(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Lane i = `sum_floats` of vector i, with its bits, for as many vectors as there are lanes; or of int32."""
        level, width = list(vectors), self.lanes
        while width > 1:
            width //= 2
            level = [self._halved_pair(x, y, width) for x, y in zip(level[::2], level[1::2], strict=True)]
        return level[0]

    def _halved_pair(self, x: ir.Value, y: ir.Value, width: int) -> ir.Value:
        """Of x and y, whose lanes are groups of 2 * width: the low half of each group plus its high half."""
        lows = [lane for lane in range(2 * self.lanes) if lane % (2 * width) < width]
        kind = ir.VectorType(I32, self.lanes)
        low, high = (ir.Constant(kind, [lane + offset for lane in lows]) for offset in (0, width))
        add = self.b.add if x.type == self.i32 else self.b.fadd
        return add(self.b.shuffle_vector(x, y, low), self.b.shuffle_vector(x, y, high))

    def part(self, x: ir.Value, first: int, count: int) -> ir.Value:
        """Lanes first .. first + count of x."""
        lanes = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
        return self.b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), lanes)

    def widened(self, x: ir.Value, count: int) -> ir.Value:
        """The elements of x, then zeros, `count` in all."""
        order = ir.Constant(ir.VectorType(I32, count), [min(lane, x.type.count) for lane in range(count)])
        return self.b.shuffle_vector(x, ir.Constant(x.type, None), order)

    def doubled(self, x: ir.Value) -> ir.Value:
        """The elements of x twice, one behind the other."""
        order = ir.Constant(ir.VectorType(I32, 2 * x.type.count), [*range(x.type.count)] * 2)
        return self.b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), order)

    def halves(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """The lower lanes = low, the upper ones = high (of any 32-bit type)."""
        half = self.lanes // 2
        order = ir.Constant(ir.VectorType(I32, self.lanes), [*range(half), *range(self.lanes + half, 2 * self.lanes)])
        return self.b.shuffle_vector(self.splat(low), self.splat(high), order)

    def _halved(self, x: ir.Value, operation: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Lane 0 of x after log2(lanes) times ``x = operation(low half, high half)``."""
        width = self.lanes
        while width > 1:
            width //= 2
            x = operation(self.part(x, 0, width), self.part(x, width, width))
        return self.b.extract_element(x, ir.Constant(I32, 0))

    def narrow(self, x: ir.Value, bits: int) -> ir.Value:
        """The low 8 or 16 bits of each int32 lane, packed."""
        return self.b.trunc(x, ir.VectorType(ir.IntType(bits), self.lanes))

    def absolute_floats(self, x: ir.Value) -> ir.Value:
        """|x|."""
        return self.call(f"llvm.fabs.v{self.lanes}f32", self.f32, [x])

    def copy_sign_floats(self, x: ir.Value, sign: ir.Value) -> ir.Value:
        """|x| with the sign of `sign`."""
        return self.call(f"llvm.copysign.v{self.lanes}f32", self.f32, [x, sign])

    def to_f32(self, x: ir.Value) -> ir.Value:
        """int32 -> float32."""
        return self.b.sitofp(x, self.f32)

    def low_nibbles(self, x: ir.Value) -> ir.Value:
        """Low four bits of each byte."""
        return self.b.and_(x, self.constant(self.u8, 15))

    def high_nibbles(self, x: ir.Value) -> ir.Value:
        """High four bits of each byte."""
        words = self.b.lshr(self.b.bitcast(x, self.i16), self.constant(self.i16, 4))
        return self.low_nibbles(self.b.bitcast(words, self.u8))

    def bit_field(self, x: ir.Value, n_bits: int, shift: int, place: int) -> ir.Value:
        """n_bits of each byte from bit `shift` on, moved to bit `place`; all other bits 0."""
        moved = self.b.bitcast(x, self.i16)
        if shift != place:
            move = self.b.lshr if shift > place else self.b.shl
            moved = move(moved, self.constant(self.i16, abs(shift - place)))
        return self.b.and_(self.b.bitcast(moved, self.u8), self.constant(self.u8, (1 << n_bits) - 1 << place))

    def nibbles_of_halves(self, x: ir.Value) -> ir.Value:
        """Low four bits of the bytes in the lower half of x, high four bits of those in the upper half."""
        shift = ir.Constant(self.i16, [0] * self.lanes + [4] * self.lanes)
        return self.low_nibbles(self.b.bitcast(self.b.lshr(self.b.bitcast(x, self.i16), shift), self.u8))

    def low_bf16(self, x: ir.Value) -> ir.Value:
        """Low half of each 32-bit lane, a bfloat16, as float32."""
        return self.b.bitcast(self.b.shl(x, self.constant(self.i32, 16)), self.f32)

    def high_bf16(self, x: ir.Value) -> ir.Value:
        """High half of each 32-bit lane, a bfloat16, as float32."""
        return self.b.bitcast(self.b.and_(x, self.constant(self.i32, 0xFFFF0000)), self.f32)

    def load_bf16(self, pointer: ir.Value) -> ir.Value:
        """`lanes` consecutive bfloat16 as float32."""
        return self.widen_bf16(self.load(pointer, self.half_words))

    def widen_bf16(self, halves: ir.Value) -> ir.Value:
        """`lanes` bfloat16 (as 16-bit integers) as float32."""
        return self.low_bf16(self.b.zext(halves, self.i32))

    def as_bytes(self, x: ir.Value) -> ir.Value:
        """The same bits as 8-bit elements."""
        return self.b.bitcast(x, self.u8)

    def as_words(self, x: ir.Value) -> ir.Value:
        """The same bits as 32-bit elements."""
        return self.b.bitcast(x, self.i32)

    def as_floats(self, x: ir.Value) -> ir.Value:
        """The same bits as float32."""
        return self.b.bitcast(x, self.f32)

    # Products of narrow types

    def dot_bf16(self, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        """float32 acc[i] + x[i].high * y[i].high, then + x[i].low * y[i].low, halves of int32 lanes (vdpbf16ps).

        The instruction rounds as two fused multiply-adds in this order do, but takes subnormal values as 0.
        """
        if not self.bf16_dot:
            acc = self.mul_add(self.high_bf16(x), self.high_bf16(y), acc)
            return self.mul_add(self.low_bf16(x), self.low_bf16(y), acc)
        pairs = [self.b.bitcast(value, self.bf16) for value in (x, y)]
        return self.call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", self.f32, [acc, *pairs])

    def dot_bytes(self, acc: ir.Value, codes: ir.Value, signed: ir.Value) -> ir.Value:
        """acc[i] + sum over the 4 bytes of lane i of unsigned codes * signed, in int32 (vpdpbusd)."""
        if self.dot_kind == "vnni":
            bits = 32 * self.lanes
            return self.call(f"llvm.x86.avx512.vpdpbusd.{bits}", self.i32, [acc, codes, signed])
        for byte in range(4):
            weight = self.b.lshr(self.as_words(codes), self.constant(self.i32, 8 * byte))
            weight = self.b.and_(weight, self.constant(self.i32, 255))
            left = self.b.shl(self.as_words(signed), self.constant(self.i32, 24 - 8 * byte))
            acc = self.b.add(acc, self.b.mul(weight, self.b.ashr(left, self.constant(self.i32, 24))))
        return acc

    def dot_pairs(self, codes: ir.Value, signed: ir.Value) -> ir.Value:
        """int16[i] = sum over bytes 2i, 2i + 1 of unsigned codes * signed (vpmaddubsw; must not overflow)."""
        return self.call(self._x86("pmadd.ub.sw", "pmaddubs.w"), self.i16, [codes, signed])

    def add_pairs(self, acc: ir.Value, x: ir.Value) -> ir.Value:
        """acc[i] + int16 x[2i] + x[2i + 1] (vpmaddwd with ones)."""
        ones = self.constant(self.i16, 1)
        return self.b.add(acc, self.call(self._x86("pmadd.wd", "pmaddw.d"), self.i32, [x, ones]))

    def copy_sign(self, x: ir.Value, sign: ir.Value) -> ir.Value:
        """Per byte: x if sign > 0, -x if sign < 0 (either where sign is 0: its product is 0)."""
        if self.lanes == 8:
            return self.call("llvm.x86.avx2.psign.b", self.u8, [x, sign])
        negative = self.b.icmp_signed("<", sign, self.zero(self.u8))
        return self.b.select(negative, self.b.sub(self.zero(self.u8), x), x)

    def absolute(self, x: ir.Value) -> ir.Value:
        """Absolute value per byte."""
        return self.call(f"llvm.abs.v{4 * self.lanes}i8", self.u8, [x, ir.Constant(I1, 0)])

    def _x86(self, avx2: str, avx512: str) -> str:
        return f"llvm.x86.avx2.{avx2}" if self.lanes == 8 else f"llvm.x86.avx512.{avx512}.512"

    def call(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """The value of an LLVM intrinsic."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
        return self.b.call(function, arguments)
