"""The one way to compile with Numba: kept on disk between starts, never stale, no error where nothing can be kept.

Numba ties code on disk to the file of the function itself; what is compiled into it from other modules may have changed
since. Here it is tied to all sources of the packages that it can come from. The other packages compile through this
module too, since all of them may import it. Honours NUMBA_DISABLE_JIT=1.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast


def _import_numba() -> None:
    """Without SciPy, whose linear algebra Numba would import for functions that nothing here calls; others, who call
    them, find it later."""
    if "numba" in sys.modules or "scipy" in sys.modules:
        return
    there = importlib.util.find_spec("scipy") is not None
    sys.modules["scipy"] = None  # type: ignore[assignment]  # so an import of it fails
    try:
        importlib.import_module("numba")
        vars(importlib.import_module("numba.np.arraymath"))["_HAVE_BLAS"] = there
    finally:
        del sys.modules["scipy"]


_import_numba()

import numba  # type: ignore[import-untyped, unused-ignore]  # noqa: E402
from numba.core.caching import IndexDataCacheFile  # type: ignore[import-untyped, unused-ignore]  # noqa: E402

Function = TypeVar("Function", bound=Callable[..., Any])


class UncachedCodeWarning(UserWarning):
    """Compiled code is made again at each start, because no cache directory can be written to."""


def compiled(function: Function) -> Function:
    """``numba.njit`` with this package's options; the type of the Python function is kept for checkers."""
    made = once_for_all_values(numba.njit(nogil=True, error_model="numpy")(function))
    keep_on_disk(made, "scheduler")
    return cast(Function, made)


def straight(made: Function) -> Function:
    """The machine code of `made`, called without Numba's look-up of what types the arguments have: for who gives those
    that it was compiled for, once it was. `made` itself before that, or where it was compiled for several.

    After work that has emptied the caches the look-up takes 1 to 3 us.
    """
    codes = getattr(made, "overloads", {})
    return cast(Function, next(iter(codes.values())).entry_point) if len(codes) == 1 else made


def once_for_all_values(made: Any) -> Any:
    """Lets compiled callers of `made` share one machine code of it. Returns `made`.

    Numba compiles a function again for each number or truth value that a call of it spells out: f(x, -1) and f(x, y).
    """
    if numba.config.DISABLE_JIT:
        return made
    template_of, plain = made.get_call_template, numba.types.unliteral
    made.get_call_template = lambda args, kws: template_of(
        [plain(kind) for kind in args], {name: plain(kind) for name, kind in kws.items()}
    )
    return made


def keep_on_disk(made: Any, *packages: str) -> None:
    """Lets Numba keep the machine code of `made` until a source of `packages` changes; warns once where it cannot.

    made: what ``numba.njit`` or ``CFunc`` made, before it is compiled. packages: the package of the function, and those
    whose compiled functions it calls.
    """
    if numba.config.DISABLE_JIT:
        return
    try:
        made.enable_caching()
    except RuntimeError:  # Numba finds no directory that it may write to
        _warn_once()
        return
    cache = made._cache  # private, like what is called of it; tests/scheduler/test_compiled.py
    cache._cache_file = CodeFiles(cache.cache_path, cache._impl.filename_base, source_stamp(*packages))


class CodeFiles(IndexDataCacheFile):  # type: ignore[misc, unused-ignore]
    """Numba's files of one function, an index and a file for each signature, that several processes may write at once.

    Each process takes a free name for its code, and two may take the same one. So the file says whose code it has, and
    another one's is not loaded; it is compiled again.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keeps the code `data` of signature, machine and byte code `key`."""
        super().save(key, (self._source_stamp, key, data))

    def load(self, key: Any) -> Any:
        """The code that was kept for `key`, or None."""
        stamp, owner, data = super().load(key) or (None, None, None)
        return data if (stamp, owner) == (self._source_stamp, key) else None


@cache
def source_stamp(*packages: str) -> str:
    """Hash of all Python sources of `packages`, which lie beside this one, and of this module, which writes the files.

    Read once, when the first function of them is made: later the files may be those of an update.
    """
    root, digest = Path(__file__).parents[1], hashlib.sha256(Path(__file__).read_bytes())
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _warn_once() -> None:
    warnings.warn(
        "no writable directory for compiled code: every start compiles again (about 10 s). "
        "Set NUMBA_CACHE_DIR to a directory that you may write to.",
        UncachedCodeWarning,
        stacklevel=4,
    )
