"""Rows around the matrix products on every path that this CPU has: formats of activations, activation functions."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from cpu_kernels.host import isa
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.simd.formats import INEXACT, NOT_FINITE, PAIRS, PARTS, X_CORRECTIONS, X_SCALES, Format
from cpu_kernels.simd.rows import (
    ACT_MAX,
    ALPHA,
    GATE_MAX,
    N_PARAMETERS,
    UP_LIMIT,
    UP_OFFSET,
    FinishKernel,
    PrepareKernel,
)

PATHS = [path.name for path in isa.PATHS if not isa.missing_features(path, isa.cpu_features())]
FORMATS = {
    "plain": Format("plain"),
    "paired": Format("paired"),
    "split": Format("split"),
    "quantised": Format("quantised", 8),
}
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def prepare(form: str, x: np.ndarray, path: str) -> tuple[np.ndarray, int]:
    """Blocks uint8 [n, block bytes] of a row, and the flags."""
    kernel = PrepareKernel(FORMATS[form])
    blocks = np.full((-(-x.size // 64), kernel.form.block_bytes), 0xAA, np.uint8)
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    call = function(kernel_address(kernel, path))
    return blocks, call(x.ctypes.data, x.size, blocks.ctypes.data)


def finish(
    kernel: FinishKernel, sums: np.ndarray, path: str, column: int = 0, n_true: int = 64, **limits: float
) -> np.ndarray:
    """Blocks uint8 [n_rows, block bytes] of rows of one block."""
    parameters = np.full(N_PARAMETERS, np.inf, np.float32)
    parameters[[ALPHA, UP_OFFSET]] = limits.get("alpha", 1.0), limits.get("up_offset", 0.0)
    for place, name in ((GATE_MAX, "gate_max"), (ACT_MAX, "act_max"), (UP_LIMIT, "up_limit")):
        parameters[place] = limits.get(name, np.inf)
    blocks = np.full((len(sums), kernel.form.block_bytes), 0xAA, np.uint8)
    p, i = ctypes.c_void_p, ctypes.c_int64
    call = ctypes.CFUNCTYPE(None, p, i, p, i, p, i, i)(kernel_address(kernel, path))
    call(sums.ctypes.data, len(sums), parameters.ctypes.data, n_true, blocks.ctypes.data, blocks.shape[1], column)
    return blocks


def halves(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, 64] of the float32 and of the bfloat16 of paired blocks."""
    words = np.ascontiguousarray(blocks[:, PAIRS:]).view(np.uint16).astype(np.uint32) << 16
    return np.ascontiguousarray(blocks[:, :PAIRS]).view(np.float32), words.view(np.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_true", [1, 64, 100])
def test_plain_rows_are_copied_and_padded(path: str, n_true: int) -> None:
    x = np.random.default_rng(0).standard_normal(n_true).astype(np.float32)
    blocks, flags = prepare("plain", x, path)
    row = blocks.view(np.float32).ravel()
    assert flags == 0
    assert np.array_equal(row[:n_true], x)
    assert not row[n_true:].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_quantised_groups_match_their_definition(path: str, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal(96) * 10.0**seed).astype(np.float32)
    blocks, flags = prepare("quantised", x, path)
    assert flags == 0
    padded = np.concatenate([x, np.zeros(32, np.float32)]).reshape(2, 2, 32)
    codes = blocks[:, :X_SCALES].view(np.int8).reshape(2, 2, 32)
    scales = np.ascontiguousarray(blocks[:, X_SCALES:X_CORRECTIONS]).view(np.float32)
    corrections = np.ascontiguousarray(blocks[:, X_CORRECTIONS:]).view(np.int32)
    largest = np.abs(padded).max(2, keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    np.testing.assert_array_equal(codes, np.rint(padded * inverse).astype(np.int8))
    np.testing.assert_allclose(scales, largest[:, :, 0] / 127, rtol=1e-6)
    np.testing.assert_array_equal(corrections, -8 * codes.sum(2, dtype=np.int32))


@pytest.mark.parametrize("path", PATHS)
def test_paired_rows_say_whether_they_are_bfloat16(path: str) -> None:
    x = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    blocks, flags = prepare("paired", x, path)
    assert flags == INEXACT
    assert np.array_equal(halves(blocks)[0].ravel()[:100], x)
    rounded = torch.from_numpy(x).bfloat16().float().numpy()
    rounded[3] = 0
    blocks, flags = prepare("paired", rounded, path)
    assert flags == 0
    for part in halves(blocks):
        assert np.array_equal(part.ravel()[:100], rounded)
        assert not part.ravel()[100:].any()
    rounded[99] = 2.0**-130  # a bfloat16, but subnormal
    assert prepare("paired", rounded, path)[1] == INEXACT


def parts_of(blocks: np.ndarray) -> np.ndarray:
    """float32 [PARTS, n, 64] of split blocks."""
    words = blocks.view(np.uint16).astype(np.uint32).reshape(len(blocks), PARTS, 64) << 16
    return words.view(np.float32).transpose(1, 0, 2)


@pytest.mark.parametrize("path", PATHS)
def test_the_parts_of_split_rows_add_up(path: str) -> None:
    random = np.random.default_rng(1)
    x = (random.standard_normal(100) * 10.0 ** random.integers(-30, 38, 100)).astype(np.float32)
    x[:6] = [0.0, -0.0, np.finfo(np.float32).max, 1.0 + 2.0**-23, -1.0 - 2.0**-8 - 2.0**-23, 2.0**-16]
    blocks, flags = prepare("split", x, path)
    assert flags == INEXACT
    high, middle, low = (part.ravel() for part in parts_of(blocks))
    assert np.array_equal((high + (middle + low))[:100].view(np.uint32)[2:], x.view(np.uint32)[2:])
    assert not (high + middle + low)[100:].any()
    assert np.array_equal(middle[[3, 4]], [2.0**-23, -(2.0**-8)])
    assert np.array_equal(low[[3, 4]], [0, -(2.0**-23)])


@pytest.mark.parametrize("path", PATHS)
def test_split_rows_say_whether_the_highest_part_is_all(path: str) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16().float().numpy()
    x[3:6] = [0.0, -0.0, 2.0**-130]  # tiles take subnormal values as 0 in any part
    blocks, flags = prepare("split", x, path)
    assert flags == 0
    high, middle, low = (part.ravel() for part in parts_of(blocks))
    assert np.array_equal(high[:100].view(np.uint32), x.view(np.uint32))
    assert not middle.any()
    assert not low.any()
    x[99] += np.float32(2.0**-20)
    assert prepare("split", x, path)[1] == INEXACT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_flagged(path: str, form: str, bad: float) -> None:
    x = np.ones(70, np.float32)
    assert prepare(form, x, path)[1] == 0
    x[66] = bad
    blocks, flags = prepare(form, x, path)
    assert flags & NOT_FINITE
    if form == "split":
        high, middle, low = (part.ravel()[66] for part in parts_of(blocks))
        np.testing.assert_equal(high + (middle + low), np.float32(bad))
    if form == "quantised":
        assert not blocks[1, :X_SCALES].any()
        assert np.isinf(blocks[1, X_SCALES:X_CORRECTIONS].view(np.float32)[0])


def test_a_group_of_zeros_has_scale_zero() -> None:
    blocks, flags = prepare("quantised", np.zeros(64, np.float32), PATHS[0])
    assert flags == 0
    assert not blocks.any()


VALUES = np.concatenate([np.linspace(-20, 20, 1200), np.linspace(-0.1, 0.1, 80)]).astype(np.float32).reshape(-1, 64)


@pytest.mark.parametrize("path", [PATHS[0], "portable"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_float32_accurate(path: str, kind: str) -> None:
    result = finish(FinishKernel(FORMATS["plain"], kind, gated=False), VALUES, path).view(np.float32)
    x = torch.from_numpy(VALUES).double()
    size = np.maximum(np.abs(VALUES), 1e-3) if kind.startswith("gelu") else 0  # 1 + erf cancels where gelu is near 0
    assert np.all(np.abs(result - KINDS[kind](x).numpy()) <= 1e-6 * np.maximum(np.abs(KINDS[kind](x).numpy()), size))


@pytest.mark.parametrize("path", PATHS)
def test_gated_activation_with_its_limits(path: str) -> None:
    limits = {"alpha": 1.702, "gate_max": 7.0, "act_max": 5.0, "up_limit": 6.0, "up_offset": 1.0}
    sums = np.random.default_rng(2).standard_normal((9, 64)).astype(np.float32) * 8
    result = finish(FinishKernel(FORMATS["plain"], "silu", True), sums, path, column=32, n_true=20, **limits)
    gate, up = np.minimum(sums[:, :32].astype(np.float64), 7), np.clip(sums[:, 32:].astype(np.float64), -6, 6)
    expected = np.minimum(gate / (1 + np.exp(-1.702 * gate)), 5) * (up + 1)
    rows = result.view(np.float32)
    np.testing.assert_allclose(rows[:, 32:52], expected[:, :20], rtol=2e-6, atol=1e-6)
    assert not rows[:, 52:].any()
    assert (result[:, :128] == 0xAA).all()  # the other half of the block is another task's


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"])
def test_large_values_and_nan(kind: str) -> None:
    sums = np.zeros((1, 64), np.float32)
    sums[0, :6] = -1e4, 1e4, -88.5, 88.5, np.nan, np.inf
    result = finish(FinishKernel(FORMATS["plain"], kind, False), sums, PATHS[0]).view(np.float32)[0]
    expected = KINDS[kind](torch.tensor([-1e4, 1e4, -88.5, 88.5])).numpy()
    np.testing.assert_allclose(result[:4], expected, rtol=1e-6, atol=1e-30)
    assert np.isnan(result[4])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["paired", "quantised"])
def test_finished_rows_have_the_format_of_prepared_ones(path: str, form: str) -> None:
    sums = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    blocks = finish(FinishKernel(FORMATS[form], "identity", False), sums, path)
    for row, block in zip(sums, blocks, strict=True):
        assert np.array_equal(prepare(form, row, path)[0][0], block)
