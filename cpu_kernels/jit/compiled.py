"""`kernel`: Numba compilation with the options of this package and a disk cache that may be missing."""

import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

# Scalars inside compiled code: float32, int32 and bool of Numba, for which Python has no static types of its own.
Real = Any
Whole = Any
Truth = Any
WORKER_SIGNATURE = "void(int64, int64)"
F = TypeVar("F", bound=Callable[..., Any])


class UncachedKernelWarning(UserWarning):
    """Kernels compile again at each start, because no cache directory is writable."""


def kernel(function: F) -> F:
    """Compiles `function` on first call: no GIL, no bounds checks, results kept on disk where that is possible."""
    return _jit(function, parallel=False)


def parallel_kernel(function: F) -> F:
    """Like `kernel`, with `numba.prange` loops run by the thread pool (see `cpu_kernels.host.threads`)."""
    return _jit(function, parallel=True)


def inline_kernel(function: F) -> F:
    """A part of kernels: compiled into its callers, not cached or callable by itself."""
    return cast(F, numba.njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


def float_kernel(function: F) -> F:
    """Like `inline_kernel`; sums may be taken in vectors, in an order that depends on the CPU and on nothing else."""
    options = {**_OPTIONS, "fastmath": {"reassoc", "contract", "nsz"}}
    return cast(F, numba.njit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


class Worker:
    """A function ``(call: int64, thread: int64) -> None`` that threads run by address; compiled when first asked for.

    Compiling the big functions once by themselves, and looping over their addresses in one tiny parallel kernel, takes
    a third of the time that Numba needs for the same code inside `prange` bodies.
    """

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self.function = function
        self._compiled: CFunc | None = None

    @property
    def address(self) -> int:
        """Address of the machine code."""
        if self._compiled is None:
            made = CFunc(self.function, normalize_signature(WORKER_SIGNATURE), {}, {**_OPTIONS, "nopython": True})
            if _enable_cache(made.enable_caching):
                _stamp(made)
            made.compile()
            self._compiled = made
        return cast(int, self._compiled.address)


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def _jit(function: F, parallel: bool) -> F:
    compiled = numba.njit(**_OPTIONS, parallel=parallel)(function)
    if _enable_cache(compiled.enable_caching):
        _stamp(compiled)
    return cast(F, compiled)


def _enable_cache(enable: Callable[[], None]) -> bool:
    """Whether compiled code can be kept on disk; warns once if not."""
    try:
        enable()
    except RuntimeError as error:  # Numba finds no directory that it may write to
        if "cannot cache" not in str(error):
            raise
        warnings.warn(
            "no writable directory for compiled kernels: every start compiles again (about 10 s). "
            "Set NUMBA_CACHE_DIR to a directory that you may write to.",
            UncachedKernelWarning,
            stacklevel=3,
        )
        return False
    return True


def _stamp(compiled: Any) -> None:
    """Ties cached code to all sources of this package; Numba itself looks at the function's own file only."""
    cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache_file is not None:
        cache_file._source_stamp = package_stamp()


@cache
def package_stamp() -> str:
    """Hash of the sources that compiled code comes from, constants included."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
