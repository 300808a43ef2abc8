"""Backends by name."""

import difflib
from collections.abc import Callable

from cpu_kernels.backends.base import CpuBackend
from cpu_kernels.backends.choice import measured_choice
from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.backends.reference import ReferenceBackend
from cpu_kernels.backends.torch_backend import TorchBackend
from cpu_kernels.errors import BackendError

__all__ = ["BACKENDS", "CpuBackend", "get_backend"]


def _reference(threads: int | None) -> CpuBackend:
    return ReferenceBackend()


def _torch(threads: int | None) -> CpuBackend:
    return TorchBackend(threads)


def _numba(threads: int | None) -> CpuBackend:
    return NumbaBackend(threads)


def _onnx(threads: int | None) -> CpuBackend:
    from cpu_kernels.backends.onnx_backend import OnnxBackend

    return OnnxBackend(threads)


def _ipex(threads: int | None) -> CpuBackend:
    from cpu_kernels.backends.ipex_backend import IpexBackend

    return IpexBackend(threads)


BACKENDS: dict[str, Callable[[int | None], CpuBackend]] = {
    "numba": _numba,
    "torch": _torch,
    "onnx": _onnx,
    "ipex": _ipex,
    "reference": _reference,
}


def get_backend(name: str = "auto", threads: int | None = None) -> CpuBackend:
    """The backend called `name`; "auto" takes the fastest of the last `hybrimoe calibrate`, or numba.

    threads: size of its part of the thread pool, None = all physical cores. Raises BackendError for an unknown name or
    a backend that cannot run here (with the reason).
    """
    chosen = measured_choice().backend if name == "auto" else name
    if chosen not in BACKENDS:
        near = difflib.get_close_matches(chosen, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BackendError(f"unknown CPU backend {name!r}; expected auto, {', '.join(BACKENDS)}.{hint}")
    return BACKENDS[chosen](threads)
