"""The SIMD backend against the reference: every dtype and activation, odd shapes, unequal loads, bits, threads."""

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

import cpu_kernels as ck
from cpu_kernels.backends import reference as reference_backend
from cpu_kernels.format.reference import apply_activation

MakePool = Callable[..., Any]
Route = Callable[..., tuple[ck.Dispatch, np.ndarray]]
ACTIVATIONS = {
    "silu": ck.Activation("silu"),
    "gpt-oss": ck.Activation("silu", alpha=1.702, gate_max=0.7, up_limit=0.7, up_offset=1.0),
    "act_max": ck.Activation("silu", act_max=0.2),
    "gelu": ck.Activation("gelu"),
    "gelu_tanh": ck.Activation("gelu_tanh"),
    "relu": ck.Activation("relu"),
    "sigmoid": ck.Activation("sigmoid", up_offset=0.5),
    "identity": ck.Activation("identity"),
    "relu2 ungated": ck.Activation("relu2", gated=False),
    "gelu ungated": ck.Activation("gelu", gated=False),
}


@pytest.fixture(scope="module")
def backend() -> ck.CpuBackend:
    return ck.get_backend("numba")


@pytest.fixture(scope="module")
def reference() -> ck.CpuBackend:
    return ck.get_backend("reference")


def assert_parity(spec: ck.ExpertSpec, result: np.ndarray, expected: np.ndarray, share: float = 1.0) -> None:
    assert np.array_equal(np.isnan(result), np.isnan(expected))  # the same rows were written
    error = ck.relative_error(torch.from_numpy(np.nan_to_num(result)), torch.from_numpy(np.nan_to_num(expected)))
    assert error <= share * ck.tolerance(spec)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Activations as integer kernels see them: 127 steps of the largest absolute value of each group of 32."""
    groups = []
    for group in values.split(32, dim=-1):
        step = group.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
        groups.append(torch.round(group / step) * step)
    return torch.cat(groups, dim=-1)


def ffn_of_rounded_activations(spec: ck.ExpertSpec, weights: ck.ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """`reference_ffn` but for its activations."""
    x = rounded(x)
    up = torch.nn.functional.linear(x, weights.up, weights.up_bias)
    gate = None if weights.gate is None else torch.nn.functional.linear(x, weights.gate, weights.gate_bias)
    inner = rounded(apply_activation(spec.activation, gate, up))
    return torch.nn.functional.linear(inner, weights.down, weights.down_bias)


@pytest.mark.parametrize("dtype", ck.DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_activations(
    backend: ck.CpuBackend,
    reference: ck.CpuBackend,
    make_pool: MakePool,
    route: Route,
    dtype: ck.ExpertDtype,
    name: str,
    bias: bool,
) -> None:
    spec = ck.ExpertSpec(96, 72, dtype, ACTIVATIONS[name], bias)
    pool = make_pool(spec)
    dispatch, x = route(11, 3, 4, 96)
    assert_parity(spec, pool.run(backend, dispatch, x), pool.run(reference, dispatch, x))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden=st.integers(1, 200),
    inter=st.integers(1, 200),
    dtype=st.sampled_from(ck.DTYPES),
    n_tokens=st.integers(0, 40),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@example(hidden=58, inter=2, dtype="int8", n_tokens=2, top_k=2, seed=85)
def test_any_shape(
    backend: ck.CpuBackend,
    reference: ck.CpuBackend,
    make_pool: MakePool,
    route: Route,
    hidden: int,
    inter: int,
    dtype: ck.ExpertDtype,
    n_tokens: int,
    top_k: int,
    seed: int,
) -> None:
    spec = ck.ExpertSpec(hidden, inter, dtype, ck.Activation("silu", gated=seed % 3 > 0), seed % 2 == 0)
    pool = make_pool(spec, seed=seed)
    dispatch, x = route(n_tokens, top_k, 4, hidden, seed)
    expected = pool.run(reference, dispatch, x)
    if dtype in ("int8", "int4") and min(hidden, inter) < 32:  # too few terms to average the rounding out
        with mock.patch.object(reference_backend, "reference_ffn", ffn_of_rounded_activations):
            expected = pool.run(reference, dispatch, x)
    assert_parity(spec, pool.run(backend, dispatch, x), expected, share=1.5)


@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_large_and_unequal_loads(
    backend: ck.CpuBackend, reference: ck.CpuBackend, make_pool: MakePool, dtype: ck.ExpertDtype
) -> None:
    spec = ck.ExpertSpec(192, 320, dtype)
    pool = make_pool(spec)
    index = np.zeros((600, 2), np.int64)
    index[:, 1] = 1 + (np.arange(600) % 40 == 0) + 2 * (np.arange(600) == 7)
    x = np.random.default_rng(1).standard_normal((600, 192)).astype(np.float32)
    dispatch = ck.build_dispatch(index, np.full((600, 2), 0.5, np.float32), 4)
    assert sorted(dispatch.n_tokens_per_expert.tolist()) == [1, 15, 584, 600]
    assert_parity(spec, pool.run(backend, dispatch, x), pool.run(reference, dispatch, x))


@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_4096_tokens_for_one_expert(
    backend: ck.CpuBackend, reference: ck.CpuBackend, make_pool: MakePool, dtype: ck.ExpertDtype
) -> None:
    spec = ck.ExpertSpec(64, 64, dtype)
    pool = make_pool(spec, n_experts=1)
    x = np.random.default_rng(2).standard_normal((4096, 64)).astype(np.float32)
    dispatch = ck.build_dispatch(np.zeros((4096, 1), np.int64), np.ones((4096, 1), np.float32), 1)
    assert_parity(spec, pool.run(backend, dispatch, x), pool.run(reference, dispatch, x), share=1.5)


@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_bits_do_not_depend_on_split_batch_or_threads(make_pool: MakePool, route: Route, dtype: ck.ExpertDtype) -> None:
    """One call, one call an expert, one call a token, one thread: the same bits in every row."""
    spec = ck.ExpertSpec(200, 136, dtype, has_bias=True)
    pool = make_pool(spec, n_experts=6)
    dispatch, x = route(150, 3, 6, 200)
    two, one = ck.get_backend("numba"), ck.get_backend("numba", threads=1)
    whole = pool.run(two, dispatch, x)
    assert np.array_equal(whole, pool.run(one, dispatch, x), equal_nan=True)
    records, pieces = pool.records(dispatch), np.full_like(whole, np.nan)
    for position in np.random.default_rng(0).permutation(dispatch.expert_ids.size).astype(np.int32):
        at = np.array([position], np.int32)
        two.run(spec, records[at], at, dispatch, x, pieces)
    assert np.array_equal(whole, pieces, equal_nan=True)
    for token in (0, 7, 149):
        index = np.full((1, 3), -1, np.int64)
        for i, expert in enumerate(dispatch.expert_ids):
            rows = dispatch.rows[dispatch.offsets[i] : dispatch.offsets[i + 1]]
            index[0, rows[rows // 3 == token] % 3] = expert
        weights = dispatch.weights[3 * token : 3 * token + 3].reshape(1, 3)
        single = pool.run(two, ck.build_dispatch(index, weights, 6), x[token : token + 1])
        assert np.array_equal(single, whole[3 * token : 3 * token + 3], equal_nan=True)


def test_rows_of_other_experts_are_not_touched(backend: ck.CpuBackend, make_pool: MakePool, route: Route) -> None:
    spec = ck.ExpertSpec(64, 64, "int4")
    pool = make_pool(spec)
    dispatch, x = route(9, 2, 4, 64)
    out = np.full((18, 64), 123.0, np.float32)
    at = np.array([1], np.int32)
    backend.run(spec, pool.records(dispatch)[at], at, dispatch, x, out)
    mine = dispatch.rows[dispatch.offsets[1] : dispatch.offsets[2]]
    others = np.setdiff1d(np.arange(18), mine)
    assert (out[others] == 123.0).all()
    assert (out[mine] != 123.0).all()


def test_duplicate_experts_of_a_token_add_up(backend: ck.CpuBackend, make_pool: MakePool) -> None:
    spec = ck.ExpertSpec(64, 64, "float32")
    pool = make_pool(spec)
    x = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    sums = []
    for index, weights in (([[2, 2]], [[0.25, 0.5]]), ([[2, -1]], [[0.75, 9.0]])):
        dispatch = ck.build_dispatch(np.array(index), np.array(weights, np.float32), 4)
        out = np.empty((1, 64), np.float32)
        ck.combine(pool.run(backend, dispatch, x), dispatch, out)
        sums.append(out)
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5, atol=1e-7)


def test_two_generations_and_an_accelerator_thread_at_once(make_pool: MakePool, route: Route) -> None:
    """Three threads, two of them on one backend: results are those of a quiet run."""
    spec = ck.ExpertSpec(256, 512, "int8")
    pool = make_pool(spec, n_experts=8)
    shared, own = ck.get_backend("numba"), ck.get_backend("numba", threads=1)
    jobs = [(shared, route(17, 3, 8, 256, 1)), (shared, route(5, 2, 8, 256, 2)), (own, route(33, 2, 8, 256, 3))]
    expected = [pool.run(own, *job) for _, job in jobs]
    problems: list[str] = []

    def repeat(number: int) -> None:
        backend, job = jobs[number]
        for _ in range(25):
            if not np.array_equal(pool.run(backend, *job), expected[number], equal_nan=True):
                problems.append(f"thread {number}")
                return

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_nan_weights_of_the_intermediate_reach_the_output(backend: ck.CpuBackend, make_pool: MakePool) -> None:
    """An overflow inside an expert must not be hidden by quantisation."""
    spec = ck.ExpertSpec(64, 64, "int8", ck.Activation("relu2", gated=False))
    pool = make_pool(spec, n_experts=1)
    x = np.full((1, 64), 1e25, np.float32)
    dispatch = ck.build_dispatch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), 1)
    assert np.isnan(pool.run(backend, dispatch, x)).all()


def test_custom_activation_is_refused_with_the_way_out(
    backend: ck.CpuBackend, make_pool: MakePool, route: Route
) -> None:
    custom = ck.Activation("custom", custom=lambda both: both[..., :64] * torch.tanh(both[..., 64:]))
    spec = ck.ExpertSpec(64, 64, "float32", custom)
    pool = make_pool(spec)
    dispatch, x = route(5, 2, 4, 64)
    assert "torch backend" in str(backend.supports(spec))
    with pytest.raises(ck.BackendError, match="torch backend"):
        pool.run(backend, dispatch, x)
    torch_rows = pool.run(ck.get_backend("torch"), dispatch, x)
    assert_parity(spec, torch_rows, pool.run(ck.get_backend("reference"), dispatch, x))


@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_linear(backend: Any, dtype: ck.ExpertDtype) -> None:
    spec = ck.LinearSpec(150, 333, dtype)
    weight = torch.randn(333, 150, generator=torch.Generator().manual_seed(0)) * 0.1
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_linear(spec, weight, record)
    x = np.random.default_rng(0).standard_normal((13, 150)).astype(np.float32)
    out = np.full((13, 333), np.nan, np.float32)
    ck.run_linear(spec, record.ctypes.data, x, out)
    expected = torch.from_numpy(x) @ ck.unpack_linear(spec, record).T
    limit = 1e-5 if dtype in ("float32", "bfloat16") else 2e-2
    assert ck.relative_error(torch.from_numpy(out), expected) < limit
    single = np.empty((1, 333), np.float32)
    backend.linear(spec, record.ctypes.data, x[5:6], single)
    assert np.array_equal(single[0], out[5])
    with pytest.raises(ck.LayoutError, match=r"x must be C-contiguous float32\[13, 150\]"):
        backend.linear(spec, record.ctypes.data, x.astype(np.float64), out)
    x[3, 4] = np.nan
    with pytest.raises(ck.ActivationValueError, match=r"hidden\[3\]"):
        backend.linear(spec, record.ctypes.data, x, out)
