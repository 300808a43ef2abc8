"""Bad input to a backend: a clear error, nothing written."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cpu_kernels as ck

SPEC = ck.ExpertSpec(64, 64, "int8")


@pytest.fixture(params=["numba", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> ck.CpuBackend:
    return ck.get_backend(request.param)


@pytest.fixture
def call(make_pool: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a good call."""
    pool = make_pool(SPEC)
    dispatch = ck.build_dispatch(np.array([[0, 1], [1, 3]]), np.ones((2, 2), np.float32), 4)
    return {
        "spec": SPEC,
        "records": pool.records(dispatch),
        "positions": np.arange(3, dtype=np.int32),
        "dispatch": dispatch,
        "hidden": np.ones((2, 64), np.float32),
        "out_rows": np.full((4, 64), 5.0, np.float32),
        "pool": pool,
    }


def run(backend: ck.CpuBackend, call: dict[str, Any], **changes: Any) -> None:
    backend.run(**{key: value for key, value in (call | changes).items() if key != "pool"})


def refused(backend: ck.CpuBackend, call: dict[str, Any], error: type[Exception], text: str, **changes: Any) -> None:
    before = call["out_rows"].copy()
    with pytest.raises(error, match=text):
        run(backend, call, **changes)
    assert np.array_equal(call["out_rows"], before)


def test_good_call(backend: ck.CpuBackend, call: dict[str, Any]) -> None:
    run(backend, call)
    assert (call["out_rows"] != 5.0).all()


def test_buffers(backend: ck.CpuBackend, call: dict[str, Any]) -> None:
    wide = np.ones((2, 128), np.float32)
    refused(backend, call, ck.LayoutError, "hidden must be C-contiguous.*not contiguous", hidden=wide[:, ::2])
    refused(backend, call, ck.LayoutError, "found float64", hidden=np.ones((2, 64)))
    refused(
        backend, call, ck.LayoutError, r"float32\[2, 64\], found float32\[3, 64\]", hidden=np.ones((3, 64), np.float32)
    )
    refused(backend, call, ck.LayoutError, r"out_rows must be .*\[4, 64\]", out_rows=np.ones((3, 64), np.float32))
    both = np.ones((6, 64), np.float32)
    refused(backend, call, ck.LayoutError, "overlap", hidden=both[:2], out_rows=both[1:5])
    locked = np.ones((4, 64), np.float32)
    locked.flags.writeable = False
    refused(backend, call, ck.LayoutError, "read-only", out_rows=locked)


@pytest.mark.parametrize("positions", [[0, 1, 3], [0, 1, -1], [0, 1, 1]])
def test_positions(backend: ck.CpuBackend, call: dict[str, Any], positions: list[int]) -> None:
    text = r"positions\[2\] .*3 active experts"
    refused(backend, call, ck.DispatchError, text, positions=np.array(positions, np.int32))


def test_records(backend: ck.CpuBackend, call: dict[str, Any]) -> None:
    none = np.array([0, 1, 0], np.uint64) * call["records"]
    refused(backend, call, ck.DispatchError, "has no record", records=none)
    refused(backend, call, ck.LayoutError, "records must be", records=call["records"].astype(np.int64))
    refused(backend, call, ck.LayoutError, "records must be", records=call["records"][:2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_activations_that_are_not_finite(
    backend: ck.CpuBackend, call: dict[str, Any], make_pool: Callable[..., Any], value: float, dtype: ck.ExpertDtype
) -> None:
    spec = ck.ExpertSpec(64, 64, dtype)
    pool = make_pool(spec)
    hidden = np.ones((2, 64), np.float32)
    hidden[1, 17] = value
    refused(
        backend,
        call,
        ck.ActivationValueError,
        r"hidden\[1\] contains NaN or infinity",
        spec=spec,
        records=pool.records(call["dispatch"]),
        hidden=hidden,
    )


def test_nothing_to_do(backend: ck.CpuBackend, call: dict[str, Any]) -> None:
    empty = {"records": np.zeros(0, np.uint64), "positions": np.zeros(0, np.int32)}
    run(backend, call, **empty)
    assert (call["out_rows"] == 5.0).all()
    dispatch = ck.build_dispatch(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32), 4)
    run(
        backend,
        call,
        **empty,
        dispatch=dispatch,
        hidden=np.zeros((0, 64), np.float32),
        out_rows=np.zeros((0, 64), np.float32),
    )


def test_unknown_backend() -> None:
    with pytest.raises(ck.BackendError, match="Did you mean 'numba'"):
        ck.get_backend("numbra")
