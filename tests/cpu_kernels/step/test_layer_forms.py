"""Layers of a step, compiled and as plain loops over NumPy arrays: gates, values, and cores side by side."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from cpu_kernels.format.spec import Activation, ExpertSpec
from cpu_kernels.host.isa import detect
from cpu_kernels.step.attend import SIGMOID_GATE, SOFTPLUS_GATE
from cpu_kernels.step.capped import add_cap
from cpu_kernels.step.compiled import CachePlace, CompiledLayers
from cpu_kernels.step.floats import FLOAT32
from cpu_kernels.step.heads import HeadNorm, Tuning
from cpu_kernels.step.parts import Arm, Attention, Branch, Columns, GateColumns, Layer, Mlp, Moe, Sum
from cpu_kernels.step.products import Product, plain_product
from cpu_kernels.step.program import LINE, MEETS, N_ROWS, WORKER, Program
from cpu_kernels.step.router import SELECT_WORK, Selection
from cpu_kernels.step.run import perform
from cpu_kernels.step.stream import Norm

N_PAST, N_NEW = 5, 3
TOLERANCE = 2e-5
EPS = 1e-5


class Weights:
    """Random matrices, kept alive, with the products that read them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.of: dict[int, np.ndarray] = {}

    def product(self, n_out: int, n_in: int) -> Product:
        matrix = self.rng.standard_normal((n_out, n_in), np.float32) / np.float32(n_in**0.5)
        self.of[matrix.ctypes.data] = matrix
        return plain_product(matrix.ctypes.data, n_out, n_in, halves=False)

    def norm(self, width: int) -> Norm:
        return Norm(1 + self.rng.standard_normal(width, np.float32) / 4, EPS)

    def times(self, product: Product, x: np.ndarray) -> np.ndarray:
        result: np.ndarray = x @ self.of[product.address].T
        return result

    def mlp(self, width: int, inter: int) -> Mlp:
        up, gate, down = self.product(inter, width), self.product(inter, width), self.product(width, inter)
        return Mlp(up, down, Activation("silu"), gate=gate, scale=0.5)

    def mlp_of(self, mlp: Mlp, x: np.ndarray) -> np.ndarray:
        assert mlp.gate is not None
        gate = self.times(mlp.gate, x)
        return mlp.scale * self.times(mlp.down, gate / (1 + np.exp(-gate)) * self.times(mlp.up, x))


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    result: np.ndarray = x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(EPS)) * weight
    return result


def normed(norm: Norm | None, x: np.ndarray) -> np.ndarray:
    return x if norm is None else rms(x, norm.weight)


def run(
    branch: Branch, x: np.ndarray, caches: tuple[np.ndarray, np.ndarray] | None = None, positions: tuple[int, ...] = ()
) -> np.ndarray:
    """What a branch leaves of stream float32 [rows, width]; caches: keys, values [heads, tokens, columns]."""
    found = []
    for threads in (1, 3):
        layers = CompiledLayers([(0, Layer((branch,)))], x.shape[1], (), threads, detect().isa.name)
        if caches is not None:
            places = [(c.ctypes.data, c.strides[0], c.strides[1]) for c in caches]
            layers.bind(0, 0, CachePlace(places[0], places[1], FLOAT32))
        layers.give_room(len(x), N_PAST + len(x))
        layers.set_rows([N_PAST], len(x), positions=positions)
        layers.stream[: len(x)] = x
        layers.run()
        found.append(layers.stream[: len(x)].copy())
    np.testing.assert_array_equal(*found)  # the bits do not depend on the threads
    return found[0]


def attention_of(weights: Weights, core: Attention, x: np.ndarray, past: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The obvious form; the caches are written to."""
    q, k, v = (weights.times(product, x).reshape(len(x), -1, d) for product, d in zip(
        core.inputs, (core.dim, core.dim, core.v_dim), strict=False))  # fmt: skip
    if core.norm is not None:
        q, k = rms(q, core.norm.q_weight), rms(k, core.norm.k_weight)
        v = v if core.norm.v_weight is None else rms(v, core.norm.v_weight)
    keys, values = past
    result = np.zeros((len(x), core.n_heads, core.v_dim), np.float32)
    for row in range(len(x)):
        seen = N_PAST + row + 1
        keys[:, seen - 1], values[:, seen - 1] = k[row], v[row] * core.v_scale
        for head in range(core.n_heads):
            own = head * core.n_kv_heads // core.n_heads
            scores = keys[own, :seen] @ q[row, head] * core.scale
            shares = np.exp(scores - scores.max())
            result[row, head] = shares @ values[own, :seen] / shares.sum()
    if core.gate is not None:
        gate = weights.times(core.inputs[core.gate.columns.product], x).reshape(len(x), core.n_heads, core.gate.n)
        result *= 1 / (1 + np.exp(-gate)) if core.gate.kind == SIGMOID_GATE else np.logaddexp(0, gate)
    return weights.times(core.output, result.reshape(len(x), -1))


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (6, 2), (9, 3)])
@pytest.mark.parametrize(("dim", "v_dim"), [(5, 5), (5, 13), (16, 16), (24, 8), (64, 32)])
@pytest.mark.parametrize("gate", [None, "of a head", "of each column"])
@pytest.mark.parametrize("kind", [SIGMOID_GATE, SOFTPLUS_GATE])
def test_gates_and_values(n_heads: int, n_kv_heads: int, dim: int, v_dim: int, gate: str | None, kind: int) -> None:
    width, weights = 40, Weights(dim + v_dim)
    inputs = [weights.product(n * d, width) for n, d in ((n_heads, dim), (n_kv_heads, dim), (n_kv_heads, v_dim))]
    columns, norm = None, None
    if gate is not None:
        n = 1 if gate == "of a head" else v_dim
        inputs.append(replace(weights.product(n_heads * n, width)))
        weights.of[inputs[-1].address] *= np.float32(12)  # softplus has two ways: for small values and for large ones
        columns = GateColumns(Columns(3, 0, n), n, kind)
    else:
        vectors = [weights.norm(d).weight for d in (dim, dim, v_dim)]
        norm = HeadNorm(vectors[0], vectors[1], EPS, v_weight=vectors[2] if kind == SIGMOID_GATE else None)
    core = Attention(
        tuple(inputs), weights.product(width, n_heads * v_dim), Columns(0, 0, dim), Columns(1, 0, dim),
        Columns(2, 0, v_dim), n_heads, n_kv_heads, dim, v_dim, dim**-0.5, 0, norm=norm, gate=columns, v_scale=0.7,
    )  # fmt: skip
    x = weights.rng.standard_normal((N_NEW, width), np.float32)
    past = [weights.rng.standard_normal((n_kv_heads, N_PAST + N_NEW, d), np.float32) for d in (dim, v_dim)]
    mine = [part.copy() for part in past]
    expected = x + attention_of(weights, core, x, (past[0], past[1]))
    found = run(Branch(core, None), x, (mine[0], mine[1]))
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
    for one, other in zip(mine, past, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("step", [1.0, 2.0, 100.0])
def test_queries_that_grow(step: float, *, by_position: bool) -> None:
    """With the tokens that they see, or with where they stand."""
    width, dim, weights = 24, 16, Weights(int(step))
    inputs = tuple(weights.product(dim, width) for _ in range(3))
    core = Attention(
        inputs, weights.product(width, dim), Columns(0, 0, dim), Columns(1, 0, dim), Columns(2, 0, dim), 1, 1, dim, dim,
        1.0, 0, tuning=Tuning(0.7, step, by_position=by_position),
    )  # fmt: skip
    x = weights.rng.standard_normal((N_NEW, width), np.float32)
    positions = (99, 100, 1_000_000)
    places = np.array(positions if by_position else [N_PAST + row + 1 for row in range(N_NEW)], np.float64)
    past = [weights.rng.standard_normal((1, N_PAST + N_NEW, dim), np.float32) for _ in range(2)]
    found = run(Branch(core, None), x, (past[0].copy(), past[1].copy()), positions)
    grown = 1 + 0.7 * np.log(1 + np.floor(places / step))
    plain = replace(core, tuning=None)
    expected = np.zeros_like(x)
    for row in range(N_NEW):  # each row by itself, with a scale of its own
        own = attention_of(weights, replace(plain, scale=float(grown[row])), x, (past[0], past[1]))
        expected[row] = x[row] + own[row]
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("width", [8, 40, 64, 130])
@pytest.mark.parametrize("n_rows", [1, 7])
def test_cores_side_by_side(width: int, n_rows: int) -> None:
    """Some with norms of their own before or behind them, and one around them all."""
    weights = Weights(width)
    arms = (
        Arm(weights.mlp(width, 24), None, weights.norm(width)), Arm(weights.mlp(width, 65)),
        Arm(weights.mlp(width, 24), weights.norm(width), weights.norm(width)),
        Arm(weights.mlp(width, 9), weights.norm(width)),
    )  # fmt: skip
    branch = Branch(Sum(arms), weights.norm(width), weights.norm(width), 0.3, 0.9)
    x = weights.rng.standard_normal((n_rows, width), np.float32)
    given = normed(branch.pre, x)
    total = sum(
        normed(arm.post, weights.mlp_of(arm.core, normed(arm.pre, given))) for arm in arms if isinstance(arm.core, Mlp)
    )
    expected = 0.9 * x + 0.3 * normed(branch.post, np.asarray(total))
    np.testing.assert_allclose(run(branch, x), expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


def test_the_identity_beside_shared_experts_waits_for_the_choice() -> None:
    """The one expert with weights is never chosen: what comes out are shared experts and what was given."""
    width, n_experts = 64, 5
    weights = Weights(3)
    record = np.zeros(ExpertSpec(width, 32, "float32", Activation("silu")).record_bytes + LINE, np.uint8)
    record = record[-record.ctypes.data % LINE :]
    never = np.array([-1e9, 0, 0, 0, 0], np.float32)
    moe = Moe(
        weights.product(n_experts, width), Selection(2, correction=never),
        ExpertSpec(width, 32, "float32", Activation("silu")), np.array([record.ctypes.data], np.int64),
        shared=(weights.mlp(width, 24),),
    )  # fmt: skip
    x = weights.rng.standard_normal((4, width), np.float32)
    logits = weights.times(moe.router, x)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    own = np.sort(shares[:, 1:], -1)[:, -2:].sum(-1, keepdims=True)
    expected = x + own * x + weights.mlp_of(moe.shared[0], x)
    branch = Branch(moe, None, None)
    np.testing.assert_allclose(run(branch, x), expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
    table = CompiledLayers([(0, Layer((branch,)))], width, (), 2, detect().isa.name).program.table
    assert table[table[:, WORKER] == SELECT_WORK.address, MEETS].tolist() == [1]


@pytest.mark.parametrize("width", [1, 7, 8191, 8192, 20_011])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_capped_logits(width: int, n_rows: int, threads: int) -> None:
    program = Program(threads)
    address = program.logits(width)
    add_cap(program, program.state, address, width, 30.0)
    program.seal()
    program.state[N_ROWS] = n_rows
    values = np.ctypeslib.as_array((ctypes.c_float * (n_rows * width)).from_address(address))
    x = np.random.default_rng(width).standard_normal(values.size, np.float32) * 40
    x[: min(4, x.size)] = np.array([0.0, -1e-3, 3e4, -3e4])[: min(4, x.size)]
    values[:] = x
    perform(program)
    np.testing.assert_allclose(values, 30 * np.tanh(x.astype(np.float64) / 30), rtol=1e-5, atol=4e-6)
