"""Elementwise functions in plain Python (no compilation): the same source that Numba compiles."""

import math

import numpy as np
import pytest

from cpu_kernels import elementwise
from cpu_kernels.compiled import kernel


@kernel
def exp_and_erf(x: np.ndarray, exp: np.ndarray, erf: np.ndarray) -> None:
    for i in range(x.size):
        exp[i] = elementwise.exp(x[i])
        erf[i] = elementwise.erf(x[i])


def test_exp_and_erf_are_float32_accurate() -> None:
    x = np.linspace(-20, 20, 4001, dtype=np.float32)
    exp, erf = np.empty_like(x), np.empty_like(x)
    exp_and_erf(x, exp, erf)
    np.testing.assert_allclose(exp, np.exp(x.astype(np.float64)), rtol=4e-7)
    np.testing.assert_allclose(erf, [math.erf(v) for v in x.tolist()], rtol=4e-7, atol=1e-9)


def test_exp_stays_finite_outside_its_range() -> None:
    x = np.array([-1e4, -88, 88.5, 1e4], np.float32)
    exp, erf = np.empty_like(x), np.empty_like(x)
    exp_and_erf(x, exp, erf)
    assert np.isfinite(exp).all()
    assert exp[0] < 1e-37
    assert erf.tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_quantised_group_matches_its_definition(seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal(32) * 10.0**seed).astype(np.float32)
    codes = np.zeros(32, np.int8)
    scale, total = quantise(x, codes)
    assert scale == pytest.approx(np.abs(x).max() / 127, rel=1e-6)
    np.testing.assert_array_equal(codes, np.rint(x * (np.float32(127) / np.abs(x).max())).astype(np.int8))
    assert total == codes.sum(dtype=np.int32)


def test_quantised_group_of_zeros_and_of_nan() -> None:
    codes = np.ones(32, np.int8)
    assert quantise(np.zeros(32, np.float32), codes) == (0, 0)
    assert not codes.any()
    x = np.ones(32, np.float32)
    x[7] = np.nan
    assert quantise(x, codes) == (np.inf, 0)


@kernel
def quantise(x: np.ndarray, codes: np.ndarray) -> tuple[float, int]:
    return elementwise.quantise_group(x, codes)
