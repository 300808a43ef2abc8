"""The inner kernels: 64 rows of a packed matrix times the activations of some tokens, for one dtype and ISA.

Each module exports one function, `panel`::

    panel(weights, row_block_bytes, n_blocks, x, x_row_bytes, row_ids, n_rows, out)
    out[i, r] += sum over columns of W[r, column] * x[row_ids[i], column]      i < n_rows, r < 64

over `n_blocks` blocks of 64 columns; `out` is float32 [n_rows, 64] and `row_ids` int32 [n_rows]. It takes 16 rows at a
time, and the tokens in register tiles of some tokens by some vectors of rows. Each output is one chain of fused
multiply-adds in the same order of columns in every tile, so its bits depend on nothing but its inputs. With AMX,
bfloat16 weights take `cpu_kernels.simd.amx` instead.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from llvmlite import ir

from cpu_kernels.format.layout import (
    BITS,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    GROUP,
    LINE_BYTES,
    LINES,
    PANEL_ROWS,
    PLANES,
    block_bytes,
    is_quantised,
)
from cpu_kernels.host.isa import Isa, is_zen
from cpu_kernels.simd.amx import write_panel
from cpu_kernels.simd.formats import GROUPS, PAIRS, PARTS, X_CORRECTIONS, X_SCALES, format_of
from cpu_kernels.simd.products import GroupDot
from cpu_kernels.simd.vectors import F32, I32, I64, POINTER, VOID, Simd

FLOAT_UNROLL = 16  # lines
L1_WEIGHT_BYTES = 9216  # of a row block that stay in L1 (32 KiB) beside the activations of a tile
# How far ahead weights are asked for, into L2. Each line, the next part while this one is in L1: with several tokens
# the out-of-order window is too short for the latency of memory (4 tokens of int4 take half as long by it).
PREFETCH_BYTES = L1_WEIGHT_BYTES
# With few tokens the window and the CPU's prefetchers follow the stream by themselves; asking for each line as well
# costs them up to 20 %, asking for one in eight, further ahead, starts them on the pages to come: 1 and 2 tokens gain 4
# to 17 % by it (Zen 4, 2 threads).
SPARSE_LINES, SPARSE_BYTES = 8, 2 * L1_WEIGHT_BYTES
# Tokens of a tile from which each line is asked for, with 32 vector registers and with 16 (Zen 4, 2 threads). On Intel
# it always is: the prefetchers alone leave a third of the memory's rate unused. OLMoE's shape, 3 layers, int4 experts,
# int8 dense layers, one token, on a Xeon of the Granite Rapids class, 2 threads: 8.0 ms a step in place of 9.2 with
# AVX-512, 9.4 in place of 12.5 with AVX2 (medians; asking half as far ahead: 8.6 and 9.4).
EACH_LINE_FROM = {"bfloat16": (4, 2), "float32": (8, 4)} | dict.fromkeys(PLANES, (4, 2))
# With 16 registers a single token asks for each line as well, and as read once (prefetchnta): the megabytes of a layer
# then pass the caches by, and Python, which runs between two layers, finds its own code and data where it left them.
# What takes it 236 us after a layer of int4 takes 100 us so, and 71 us without a layer. The kernels gain by it: int4
# 8 %, int8 3 %, bfloat16 12 %. Those of float32 lose 4 %, and Python gains nothing (OLMoE's shape, Zen 1, 2 threads).
# On Intel such lines come late: 2156 us a layer of int4 in place of 1566, for 33 us that Python gains (a Xeon of 2024,
# forced to AVX2); so Zen alone does it.
ONCE_DTYPES, ONCE_BYTES = ("bfloat16", *PLANES), L1_WEIGHT_BYTES // 4
# Tiles of so many tokens multiply float32 on Intel, with the same bits: vdpbf16ps takes 1.23 times as long as two
# multiply-adds with 8 tokens, 1.33 times with 64, 0.92 with 1 and 0.98 with 4 (panels that lie in the caches,
# a Xeon of the Granite Rapids class). On Zen 4 it doubles the products a cycle.
PAIRS_BELOW = 8
WORD_BYTES = 4  # of a row in a line
WORDS = GROUP // WORD_BYTES  # of a row in a group, as bytes
SCALE_BYTES = 2
PANEL_ARGUMENTS = [POINTER, I64, I64, POINTER, I64, POINTER, I64, POINTER]
Tiles = list[tuple[int, ir.Function]]  # tokens of a tile, its code; from large to small
Row = tuple[ir.Value, ir.Value]  # a vector of rows: address of its block, first row in it


@dataclass(frozen=True, slots=True)
class PanelKernel:
    """`panel` for a dtype.

    pairs: multiplies the bfloat16 of activations; the same bits as from their float32, where these are bfloat16 (and,
    in paired blocks, not subnormal). emulate_dot: products of narrow types in plain arithmetic, for tests on any CPU.
    once: a single token's weights pass the caches by, where there are 16 registers (`ONCE_DTYPES`). many_pairs: the
    same pairs for tiles of PAIRS_BELOW tokens and more, which otherwise take float32. each_line: every line of weights
    is asked for, also for few tokens.
    """

    dtype: str
    pairs: bool = False
    emulate_dot: bool = False
    once: bool = field(default_factory=is_zen)
    many_pairs: bool = field(default_factory=is_zen)
    each_line: bool = field(default_factory=lambda: not is_zen())
    symbol: ClassVar[str] = "panel"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        pairs = ("-pairs" + "-many" * self.many_pairs) * self.pairs
        return self.dtype + pairs + "-emulated" * self.emulate_dot + "-once" * self.once + "-far" * self.each_line

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `panel`."""
        module = ir.Module(self.name)
        if isa.bf16_tiles and self.dtype == "bfloat16":
            panel = ir.Function(module, ir.FunctionType(VOID, PANEL_ARGUMENTS), self.symbol)
            s = Simd(ir.IRBuilder(panel.append_basic_block()), isa, self.emulate_dot)
            write_panel(s, panel, 1 if self.pairs else PARTS)
            return module
        shapes = isa.tiles
        if isa.float_tile is not None and not is_quantised(self.dtype):
            shapes = (isa.float_tile, *shapes)
        tiles = [(n, _tile_function(module, self, isa, n, m)) for n, m in shapes]
        _panel_function(module, self, isa, tiles, few=isa.tiles[0][0])
        return module


def _panel_function(module: ir.Module, kernel: PanelKernel, isa: Isa, tiles: Tiles, few: int) -> None:
    """Row block by row block (a single stream of weights).

    A few tokens take all columns at once. More tokens take them in parts that stay in L1 while the tiles pass over
    them. Each tile unpacks int4 codes anew: those instructions go to pipes that products leave idle
    (1.3 cycles a vpdpbusd with and without them; unpacking once a part, into L1, takes 1.5 at 16 tokens; Zen 4).
    """
    dtype, x_block_bytes = kernel.dtype, format_of(kernel.dtype, isa).block_bytes
    panel = ir.Function(module, ir.FunctionType(VOID, PANEL_ARGUMENTS), kernel.symbol)
    weights, stride, n_blocks, x, x_stride, row_ids, n_rows, out = panel.args
    s = Simd(ir.IRBuilder(panel.append_basic_block()), isa)
    part_blocks = L1_WEIGHT_BYTES // block_bytes(dtype)
    is_few = s.b.icmp_signed("<=", n_rows, s.const(few))
    with s.loop(s.const(0), s.const(PANEL_ROWS // BLOCK_ROWS)) as row_block:
        start = s.offset(weights, s.b.mul(row_block, stride))
        place = s.offset(out, s.b.mul(row_block, s.const(4 * BLOCK_ROWS)))
        with s.b.if_else(is_few) as (then, otherwise):
            with then:
                _all_tokens(s, tiles, [start, n_blocks, x, x_stride], row_ids, n_rows, place)
            with otherwise, s.loop(s.const(0), n_blocks, part_blocks) as block:
                left = s.b.sub(n_blocks, block)
                count = s.b.select(s.b.icmp_signed("<", left, s.const(part_blocks)), left, s.const(part_blocks))
                here = s.offset(start, s.b.mul(block, s.const(block_bytes(dtype))))
                x_here = s.offset(x, s.b.mul(block, s.const(x_block_bytes)))
                _all_tokens(s, tiles, [here, count, x_here, x_stride], row_ids, n_rows, place)
    s.b.ret_void()


def _all_tokens(
    s: Simd,
    tiles: Tiles,
    arguments: list[ir.Value],
    row_ids: ir.Value,
    n_rows: ir.Value,
    out: ir.Value,
) -> None:
    """As many tokens as possible in the largest tile, the rest in ever smaller ones."""
    done: ir.Value = s.const(0)
    for n_tokens, tile in tiles:
        left = s.b.sub(n_rows, done)
        stop = s.b.add(done, s.b.sub(left, s.b.srem(left, s.const(n_tokens))))
        with s.loop(done, stop, n_tokens) as i:
            ids = s.offset(row_ids, s.b.mul(i, s.const(4)))
            s.b.call(tile, [*arguments, ids, s.offset(out, s.b.mul(i, s.const(4 * PANEL_ROWS)))])
        done = stop


def _tile_function(module: ir.Module, kernel: PanelKernel, isa: Isa, n_tokens: int, n_vectors: int) -> ir.Function:
    """tile(row_block, n_blocks, x, x_row_bytes, row_ids, out): 16 rows x n_tokens, n_vectors of rows at a time."""
    function = _internal(module, f"tile_{n_tokens}x{n_vectors}", [POINTER, I64, POINTER, I64, POINTER, POINTER])
    s = Simd(ir.IRBuilder(function.append_basic_block()), isa, kernel.emulate_dot)
    _Tile(s, kernel, n_tokens, n_vectors, function).body()
    s.b.ret_void()
    return function


def _internal(module: ir.Module, name: str, arguments: list[ir.Type]) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function


class _Tile:
    """Writes the code of one register tile."""

    def __init__(self, s: Simd, kernel: PanelKernel, n_tokens: int, n_vectors: int, function: ir.Function) -> None:
        self.s, self.dtype, self.n_vectors = s, kernel.dtype, n_vectors
        self.form = format_of(kernel.dtype, s.isa)
        self.pairs = kernel.pairs and (kernel.many_pairs or n_tokens < PAIRS_BELOW)
        self.each_line = kernel.each_line
        self.once = kernel.once and n_tokens == 1 and not s.isa.many_registers and kernel.dtype in ONCE_DTYPES
        # Weights are read in the order in which they lie: the CPU's prefetchers follow an ascending stream at the rate
        # of a plain read, and lose it where LLVM's own order jumps to and fro (one token: int8 +14 to 30 %, float32
        # +11 to 20 %, int4 0 to 5 %; on AVX2 up to 20 %). Elsewhere more tokens would spill (AVX2: -30 %).
        self.in_order = n_tokens == 1 or (s.isa.many_registers and s.isa.dot == "vnni")
        self.weights, self.n_blocks, x, x_stride, row_ids, self.out = function.args
        self.x_rows = []
        for token in range(n_tokens):
            row = s.b.sext(s.load(s.offset(row_ids, 4 * token), I32, 4), I64)
            self.x_rows.append(s.offset(x, s.b.mul(row, x_stride)))
        self.sums = [[s.b.alloca(s.f32) for _ in range(n_vectors)] for _ in range(n_tokens)]

    def body(self) -> None:
        """All 16 rows: vectors in groups of n_vectors; in each group all column blocks."""
        s = self.s
        with s.loop(s.const(0), s.const(BLOCK_ROWS // s.lanes), self.n_vectors) as part:
            out = s.offset(self.out, s.b.mul(part, s.const(4 * s.lanes)))
            self._each_sum(out, load=True)
            with s.loop(s.const(0), self.n_blocks) as block:
                self._block(part, block)
            self._each_sum(out, load=False)

    def _each_sum(self, out: ir.Value, load: bool) -> None:
        s = self.s
        for token, row in enumerate(self.sums):
            for vector, total in enumerate(row):
                place = s.offset(out, 4 * (PANEL_ROWS * token + s.lanes * vector))
                if load:
                    s.b.store(s.load(place, s.f32), total)
                else:
                    s.store(s.b.load(total, typ=s.f32), place)

    def _block(self, part: ir.Value, block: ir.Value) -> None:
        """One block of 64 columns. `part`: which part of a 16-row line the first vector takes."""
        s = self.s
        start = s.offset(self.weights, s.b.mul(block, s.const(block_bytes(self.dtype))))
        rows = []
        for vector in range(self.n_vectors):
            rows.append((start, s.b.mul(s.b.add(part, s.const(vector)), s.const(s.lanes))))
        x_step = s.b.mul(block, s.const(self.form.block_bytes))
        x = [s.offset(row, x_step) for row in self.x_rows]
        self._prefetch(start)
        if is_quantised(self.dtype):
            # The scales lie behind the codes of all groups.
            for groups in [range(GROUPS)] if self.in_order else [[group] for group in range(GROUPS)]:
                dots = [self._group_dots(rows, x, group) for group in groups]
                for group, group_dots in zip(groups, dots, strict=True):
                    self._add_group(rows, x, group, group_dots)
        else:
            self._float_lines(rows, x)

    def _prefetch(self, block: ir.Value) -> None:
        """Asks for lines of a later block."""
        n_tokens, many_registers = len(self.x_rows), self.s.isa.many_registers
        n_lines, ahead = SPARSE_LINES, SPARSE_BYTES
        if self.once or self.each_line or n_tokens >= EACH_LINE_FROM[self.dtype][0 if many_registers else 1]:
            n_lines, ahead = 1, ONCE_BYTES if self.once else PREFETCH_BYTES
        for number in range(block_bytes(self.dtype) // (n_lines * LINE_BYTES)):
            self.s.prefetch(self.s.offset(block, ahead + number * n_lines * LINE_BYTES), self.once)

    def _read(self, row: Row, n_bytes: int, lane_bytes: int, kind: ir.Type) -> ir.Value:
        """Weights (or scales) of a vector of rows in the line at n_bytes of its block; lane_bytes: bytes of a row."""
        s = self.s
        place = s.offset(s.offset(row[0], n_bytes), s.b.mul(row[1], s.const(lane_bytes)))
        return s.load_in_order(place, kind) if self.in_order else s.load(place, kind)

    def _group_dots(self, rows: list[Row], x: list[ir.Value], group: int) -> list[list[GroupDot]]:
        """32 columns: byte products in int32, by tokens and vectors of rows."""
        s, bits = self.s, BITS[self.dtype]
        dots = []
        for source in x:
            correction = s.splat_load(s.offset(source, X_CORRECTIONS + 4 * group), I32)
            dots.append([GroupDot(s, bits, correction) for _ in rows])
        for word, codes in self._codes_of_group(rows, group):
            for source, row_dots in zip(x, dots, strict=True):
                signed = s.as_bytes(s.splat_load(s.offset(source, GROUP * group + 4 * word), I32))
                for dot, code in zip(row_dots, codes, strict=True):
                    dot.add(code, signed)
        return dots

    def _add_group(self, rows: list[Row], x: list[ir.Value], group: int, dots: list[list[GroupDot]]) -> None:
        """One float multiply-add with both scales."""
        s = self.s
        place = LINES[self.dtype] * LINE_BYTES + SCALE_BYTES * BLOCK_ROWS * group
        scales = [s.widen_bf16(self._read(row, place, SCALE_BYTES, s.half_words)) for row in rows]
        for token, (source, row_dots) in enumerate(zip(x, dots, strict=True)):
            x_scale = s.splat_load(s.offset(source, X_SCALES + 4 * group), F32)
            for vector, dot in enumerate(row_dots):
                self._accumulate(token, vector, s.to_f32(dot.result()), s.b.fmul(scales[vector], x_scale))

    def _codes_of_group(self, rows: list[Row], group: int) -> Iterator[tuple[int, list[ir.Value]]]:
        """The words of four columns of a group, in the order of lines: (number, codes by vectors of rows).

        Lines of the planes above the last are read first and kept; each line of the last gives whole codes.
        """
        last = PLANES[self.dtype][-1]
        start = BITS[self.dtype] * group
        above = [self._planes_above(row, start) for row in rows]
        for number in range(last):
            low = [self._line(row, start + BITS[self.dtype] - last + number) for row in rows]
            for part, word in enumerate(range(number, WORDS, last)):
                fields = [self._field(line, last, part * last, 0) for line in low]
                yield word, [high(field, word) for field, high in zip(fields, above, strict=True)]

    def _planes_above(self, row: Row, start: int) -> Callable[[ir.Value, int], ir.Value]:
        """Reads the lines of all planes but the last; what it gives adds their bits to a word of four columns."""
        read, below = [], BITS[self.dtype]
        for plane in PLANES[self.dtype][:-1]:
            first, below = start + BITS[self.dtype] - below, below - plane
            read.append((plane, below, [self._line(row, first + j) for j in range(plane)]))

        def with_high_bits(code: ir.Value, word: int) -> ir.Value:
            for plane, place, lines in read:
                code = self.s.b.or_(code, self._field(lines[word % plane], plane, plane * (word // plane), place))
            return code

        return with_high_bits

    def _line(self, row: Row, line: int) -> ir.Value:
        return self._read(row, LINE_BYTES * line, WORD_BYTES, self.s.u8)

    def _field(self, line: ir.Value, plane: int, shift: int, place: int) -> ir.Value:
        """`plane` bits of each byte from bit `shift` on, moved to bit `place`."""
        return line if plane == 8 else self.s.bit_field(line, plane, shift, place)

    def _float_lines(self, rows: list[Row], x: list[ir.Value]) -> None:
        """All lines of a float block, FLOAT_UNROLL at a time, two columns at a time: a line, or two of float32."""
        s = self.s
        line_columns = BLOCK_COLUMNS // LINES[self.dtype]
        x_bytes, x_first = (2 * line_columns, PAIRS) if self.pairs else (4 * line_columns, 0)  # of a line's columns
        with s.loop(s.const(0), s.const(LINES[self.dtype]), FLOAT_UNROLL) as line:
            step, x_step = s.b.mul(line, s.const(LINE_BYTES)), s.b.mul(line, s.const(x_bytes))
            here = [(s.offset(block, step), lane) for block, lane in rows]
            x_here = [s.offset(s.offset(source, x_step), x_first) for source in x]
            for pair in range(FLOAT_UNROLL * line_columns // 2):
                if self.pairs:
                    self._add_pair(here, x_here, pair)
                else:
                    self._add_columns(here, x_here, pair)

    def _words(self, rows: list[Row], line: int) -> list[ir.Value]:
        return [self._read(row, LINE_BYTES * line, WORD_BYTES, self.s.i32) for row in rows]

    def _add_pair(self, rows: list[Row], x: list[ir.Value], pair: int) -> None:
        """bfloat16 weights of two columns times the bfloat16 of these columns."""
        s = self.s
        words = self._words(rows, pair)
        for token, source in enumerate(x):
            two = s.splat_load(s.offset(source, 4 * pair), I32)
            for vector, word in enumerate(words):
                total = self.sums[token][vector]
                s.b.store(s.dot_bf16(s.b.load(total, typ=s.f32), word, two), total)

    def _add_columns(self, rows: list[Row], x: list[ir.Value], pair: int) -> None:
        """Weights of two columns times float32; the second first, as vdpbf16ps does: all kinds give the same bits."""
        s = self.s
        if self.dtype == "float32":
            columns = [[s.as_floats(word) for word in self._words(rows, 2 * pair + half)] for half in range(2)]
        else:
            words = self._words(rows, pair)
            columns = [[s.low_bf16(word) for word in words], [s.high_bf16(word) for word in words]]
        for half in (1, 0):
            for token, source in enumerate(x):
                value = s.splat_load(s.offset(source, 4 * (2 * pair + half)), F32)
                for vector, weight in enumerate(columns[half]):
                    self._accumulate(token, vector, weight, value)

    def _accumulate(self, token: int, vector: int, left: ir.Value, right: ir.Value) -> None:
        total = self.sums[token][vector]
        self.s.b.store(self.s.mul_add(left, right, self.s.b.load(total, typ=self.s.f32)), total)
