"""`kernel`: Numba compilation with the options of this package, kept on disk by `scheduler.compiled`."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from scheduler.compiled import keep_on_disk

# Scalars inside compiled code: float32, int32 and bool of Numba, for which Python has no static types of its own.
Real = Any
Whole = Any
Truth = Any
PACKAGE = "cpu_kernels"
"""Whose sources machine code is made from: a change in any of them makes it anew."""
WORKER_SIGNATURE = "void(int64, int64)"
F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compiles `function` on first call: no GIL, no bounds checks, results kept on disk where that is possible."""
    compiled = numba.njit(**_OPTIONS)(function)
    keep_on_disk(compiled, PACKAGE)
    return cast(F, compiled)


def inline_kernel(function: F) -> F:
    """A part of kernels: compiled into its callers, not cached or callable by itself."""
    return cast(F, numba.njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


def float_kernel(function: F) -> F:
    """Like `inline_kernel`; sums may be taken in vectors, in an order that depends on the CPU and on nothing else."""
    options = {**_OPTIONS, "fastmath": {"reassoc", "contract", "nsz"}}
    return cast(F, numba.njit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


class Worker:
    """A function ``(call: int64, thread: int64) -> None`` that threads run by address; compiled when first asked for.

    The team of threads (`cpu_kernels.engine.team`) runs any of them, and each is compiled once by itself.
    """

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self.function = function
        self._compiled: CFunc | None = None

    @property
    def address(self) -> int:
        """Address of the machine code."""
        if self._compiled is None:
            made = CFunc(self.function, normalize_signature(WORKER_SIGNATURE), {}, {**_OPTIONS, "nopython": True})
            keep_on_disk(made, PACKAGE)
            made.compile()
            self._compiled = made
        return cast(int, self._compiled.address)


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
