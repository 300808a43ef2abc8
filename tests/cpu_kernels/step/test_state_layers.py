"""Operations of layers that keep states, against plain loops in float64, over odd sizes, sequences and threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cpu_kernels.errors import LayoutError
from cpu_kernels.jit.compiled import kernel
from cpu_kernels.step.floats import BFLOAT16, FLOAT32, exp_of
from cpu_kernels.step.program import MAX_ROWS, N_ROWS, SEEN, SEQUENCE, Program
from cpu_kernels.step.run import perform
from cpu_kernels.step.states import recurrence
from cpu_kernels.step.states.channels import Unit, add_channels
from cpu_kernels.step.states.gated_norm import GatedNorm, add_gated_norm
from cpu_kernels.step.states.held import STATES_SIZE
from cpu_kernels.step.states.recurrence import (
    BY_SIGMOID,
    BY_SOFTPLUS,
    DELTA,
    SCAN,
    STEADY,
    SUM,
    Fading,
    Heads,
    Inputs,
    Places,
    add_recurrence,
)

TOLERANCE = 2e-5
"""Relative, of sums of up to some hundred float32 products."""
HALF_TOLERANCE = 2e-2
"""The same where states are bfloat16."""
BATCHES = [(1, 1), (1, 4), (3, 1), (2, 5), (16, 1)]
"""Sequences, and new tokens of each."""


def to_halves(x: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16, nearest."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_floats(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def stored(x: np.ndarray, kind: int) -> np.ndarray:
    return np.array(x, np.float32) if kind == FLOAT32 else to_halves(x)


def read(held: np.ndarray) -> np.ndarray:
    return held if held.dtype == np.float32 else to_floats(held)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


class Rows:
    """A program on rows of several sequences, and named float32 rows [n_rows, width] that its operations read."""

    def __init__(self, batch: tuple[int, int], threads: int) -> None:
        self.batch, self.n_rows = batch, batch[0] * batch[1]
        self.program = Program(threads)
        self.places = self.program.zeros(MAX_ROWS * STATES_SIZE, np.int64).reshape(MAX_ROWS, STATES_SIZE)
        for row in range(self.n_rows):
            self.program.rows[row, [SEQUENCE, SEEN]] = row // batch[1], row % batch[1] + 1
        self.program.state[N_ROWS] = self.n_rows

    def give(self, name: str, values: np.ndarray) -> int:
        """Address of rows that hold the values."""
        address = self.program.floats(name, values.shape[1])
        self.of(name, values.shape[1])[:] = values
        return address

    def of(self, name: str, width: int) -> np.ndarray:
        """float32 [n_rows, width] of a buffer."""
        buffer = self.program.buffers[name, 4 * width * MAX_ROWS]
        return buffer.view(np.float32).reshape(MAX_ROWS, width)[: self.n_rows]

    def hold(self, at: int, states: np.ndarray, kind: int, *, elsewhere: bool) -> tuple[np.ndarray, np.ndarray]:
        """Places of states [sequences, ...]; returns where they are read and where they are written."""
        source = stored(states, kind)
        target = np.zeros_like(source) if elsewhere else source
        for sequence in range(self.batch[0]):
            self.places[sequence, at : at + 3] = source[sequence].ctypes.data, target[sequence].ctypes.data, kind
        return source, target

    def run(self) -> None:
        self.program.seal()
        perform(self.program)


def check(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(found - expected).max() <= tolerance * (np.abs(expected).max() + 1e-30)


# The exponential ------------------------------------------------------------------------------------------------------


@kernel
def _exponentials(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.size):
        out[i] = exp_of(x[i])


def test_the_exponential() -> None:
    x = np.concatenate([np.linspace(-86, 87, 100_001), np.linspace(-1, 1, 50_001)]).astype(np.float32)
    found = np.empty_like(x)
    _exponentials(x, found)
    expected = np.exp(x.astype(np.float64))
    assert np.abs(found / expected - 1).max() < 5e-7
    ends = np.array([-1000, -np.inf, np.inf, 1000, np.nan], np.float32)
    found = np.empty_like(ends)
    _exponentials(ends, found)
    assert found[0] < 1e-37
    assert found[1] < 1e-37
    assert (found[2:4] > 1e38).all()
    assert np.isnan(found[4])


# Channels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("kind", "taps", "elsewhere"), [(FLOAT32, 4, False), (FLOAT32, 3, True), (BFLOAT16, 4, False)])
@pytest.mark.parametrize("form", ["norm", "gated", "bias"])
def test_convolved_channels(batch: tuple[int, int], kind: int, taps: int, elsewhere: bool, form: str) -> None:
    """Two heads of 24 with a norm, or 300 channels that are multiplied with others, or with bias and silu."""
    random = np.random.default_rng(3)
    widths = {"norm": 24, "gated": 300, "bias": 17}[form]
    n = 2 * widths if form == "norm" else widths
    rows = Rows(batch, 2)
    source = random.standard_normal((rows.n_rows, 3 * n)).astype(np.float32)
    at = rows.give("source", source)
    weight = random.standard_normal((n, taps)).astype(np.float32)
    bias = random.standard_normal(n).astype(np.float32) if form == "bias" else None
    past = random.standard_normal((batch[0], n, taps))
    _, written = rows.hold(0, past, kind, elsewhere=elsewhere)
    past = read(stored(past, kind)).astype(np.float64)
    if form == "norm":
        units = [Unit(24, at + 4 * 24 * head, 3 * n, eps=1e-6, scale=0.25) for head in range(2)]
    elif form == "gated":
        units = [Unit(n, at, 3 * n, at + 4 * n, at + 8 * n)]
    else:
        units = [Unit(n, at, 3 * n)]
    out = rows.program.floats("out", n)
    add_channels(rows.program, units, out, rows.places.ctypes.data, weight=weight, bias=bias, has_silu=form != "gated")
    rows.run()
    expected = np.zeros((rows.n_rows, n))
    for row in range(rows.n_rows):
        held, x = past[row // batch[1]], source[row].astype(np.float64)
        new = x[:n] * (x[n : 2 * n] if form == "gated" else 1)
        held[:, :-1], held[:, -1] = held[:, 1:].copy(), new
        y = (held * weight).sum(1) + (0 if bias is None else bias)
        y = y if form == "gated" else y * sigmoid(y)
        if form == "norm":
            heads = y.reshape(2, 24)
            y = (0.25 * heads / np.sqrt((heads**2).sum(1, keepdims=True) + 1e-6)).ravel()
        expected[row] = y * x[2 * n :] if form == "gated" else y
    check(rows.of("out", n), expected)
    check(read(written), past, TOLERANCE if kind == FLOAT32 else HALF_TOLERANCE)


def test_channels_without_a_convolution() -> None:
    rows = Rows((2, 3), 1)
    source = np.random.default_rng(1).standard_normal((6, 40)).astype(np.float32)
    at = rows.give("source", source)
    out = rows.program.floats("out", 30)
    units = [Unit(20, at + 4 * 20, 40), Unit(10, at, 40)]
    add_channels(rows.program, units, out, 0, has_silu=True)
    rows.run()
    chosen = np.concatenate([source[:, 20:], source[:, :10]], 1).astype(np.float64)
    check(rows.of("out", 30), chosen * sigmoid(chosen))


def test_units_beyond_a_threads_scratch_are_refused() -> None:
    program = Program(1)
    with pytest.raises(LayoutError, match="channels"):
        add_channels(program, [Unit(5000, 0, 5000, eps=1e-6)], 0, 0, weight=np.zeros((5000, 4), np.float32))


# Recurrence -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """heads, heads of keys, columns of keys and of values; rule, fading; each: faded for each column of a key."""

    rule: int
    fading: int
    n: int = 4
    n_keys: int = 2
    k_dim: int = 16
    v_dim: int = 24
    each: bool = False
    kind: int = FLOAT32
    limits: tuple[float, float] = (0.0, recurrence.NO_LIMIT)
    has_skip: bool = False


CASES = {
    "gated delta": Case(DELTA, BY_SOFTPLUS),
    "gated delta, odd": Case(DELTA, BY_SOFTPLUS, 3, 3, 7, 5),
    "gated delta, real": Case(DELTA, BY_SOFTPLUS, 4, 2, 128, 128),
    "delta of each column": Case(DELTA, BY_SOFTPLUS, 2, 2, 20, 36, each=True),
    "delta of each column, bounded": Case(DELTA, BY_SIGMOID, 2, 2, 20, 36, each=True, limits=(-5.0, 0.0)),
    "lightning": Case(SUM, STEADY, 3, 3, 24, 24),
    "lightning in bfloat16": Case(SUM, STEADY, 3, 3, 24, 24, kind=BFLOAT16),
    "scan": Case(SCAN, BY_SOFTPLUS, 6, 2, 16, 9, limits=(0.1, 0.9), has_skip=True),
    "scan in bfloat16": Case(SCAN, BY_SOFTPLUS, 4, 1, 33, 8, kind=BFLOAT16, has_skip=True),
}


class Recalled:
    """Random inputs of a case; what the operation makes of them, and what plain loops in float64 do."""

    def __init__(self, case: Case, batch: tuple[int, int]) -> None:
        random, n_rows = np.random.default_rng(7), batch[0] * batch[1]
        self.case, self.batch = case, batch
        self.widths = [case.n_keys * case.k_dim, case.n_keys * case.k_dim, case.n * case.v_dim]

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape).astype(np.float32)

        self.channels = normal(n_rows, sum(self.widths)) / np.float32(case.k_dim**0.5)
        n_fades = case.n * (case.k_dim if case.each else 1)
        self.gates = normal(n_rows, case.n + n_fades)  # beta, then the fading's
        self.bias = normal(n_fades)
        self.rate = np.abs(normal(case.n)) / 2 if case.fading != STEADY else random.uniform(0.5, 1, case.n)
        self.skip = normal(case.n) if case.has_skip else None
        shape = (case.v_dim, case.k_dim) if case.rule == SCAN else (case.k_dim, case.v_dim)
        self.states = normal(batch[0], case.n, *shape)

    def run(self, threads: int, *, elsewhere: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The results [rows, heads * v_dim], and the states where they were read and written."""
        case, rows = self.case, Rows(self.batch, threads)
        width = self.gates.shape[1]
        channels, gates = rows.give("channels", self.channels), rows.give("gates", self.gates)
        each = case.k_dim if case.each else 1
        beta = Places(tuple(gates + 4 * head for head in range(case.n)), width)
        fades = Places(tuple(gates + 4 * (case.n + head * each) for head in range(case.n)), width)
        heads = Heads(case.n, case.n_keys, case.k_dim, case.v_dim, 0, self.widths[0], 2 * self.widths[0])
        inputs = Inputs(
            channels, sum(self.widths), beta if case.rule == DELTA else None,
            None if case.fading == STEADY else fades, self.skip,
        )  # fmt: skip
        fading = Fading(case.fading, self.rate, self.bias, case.each, *case.limits)
        out = rows.program.floats("out", self.widths[2])
        add_recurrence(rows.program, case.rule, heads, inputs, fading, out, rows.places.ctypes.data)
        source, target = rows.hold(3, self.states, case.kind, elsewhere=elsewhere)
        rows.run()
        return rows.of("out", self.widths[2]).copy(), source, target

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The same by definition."""
        case, n_new = self.case, self.batch[1]
        states = read(stored(self.states, case.kind)).astype(np.float64)
        out = np.zeros((len(self.channels), case.n, case.v_dim))
        for row, channels in enumerate(self.channels.astype(np.float64)):
            q, k, v = np.split(channels, np.cumsum(self.widths)[:-1])
            for head in range(case.n):
                own = slice(head // (case.n // case.n_keys) * case.k_dim, None)
                state = states[row // n_new, head]
                query, key = q[own][: case.k_dim], k[own][: case.k_dim]
                out[row, head] = self._token(state, row, head, query, key, v.reshape(case.n, -1)[head])
        return out.reshape(len(out), -1), states

    def _token(self, state: np.ndarray, row: int, head: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        case, gates = self.case, self.gates[row].astype(np.float64)
        kept, step = self._kept(gates[case.n :], head)
        if case.rule == SCAN:
            state *= kept
            state += step * np.outer(v, k)
            result: np.ndarray = state @ q
            return result if self.skip is None else result + self.skip[head] * v
        state *= np.broadcast_to(kept, case.k_dim)[:, None]
        if case.rule == DELTA:
            v = sigmoid(gates[head]) * (v - k @ state)
        state += np.outer(k, v)
        recalled: np.ndarray = q @ state
        return recalled

    def _kept(self, gates: np.ndarray, head: int) -> tuple[Any, Any]:
        case, rate = self.case, float(self.rate[head])
        if case.fading == STEADY:
            return rate, 1.0
        each = case.k_dim if case.each else 1
        x = (gates + self.bias)[head * each : (head + 1) * each]
        if case.fading == BY_SIGMOID:
            return np.exp(case.limits[0] * sigmoid(rate * x)), 1.0
        step = softplus(x).clip(*case.limits) if self.batch[1] > 1 else softplus(x)
        return np.exp(-rate * step), step


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_a_recurrence(name: str, batch: tuple[int, int]) -> None:
    recalled = Recalled(CASES[name], batch)
    found, source, target = recalled.run(2)
    expected, states = recalled.expected()
    tolerance = TOLERANCE if CASES[name].kind == FLOAT32 else HALF_TOLERANCE
    check(found, expected, tolerance)
    check(read(target), states, tolerance)
    assert source is target


@pytest.mark.parametrize("name", CASES)
def test_a_recurrence_that_writes_elsewhere_leaves_what_it_reads(name: str) -> None:
    recalled = Recalled(CASES[name], (3, 2))
    in_place, _, written = recalled.run(1)
    found, source, target = recalled.run(1, elsewhere=True)
    assert np.array_equal(found, in_place)
    assert np.array_equal(target, written)
    assert np.array_equal(source, stored(recalled.states, CASES[name].kind))


@pytest.mark.parametrize("name", CASES)
def test_the_bits_depend_on_neither_threads_nor_others(name: str) -> None:
    recalled = Recalled(CASES[name], (3, 2))
    found, _, states = recalled.run(1)
    for threads in (2, 3):
        again, _, others = recalled.run(threads)
        assert np.array_equal(again, found)
        assert np.array_equal(others, states)
    alone = Recalled(CASES[name], (3, 2))
    alone.batch, alone.channels, alone.gates = (1, 2), alone.channels[2:4], alone.gates[2:4]
    alone.states = alone.states[1:2]
    own, _, state = alone.run(2)
    assert np.array_equal(own, found[2:4])
    assert np.array_equal(state[0], states[1])


def test_heads_beyond_a_threads_scratch_are_refused() -> None:
    heads = Heads(1, 1, 8192, 8192, 0, 0, 0)
    with pytest.raises(LayoutError, match="columns"):
        add_recurrence(Program(1), SUM, heads, Inputs(0, 0), Fading(STEADY, np.ones(1)), 0, 0)


# The norm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [10, 30])
@pytest.mark.parametrize("form", ["no gate", "silu", "sigmoid", "silu first"])
def test_a_gated_norm(group: int, form: str) -> None:
    random, rows = np.random.default_rng(5), Rows((2, 3), 2)
    x, gates = (random.standard_normal((6, 30)).astype(np.float32) for _ in range(2))
    weight = random.standard_normal(30).astype(np.float32)
    at, gate = rows.give("x", x), rows.give("gates", gates)
    norm = GatedNorm(weight, 1e-5, group, has_sigmoid=form == "sigmoid", gate_first=form == "silu first")
    places = Places(tuple(gate + 4 * first for first in range(0, 30, group)), 30)
    add_gated_norm(rows.program, norm, at, None if form == "no gate" else places)
    rows.run()
    act = {"no gate": 1.0, "sigmoid": sigmoid(gates.astype(np.float64))}.get(form, gates * sigmoid(gates.astype(float)))
    expected = x.astype(np.float64) * (act if form == "silu first" else 1)
    groups = expected.reshape(6, -1, group)
    expected = (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-5)).reshape(6, 30) * weight
    check(rows.of("x", 30), expected * (1 if form == "silu first" else act))
