"""Arrays by address. A compiled call that works on thirty arrays is told one vector of addresses in their place.

Taking an array into a compiled call costs more than a number: the interpreter's record of it has to be read, and after
kernels that stream weights it comes from memory. Whoever writes an address down keeps the array as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numba  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic  # type: ignore[import-untyped, unused-ignore]


def _view_of(kind: Any, plain: Any) -> Callable[[int, int | tuple[int, ...]], Any]:
    """``(address, shape)`` -> the array there, in compiled code, or in Python where compiling is switched off."""
    if numba.config.DISABLE_JIT:

        def slow_view(address: int, shape: int | tuple[int, ...]) -> Any:
            size = int(np.prod(shape))
            return np.ctypeslib.as_array((plain * size).from_address(int(address))).reshape(shape)

        return slow_view

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def pointer(typingctx: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer())

        return types.CPointer(kind)(types.int64), code

    def view(address: int, shape: int | tuple[int, ...]) -> Any:
        return numba.carray(pointer(address), shape)

    made = numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(view)
    return cast(Callable[[int, int | tuple[int, ...]], Any], made)


floats_at: Callable[[int, int | tuple[int, ...]], npt.NDArray[np.float64]] = _view_of(types.float64, ctypes.c_double)
"""float64 [n], or of a shape, at an address, without a copy: a reshape is more code than that."""
singles_at: Callable[[int, int | tuple[int, ...]], npt.NDArray[np.float32]] = _view_of(types.float32, ctypes.c_float)
"""float32, likewise."""
ints_at: Callable[[int, int | tuple[int, ...]], npt.NDArray[np.int64]] = _view_of(types.int64, ctypes.c_int64)
"""int64, likewise."""
ids_at: Callable[[int, int | tuple[int, ...]], npt.NDArray[np.int32]] = _view_of(types.int32, ctypes.c_int32)
"""int32, likewise."""
