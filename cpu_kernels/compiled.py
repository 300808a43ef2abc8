"""`kernel`: Numba compilation with the options of this package and a disk cache that may be missing."""

import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


class UncachedKernelWarning(UserWarning):
    """Kernels compile again at each start, because no cache directory is writable."""


def kernel(function: F) -> F:
    """Compiles `function` on first call: no GIL, no bounds checks, results kept on disk where that is possible."""
    return _jit(function, parallel=False)


def parallel_kernel(function: F) -> F:
    """Like `kernel`, with `numba.prange` loops run by the thread pool (see `cpu_kernels.threads`)."""
    return _jit(function, parallel=True)


def inline_kernel(function: F) -> F:
    """A part of kernels: compiled into its callers by LLVM, not cached by itself."""
    return cast(F, numba.njit(nogil=True, error_model="numpy", boundscheck=False)(function))


def _jit(function: F, parallel: bool) -> F:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "parallel": parallel}
    try:
        compiled = numba.njit(cache=True, **options)(function)
        _stamp(compiled)
        return cast(F, compiled)
    except RuntimeError as error:  # Numba finds no directory that it may write to
        if "cannot cache" not in str(error):
            raise
        warnings.warn(
            "no writable directory for compiled kernels: every start compiles again (about 10 s). "
            "Set NUMBA_CACHE_DIR to a directory that you may write to.",
            UncachedKernelWarning,
            stacklevel=3,
        )
        return cast(F, numba.njit(cache=False, **options)(function))


def _stamp(compiled: Any) -> None:
    """Ties cached code to all sources of this package; Numba itself looks at the function's own file only."""
    cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache_file is not None:
        cache_file._source_stamp = package_stamp()


@cache
def package_stamp() -> str:
    """Hash of this package's sources."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
