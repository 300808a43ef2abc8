"""One way to compile: nopython, cached beside the source, without the GIL. Honours NUMBA_DISABLE_JIT=1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba  # type: ignore[import-untyped, unused-ignore]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """``numba.njit`` with this package's options; the type of the Python function is kept for checkers."""
    return cast(Function, numba.njit(cache=True, nogil=True)(function))
