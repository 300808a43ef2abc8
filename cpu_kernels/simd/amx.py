"""bfloat16 weights on AMX: 64 rows times any number of tokens, by instructions that multiply tiles.

tdpbf16ps adds the products of 32 columns, for up to 16 tokens and for 16 rows of weights, to their sums::

    even, odd = 0, 0
    for i in range(16):
        even, odd = fma(x[2 i], w[2 i], even), fma(x[2 i + 1], w[2 i + 1], odd)
    sum = sum + (even + odd)

Each step rounds to nearest; subnormal values count as 0, those that go in and those that come out. With `emulate_dot`
vectors do the same, but for the subnormal ones.

A block of a record is two tiles of weights as they are wanted. Tiles of tokens are read from where their rows lie, if
these follow each other, else from a copy. A float32 is three bfloat16 (format split of `cpu_kernels.simd.formats`), and
each 32 columns are added three times, for the highest parts, the middle and the lowest. Where tokens are bfloat16, the
first is all: the others would add 0. So a token's bits do not depend on what the others of its call need, nor on how
many they are. One token comes here as many do: its weights arrive from memory more slowly than tiles multiply.

Tiles are state of the thread. They are set up and given back in one call, so that what runs next finds none and the
system has none to save.
"""

from llvmlite import ir

from cpu_kernels.format.layout import BLOCK_COLUMNS, BLOCK_ROWS, LINE_BYTES, PANEL_ROWS, block_bytes
from cpu_kernels.simd.formats import PART_BYTES, SPLIT_BYTES
from cpu_kernels.simd.vectors import I1, I8, I32, I64, VOID, Simd

TILE_ROWS, TILE_COLUMNS = 16, 32
TILE_BYTES = TILE_ROWS * LINE_BYTES
TILES = BLOCK_COLUMNS // TILE_COLUMNS  # of a block, one behind the other
ROW_BLOCKS = PANEL_ROWS // BLOCK_ROWS
SUM_BYTES = 4 * PANEL_ROWS  # of a token
SUM_TILES, X_TILE, WEIGHT_TILES = range(ROW_BLOCKS), 4, (5, 6, 7)
"""Numbers of the tile registers."""
PALETTE = 1
SHAPE_BYTES, ROW_BYTES_AT, ROWS_AT = 64, 16, 48  # of what ldtilecfg reads: bytes of a row (uint16), rows (uint8)
PREFETCH_BYTES = 4096
"""How far ahead of the first tokens, for which they come from memory, lines of weights are asked for."""


def write_panel(s: Simd, function: ir.Function, parts: int) -> None:
    """The body of `panel` (see `cpu_kernels.simd.tiles`) for bfloat16 weights; parts of activations: 1 or PARTS."""
    _Panel(s, function, parts).body()
    s.b.ret_void()


class _Panel:
    def __init__(self, s: Simd, function: ir.Function, parts: int) -> None:
        self.s, self.parts = s, parts
        self.weights, self.stride, self.n_blocks, self.x, self.x_stride, *tokens = function.args
        self.row_ids, self.n_tokens, self.out = tokens
        self.copy = s.scratch(TILE_ROWS * SPLIT_BYTES)
        self.sums = s.scratch(TILE_ROWS * SUM_BYTES)
        self.shapes = s.scratch(SHAPE_BYTES)

    def body(self) -> None:
        """16 tokens after the other, each time with all columns."""
        s, most = self.s, self.s.const(TILE_ROWS)
        with s.loop(s.const(0), self.n_tokens, most) as first:
            left = s.b.sub(self.n_tokens, first)
            is_whole = s.b.icmp_signed(">=", left, most)
            count = s.b.select(is_whole, most, left)
            is_first = s.b.icmp_signed("==", first, s.const(0))
            with s.b.if_then(s.b.or_(is_first, s.b.not_(is_whole))):
                self._set_up(count)
            self._multiply(s.offset(self.row_ids, s.b.mul(first, s.const(4))), count, is_first)
            self._add_to_out(s.offset(self.out, s.b.mul(first, s.const(SUM_BYTES))), count)
        self._tile("tilerelease")

    def _tile(self, name: str, *arguments: ir.Value | int) -> None:
        """A tile instruction; numbers are those of registers."""
        if not self.s.emulate_dot:
            values = [ir.Constant(I8, value) if isinstance(value, int) else value for value in arguments]
            self.s.call(f"llvm.x86.{name}", VOID, values)

    def _set_up(self, count: ir.Value) -> None:
        """Tiles for `count` tokens."""
        s = self.s
        shapes = bytearray(SHAPE_BYTES)
        shapes[0] = PALETTE
        for number in (*SUM_TILES, X_TILE, *WEIGHT_TILES):
            shapes[ROW_BYTES_AT + 2 * number], shapes[ROWS_AT + number] = LINE_BYTES, TILE_ROWS
        s.store(ir.Constant(ir.VectorType(I8, SHAPE_BYTES), list(shapes)), self.shapes, SHAPE_BYTES)
        for number in (*SUM_TILES, X_TILE):
            s.store(s.b.trunc(count, I8), s.offset(self.shapes, ROWS_AT + number))
        self._tile("ldtilecfg", self.shapes)

    def _row(self, ids: ir.Value, token: ir.Value) -> ir.Value:
        """The number of a token's row in x."""
        return self.s.b.sext(self.s.load(self.s.offset(ids, self.s.b.mul(token, self.s.const(4))), I32, 4), I64)

    def _multiply(self, ids: ir.Value, count: ir.Value, is_first: ir.Value) -> None:
        """Sums of all columns for `count` tokens, whose rows are `ids`."""
        s = self.s
        start = self._row(ids, s.const(0))
        follow = self._follow(ids, count, start)
        rows = s.offset(self.x, s.b.mul(start, self.x_stride))
        x_stride = s.b.select(follow, self.x_stride, s.const(SPLIT_BYTES))
        self._clear()
        with s.loop(s.const(0), self.n_blocks) as block:
            weights = s.offset(self.weights, s.b.mul(block, s.const(block_bytes("bfloat16"))))
            place = s.b.mul(block, s.const(SPLIT_BYTES))
            with s.b.if_then(is_first):
                self._prefetch(weights)
            with s.b.if_then(s.b.not_(follow)):
                self._copy_rows(ids, count, place)
            x = s.b.select(follow, s.offset(rows, place), self.copy)
            for tile in range(TILES):
                here = s.offset(weights, tile * TILE_BYTES), s.offset(x, tile * LINE_BYTES), x_stride
                if s.emulate_dot:
                    self._emulate(*here, count)
                else:
                    self._tile_products(*here)
        for number in SUM_TILES:
            self._tile("tilestored64", number, s.offset(self.sums, number * LINE_BYTES), s.const(SUM_BYTES))

    def _follow(self, ids: ir.Value, count: ir.Value, start: ir.Value) -> ir.Value:
        """Whether the rows are start, start + 1, ..."""
        s = self.s

        def both(token: ir.Value, so_far: list[ir.Value]) -> list[ir.Value]:
            return [s.b.and_(so_far[0], s.b.icmp_signed("==", self._row(ids, token), s.b.add(start, token)))]

        return s.fold(s.const(0), count, 1, [ir.Constant(I1, 1)], both)[0]

    def _clear(self) -> None:
        s = self.s
        if s.emulate_dot:
            with s.loop(s.const(0), s.const(TILE_ROWS * SUM_BYTES), LINE_BYTES) as place:
                s.store(s.zero(s.f32), s.offset(self.sums, place))
        for number in SUM_TILES:
            self._tile("tilezero", number)

    def _prefetch(self, weights: ir.Value) -> None:
        s = self.s
        for row_block in range(ROW_BLOCKS):
            start = self._row_block(weights, row_block)
            for line in range(block_bytes("bfloat16") // LINE_BYTES):
                s.prefetch(s.offset(start, PREFETCH_BYTES + line * LINE_BYTES))

    def _row_block(self, weights: ir.Value, row_block: int) -> ir.Value:
        return self.s.offset(weights, self.s.b.mul(self.stride, self.s.const(row_block)))

    def _copy_rows(self, ids: ir.Value, count: ir.Value, place: ir.Value) -> None:
        """A block of each token, as far as it is used, one behind the other."""
        s = self.s
        with s.loop(s.const(0), count) as token:
            row = s.offset(self.x, s.b.mul(self._row(ids, token), self.x_stride))
            source, target = s.offset(row, place), s.offset(self.copy, s.b.mul(token, s.const(SPLIT_BYTES)))
            for line in range(0, self.parts * PART_BYTES, LINE_BYTES):
                s.store(s.load(s.offset(source, line), s.i32), s.offset(target, line), LINE_BYTES)

    def _tile_products(self, weights: ir.Value, x: ir.Value, x_stride: ir.Value) -> None:
        """32 columns. Weights stay in their registers from one part to the next, as far as there are registers."""
        s = self.s
        held: list[int] = []  # row blocks, by register
        oldest = 0
        for part in range(self.parts):
            self._tile("tileloadd64", X_TILE, s.offset(x, part * PART_BYTES), x_stride)
            for row_block in sorted(range(ROW_BLOCKS), key=lambda n: n not in held):
                if row_block not in held:
                    if len(held) < len(WEIGHT_TILES):
                        held.append(row_block)
                    else:
                        held[oldest] = row_block
                        oldest = (oldest + 1) % len(held)
                    number = WEIGHT_TILES[held.index(row_block)]
                    self._tile("tileloadd64", number, self._row_block(weights, row_block), s.const(LINE_BYTES))
                self._tile("tdpbf16ps", row_block, X_TILE, WEIGHT_TILES[held.index(row_block)])

    def _emulate(self, weights: ir.Value, x: ir.Value, x_stride: ir.Value, count: ir.Value) -> None:
        """The same in vectors of 16 rows of weights, for tests on any CPU."""
        s = self.s
        with s.loop(s.const(0), count) as token:
            row = s.offset(x, s.b.mul(token, x_stride))
            for row_block in range(ROW_BLOCKS):
                place = s.offset(s.offset(self.sums, s.b.mul(token, s.const(SUM_BYTES))), row_block * LINE_BYTES)
                total = s.load(place, s.f32)
                for part in range(self.parts):
                    columns = s.offset(row, part * PART_BYTES)
                    total = s.b.fadd(total, self._emulated_sum(self._row_block(weights, row_block), columns))
                s.store(total, place)

    def _emulated_sum(self, weights: ir.Value, columns: ir.Value) -> ir.Value:
        s = self.s
        even: ir.Value = s.zero(s.f32)
        odd: ir.Value = s.zero(s.f32)
        for pair in range(TILE_COLUMNS // 2):
            words = s.load(s.offset(weights, pair * LINE_BYTES), s.i32)
            two = s.splat_load(s.offset(columns, 4 * pair), I32)
            even = s.mul_add(s.low_bf16(two), s.low_bf16(words), even)
            odd = s.mul_add(s.high_bf16(two), s.high_bf16(words), odd)
        return s.b.fadd(even, odd)

    def _add_to_out(self, out: ir.Value, count: ir.Value) -> None:
        """The sums of tokens, added to what `out` holds."""
        s = self.s
        with s.loop(s.const(0), s.b.mul(count, s.const(SUM_BYTES)), LINE_BYTES) as place:
            # adding 0 takes the sign of a 0, which may depend on the number of parts
            total = s.b.fadd(s.load(s.offset(self.sums, place), s.f32), s.zero(s.f32))
            here = s.offset(out, place)
            s.store(s.b.fadd(s.load(here, s.f32), total), here)
