"""Attention of one query token per head over a run of cached tokens, as flash decoding's first step.

attend(q, k, k_bytes, v, v_bytes, bias, n_tokens, dim, v_dim, scores, stats, out, more, more_bytes, more_dim)

q float32 [heads, dim + more_dim], scaled already; k and v: rows of bfloat16 (or float32), k_bytes and v_bytes apart,
that all the heads share. more: where the last more_dim columns of keys lie, more_bytes apart, if not behind the first
(latent attention keeps the rotated part by itself); more_dim 0: there are none.
bias float32 [n_tokens] is added to every head's scores. scores: scratch float32 [heads, CHUNK]. For each head, stats
gets m = max score and the sum of exp(score - m) (float32 [heads, 2]), out the sum of exp(score - m) * v (float32
[heads, v_dim]). dim, v_dim and more_dim are multiples of the ISA's lanes; n_tokens is 1 to CHUNK.

`attend` of chosen tokens has one argument more, positions int32 [n_tokens]: token t is row positions[t] of k, v and
more.

Partial results of runs are joined by ``exp(m - max m)`` (Dao et al., Flash-Decoding, 2023).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from llvmlite import ir

from cpu_kernels.format.layout import LINE_BYTES
from cpu_kernels.host.isa import Isa, is_zen
from cpu_kernels.simd.functions import exp
from cpu_kernels.simd.vectors import F32, I32, I64, POINTER, VOID, Simd

RUN = 256
"""Cached tokens of a run: keys and values of 128 columns (128 KiB) stay in L2 for the heads that share them."""
CHUNK = 4 * RUN
"""Cached tokens of a call at most."""
HEAD_BLOCK = 4
"""Query heads that share one reading of keys and values."""
LOWEST = -1.0e38
"""Below every score; finite, so that a run whose tokens are all masked has no inf - inf."""
PREFETCH_TOKENS = 8
"""How far ahead of its use a row of values is asked for."""
FAR_KEY_BYTES, FAR_TOKENS = 4096, 2 * PREFETCH_TOKENS
"""The same where every line is asked for, of keys too: Intel's prefetchers alone leave half of the memory's rate unused
(OLMoE's shape, 4 layers, 8,000 tokens, 2 threads: 32.6 tokens/s without, 36 with it). Zen was measured without."""
VALUE_TOKENS = 4
"""Tokens whose values meet the sums at a time. Their rows are read as a whole, so that memory sees one stream, and the
sums wait in L1 meanwhile. (Some columns of all tokens at a time, with their sums in registers, read a part of each row,
run after run: 17.5 GB/s with AVX2 and 21.6 with AVX-512, where it is 25.7 and 27.3 now, with tickets of several runs
and one prefetch a line besides; OLMoE's heads, 8,000 tokens, 2 threads of a Xeon, measured.)"""


@dataclass(frozen=True, slots=True)
class AttendKernel:
    """`attend` for a number of query heads that share keys and values, which are stored as `dtype`.

    far: every line of keys and values is asked for, far ahead of its use. chosen: tokens lie where positions say.
    """

    n_heads: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    far: bool = field(default_factory=lambda: not is_zen())
    chosen: bool = False
    symbol: ClassVar[str] = "attend"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        dtype = "" if self.dtype == "bfloat16" else f"-{self.dtype}"
        return f"attend-{self.n_heads}{dtype}" + "-far" * self.far + "-chosen" * self.chosen

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `attend`."""
        return _module(self, isa)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The function's arguments by name."""

    q: ir.Value
    k: ir.Value
    k_bytes: ir.Value
    v: ir.Value
    v_bytes: ir.Value
    bias: ir.Value
    n_tokens: ir.Value
    dim: ir.Value
    v_dim: ir.Value
    scores: ir.Value
    stats: ir.Value
    out: ir.Value
    more: ir.Value
    more_bytes: ir.Value
    more_dim: ir.Value


@dataclass(frozen=True, slots=True)
class _Arguments(Arguments):
    """The same, and how keys and values are stored."""

    is_bf16: bool
    far: bool
    positions: ir.Value | None

    def row(self, s: Simd, token: ir.Value) -> ir.Value:
        """The number of the row of a token of the run."""
        if self.positions is None:
            return token
        return s.b.sext(s.load(s.offset(self.positions, s.b.mul(token, s.const(4))), I32, 4), I64)

    @property
    def element_bytes(self) -> int:
        """Bytes of a cached value."""
        return 2 if self.is_bf16 else 4

    @property
    def line_columns(self) -> int:
        """Columns of a cache line."""
        return LINE_BYTES // self.element_bytes

    def load(self, s: Simd, place: ir.Value) -> ir.Value:
        """A vector of cached values as float32."""
        return s.load_bf16(place) if self.is_bf16 else s.load(place, s.f32)


def begin(name: str, symbol: str, isa: Isa, *, chosen: bool = False) -> tuple[ir.Module, Simd, list[Any]]:
    """A module with `attend` (of chosen tokens) as function `symbol`, still without instructions; its arguments."""
    module = ir.Module(name)
    kinds = [POINTER, POINTER, I64, POINTER, I64, POINTER, I64, I64, I64, POINTER, POINTER, POINTER]
    kinds += [POINTER, I64, I64, *[POINTER] * chosen]
    function = ir.Function(module, ir.FunctionType(VOID, kinds), symbol)
    return module, Simd(ir.IRBuilder(function.append_basic_block()), isa), list(function.args)


def _module(kernel: AttendKernel, isa: Isa) -> ir.Module:
    module, s, arguments = begin(kernel.name, kernel.symbol, isa, chosen=kernel.chosen)
    positions = arguments.pop() if kernel.chosen else None
    a = _Arguments(*[*arguments, kernel.dtype == "bfloat16", kernel.far, positions])
    _scores(s, a, kernel.n_heads)
    softmax(s, a, kernel.n_heads)
    _values(s, a, kernel.n_heads)
    s.b.ret_void()
    return module


def _scores(s: Simd, a: _Arguments, n_heads: int) -> None:
    """scores[h, t] = q[h] . k[t] + bias[t]; up to the next whole vector, LOWEST.

    Several heads take as many tokens at a time as give a whole vector of sums (11 % less time than one by one; a single
    head would read 16 rows at once for it, which the prefetchers do not follow: 3 times as long. Zen 4, measured). Each
    sum is the same as that of a single token.
    """
    fill_last_vector(s, a, n_heads)
    first = s.const(0) if n_heads == 1 else _scores_by_blocks(s, a, n_heads)
    with s.loop(first, a.n_tokens) as token:
        bias = s.load(s.offset(a.bias, floats(s, token)), F32, 4)
        for head, total in enumerate(_products(s, a, n_heads, token, 1)):
            score = s.b.fadd(s.sum_floats(total), bias)
            s.store(score, s.offset(a.scores, floats(s, token, CHUNK * head)), 4)


def fill_last_vector(s: Simd, a: Arguments, n_heads: int) -> None:
    """The last vector of each head's scores = LOWEST."""
    lanes = s.const(s.lanes)
    whole = s.b.mul(s.b.sdiv(s.b.sub(s.b.add(a.n_tokens, lanes), s.const(1)), lanes), lanes)
    for head in range(n_heads):
        with s.loop(s.b.sub(whole, lanes), whole) as token:
            s.store(s.real(LOWEST), s.offset(a.scores, floats(s, token, CHUNK * head)), 4)


def _scores_by_blocks(s: Simd, a: _Arguments, n_heads: int) -> ir.Value:
    """Scores of whole blocks of lanes / n_heads tokens; returns the first token that is in none."""
    block = s.lanes // n_heads
    blocked = _whole(s, a.n_tokens, block)
    with s.loop(s.const(0), blocked, block) as token:
        sums = s.sum_each(_products(s, a, n_heads, token, block))
        bias = s.load(s.offset(a.bias, floats(s, token)), ir.VectorType(F32, block), 4)
        for head in range(n_heads):
            score = s.b.fadd(s.part(sums, head * block, block), bias)
            s.store(score, s.offset(a.scores, floats(s, token, CHUNK * head)), 4)
    return blocked


def _products(s: Simd, a: _Arguments, n_heads: int, token: ir.Value, n_tokens: int) -> list[ir.Value]:
    """Vectors, head by head, whose lanes add up to q[head] . k[token + i] for n_tokens tokens."""
    tokens = [a.row(s, s.b.add(token, s.const(i))) for i in range(n_tokens)]
    query_bytes = s.b.mul(s.b.add(a.dim, a.more_dim), s.const(4))
    sums = [s.zero(s.f32)] * (n_heads * n_tokens)
    for first, row_bytes, n_columns, query in (
        (a.k, a.k_bytes, a.dim, a.q), (a.more, a.more_bytes, a.more_dim, s.offset(a.q, s.b.mul(a.dim, s.const(4)))),
    ):  # fmt: skip
        keys = [s.offset(first, s.b.mul(each, row_bytes)) for each in tokens]
        line = a.line_columns
        whole = _whole(s, n_columns, line)
        sums = s.fold(s.const(0), whole, line, sums, partial(_add_line, s, a, keys, query, query_bytes))
        sums = s.fold(whole, n_columns, s.lanes, sums, partial(_add_columns, s, a, keys, query, query_bytes))
    return sums


def _add_line(
    s: Simd, a: _Arguments, keys: list[ir.Value], query: ir.Value, query_bytes: ir.Value, column: ir.Value,
    sums: list[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """The sums of `_products` with the columns of a cache line more."""
    if a.far and a.positions is None:
        for key in keys:
            s.prefetch(s.offset(s.offset(key, s.b.mul(column, s.const(a.element_bytes))), FAR_KEY_BYTES))
    for first in range(0, a.line_columns, s.lanes):
        sums = _add_columns(s, a, keys, query, query_bytes, s.b.add(column, s.const(first)), sums)
    return sums


def _add_columns(
    s: Simd, a: _Arguments, keys: list[ir.Value], query: ir.Value, query_bytes: ir.Value, column: ir.Value,
    sums: list[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """The sums of `_products` with a vector of columns more."""
    parts = [a.load(s, s.offset(key, s.b.mul(column, s.const(a.element_bytes)))) for key in keys]
    added: list[ir.Value] = []
    for head in range(len(sums) // len(keys)):
        place = s.offset(query, s.b.add(s.b.mul(query_bytes, s.const(head)), s.b.mul(column, s.const(4))))
        values = s.load(place, s.f32)
        added += [s.mul_add(part, values, sums[head * len(keys) + i]) for i, part in enumerate(parts)]
    return added


def softmax(s: Simd, a: Arguments, n_heads: int) -> None:
    """Scores become exp(score - m), stats m and the sum, head by head."""
    for head in range(n_heads):
        _softmax(s, s.offset(a.scores, 4 * CHUNK * head), s.offset(a.stats, 8 * head), a.n_tokens)


def _softmax(s: Simd, scores: ir.Value, stats: ir.Value, n_tokens: ir.Value) -> None:
    """scores[t] becomes exp(scores[t] - m); stats = m, sum."""

    def largest(token: ir.Value, best: list[ir.Value]) -> list[ir.Value]:
        return [s.maximum(s.load(s.offset(scores, floats(s, token)), s.f32), best[0])]

    (best,) = s.fold(s.const(0), n_tokens, s.lanes, [s.constant(s.f32, LOWEST)], largest)
    top = s.max_float(best)
    shift = s.splat(s.b.fneg(top))

    def weigh(token: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
        place = s.offset(scores, floats(s, token))
        weight = exp(s, s.b.fadd(s.load(place, s.f32), shift))
        s.store(weight, place)
        return [s.b.fadd(total[0], weight)]

    (total,) = s.fold(s.const(0), n_tokens, s.lanes, [s.zero(s.f32)], weigh)
    s.store(top, stats, 4)
    s.store(s.sum_floats(total), s.offset(stats, 4), 4)


def _values(s: Simd, a: _Arguments, n_heads: int) -> None:
    """out[h] = sum over t of scores[h, t] * v[t], VALUE_TOKENS tokens at a time. Each column's additions are in the
    order of the tokens."""
    with s.loop(s.const(0), s.b.mul(a.v_dim, s.const(n_heads)), s.lanes) as at:
        s.store(s.zero(s.f32), s.offset(a.out, floats(s, at)))
    whole = _whole(s, a.n_tokens, VALUE_TOKENS)
    for start, stop, n_tokens in ((s.const(0), whole, VALUE_TOKENS), (whole, a.n_tokens, 1)):
        with s.loop(start, stop, n_tokens) as token:
            _add_values(s, a, n_heads, [s.b.add(token, s.const(i)) for i in range(n_tokens)])


def _add_values(s: Simd, a: _Arguments, n_heads: int, tokens: list[ir.Value]) -> None:
    """Adds the tokens' weighted values to the heads' results."""
    rows = [s.offset(a.v, s.b.mul(a.row(s, token), a.v_bytes)) for token in tokens]
    weights = [
        [s.splat_load(s.offset(a.scores, floats(s, token, CHUNK * head)), F32) for token in tokens]
        for head in range(n_heads)
    ]
    n_lines, n_ahead = (1, FAR_TOKENS) if a.far else (2, PREFETCH_TOKENS)  # one line in n_lines is asked for
    ahead = s.b.mul(a.v_bytes, s.const(n_ahead))
    step = n_lines * a.line_columns
    whole = _whole(s, a.v_dim, step)
    with s.loop(s.const(0), whole, step) as column:
        for row in rows if a.positions is None else ():  # chosen rows do not follow each other
            s.prefetch(s.offset(s.offset(row, s.b.mul(column, s.const(a.element_bytes))), ahead))
        for first in range(0, step, s.lanes):
            _add_value_columns(s, a, rows, weights, s.b.add(column, s.const(first)))
    with s.loop(whole, a.v_dim, s.lanes) as column:
        _add_value_columns(s, a, rows, weights, column)


def _add_value_columns(
    s: Simd, a: _Arguments, rows: list[ir.Value], weights: list[list[ir.Value]], column: ir.Value
) -> None:
    """A vector of columns of `_add_values`. weights: by head and row."""
    parts = [a.load(s, s.offset(row, s.b.mul(column, s.const(a.element_bytes)))) for row in rows]
    for head, own in enumerate(weights):
        place = s.offset(a.out, floats(s, s.b.add(s.b.mul(a.v_dim, s.const(head)), column)))
        total = s.load(place, s.f32)
        for weight, part in zip(own, parts, strict=True):
            total = s.mul_add(weight, part, total)
        s.store(total, place)


def _whole(s: Simd, n: ir.Value, step: int) -> ir.Value:
    """The largest multiple of `step` up to n."""
    return s.b.mul(s.b.sdiv(n, s.const(step)), s.const(step))


def floats(s: Simd, index: ir.Value, first: int = 0) -> ir.Value:
    """Byte offset of float32 number first + index."""
    return s.b.mul(s.b.add(index, s.const(first)), s.const(4))
