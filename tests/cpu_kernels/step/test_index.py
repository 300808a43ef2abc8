"""The index of the compiled step: queries, keys, scores and the choice against float64; attention to chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.host.isa import BY_NAME, PATHS, cpu_features, detect, missing_features
from cpu_kernels.jit.compiled import kernel
from cpu_kernels.simd.attention import LOWEST, AttendKernel
from cpu_kernels.simd.compile import Target, assembly
from cpu_kernels.simd.index_scores import IndexScoresKernel
from cpu_kernels.step import attend, index
from cpu_kernels.step.cached import I_KIND, I_TOKEN, INDEX, PLACE_SIZE
from cpu_kernels.step.floats import BFLOAT16, FLOAT32
from cpu_kernels.step.heads import HALVES, PAIRS, PAIRS_TO_HALVES, Rotary
from cpu_kernels.step.program import (
    MASK,
    MASK_ROW,
    MAX_ROWS,
    N_ROWS,
    NOT_FINITE,
    PADDING,
    SEEN,
    SEQUENCE,
    Part,
    Program,
)
from cpu_kernels.step.run import perform
from cpu_kernels.step.stream import Norm, add_stream

DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}
SCORE_ERROR = 1e-5
"""Of scores over the largest: float32 sums of up to a few hundred products, in another order than float64's."""
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """Sizes of an index, and its rows: the sequence of each and how many tokens it sees."""

    n_heads: int
    dim: int
    top_k: int
    rows: Sequence[tuple[int, int]]
    rotated: int = 0
    first: int = 0
    kind: int = HALVES
    centred: bool = True
    is_padded: bool = False


CASES = {
    "many heads": Case(64, 128, 40, [(0, 300)], 64),
    "one head, odd size": Case(1, 5, 3, [(0, 17), (1, 18)]),
    "heads that fill no vector": Case(33, 24, 7, [(0, 513), (0, 514), (0, 515)], 8, 16, PAIRS_TO_HALVES),
    "few see more": Case(3, 16, 100, [(1, 60), (1, 100), (1, 101), (0, 400)], 16, 0, PAIRS, centred=False),
    "padding": Case(8, 32, 20, [(0, 260), (1, 90)], 32, is_padded=True),
    "nobody sees more": Case(4, 8, 64, [(0, 64), (1, 3)], 4),
}


class Indexed:
    """One index over random keys and inputs."""

    def __init__(self, case: Case, stored: int = FLOAT32) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.case, self.stored = case, stored
        n_rows, self.room = len(case.rows), max(seen for _, seen in case.rows)
        self.keys = normal(2, self.room, case.dim).to(DTYPES[stored])
        self.q, self.k, self.w = (normal(n_rows, n) for n in (case.n_heads * case.dim, case.dim, case.n_heads))
        self.norm = Norm(
            normal(case.dim).numpy(), EPS, normal(case.dim).numpy() if case.centred else None, case.centred
        )  # fmt: skip
        angles = normal(n_rows, case.rotated // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask = np.zeros((2, self.room), np.float32)
        if case.is_padded:
            self.mask[0, :230] = LOWEST  # leaves row 0 of the case more than it may choose, and
            self.mask[1, :80] = LOWEST  # row 1 fewer

    def run(self, threads: int, isa: str | None = None) -> tuple[np.ndarray, torch.Tensor, int]:
        """(chosen int32 [rows, top_k], the keys afterwards, what is not finite)."""
        case, n_rows = self.case, len(self.case.rows)
        isa = isa or detect().isa.name
        program, keys = Program(threads), self.keys.clone()
        places = program.zeros(MAX_ROWS * PLACE_SIZE, np.int64).reshape(MAX_ROWS, PLACE_SIZE)
        rotary = None
        if case.rotated:
            rotary = Rotary(case.rotated, case.first, case.kind, self.cos.data_ptr(), self.sin.data_ptr())
        chosen = program.floats("chosen", case.top_k)
        call = index.add_index(
            program, 3, index.IndexSizes(case.n_heads, case.dim, case.top_k), self.norm, rotary, self.q.data_ptr(),
            self.k.data_ptr(), self.w.data_ptr(), places.ctypes.data, chosen, isa,
        )  # fmt: skip
        add_stream(program, Part.NORMS, 3, program.floats("between", 8), 8, keep=1.0)  # what comes between in a layer
        index.add_choice(program, call)
        index.set_index_kernel(call, self.stored, isa)
        scores = np.full((n_rows, self.room), np.nan, np.float32)
        index.give_scores(call, scores.ctypes.data, self.room)
        program.seal()
        for sequence in range(2):
            places[sequence, [INDEX, I_TOKEN, I_KIND]] = (
                keys[sequence].data_ptr(), keys.element_size() * case.dim, self.stored,
            )  # fmt: skip
        for row, (sequence, seen) in enumerate(case.rows):
            program.rows[row, [SEQUENCE, SEEN, PADDING]] = sequence, seen, 0
        program.state[N_ROWS] = n_rows
        if case.is_padded:
            program.state[[MASK, MASK_ROW]] = self.mask.ctypes.data, self.room
        perform(program)
        self.scores = scores
        buffers = {name: buffer for (name, _), buffer in program.buffers.items()}
        places_found = buffers["chosen"].view(np.int32).reshape(MAX_ROWS, case.top_k)[:n_rows].copy()
        return places_found, keys, int(program.state[NOT_FINITE])

    def rotated(self, x: np.ndarray, row: int) -> np.ndarray:
        """Rows x float64 [n, dim] by the angles of a row."""
        case, result = self.case, x.copy()
        half = case.rotated // 2
        part = x[:, case.first : case.first + case.rotated]
        cos, sin = self.cos[row].double().numpy(), self.sin[row].double().numpy()
        halves, pairs = (slice(0, half), slice(half, 2 * half)), (slice(0, None, 2), slice(1, None, 2))
        a, b = (part[:, at] for at in (halves if case.kind == HALVES else pairs))
        target = result[:, case.first : case.first + case.rotated]
        first, second = pairs if case.kind == PAIRS else halves
        target[:, first], target[:, second] = a * cos - b * sin, b * cos + a * sin
        return result

    def expected(self) -> tuple[np.ndarray, torch.Tensor]:
        """(scores float64 [rows, room], where a row sees more than are chosen; the keys afterwards)."""
        case, keys = self.case, self.keys.clone()
        for row, (sequence, seen) in enumerate(case.rows):
            x = self.k[row].double().numpy()
            x = x - x.mean() if case.centred else x
            x = x / np.sqrt((x**2).mean() + EPS) * self.norm.weight
            x = x if self.norm.bias is None else x + self.norm.bias
            keys[sequence, seen - 1] = torch.from_numpy(self.rotated(x[None], row)[0]).to(keys.dtype)
        scores = np.full((len(case.rows), self.room), np.nan)
        for row, (sequence, seen) in enumerate(case.rows):
            if seen > case.top_k:
                query = self.rotated(self.q[row].double().numpy().reshape(case.n_heads, case.dim), row)
                products = np.maximum(query @ keys[sequence, :seen].double().numpy().T, 0)
                scores[row, :seen] = self.w[row].double().numpy() @ products + self.mask[sequence, :seen]
        return scores, keys


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_scores_keys_and_choice(name: str, stored: int) -> None:
    indexed = Indexed(CASES[name], stored)
    scores, keys = indexed.expected()
    chosen, written, damage = indexed.run(1)
    assert damage == 0
    assert torch.allclose(written.float(), keys.float(), rtol=0, atol=1e-5 if stored == FLOAT32 else 3e-2)
    if stored == BFLOAT16:  # the last bit of a key may differ; scores are those of the keys as they are
        indexed.keys = written
        scores, _ = indexed.expected()
    for row, (_, seen) in enumerate(indexed.case.rows):
        if seen <= indexed.case.top_k:
            continue
        own, found = scores[row, :seen], indexed.scores[row, :seen]
        visible = own > LOWEST / 2
        top = np.abs(own[visible]).max()
        assert np.abs(own - found)[visible].max() <= SCORE_ERROR * top * indexed.case.n_heads**0.5
        assert (found[~visible] < LOWEST / 2).all()
        best = np.lexsort((np.arange(seen), -found.astype(np.float64)))[: indexed.case.top_k]
        assert chosen[row].tolist() == sorted(best.tolist())
    for threads in (2, 3):
        again, same_keys, _ = indexed.run(threads)
        assert np.array_equal(chosen, again)
        assert torch.equal(written, same_keys)


def here() -> list[str]:
    return [path.name for path in PATHS if not missing_features(path, cpu_features())]


@pytest.mark.parametrize("isa", here())
@pytest.mark.parametrize("stored", DTYPES)
def test_arithmetic_of_every_path(isa: str, stored: int) -> None:
    for name in ("one head, odd size", "heads that fill no vector"):
        indexed = Indexed(CASES[name], stored)
        _, indexed.keys, _ = indexed.run(1, isa)
        scores, _ = indexed.expected()
        known = ~np.isnan(scores)
        assert np.abs(scores - indexed.scores)[known].max() <= 1e-4 * np.abs(scores[known]).max()


def test_a_row_gets_the_bits_that_it_has_alone() -> None:
    case = CASES["heads that fill no vector"]
    together = Indexed(case)
    together.run(2)
    for row, place in enumerate(case.rows):
        alone = Indexed(Case(**{**vars(case), "rows": [place]}))
        alone.keys, alone.room = together.keys[:, : place[1]].contiguous(), place[1]
        alone.keys[0, : place[1]] = together.run(1)[1][0, : place[1]]
        for name in ("q", "k", "w", "cos", "sin"):
            setattr(alone, name, getattr(together, name)[row : row + 1].contiguous())
        alone.norm = together.norm
        alone.run(1)
        assert np.array_equal(alone.scores[0, : place[1]], together.scores[row, : place[1]])


@pytest.mark.parametrize("part", ["keys", "q", "w"])
def test_a_score_that_is_nan_is_told_with_its_layer(part: str) -> None:
    indexed = Indexed(CASES["many heads"])
    getattr(indexed, part).flatten()[2] = torch.nan
    assert indexed.run(2)[2] == 4
    unread = Indexed(CASES["nobody sees more"])
    getattr(unread, part).flatten()[2] = torch.nan
    assert unread.run(2)[2] == 0


@kernel
def taken(scores: np.ndarray, chosen: np.ndarray) -> bool:
    return bool(index.take_largest(scores, np.empty(1 << 11, np.int32), chosen))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, LOWEST]), min_size=2, max_size=60
    ),
    st.data(),
)
def test_the_largest_scores_are_taken_and_of_equal_ones_the_first(values: list[float], data: st.DataObject) -> None:
    scores = np.array(values, np.float32)
    chosen = np.empty(data.draw(st.integers(1, len(values) - 1)), np.int32)
    assert taken(scores, chosen)
    order = sorted(range(len(values)), key=lambda i: (-float(scores[i]), i))
    assert chosen.tolist() == sorted(order[: chosen.size])


def test_a_nan_among_scores_is_told() -> None:
    for sign in (np.nan, -np.nan):
        assert not taken(np.array([1, sign, 2], np.float32), np.empty(2, np.int32))


# Attention to what was chosen ---------------------------------------------------------------------------------------

KINDS = {
    "latent": (8, 64, 32),
    "many heads": (20, 32, 16),
    "two heads": (2, 32, 16),
    "odd size": (3, 24, 5),
}
"""heads, columns that keys and values share, columns of keys alone."""


class Chosen:
    """Latent attention of three rows, of which two see more than they attend to."""

    top_k, n_tokens, seen = 300, 700, (700, 655, 290)

    def __init__(self, heads: int, dim: int, shared: int, *, is_padded: bool) -> None:
        generator = torch.Generator().manual_seed(2)
        self.heads, self.dim, self.shared, self.is_padded = heads, dim, shared, is_padded
        self.query = torch.randn(3, heads, dim + shared, generator=generator) / (dim + shared) ** 0.5
        self.keys = torch.randn(2, self.n_tokens, dim, generator=generator)
        self.more = torch.randn(2, self.n_tokens, shared, generator=generator)
        self.sequences = (0, 1, 1)
        places = [torch.randperm(seen, generator=generator)[: self.top_k].sort().values for seen in self.seen[:2]]
        self.places = torch.stack([*places, torch.arange(self.top_k)]).int()  # those of the last row are not read
        self.mask = np.zeros((2, self.n_tokens), np.float32)
        self.mask[1, :50] = LOWEST

    def run(self, kind: int, threads: int) -> torch.Tensor:
        program, isa = Program(threads), detect().isa.name
        width = self.dim + self.shared
        out = program.floats("out", self.heads * self.dim)
        table = program.zeros(MAX_ROWS * PLACE_SIZE, np.int64).reshape(MAX_ROWS, PLACE_SIZE)
        keys, more = self.keys.to(DTYPES[kind]), self.more.to(DTYPES[kind])
        call = attend.add_attention(
            program, self.heads, 1, self.dim, self.dim, self.query.data_ptr(), table.ctypes.data, out,
            shared=self.shared, top_k=self.top_k, chosen=self.places.data_ptr(),
        )  # fmt: skip
        attend.set_kernels(call, kind, isa)
        sizes = attend.room_bytes(call, 3, self.n_tokens)
        room = np.empty(sum(sizes), np.uint8)
        attend.give_room(call, room.ctypes.data, room.ctypes.data + sizes[0], self.n_tokens)
        program.seal()
        for sequence in range(2):
            for at, part in ((0, keys), (3, more)):
                row_bytes = part.element_size() * part.shape[-1]
                table[sequence, at : at + 3] = part[sequence].data_ptr(), 0, row_bytes
            table[sequence, 6] = kind
        for row, (sequence, seen) in enumerate(zip(self.sequences, self.seen, strict=True)):
            program.rows[row, [SEQUENCE, SEEN, PADDING]] = sequence, seen, 0
        program.state[N_ROWS] = 3
        if self.is_padded:
            program.state[[MASK, MASK_ROW]] = self.mask.ctypes.data, self.n_tokens
        perform(program)
        buffers = {name: buffer for (name, _), buffer in program.buffers.items()}
        found = buffers["out"].view(np.float32)[: 3 * self.heads * self.dim].copy()
        assert width == self.query.shape[-1]
        return torch.from_numpy(found).view(3, self.heads, self.dim)

    def expected(self, kind: int) -> torch.Tensor:
        results = []
        for row, (sequence, seen) in enumerate(zip(self.sequences, self.seen, strict=True)):
            places = self.places[row].long() if seen > self.top_k else torch.arange(seen)
            values = self.keys[sequence, places].to(DTYPES[kind]).double()
            keys = torch.cat([values, self.more[sequence, places].to(DTYPES[kind]).double()], -1)
            scores = self.query[row].double() @ keys.T
            if self.is_padded:
                scores = scores + torch.from_numpy(self.mask[sequence]).double()[places]
            results.append(torch.softmax(scores, -1) @ values)
        return torch.stack(results)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", KINDS)
def test_attention_to_chosen_tokens(name: str, is_padded: bool) -> None:
    chosen = Chosen(*KINDS[name], is_padded=is_padded)
    for kind in DTYPES:
        found = chosen.run(kind, 1)
        expected = chosen.expected(kind)
        assert float((found.double() - expected).norm() / expected.norm()) <= 1e-5, kind
        for threads in (2, 3):
            assert torch.equal(found, chosen.run(kind, threads))


def test_what_was_not_chosen_is_not_read() -> None:
    chosen = Chosen(*KINDS["latent"], is_padded=False)
    before = chosen.run(FLOAT32, 2)
    read = torch.zeros(2, chosen.n_tokens, dtype=torch.bool)
    read[0, chosen.places[0].long()] = True
    read[1, chosen.places[1].long()] = True
    read[1, : chosen.seen[2]] = True
    chosen.keys[~read] = torch.nan
    assert torch.equal(before, chosen.run(FLOAT32, 2))
    chosen.keys[0, int(chosen.places[0, 7])] = torch.nan
    assert chosen.run(FLOAT32, 2)[0].isnan().all()


@pytest.mark.parametrize("name", ["avx512vnni", "avx512", "avxvnni", "avx2", "portable"])
def test_the_kernels_compile_for_every_path(name: str) -> None:
    isa = BY_NAME[name]
    target = Target("x86_64-unknown-linux-gnu", "x86-64", ",".join(f"+{feature}" for feature in isa.features))
    for dtype in ("float32", "bfloat16"):
        assert "index_scores:" in assembly(IndexScoresKernel(dtype), isa, target)
        assert "attend:" in assembly(AttendKernel(4, dtype, chosen=True), isa, target)
