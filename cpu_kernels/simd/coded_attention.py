"""`attend` of `cpu_kernels.simd.attention` over keys and values that are stored as integer codes.

Rows lie as `cpu_kernels.step.stored` says; both are read as they are. The query is rounded to int8 codes with one scale
(its error is that of INT8 keys), so that scores are sums of integer products. Weights take on the scales of values
before they meet their codes.

    INT8   score = q scale * k scale * sum of q * k
    INT4   score = q scale * sum over groups of k scale * (sum of q * stored k - 8 * sum of q)

dim, v_dim and more_dim are multiples of 32 (INT8) or 64 (INT4); vectors are of at most 256 bits, because rows are
short. Behind the scores there must be room for codes of the query, 2 * (dim + more_dim) bytes a head, and for two times
CHUNK floats a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from llvmlite import ir

from cpu_kernels.host.isa import BY_NAME, Isa, cpu_features, missing_features
from cpu_kernels.simd.attention import CHUNK, PREFETCH_TOKENS, Arguments, begin, fill_last_vector, floats, softmax
from cpu_kernels.simd.formats import ABSOLUTE_BITS, CODE_MAX, INFINITY_BITS, ROUND, ROUND_BITS, TINY
from cpu_kernels.simd.vectors import F32, I8, I16, I32, Simd

GROUP = 32
"""Columns of an INT4 row that share a scale, and of a step of an INT8 row."""
OFFSET = 8
"""What a stored INT4 code is larger than its value."""
WIDEST = 8
"""Lanes of a vector: 32 bytes of codes are a group of an INT8 row."""
SUMS = 8
"""Vectors of results that the loop over values keeps in registers, of 16."""


def coded_isa(isa: Isa) -> Isa:
    """The vector path of these kernels on a CPU whose path is `isa`: at most 256 bits."""
    if isa.lanes <= WIDEST:
        return isa
    return next(BY_NAME[name] for name in ("avxvnni", "avx2") if not missing_features(BY_NAME[name], cpu_features()))


def whole_columns(bits: int) -> int:
    """What the numbers of columns must be multiples of."""
    return GROUP if bits == 8 else 2 * GROUP


@dataclass(frozen=True, slots=True)
class CodedAttendKernel:
    """`attend` for 1 to 4 query heads that share keys and values of 8 or 4 bits. split: keys have `more` columns,
    which are a row of their own."""

    n_heads: int
    bits: Literal[8, 4]
    split: bool = False
    symbol: ClassVar[str] = "attend"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"attend-int{self.bits}-{self.n_heads}{'-split' if self.split else ''}"

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `attend`."""
        module, s, arguments = begin(self.name, self.symbol, isa)
        _Writer(s, Arguments(*arguments), self).write()
        s.b.ret_void()
        return module


@dataclass(frozen=True, slots=True)
class _Keys:
    """A row of each key: `n` columns at `rows`, `row_bytes` apart, and the query's codes for them.

    The codes of a head lie at `codes` + head * `head_bytes`: int8 [n], then their sizes (INT8) or, by groups, a vector
    whose first lane is -8 * sum of the codes (INT4). scales: of the heads, each for as many lanes as tokens of a block.
    """

    rows: ir.Value
    row_bytes: ir.Value
    n: ir.Value
    codes: ir.Value
    head_bytes: ir.Value
    scales: ir.Value


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the instructions of one kernel."""

    s: Simd
    a: Arguments
    kernel: CodedAttendKernel

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
        scales = []
        for head, query in enumerate(queries):
            scales.append(self._write_query(query, n, s.offset(place, s.b.mul(head_bytes, s.const(head)))))
        lanes = [scale for scale in scales for _ in range(self.block)]
        return _Keys(rows, row_bytes, n, place, head_bytes, self._vector(lanes))

    def _write_query(self, query: ir.Value, n: ir.Value, place: ir.Value) -> ir.Value:
        """Writes codes of float32 [n] of the largest size / 127; returns their scale, NaN where a value is not
        finite."""
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
        with s.loop(s.const(0), n, GROUP) as column:
            total = s.zero(s.i32)
            for first in range(0, GROUP, s.lanes):
                here = s.b.add(column, s.const(first))
                x = s.load(s.offset(query, floats(s, here)), s.f32)
                rounded = s.as_words(s.b.fadd(s.b.fmul(x, inverse), s.constant(s.f32, ROUND)))
                code = s.b.and_(s.b.sub(rounded, s.constant(s.i32, ROUND_BITS)), keep)
                s.store(s.narrow(code, 8), s.offset(place, here))
                total = s.b.add(total, code)
                if self.kernel.bits == 8:
                    size = s.b.select(s.b.icmp_signed("<", code, s.zero(s.i32)), s.b.neg(code), code)
                    s.store(s.narrow(size, 8), s.offset(place, s.b.add(n, here)))
            if self.kernel.bits == 4:
                correction = s.b.mul(s.reduce(total, "add"), ir.Constant(I32, -OFFSET))
                first_lane = s.b.insert_element(s.zero(s.i32), correction, ir.Constant(I32, 0))
                s.store(first_lane, s.offset(place, s.b.add(n, column)))
        return s.b.select(finite, s.b.fmul(extreme, s.real(1 / CODE_MAX)), s.real(float("nan")))

    # Scores ------------------------------------------------------------------------------------------------------

    def _scores(self, keys: list[_Keys]) -> None:
        """scores[h, t] = q[h] . k[t] + bias[t], a block of tokens at a time."""
        s, a = self.s, self.a
        whole = s.b.mul(s.b.sdiv(a.n_tokens, s.const(self.block)), s.const(self.block))
        with s.loop(s.const(0), whole, self.block) as token:
            bias = s.load(s.offset(a.bias, floats(s, token)), ir.VectorType(F32, self.block), 4)
            self._score_block(keys, token, [s.b.add(token, s.const(i)) for i in range(self.block)], bias, None)
        last = s.b.sub(a.n_tokens, s.const(1))
        with s.loop(whole, a.n_tokens, self.block) as token:
            tokens, real = [], []
            for i in range(self.block):
                one = s.b.add(token, s.const(i))
                real.append(s.b.icmp_signed("<=", one, last))
                tokens.append(s.b.select(real[-1], one, last))
            bias = self._vector([s.load(s.offset(a.bias, floats(s, one)), F32, 4) for one in tokens])
            self._score_block(keys, token, tokens, bias, real)

    def _score_block(
        self, keys: list[_Keys], token: ir.Value, tokens: list[ir.Value], bias: ir.Value, real: list[ir.Value] | None
    ) -> None:
        """Scores of `tokens` from `token` on; those that are not `real` are left as they are."""
        s, a, n_heads = self.s, self.a, self.kernel.n_heads
        of_part = self._products_int8 if self.kernel.bits == 8 else self._products_int4
        total = of_part(keys[0], tokens)
        for part in keys[1:]:
            total = s.b.fadd(total, of_part(part, tokens))
        for head in range(n_heads):
            scores = s.b.fadd(s.part(total, head * self.block, self.block), bias)
            if real is None:
                s.store(scores, s.offset(a.scores, floats(s, token, CHUNK * head)), 4)
                continue
            for i, one in enumerate(real):
                with s.b.if_then(one):
                    score = s.b.extract_element(scores, ir.Constant(I32, i))
                    s.store(score, s.offset(a.scores, floats(s, tokens[i], CHUNK * head)), 4)

    def _products_int8(self, keys: _Keys, tokens: list[ir.Value]) -> ir.Value:
        """A vector of q[h] . k[t], head by head."""
        s = self.s
        rows = [s.offset(keys.rows, s.b.mul(token, keys.row_bytes)) for token in tokens]

        def add(column: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            codes = [s.load(s.offset(row, column), s.u8) for row in rows]
            added: list[ir.Value] = []
            for head in range(self.kernel.n_heads):
                place = s.offset(s.offset(keys.codes, s.b.mul(keys.head_bytes, s.const(head))), column)
                query, size = s.load(place, s.u8), s.load(s.offset(place, keys.n), s.u8)
                for i, code in enumerate(codes):
                    added.append(self._dot(sums[head * len(rows) + i], size, s.copy_sign(code, query)))
            return added

        n_sums = self.kernel.n_heads * len(rows)
        sums = s.fold(s.const(0), keys.n, 4 * s.lanes, [s.zero(s.i32)] * n_sums, add)
        products = self._sum_each([s.to_f32(total) for total in sums])
        scales = [s.load(s.offset(row, keys.n), F32, 1) for row in rows] * self.kernel.n_heads
        return s.b.fmul(products, s.b.fmul(self._vector(scales), keys.scales))

    def _products_int4(self, keys: _Keys, tokens: list[ir.Value]) -> ir.Value:
        """As `_products_int8`; a byte's halves are columns of two groups."""
        s = self.s
        rows = [s.offset(keys.rows, s.b.mul(token, keys.row_bytes)) for token in tokens]
        half = s.b.sdiv(keys.n, s.const(2))

        def add(byte: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            added = list(sums)
            for i, row in enumerate(rows):
                parts = [s.load(s.offset(s.offset(row, byte), at), s.u8) for at in range(0, GROUP, 4 * s.lanes)]
                for column, take in ((byte, s.low_nibbles), (s.b.add(half, byte), s.high_nibbles)):
                    codes, scale = [take(part) for part in parts], s.splat(self._int4_scale(row, half, column))
                    for head in range(self.kernel.n_heads):
                        at = head * len(rows) + i
                        products = s.to_f32(self._group_product(keys, head, column, codes))
                        added[at] = s.mul_add(products, scale, added[at])
            return added

        n_sums = self.kernel.n_heads * len(rows)
        sums = s.fold(s.const(0), half, GROUP, [s.zero(s.f32)] * n_sums, add)
        return s.b.fmul(self._sum_each(sums), keys.scales)

    def _sum_each(self, sums: list[ir.Value]) -> ir.Value:
        """The sums of the lanes of each vector; three heads leave some lanes of the result over, which become 0."""
        return self.s.sum_each(sums + [self.s.zero(self.s.f32)] * (self.s.lanes - len(sums)))

    def _group_product(self, keys: _Keys, head: int, column: ir.Value, codes: list[ir.Value]) -> ir.Value:
        """int32 lanes whose sum is that of a group's products, without the codes' offset."""
        s = self.s
        place = s.offset(s.offset(keys.codes, s.b.mul(keys.head_bytes, s.const(head))), column)
        total = s.load(s.offset(place, keys.n), s.i32)
        for number, part in enumerate(codes):
            total = self._dot(total, part, s.load(s.offset(place, 4 * s.lanes * number), s.u8))
        return total

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
        s, a, n_heads = self.s, self.a, self.kernel.n_heads
        with s.loop(s.const(0), a.n_tokens) as token:
            scale = s.load(s.offset(s.offset(a.v, s.b.mul(token, a.v_bytes)), a.v_dim), F32, 1)
            for head in range(n_heads):
                place = s.offset(a.scores, floats(s, token, CHUNK * head))
                s.store(s.b.fmul(s.load(place, F32, 4), scale), place, 4)
        weights = [s.offset(a.scores, 4 * CHUNK * head) for head in range(n_heads)]
        n_vectors = SUMS // n_heads
        whole = s.b.mul(s.b.sdiv(a.v_dim, s.const(n_vectors * s.lanes)), s.const(n_vectors * s.lanes))
        for start, stop, count in ((s.const(0), whole, n_vectors), (whole, a.v_dim, 1)):
            with s.loop(start, stop, count * s.lanes) as column:
                sums = self._gathered(s.offset(a.v, column), count, [weights], [self._signed])
                for at, total in enumerate(sums):
                    head, vector = divmod(at, count)
                    self._store_out(total, head, s.b.add(column, s.const(s.lanes * vector)))

    def _values_int4(self) -> None:
        """The same, 32 bytes of the rows after the other: columns of two groups, whose scaled weights are made first,
        and their sums for the codes' offset."""
        s, a, n_heads = self.s, self.a, self.kernel.n_heads
        half = s.b.sdiv(a.v_dim, s.const(2))
        weights = [
            [s.offset(self.room, 4 * CHUNK * (n_heads * side + head)) for head in range(n_heads)] for side in range(2)
        ]
        n_vectors = SUMS // (2 * n_heads)
        with s.loop(s.const(0), half, GROUP) as byte:
            columns = [byte, s.b.add(half, byte)]
            totals = self._scaled_weights(half, columns, weights)
            offsets = [s.splat(s.b.fmul(total, s.real(-OFFSET))) for total in totals]
            for first in range(0, GROUP, n_vectors * s.lanes):
                place = s.offset(s.offset(a.v, byte), first)
                sums = self._gathered(place, n_vectors, weights, [self._low, self._high])
                for at, total in enumerate(sums):
                    side_head, vector = divmod(at, n_vectors)
                    side, head = divmod(side_head, n_heads)
                    column = s.b.add(columns[side], s.const(first + s.lanes * vector))
                    self._store_out(s.b.fadd(total, offsets[side_head]), head, column)

    def _scaled_weights(self, half: ir.Value, columns: list[ir.Value], weights: list[list[ir.Value]]) -> list[ir.Value]:
        """Writes each head's weights times the values' scales of two groups; returns their sums."""
        s, a = self.s, self.a

        def scale_token(token: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            row = s.offset(a.v, s.b.mul(token, a.v_bytes))
            added: list[ir.Value] = []
            for side, column in enumerate(columns):
                scale = self._int4_scale(row, half, column)
                for head, place in enumerate(weights[side]):
                    weight = s.b.fmul(s.load(s.offset(a.scores, floats(s, token, CHUNK * head)), F32, 4), scale)
                    s.store(weight, s.offset(place, floats(s, token)), 4)
                    added.append(s.b.fadd(totals[len(added)], weight))
            return added

        return s.fold(s.const(0), a.n_tokens, 1, [s.real(0)] * (2 * self.kernel.n_heads), scale_token)

    def _gathered(
        self, first: ir.Value, n_vectors: int, weights: list[list[ir.Value]],
        takes: list[Callable[[ir.Value], ir.Value]],
    ) -> list[ir.Value]:  # fmt: skip
        """Sums over tokens of weights times what is taken of n_vectors * lanes bytes: by taking, head, vector."""
        s, a = self.s, self.a

        def add(token: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            row = s.offset(first, s.b.mul(token, a.v_bytes))
            s.prefetch(s.offset(row, s.b.mul(a.v_bytes, s.const(PREFETCH_TOKENS))))
            narrow = ir.VectorType(I8, s.lanes)
            codes = [s.load(s.offset(row, s.lanes * vector), narrow) for vector in range(n_vectors)]
            added: list[ir.Value] = []
            for take, places in zip(takes, weights, strict=True):
                parts = [s.to_f32(take(code)) for code in codes]
                for place in places:
                    weight = s.splat_load(s.offset(place, floats(s, token)), F32)
                    added += [s.mul_add(weight, part, sums[len(added) + i]) for i, part in enumerate(parts)]
            return added

        n_sums = len(takes) * len(weights[0]) * n_vectors
        return s.fold(s.const(0), a.n_tokens, 1, [s.zero(s.f32)] * n_sums, add)

    def _signed(self, codes: ir.Value) -> ir.Value:
        return self.s.b.sext(codes, self.s.i32)

    def _low(self, codes: ir.Value) -> ir.Value:
        s = self.s
        return s.b.and_(s.b.zext(codes, s.i32), s.constant(s.i32, 15))

    def _high(self, codes: ir.Value) -> ir.Value:
        s = self.s
        return s.b.lshr(s.b.zext(codes, s.i32), s.constant(s.i32, 4))

    def _store_out(self, values: ir.Value, head: int, column: ir.Value) -> None:
        """Stores a vector of columns of a head's result."""
        s, a = self.s, self.a
        s.store(values, s.offset(a.out, floats(s, s.b.add(s.b.mul(a.v_dim, s.const(head)), column))))

    def _vector(self, scalars: list[ir.Value]) -> ir.Value:
        """A vector of scalars, one a lane. Of the heads of a block, the lanes that are left over are 0."""
        n_lanes = len(scalars) if len(scalars) <= self.block else self.s.lanes
        vector: ir.Value = ir.Constant(ir.VectorType(scalars[0].type, n_lanes), None)
        for lane, scalar in enumerate(scalars):
            vector = self.s.b.insert_element(vector, scalar, ir.Constant(I32, lane))
        return vector
