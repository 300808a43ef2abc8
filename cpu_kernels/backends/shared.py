"""The numba backend that the linear layers and the attention of a process share."""

from functools import cache

import numpy as np

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.team import start_team
from cpu_kernels.format.linear import LinearSpec


@cache
def shared_backend(threads: int | None = None) -> NumbaBackend:
    """The backend with that many threads (None: all physical cores), which are there; the same object at every call."""
    backend = NumbaBackend(threads)
    start_team(backend.n_threads)
    return backend


def run_linear(spec: LinearSpec, address: int, x: np.ndarray, out: np.ndarray, threads: int | None = None) -> None:
    """``out = x @ W.T`` for the matrix packed at `address`.

    x: C-contiguous float32 [T, in_features]; out: C-contiguous float32 [T, out_features], overwritten. For int8 and
    int4 weights x is rounded to int8 per group of 32. Releases the GIL. Raises LayoutError and ActivationValueError.
    """
    shared_backend(threads).linear(spec, address, x, out)
