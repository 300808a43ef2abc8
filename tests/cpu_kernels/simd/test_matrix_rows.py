"""Products with matrices that are not packed, on every path that this CPU has."""

import ctypes

import numpy as np
import pytest

from cpu_kernels.host import isa
from cpu_kernels.simd.compile import Target, assembly, kernel_address
from cpu_kernels.simd.matrix_rows import ROW_BLOCK, DotRowsKernel

PATHS = [path.name for path in isa.PATHS if not isa.missing_features(path, isa.cpu_features())]
KERNELS = [DotRowsKernel("bfloat16"), DotRowsKernel("float32")]


def dot_rows(kernel: DotRowsKernel, path: str, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32 [rows, outputs]; weights: float32, or bfloat16 as uint16. Rows of x lie in the first columns of x."""
    n_outputs, n_in = weights.shape
    out = np.full((len(x), n_outputs + 3), np.nan, np.float32)
    p, i = ctypes.c_void_p, ctypes.c_int64
    call = ctypes.CFUNCTYPE(None, p, i, i, i, p, i, i, p, i)(kernel_address(kernel, path))
    call(weights.ctypes.data, weights.strides[0], n_outputs, n_in, x.ctypes.data, x.strides[0], len(x), out.ctypes.data,
         out.strides[0])  # fmt: skip
    assert np.isnan(out[:, n_outputs:]).all()
    return out[:, :n_outputs]


def matrices(kernel: DotRowsKernel, n_in: int, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights as stored, their values in float64, and x, whose rows are longer and end in NaN that nothing may read."""
    rng = np.random.default_rng(n_in)
    weights = rng.standard_normal((5, n_in)).astype(np.float32)
    x = np.full((n_rows, n_in + 9), np.nan, np.float32)
    x[:, :n_in] = rng.standard_normal((n_rows, n_in))
    if kernel.dtype == "float32":
        return weights, weights.astype(np.float64), x
    stored = (weights.view(np.uint32) >> 16).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64), x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.dtype)
@pytest.mark.parametrize("n_in", [1, 7, 8, 33, 64, 200])
def test_products_are_those_of_the_values(kernel: DotRowsKernel, path: str, n_in: int) -> None:
    for n_rows in range(1, 2 * ROW_BLOCK + 2):
        weights, values, x = matrices(kernel, n_in, n_rows)
        expected = x[:, :n_in].astype(np.float64) @ values.T
        sizes = np.abs(x[:, :n_in]).astype(np.float64) @ np.abs(values).T
        found = dot_rows(kernel, path, weights, x)
        assert (np.abs(found - expected) <= 2.0**-23 * n_in * sizes).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.dtype)
def test_a_row_has_the_same_bits_alone_and_among_others(kernel: DotRowsKernel, path: str) -> None:
    weights, _, x = matrices(kernel, 1003, 11)
    alone = np.concatenate([dot_rows(kernel, path, weights, row[None]) for row in x])
    for n_rows in range(1, len(x) + 1):
        assert np.array_equal(dot_rows(kernel, path, weights, x[:n_rows]), alone[:n_rows])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.dtype)
@pytest.mark.parametrize(("name", "cpu"), [("avx2", "znver3"), ("avx512", "skylake-avx512")])
def test_sums_stay_in_registers(kernel: DotRowsKernel, name: str, cpu: str) -> None:
    """No spill in the loops over columns: a multiply-add's sum is a register, and none is stored but the results."""
    text = assembly(kernel, isa.BY_NAME[name], Target("x86_64-unknown-linux-gnu", cpu, ""))
    register = "zmm" if isa.BY_NAME[name].lanes == 16 else "ymm"
    assert "vfmadd231ps" in text
    assert not [line for line in text.splitlines() if "movups" in line and "(%rsp)" in line and register in line]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.dtype)
def test_asking_for_lines_far_ahead_changes_no_bit(kernel: DotRowsKernel) -> None:
    weights, _, x = matrices(kernel, 103, 3)
    near, far = (DotRowsKernel(kernel.dtype, far) for far in (False, True))
    for path in PATHS:
        assert np.array_equal(dot_rows(near, path, weights, x), dot_rows(far, path, weights, x))
    target = Target("x86_64-unknown-linux-gnu", "znver3", "")
    codes = [assembly(each, isa.BY_NAME["avx2"], target) for each in (near, far)]
    assert ["prefetch" in code for code in codes] == [False, True]
