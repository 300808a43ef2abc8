"""Attention of the compiled step over caches of every kind of rows, against float64 on the values that were stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cpu_kernels.errors import LayoutError
from cpu_kernels.host.isa import BY_NAME, PATHS, cpu_features, detect, missing_features
from cpu_kernels.simd import coded_attention
from cpu_kernels.simd.attention import LOWEST
from cpu_kernels.simd.coded_attention import CodedAttendKernel
from cpu_kernels.simd.compile import Target, assembly
from cpu_kernels.step import attend
from cpu_kernels.step.cached import PLACE_SIZE
from cpu_kernels.step.kv_rows import load_tokens, store_tokens
from cpu_kernels.step.program import MASK, MASK_ROW, N_ROWS, PADDING, SEEN, SEQUENCE, Program
from cpu_kernels.step.run import perform
from cpu_kernels.step.stored import BFLOAT16, FLOAT32, INT4, INT8, KIND_OF, row_bytes

TOLERANCES = {FLOAT32: 1e-5, BFLOAT16: 1e-2, INT8: 2e-2, INT4: 0.25}
"""Relative error of the result against the float32 cache, of normally distributed values and keys, of which one column
is 8 times as large (measured: 0.1 to 0.7 % in BFLOAT16, 0.9 to 1.8 % in INT8, 3 to 22 % in INT4; most for 24 columns)
"""
KERNEL_ERROR = 1.1e-2
"""The same against float64 attention over the stored rows: what the rounding of the query to int8 leaves."""


@dataclass(frozen=True)
class Kind:
    """A kind of attention: heads, heads of keys and values, columns, and what is special."""

    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    v_dim: int = 64
    shared: int = 0
    sight: attend.Sight = attend.EVERYTHING
    has_sinks: bool = False
    is_padded: bool = False
    n_tokens: int = 600


KINDS = {
    "grouped": Kind(),
    "one head": Kind(4, 4, 128, 128),
    "tickets of several tasks": Kind(32, 32),
    "groups of three": Kind(6, 2),
    "odd size": Kind(4, 2, 24, 40),
    "a group beyond whole lines": Kind(6, 6, 96, 32),
    "six groups": Kind(4, 4, 192, 192),
    "window": Kind(sight=attend.Sight(100)),
    "blocks": Kind(sight=attend.Sight(128, in_blocks=True)),
    "sinks": Kind(has_sinks=True),
    "padding": Kind(is_padded=True),
    "latent": Kind(8, 1, 128, 128, shared=64),
}
LONG = {
    "runs of two lengths": Kind(2, 2, n_tokens=3640),
    "the longest runs": Kind(2, 1, n_tokens=7600),
    "runs that many heads share": Kind(8, 1, 32, 32, n_tokens=3840),
}


def turned(x: torch.Tensor) -> torch.Tensor:
    """The Hadamard transform of the last dimension, by its matrix."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < x.shape[-1] & -x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = x.double().unflatten(-1, (-1, len(matrix)))
    return (blocks @ matrix / len(matrix) ** 0.5).flatten(-2).float()


class Attended:
    """One attention over random keys and values, stored in each of the kinds of rows."""

    def __init__(self, kind: Kind) -> None:
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.kind = kind
        self.query = normal(2, kind.heads, kind.dim + kind.shared) / (kind.dim + kind.shared) ** 0.5
        self.keys = normal(2, kind.kv_heads, kind.n_tokens, kind.dim)
        self.keys[..., 3] *= 8  # as keys are: some columns are much larger
        self.values = normal(2, kind.kv_heads, kind.n_tokens, kind.shared or kind.v_dim)
        self.sinks = normal(kind.heads).numpy() if kind.has_sinks else None
        self.seen = [kind.n_tokens, kind.n_tokens - 77]
        self.isa = detect().isa.name

    def stored(self, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as rows."""
        rows = []
        for part in (self.keys, self.values):
            made = torch.zeros(*part.shape[:3], row_bytes(kind, part.shape[3]), dtype=torch.uint8)
            store_tokens(kind, part, made)
            rows.append(made)
        return rows[0], rows[1]

    def run(
        self, kind: int, threads: int, rows: Sequence[tuple[int, int]] = (), query: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The result [rows, heads, v_dim] of the operation. rows: the sequence of each, and how many tokens it sees."""
        own, places_of_rows = self.kind, list(rows) or list(enumerate(self.seen))
        n_rows = len(places_of_rows)
        program = Program(threads)
        width = own.dim + own.shared
        source, out = program.floats("query", own.heads * width), program.floats("out", own.heads * own.v_dim)
        places = program.zeros(16 * PLACE_SIZE, np.int64).reshape(16, PLACE_SIZE)
        call = attend.add_attention(
            program, own.heads, own.kv_heads, own.dim, own.v_dim, source, places.ctypes.data, out,
            sight=own.sight, sinks=self.sinks, shared=own.shared,
        )  # fmt: skip
        attend.set_kernels(call, kind, self.isa)
        room = np.empty(sum(attend.room_bytes(call, n_rows, own.n_tokens)), np.uint8)
        parts = attend.room_bytes(call, n_rows, own.n_tokens)[0]
        attend.give_room(call, room.ctypes.data, room.ctypes.data + parts, own.n_tokens)
        program.seal()
        held = self.stored(kind)
        for sequence in range(2):
            for at, part in enumerate(held):
                places[sequence, 3 * at : 3 * at + 3] = part[sequence].data_ptr(), part.stride(1), part.stride(2)
            places[sequence, 6:8] = kind, 0
        for row, (sequence, seen) in enumerate(places_of_rows):
            program.rows[row, [SEQUENCE, SEEN, PADDING]] = sequence, seen, 0
        mask = self.mask()
        program.state[N_ROWS] = n_rows
        if own.is_padded:
            program.state[[MASK, MASK_ROW]] = mask.ctypes.data, own.n_tokens
        asked = self.query if query is None else query
        if kind in (INT8, INT4):
            asked = torch.cat([turned(part) for part in asked.split([own.dim, own.shared], -1) if part.numel()], -1)
        buffers = {name: buffer for (name, _), buffer in program.buffers.items()}
        buffers["query"].view(np.float32)[: asked.numel()] = asked.flatten().numpy()
        perform(program)
        found = buffers["out"].view(np.float32)[: n_rows * own.heads * own.v_dim].copy()
        return torch.from_numpy(found).view(n_rows, own.heads, own.v_dim)

    def mask(self) -> np.ndarray:
        """float32 [2, own.n_tokens]: padding before the sequences."""
        mask = np.zeros((2, self.kind.n_tokens), np.float32)
        mask[0, :9] = LOWEST
        return mask

    def expected(self, kind: int = FLOAT32) -> torch.Tensor:
        """The same by float64, over what a kind's rows stand for."""
        own, results = self.kind, []
        parts = []
        for rows, part in zip(self.stored(kind), (self.keys, self.values), strict=True):
            loaded = torch.empty_like(part)
            load_tokens(kind, rows, loaded)
            parts.append(loaded.double())
        keys, values = (torch.cat(parts, -1), parts[0]) if own.shared else parts
        for sequence, seen in enumerate(self.seen):
            first = 0
            if own.sight.window:
                own_block = (seen - 1) // own.sight.window * own.sight.window
                first = own_block if own.sight.in_blocks else seen - own.sight.window
            group = own.heads // own.kv_heads
            k, v = (x[sequence, :, first:seen].repeat_interleave(group, 0) for x in (keys, values))
            scores = (self.query[sequence].double()[:, None] @ k.transpose(1, 2))[:, 0]
            if own.is_padded:
                scores = scores + torch.from_numpy(self.mask()[sequence, first:seen]).double()
            sinks = torch.from_numpy(self.sinks).double()[:, None] if self.sinks is not None else scores[:, :0]
            weights = torch.softmax(torch.cat([scores, sinks], 1), 1)[:, : scores.shape[1]]
            results.append((weights[:, None] @ v)[:, 0])
        return torch.stack(results)


@pytest.mark.parametrize(
    "name", ["one head", "groups of three", "odd size", "padding", "window", "runs of two lengths"]
)
def test_rows_of_one_sequence_get_the_bits_that_each_has_alone(name: str) -> None:
    attended = Attended((KINDS | LONG)[name])
    own = attended.kind
    rows = [(1, own.n_tokens - 9 + i) for i in range(7)] + [(0, 513), (0, 514)]
    rows += [(0, seen) for seen in range(3582, 3590) if seen < own.n_tokens]  # where runs become longer
    query = torch.randn(len(rows), own.heads, own.dim, generator=torch.Generator().manual_seed(3)) / own.dim**0.5
    for kind in KIND_OF.values():
        together = attended.run(kind, 2, rows, query)
        alone = [attended.run(kind, 1, [row], query[i : i + 1]) for i, row in enumerate(rows)]
        assert torch.equal(together, torch.cat(alone)), kind


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_attention_reads_every_kind_of_rows(name: str) -> None:
    attended = Attended(KINDS[name])
    exact = attended.expected()
    for kind in KIND_OF.values():
        found = attended.run(kind, 1)
        assert error(found, exact) <= TOLERANCES[kind], (name, kind)
        assert error(found, attended.expected(kind)) <= (KERNEL_ERROR if kind in (INT8, INT4) else 1e-5), (name, kind)
        for threads in (2, 3):
            assert torch.equal(found, attended.run(kind, threads)), (name, kind, threads)


@pytest.mark.parametrize("name", LONG)
def test_runs_of_long_contexts(name: str) -> None:
    attended = Attended(LONG[name])
    for kind in KIND_OF.values():
        found = attended.run(kind, 1)
        assert error(found, attended.expected(kind)) <= (KERNEL_ERROR if kind in (INT8, INT4) else 1e-5), (name, kind)
        for threads in (2, 3):
            assert torch.equal(found, attended.run(kind, threads)), (name, kind, threads)


def here() -> list[str]:
    return [path.name for path in PATHS if not missing_features(path, cpu_features())]


@pytest.mark.parametrize("isa", here())
def test_arithmetic_of_every_path(isa: str) -> None:
    for name in ("one head", "a group beyond whole lines"):
        attended = Attended(KINDS[name])
        attended.isa = isa
        for kind in (INT8, INT4):
            assert error(attended.run(kind, 1), attended.expected(kind)) <= KERNEL_ERROR, (name, kind)


def test_asking_for_lines_far_ahead_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    attended, results = Attended(KINDS["one head"]), []
    for is_zen in (True, False):
        monkeypatch.setattr(coded_attention, "is_zen", lambda is_zen=is_zen: is_zen)
        assert CodedAttendKernel(1, 8).far is not is_zen
        results.append([attended.run(kind, 1) for kind in (INT8, INT4)])
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [INT8, INT4])
def test_what_is_not_finite_stays_so(kind: int) -> None:
    for spoiled in (torch.nan, torch.inf):
        attended = Attended(Kind(4, 4))
        attended.keys[0, 1, 5, 7] = spoiled
        assert attended.run(kind, 1)[0, 1].isnan().all()
        attended = Attended(Kind(4, 4))
        attended.query[1, 2, 0] = spoiled
        result = attended.run(kind, 1)
        assert result[1, 2].isnan().all()
        assert result[0].isfinite().all()


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="heads of 5 columns; choose int8"):
        row_bytes(INT4, 5)
    floats, rows = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 11, dtype=torch.uint8)
    with pytest.raises(LayoutError, match=r"rows of \[1, 2, 3, 12\] bytes"):
        store_tokens(INT8, floats, rows)


def test_zeros_are_stored_as_zeros() -> None:
    for kind in KIND_OF.values():
        floats, rows = torch.zeros(1, 1, 2, 32), torch.full((1, 1, 2, row_bytes(kind, 32)), 255, dtype=torch.uint8)
        store_tokens(kind, floats, rows)
        load_tokens(kind, rows, floats.add_(1))
        assert not floats.any(), kind


@pytest.mark.parametrize("name", ["avx512vnni", "avx512", "avxvnni", "avx2", "portable"])
def test_the_kernels_compile_for_every_path(name: str) -> None:
    isa = BY_NAME[name]
    target = Target("x86_64-unknown-linux-gnu", "x86-64", ",".join(f"+{feature}" for feature in isa.features))
    for kernel in (CodedAttendKernel(4, 8), CodedAttendKernel(1, 4, split=True)):
        code = assembly(kernel, isa, target)
        assert "attend:" in code
        assert ("vpdpbusd" in code) is (isa.dot == "vnni")
