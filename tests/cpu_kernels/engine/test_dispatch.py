"""Grouping by expert and summing back, against plain loops."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import cpu_kernels as ck


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 9), st.integers(0, 999))
def test_groups_rows_by_expert(n_tokens: int, top_k: int, n_experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, n_experts + 2, (n_tokens, top_k))
    weights = rng.random((n_tokens, top_k)).astype(np.float32)
    dispatch = ck.build_dispatch(index, weights, n_experts)
    flat = index.reshape(-1)
    present = [e for e in range(n_experts) if e in flat]
    assert dispatch.expert_ids.tolist() == present
    for i, expert in enumerate(present):
        rows = dispatch.rows[dispatch.offsets[i] : dispatch.offsets[i + 1]]
        assert rows.tolist() == np.flatnonzero(flat == expert).tolist()
    assert np.array_equal(dispatch.weights, weights.reshape(-1))
    out_rows = rng.standard_normal((n_tokens * top_k, 3)).astype(np.float32)
    absent = (flat < 0) | (flat >= n_experts)
    expected = np.zeros((n_tokens, 3), np.float32)
    for row in np.flatnonzero(~absent):  # in top-k order, in float32
        expected[row // top_k] += out_rows[row]
    out_rows[absent] = np.nan
    out = np.full((n_tokens, 3), 7, np.float32)
    ck.combine(out_rows, dispatch, out)
    assert np.array_equal(out, expected)


def test_integer_dtypes_and_strides() -> None:
    index = np.array([[3, 1], [1, 0]], np.int16)
    weights = np.ones((2, 2), np.float32)
    a = ck.build_dispatch(index, weights, 4)
    b = ck.build_dispatch(np.asfortranarray(index.astype(np.int64)), np.asfortranarray(weights), 4)
    assert a.expert_ids.dtype == np.int32
    assert np.array_equal(a.rows, b.rows)
    assert a.n_tokens_per_expert.tolist() == [1, 2, 1]


def test_bad_input() -> None:
    weights = np.ones((2, 2), np.float32)
    index = np.zeros((2, 2), np.int64)
    with pytest.raises(ck.DispatchError, match="integer array"):
        ck.build_dispatch(index.astype(np.float32), weights, 4)
    with pytest.raises(ck.DispatchError, match=r"float32\[2, 2\]"):
        ck.build_dispatch(index, weights.astype(np.float64), 4)
    with pytest.raises(ck.DispatchError, match="token 1: expert id -5"):
        ck.build_dispatch(np.array([[0, 1], [-5, 0]]), weights, 4)
    with pytest.raises(ck.DispatchError, match="weight nan"):
        ck.build_dispatch(index, np.full((2, 2), np.nan, np.float32), 4)
    with pytest.raises(ck.DispatchError, match="num_experts"):
        ck.build_dispatch(index, weights, 0)


def test_combine_checks_buffers() -> None:
    dispatch = ck.build_dispatch(np.zeros((2, 2), np.int64), np.ones((2, 2), np.float32), 1)
    rows, out = np.zeros((4, 8), np.float32), np.zeros((2, 8), np.float32)
    with pytest.raises(ck.DispatchError, match="out_rows must be"):
        ck.combine(rows[:3], dispatch, out)
    with pytest.raises(ck.DispatchError, match="not contiguous"):
        ck.combine(np.zeros((4, 16), np.float32)[:, ::2], dispatch, out)
    with pytest.raises(ck.DispatchError, match="overlap"):
        ck.combine(rows, dispatch, rows[:2])
