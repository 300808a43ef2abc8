"""`attend` of `cpu_kernels.simd.attention` over keys and values that are stored as integer codes.

Rows lie as `cpu_kernels.step.stored` says; both are read as they are. The query is rounded to int8 codes with one scale
(its error is that of INT8 keys), so that scores are sums of integer products. Weights take on the scales of values
before they meet their codes.

    INT8   score = q scale * k scale * sum of q * k
    INT4   score = q scale * sum over groups of k scale * (sum of q * stored k - 8 * sum of q)

dim, v_dim and more_dim are multiples of 32 (INT8), or of 64 and at most MOST_COLUMNS (INT4). Behind the scores there
must be room for codes of the query, 2 * (dim + more_dim) bytes a head.

As for floats, keys and values are read row after row, as they lie, with sums of values that wait in L1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from llvmlite import ir

from cpu_kernels.format.layout import LINE_BYTES
from cpu_kernels.host.isa import Isa, is_zen
from cpu_kernels.simd.attention import (
    CHUNK,
    FAR_KEY_BYTES,
    PREFETCH_TOKENS,
    VALUE_TOKENS,
    Arguments,
    begin,
    fill_last_vector,
    floats,
    softmax,
)
from cpu_kernels.simd.formats import ABSOLUTE_BITS, CODE_MAX, INFINITY_BITS, ROUND, ROUND_BITS, TINY
from cpu_kernels.simd.vectors import F32, I8, I16, I32, Simd

FAR_VALUE_TOKENS = 32
"""How far ahead of its use a row of values is asked for, where every line is."""
GROUP = 32
"""Columns of an INT4 row that share a scale, and of the least step of an INT8 row."""
OFFSET = 8
"""What a stored INT4 code is larger than its value."""
BYTE_OFFSET = 128
"""What an INT8 code becomes larger by, where bytes are multiplied as unsigned with signed ones."""
MOST_COLUMNS = 1024
"""Of an INT4 row."""
SCALED_BYTES = 4 * MOST_COLUMNS // GROUP
"""Of a weight times the scales of all groups of a row."""
PIECE_BYTES = 4 * GROUP
"""Of the query's codes for GROUP bytes of an INT4 row: the codes of two groups, then their corrections."""


def takes_columns(bits: int, n: int) -> bool:
    """Whether the kernels read rows of n columns."""
    return n % GROUP == 0 if bits == 8 else n % (2 * GROUP) == 0 and n <= MOST_COLUMNS


@dataclass(frozen=True, slots=True)
class CodedAttendKernel:
    """`attend` for 1 to 4 query heads that share keys and values of 8 or 4 bits. split: keys have `more` columns,
    which are a row of their own. far: every line of keys and values is asked for, far ahead of its use."""

    n_heads: int
    bits: Literal[8, 4]
    split: bool = False
    far: bool = field(default_factory=lambda: not is_zen())
    symbol: ClassVar[str] = "attend"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"attend-int{self.bits}-{self.n_heads}" + "-split" * self.split + "-far" * self.far

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `attend`."""
        module, s, arguments = begin(self.name, self.symbol, isa)
        n_scaled = SCALED_BYTES * self.n_heads if self.bits == 4 else 0
        stack = [s.scratch(n_bytes) for n_bytes in (4 * s.lanes * s.lanes, VALUE_TOKENS * n_scaled, n_scaled)]
        _Writer(s, Arguments(*arguments), self, *stack).write()
        s.b.ret_void()
        return module


@dataclass(frozen=True, slots=True)
class _Keys:
    """A row of each key: `n` columns at `rows`, `row_bytes` apart, and the query's codes for them.

    The codes of a head lie at `codes` + head * `head_bytes`. INT8: int8 [n], then their sizes. INT4: for each GROUP
    bytes of a row the codes of the two groups in it, then int32 [16], whose lanes 0 and 8 are -8 * sum of the codes
    of each. scales: of the heads, each for as many lanes as tokens of a block; sums: the same of -128 * sum of the
    codes (INT8, where they meet unsigned ones).
    """

    rows: ir.Value
    row_bytes: ir.Value
    n: ir.Value
    codes: ir.Value
    head_bytes: ir.Value
    scales: ir.Value
    sums: ir.Value


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the instructions of one kernel."""

    s: Simd
    a: Arguments
    kernel: CodedAttendKernel
    sums: ir.Value
    """Stack for a vector of each lane."""
    scaled: ir.Value
    """Stack for float32 [heads, VALUE_TOKENS, groups]."""
    group_sums: ir.Value
    """Stack for float32 [heads, groups]."""

    @property
    def block(self) -> int:
        """Tokens whose scores, of all heads, are one vector."""
        return self.s.lanes // self.kernel.n_heads

    @property
    def room(self) -> ir.Value:
        """Scratch behind the scores."""
        return self.s.offset(self.a.scores, 4 * CHUNK * self.kernel.n_heads)

    def write(self) -> None:
        """The whole function."""
        s, a, n_heads = self.s, self.a, self.kernel.n_heads
        query_bytes = s.b.mul(s.b.add(a.dim, a.more_dim), s.const(4))
        queries = [s.offset(a.q, s.b.mul(query_bytes, s.const(head))) for head in range(n_heads)]
        keys = [self._keys(a.k, a.k_bytes, a.dim, queries, self.room)]
        if self.kernel.split:
            behind = s.offset(self.room, s.b.mul(a.dim, s.const(2 * n_heads)))
            rest = [s.offset(query, s.b.mul(a.dim, s.const(4))) for query in queries]
            keys.append(self._keys(a.more, a.more_bytes, a.more_dim, rest, behind))
        fill_last_vector(s, a, n_heads)
        self._scores(keys)
        softmax(s, a, n_heads)
        (self._values_int8 if self.kernel.bits == 8 else self._values_int4)()

    # The query ---------------------------------------------------------------------------------------------------

    def _keys(
        self, rows: ir.Value, row_bytes: ir.Value, n: ir.Value, queries: list[ir.Value], place: ir.Value
    ) -> _Keys:
        """Writes the codes of the heads' queries to `place`."""
        s = self.s
        head_bytes = s.b.mul(n, s.const(2))
        scales, sums = [], []
        for head, query in enumerate(queries):
            scale, total = self._write_query(query, n, s.offset(place, s.b.mul(head_bytes, s.const(head))))
            scales.append(scale)
            sums.append(s.b.mul(total, ir.Constant(I32, -BYTE_OFFSET)))
        of_tokens = [
            self._vector([value for value in of_heads for _ in range(self.block)]) for of_heads in (scales, sums)
        ]
        return _Keys(rows, row_bytes, n, place, head_bytes, *of_tokens)

    def _write_query(self, query: ir.Value, n: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Writes codes of float32 [n] of the largest size / 127; returns their scale, NaN where a value is not
        finite, and their sum (INT8)."""
        s = self.s

        def larger(column: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            bits = s.as_words(s.load(s.offset(query, floats(s, column)), s.f32))
            return [s.max_words(found[0], s.b.and_(bits, s.constant(s.i32, ABSOLUTE_BITS)))]

        (largest,) = s.fold(s.const(0), n, s.lanes, [s.zero(s.i32)], larger)
        bits = s.reduce(largest, "umax")
        finite = s.b.icmp_unsigned("<", bits, ir.Constant(I32, INFINITY_BITS))
        extreme = s.b.bitcast(bits, F32)
        usable = s.b.and_(finite, s.b.fcmp_ordered(">", extreme, s.real(TINY)))
        inverse = s.splat(s.b.select(usable, s.b.fdiv(s.real(CODE_MAX), extreme), s.real(0)))
        keep = s.splat(s.b.sext(finite, I32))
        half = s.b.sdiv(n, s.const(2))

        def write(column: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            total = s.zero(s.i32)
            target, correction = self._group_place(place, column, half)
            for first in range(0, GROUP, s.lanes):
                x = s.load(s.offset(query, floats(s, s.b.add(column, s.const(first)))), s.f32)
                rounded = s.as_words(s.b.fadd(s.b.fmul(x, inverse), s.constant(s.f32, ROUND)))
                code = s.b.and_(s.b.sub(rounded, s.constant(s.i32, ROUND_BITS)), keep)
                s.store(s.narrow(code, 8), s.offset(target, first))
                total = s.b.add(total, code)
                if self.kernel.bits == 8:
                    size = s.b.select(s.b.icmp_signed("<", code, s.zero(s.i32)), s.b.neg(code), code)
                    s.store(s.narrow(size, 8), s.offset(target, s.b.add(n, s.const(first))))
            group_sum = s.reduce(total, "add")
            if self.kernel.bits == 4:
                first_lane = ir.Constant(ir.VectorType(I32, GROUP // 4), None)
                offset = s.b.mul(group_sum, ir.Constant(I32, -OFFSET))
                s.store(s.b.insert_element(first_lane, offset, ir.Constant(I32, 0)), correction)
            return [s.b.add(sums[0], group_sum)]

        (total,) = s.fold(s.const(0), n, GROUP, [ir.Constant(I32, 0)], write)
        return s.b.select(finite, s.b.fmul(extreme, s.real(1 / CODE_MAX)), s.real(float("nan"))), total

    def _group_place(self, place: ir.Value, column: ir.Value, half: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Where the codes of a group of the query lie, and (INT4) its correction."""
        s = self.s
        if self.kernel.bits == 8:
            return s.offset(place, column), place
        is_high = s.b.icmp_signed(">=", column, half)
        byte = s.b.select(is_high, s.b.sub(column, half), column)
        side = s.b.select(is_high, s.const(GROUP), s.const(0))
        target = s.offset(place, s.b.add(s.b.mul(byte, s.const(PIECE_BYTES // GROUP)), side))
        return target, s.offset(target, 2 * GROUP)

    # Scores ------------------------------------------------------------------------------------------------------

    def _scores(self, keys: list[_Keys]) -> None:
        """scores[h, t] = q[h] . k[t] + bias[t], a block of tokens at a time."""
        s, a = self.s, self.a
        whole = s.b.mul(s.b.sdiv(a.n_tokens, s.const(self.block)), s.const(self.block))
        last = s.b.sub(a.n_tokens, s.const(1))
        with s.loop(s.const(0), whole, self.block) as token:
            bias = s.load(s.offset(a.bias, floats(s, token)), ir.VectorType(F32, self.block), 4)
            for head, scores in enumerate(self._score_block(keys, token, last)):
                s.store(s.b.fadd(scores, bias), s.offset(a.scores, floats(s, token, CHUNK * head)), 4)
        with s.loop(whole, a.n_tokens, self.block) as token:  # fewer than a block
            found = self._score_block(keys, token, last)
            for i in range(self.block):
                one = s.b.add(token, s.const(i))
                with s.b.if_then(s.b.icmp_signed("<=", one, last)):
                    bias = s.load(s.offset(a.bias, floats(s, one)), F32, 4)
                    for head, scores in enumerate(found):
                        score = s.b.fadd(s.b.extract_element(scores, ir.Constant(I32, i)), bias)
                        s.store(score, s.offset(a.scores, floats(s, one, CHUNK * head)), 4)

    def _score_block(self, keys: list[_Keys], token: ir.Value, last: ir.Value) -> list[ir.Value]:
        """For each head q . k of a block of tokens from `token` on; behind the last token its own again."""
        s = self.s
        of_part = self._products_int8 if self.kernel.bits == 8 else self._products_int4
        total = of_part(keys[0], token, last)
        for part in keys[1:]:
            total = s.b.fadd(total, of_part(part, token, last))
        return [s.part(total, head * self.block, self.block) for head in range(self.kernel.n_heads)]

    def _rows_of_block(
        self, keys: _Keys, token: ir.Value, last: ir.Value, sums_of: Callable[[ir.Value], list[ir.Value]]
    ) -> ir.Value:
        """A vector of the sums that `sums_of` a row of keys gives each head, head by head. Row after row, as they lie:
        several at once would be read as several streams, and need more registers than there are."""
        s, n_heads, vector_bytes = self.s, self.kernel.n_heads, 4 * self.s.lanes
        with s.loop(s.const(0), s.const(self.block)) as i:
            row = s.offset(keys.rows, s.b.mul(s.smaller(s.b.add(token, i), last), keys.row_bytes))
            for head, total in enumerate(sums_of(row)):
                place = s.b.mul(s.b.add(i, s.const(head * self.block)), s.const(vector_bytes))
                s.store(total, s.offset(self.sums, place), vector_bytes)
        kind = s.i32 if self.kernel.bits == 8 else s.f32
        sums = [
            s.load(s.offset(self.sums, vector_bytes * at), kind, vector_bytes) for at in range(n_heads * self.block)
        ]  # three heads leave some lanes of the result over, which become 0
        return s.sum_each(sums + [s.zero(kind)] * (s.lanes - len(sums)))

    def _products_int8(self, keys: _Keys, token: ir.Value, last: ir.Value) -> ir.Value:
        """A vector of q[h] . k[t], head by head."""
        s, width = self.s, 4 * self.s.lanes
        whole = s.b.mul(s.b.sdiv(keys.n, s.const(width)), s.const(width))

        def sums_of(row: ir.Value) -> list[ir.Value]:
            sums = [s.zero(s.i32)] * self.kernel.n_heads
            sums = s.fold(s.const(0), whole, width, sums, partial(self._add_int8_columns, keys, row, width))
            if width > GROUP:  # a group that fills no vector
                sums = s.fold(whole, keys.n, GROUP, sums, partial(self._add_int8_columns, keys, row, GROUP))
            return sums

        total = self._rows_of_block(keys, token, last, sums_of)
        products = s.to_f32(total if s.dot_kind == "maddubs" else s.b.add(total, keys.sums))
        rows = [s.smaller(s.b.add(token, s.const(i)), last) for i in range(self.block)]
        places = [s.offset(keys.rows, s.b.add(s.b.mul(row, keys.row_bytes), keys.n)) for row in rows]
        scales = [s.load(place, F32, 1) for place in places] * self.kernel.n_heads
        return s.b.fmul(products, s.b.fmul(self._vector(scales), keys.scales))

    def _add_int8_columns(
        self, keys: _Keys, row: ir.Value, n_bytes: int, column: ir.Value, sums: list[ir.Value]
    ) -> list[ir.Value]:
        """The heads' sums with n_bytes columns of a row more."""
        s = self.s
        code = self._codes(s.offset(row, column), n_bytes)
        self._ask_ahead(s.offset(row, column))
        added: list[ir.Value] = []
        for head, total in enumerate(sums):
            place = s.offset(s.offset(keys.codes, s.b.mul(keys.head_bytes, s.const(head))), column)
            query = self._codes(place, n_bytes)
            size = self._codes(s.offset(place, keys.n), n_bytes) if s.dot_kind == "maddubs" else None
            added.append(self._signed_dot(total, code, query, size))
        return added

    def _codes(self, place: ir.Value, n_bytes: int) -> ir.Value:
        """A vector of n_bytes of codes; behind them zeros."""
        s = self.s
        found = s.load(place, ir.VectorType(I8, n_bytes))
        return found if n_bytes == 4 * s.lanes else s.widened(found, 4 * s.lanes)

    def _signed_dot(self, total: ir.Value, code: ir.Value, query: ir.Value, size: ir.Value | None) -> ir.Value:
        """total + products of signed bytes, four to a lane; where `size` (of the query) is None, the codes count as
        larger by BYTE_OFFSET."""
        s = self.s
        if size is not None:
            return s.add_pairs(total, s.dot_pairs(size, s.copy_sign(code, query)))
        return s.dot_bytes(total, s.b.xor(code, s.constant(s.u8, BYTE_OFFSET)), query)

    def _ask_ahead(self, place: ir.Value) -> None:
        """Asks for a line far behind `place`."""
        if self.kernel.far:
            self.s.prefetch(self.s.offset(place, FAR_KEY_BYTES))

    def _products_int4(self, keys: _Keys, token: ir.Value, last: ir.Value) -> ir.Value:
        """As `_products_int8`; a byte's halves are columns of two groups."""
        s = self.s
        half = s.b.sdiv(keys.n, s.const(2))

        def add(row: ir.Value, byte: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            self._ask_ahead(s.offset(row, byte))
            piece = s.offset(keys.codes, s.b.mul(byte, s.const(PIECE_BYTES // GROUP)))
            added = list(sums)
            for first, codes, scale in self._groups(row, half, byte):
                for head in range(self.kernel.n_heads):
                    place = s.offset(piece, s.b.mul(keys.head_bytes, s.const(head)))
                    products = s.load(s.offset(place, 2 * GROUP + first), s.i32)
                    for number, code in enumerate(codes):
                        query = s.load(s.offset(place, first + 4 * s.lanes * number), s.u8)
                        products = self._dot(products, code, query)
                    added[head] = s.mul_add(s.to_f32(products), scale, added[head])
            return added

        def sums_of(row: ir.Value) -> list[ir.Value]:
            return s.fold(s.const(0), half, GROUP, [s.zero(s.f32)] * self.kernel.n_heads, partial(add, row))

        return s.b.fmul(self._rows_of_block(keys, token, last, sums_of), keys.scales)

    def _groups(self, row: ir.Value, half: ir.Value, byte: ir.Value) -> list[tuple[int, list[ir.Value], ir.Value]]:
        """Codes of the two groups in GROUP bytes of a row, as vectors, and a vector of their scales; before them where
        their columns begin in the query's codes. Wide vectors hold both groups."""
        s = self.s
        here = s.offset(row, byte)
        low, high = (self._int4_scale(row, half, column) for column in (byte, s.b.add(half, byte)))
        if s.lanes * 4 > GROUP:
            both = s.doubled(s.load(here, ir.VectorType(I8, GROUP)))
            scale = s.halves(low, high)
            return [(0, [s.nibbles_of_halves(both)], scale)]
        parts = [s.load(s.offset(here, at), s.u8) for at in range(0, GROUP, 4 * s.lanes)]
        return [
            (0, [s.low_nibbles(part) for part in parts], s.splat(low)),
            (GROUP, [s.high_nibbles(part) for part in parts], s.splat(high)),
        ]

    def _dot(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """total + products of bytes, four to a lane; pairs of them must fit 16 bits."""
        s = self.s
        if s.dot_kind == "maddubs":
            return s.add_pairs(total, s.dot_pairs(unsigned, signed))
        return s.dot_bytes(total, unsigned, signed)

    def _int4_scale(self, row: ir.Value, half: ir.Value, column: ir.Value) -> ir.Value:
        """float32 scale of the group of a column."""
        s = self.s
        place = s.offset(s.offset(row, half), s.b.mul(s.b.sdiv(column, s.const(GROUP)), s.const(2)))
        bits = s.b.zext(s.load(place, I16, 1), I32)
        return s.b.bitcast(s.b.shl(bits, ir.Constant(I32, 16)), F32)

    # Values ------------------------------------------------------------------------------------------------------

    def _values_int8(self) -> None:
        """out[h] = sum over t of weight[h, t] * scale[t] * v[t]."""
        self._clear(self.a.out, self.s.b.mul(self.a.v_dim, self.s.const(self.kernel.n_heads)))
        for start, stop, n_tokens in self._token_blocks():
            with self.s.loop(start, stop, n_tokens) as token:
                self._add_int8([self.s.b.add(token, self.s.const(i)) for i in range(n_tokens)])

    def _token_blocks(self) -> tuple[tuple[ir.Value, ir.Value, int], ...]:
        """(first token, behind the last one, tokens at a time)."""
        s, n_tokens = self.s, self.a.n_tokens
        whole = s.b.mul(s.b.sdiv(n_tokens, s.const(VALUE_TOKENS)), s.const(VALUE_TOKENS))
        return (s.const(0), whole, VALUE_TOKENS), (whole, n_tokens, 1)

    def _clear(self, place: ir.Value, n_floats: ir.Value) -> None:
        """float32 [n_floats], whole vectors, = 0."""
        with self.s.loop(self.s.const(0), n_floats, self.s.lanes) as at:
            self.s.store(self.s.zero(self.s.f32), self.s.offset(place, floats(self.s, at)))

    def _rows(self, tokens: list[ir.Value]) -> list[ir.Value]:
        """Where values of tokens lie."""
        return [self.s.offset(self.a.v, self.s.b.mul(token, self.a.v_bytes)) for token in tokens]

    def _ask_for_values(self, rows: list[ir.Value], byte: ir.Value) -> None:
        """Asks for lines of later rows."""
        n_ahead = FAR_VALUE_TOKENS if self.kernel.far else PREFETCH_TOKENS
        ahead = self.s.b.add(byte, self.s.b.mul(self.a.v_bytes, self.s.const(n_ahead)))
        for row in rows:
            self.s.prefetch(self.s.offset(row, ahead))

    def _add_int8(self, tokens: list[ir.Value]) -> None:
        """Adds the tokens' weighted values to the heads' results."""
        s, a = self.s, self.a
        rows = self._rows(tokens)
        scales = [s.splat_load(s.offset(row, a.v_dim), F32) for row in rows]
        weights = [
            [
                s.b.fmul(s.splat_load(s.offset(a.scores, floats(s, token, CHUNK * head)), F32), scale)
                for token, scale in zip(tokens, scales, strict=True)
            ]
            for head in range(self.kernel.n_heads)
        ]
        whole = s.b.mul(s.b.sdiv(a.v_dim, s.const(LINE_BYTES)), s.const(LINE_BYTES))
        for start, stop, step in ((s.const(0), whole, LINE_BYTES), (whole, a.v_dim, GROUP)):
            with s.loop(start, stop, step) as column:
                self._ask_for_values(rows, column)
                for first in range(0, step, s.lanes):
                    here = s.b.add(column, s.const(first))
                    codes = [s.load(s.offset(row, here), ir.VectorType(I8, s.lanes)) for row in rows]
                    self._add_columns(here, weights, [s.to_f32(s.b.sext(code, s.i32)) for code in codes])

    def _add_columns(self, column: ir.Value, weights: list[list[ir.Value]], values: list[ir.Value]) -> None:
        """Adds weights, by head and token, times a vector of columns of each token."""
        s, a = self.s, self.a
        for head, own in enumerate(weights):
            place = s.offset(a.out, floats(s, s.b.add(s.b.mul(a.v_dim, s.const(head)), column)))
            total = s.load(place, s.f32)
            for weight, value in zip(own, values, strict=True):
                total = s.mul_add(weight, value, total)
            s.store(total, place)

    def _values_int4(self) -> None:
        """The same; the weights of each group are scaled first, and their sums taken off for the codes' offset."""
        s, a = self.s, self.a
        half, n_groups = s.b.sdiv(a.v_dim, s.const(2)), s.b.sdiv(a.v_dim, s.const(GROUP))
        self._clear(a.out, s.b.mul(a.v_dim, s.const(self.kernel.n_heads)))
        self._clear(self.group_sums, s.const(SCALED_BYTES // 4 * self.kernel.n_heads))
        for start, stop, n_tokens in self._token_blocks():
            with s.loop(start, stop, n_tokens) as token:
                self._add_int4([s.b.add(token, s.const(i)) for i in range(n_tokens)], half, n_groups)
        for head in range(self.kernel.n_heads):
            out = s.offset(a.out, floats(s, s.b.mul(a.v_dim, s.const(head))))
            with s.loop(s.const(0), a.v_dim, GROUP) as column:
                group = s.b.add(floats(s, s.b.sdiv(column, s.const(GROUP))), s.const(SCALED_BYTES * head))
                offset = s.b.fmul(s.splat_load(s.offset(self.group_sums, group), F32), s.constant(s.f32, -OFFSET))
                for first in range(0, GROUP, s.lanes):
                    place = s.offset(out, floats(s, column, first))
                    s.store(s.b.fadd(s.load(place, s.f32), offset), place)

    def _add_int4(self, tokens: list[ir.Value], half: ir.Value, n_groups: ir.Value) -> None:
        """Adds the tokens' weighted codes to the heads' results, and their scaled weights to the sums of groups."""
        s, n_heads = self.s, self.kernel.n_heads
        rows = self._rows(tokens)
        self._scale_weights(rows, tokens, half, n_groups)
        with s.loop(s.const(0), half, GROUP) as byte:
            self._ask_for_values(rows, byte)
            columns = byte, s.b.add(half, byte)
            of_sides = []
            for column in columns:
                group = floats(s, s.b.sdiv(column, s.const(GROUP)))
                scaled = [
                    [s.splat_load(s.offset(self._scaled(head, i), group), F32) for i in range(len(tokens))]
                    for head in range(n_heads)
                ]
                of_sides.append(scaled)
            for first in range(0, GROUP, s.lanes):
                places = [s.offset(s.offset(row, byte), first) for row in rows]
                words = [s.b.zext(s.load(place, ir.VectorType(I8, s.lanes)), s.i32) for place in places]
                for column, weights, take in zip(columns, of_sides, (self._low, self._high), strict=True):
                    here = s.b.add(column, s.const(first))
                    self._add_columns(here, weights, [s.to_f32(take(word)) for word in words])

    def _scaled(self, head: int, token: int) -> ir.Value:
        """Where the weights of a token of a block times its scales lie, group by group."""
        return self.s.offset(self.scaled, SCALED_BYTES * (VALUE_TOKENS * head + token))

    def _scale_weights(self, rows: list[ir.Value], tokens: list[ir.Value], half: ir.Value, n_groups: ir.Value) -> None:
        """Writes the tokens' weights times the scales of each group, and adds them to the sums of groups."""
        s, a = self.s, self.a
        fours = s.b.mul(s.b.sdiv(n_groups, s.const(4)), s.const(4))
        for start, stop, count in ((s.const(0), fours, 4), (fours, n_groups, 2)):
            words, kind = ir.VectorType(I32, count), ir.VectorType(F32, count)
            with s.loop(start, stop, count) as group:
                scales = []
                for row in rows:
                    place = s.offset(s.offset(row, half), s.b.mul(group, s.const(2)))
                    wide = s.b.zext(s.load(place, ir.VectorType(I16, count)), words)
                    scales.append(s.b.bitcast(s.b.shl(wide, ir.Constant(words, [16] * count)), kind))
                for head in range(self.kernel.n_heads):
                    place = s.offset(self.group_sums, s.b.add(floats(s, group), s.const(SCALED_BYTES * head)))
                    total = s.load(place, kind)
                    for i, (token, scale) in enumerate(zip(tokens, scales, strict=True)):
                        weight = s.load(s.offset(a.scores, floats(s, token, CHUNK * head)), F32, 4)
                        product = s.b.fmul(s.splat_of(weight, count), scale)
                        s.store(product, s.offset(self._scaled(head, i), floats(s, group)))
                        total = s.b.fadd(total, product)
                    s.store(total, place)

    def _low(self, codes: ir.Value) -> ir.Value:
        return self.s.b.and_(codes, self.s.constant(self.s.i32, 15))

    def _high(self, codes: ir.Value) -> ir.Value:
        return self.s.b.lshr(codes, self.s.constant(self.s.i32, 4))

    def _vector(self, scalars: list[ir.Value]) -> ir.Value:
        """A vector of scalars, one a lane. Of the heads of a block, the lanes that are left over are 0."""
        n_lanes = len(scalars) if len(scalars) <= self.block else self.s.lanes
        vector: ir.Value = ir.Constant(ir.VectorType(scalars[0].type, n_lanes), None)
        for lane, scalar in enumerate(scalars):
            vector = self.s.b.insert_element(vector, scalar, ir.Constant(I32, lane))
        return vector
