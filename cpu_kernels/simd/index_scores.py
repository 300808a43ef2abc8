"""Scores of cached tokens by the keys of an index: how much each counts for a query, before attention looks at it.

index_scores(queries, weights, width, keys, key_bytes, dim, n_tokens, scores)

scores[t] = sum over heads h of weights[h] * max(0, queries[h] . keys[t]), in float32. queries float32 [dim, width]: a
column is a head's query; weights float32 [width]. width is a multiple of `heads_at_once`, heads that there are not have
zeros. keys: rows of `dtype` [dim], key_bytes apart. A NaN in a key or query stays one in the scores.

Heads lie in the lanes, so that no sum goes across them but the last one of each token, and dim may be any number. The
additions of a token's score are in the same order whichever tokens are computed beside it. Source: the lightning
indexer of DeepSeek-V3.2 (DeepSeek-AI, 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from llvmlite import ir

from cpu_kernels.host.isa import Isa
from cpu_kernels.simd.vectors import F32, I16, I32, I64, POINTER, VOID, Simd

TOKENS = 4
"""Keys that share a reading of the queries."""
VECTORS = 2
"""Vectors of heads that share a reading of a key: with TOKENS, sums that leave some of AVX2's 16 registers free."""


def heads_at_once(isa: Isa) -> int:
    """What the number of heads is filled up to a multiple of."""
    return VECTORS * isa.lanes


@dataclass(frozen=True, slots=True)
class IndexScoresKernel:
    """`index_scores` for keys that are stored as `dtype`."""

    dtype: Literal["bfloat16", "float32"]
    symbol: ClassVar[str] = "index_scores"

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"index-scores-{self.dtype}"

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with `index_scores`."""
        module = ir.Module(self.name)
        kinds = [POINTER, POINTER, I64, POINTER, I64, I64, I64, POINTER]
        function = ir.Function(module, ir.FunctionType(VOID, kinds), self.symbol)
        s = Simd(ir.IRBuilder(function.append_basic_block()), isa)
        arguments = _Arguments(*[*function.args, self.dtype == "bfloat16"])
        whole = s.b.mul(s.b.sdiv(arguments.n_tokens, s.const(TOKENS)), s.const(TOKENS))
        for start, stop, count in ((s.const(0), whole, TOKENS), (whole, arguments.n_tokens, 1)):
            with s.loop(start, stop, count) as token:
                _score(s, arguments, [s.b.add(token, s.const(i)) for i in range(count)])
        s.b.ret_void()
        return module


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The function's arguments by name, and how keys are stored."""

    queries: ir.Value
    weights: ir.Value
    width: ir.Value
    keys: ir.Value
    key_bytes: ir.Value
    dim: ir.Value
    n_tokens: ir.Value
    scores: ir.Value
    is_bf16: bool

    def splat(self, s: Simd, row: ir.Value, column: ir.Value) -> ir.Value:
        """All lanes = one value of a key."""
        if not self.is_bf16:
            return s.splat_load(s.offset(row, s.b.mul(column, s.const(4))), F32)
        half = s.load(s.offset(row, s.b.mul(column, s.const(2))), I16, 2)
        return s.splat(s.b.bitcast(s.b.shl(s.b.zext(half, I32), ir.Constant(I32, 16)), F32))


def _score(s: Simd, a: _Arguments, tokens: list[ir.Value]) -> None:
    """Stores the scores of some tokens."""
    rows = [s.offset(a.keys, s.b.mul(token, a.key_bytes)) for token in tokens]
    heads = partial(_add_heads, s, a, rows)
    totals = s.fold(s.const(0), a.width, VECTORS * s.lanes, [s.zero(s.f32)] * len(rows), heads)
    for token, total in zip(tokens, totals, strict=True):
        s.store(s.sum_floats(total), s.offset(a.scores, s.b.mul(token, s.const(4))), 4)


def _add_heads(
    s: Simd, a: _Arguments, rows: Sequence[ir.Value], head: ir.Value, totals: Sequence[ir.Value]
) -> list[ir.Value]:
    """The totals of the tokens with what VECTORS vectors of heads give."""
    columns = s.offset(a.queries, s.b.mul(head, s.const(4)))
    query_bytes = s.b.mul(a.width, s.const(4))

    def add(column: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        place = s.offset(columns, s.b.mul(column, query_bytes))
        queries = [s.load(s.offset(place, 4 * s.lanes * i), s.f32) for i in range(VECTORS)]
        values = [a.splat(s, row, column) for row in rows]
        return [
            s.mul_add(value, query, sums[VECTORS * i + j])
            for i, value in enumerate(values) for j, query in enumerate(queries)
        ]  # fmt: skip

    products = s.fold(s.const(0), a.dim, 1, [s.zero(s.f32)] * (VECTORS * len(rows)), add)
    added = []
    for i, total in enumerate(totals):
        for j in range(VECTORS):
            weight = s.load(s.offset(s.offset(a.weights, s.b.mul(head, s.const(4))), 4 * s.lanes * j), s.f32)
            total = s.mul_add(s.maximum(s.zero(s.f32), products[VECTORS * i + j]), weight, total)  # NaN stays NaN
        added.append(total)
    return added
