"""Files that are mapped into memory, and what happens where a page of one does not come.

The system answers a touch of such a page (the file was cut short, or its disk gives an error) with the signal SIGBUS,
which ends the process without a word. Here the page becomes one of zeros and is counted, so that whoever computed with
it can say what is wrong, and the process goes on. Other such signals do what they did before.

Linux on x86-64 and AArch64; elsewhere nothing is watched.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import signal
import sys
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from cpu_kernels.host.memory import page_aligned
from cpu_kernels.jit.compiled import PACKAGE
from scheduler.compiled import keep_on_disk

_I64 = ir.IntType(64)
_TABLE = "hybrimoe_mapped_files"
"""Symbol of the table, int64: number of rows; from word 32 on rows of start, end (addresses) and pages that were lost.
Words 2 to 31 are the action that stood for the signal before (`struct sigaction`)."""
_TABLE_BYTES = 1 << 15
_WORD, _ROW_BYTES, _ROWS_AT, _BEFORE_AT = 8, 32, 256, 16
_MOST_ROWS = (_TABLE_BYTES - _ROWS_AT) // _ROW_BYTES
_ADDRESS_AT = 16  # si_addr in siginfo_t of 64-bit Linux
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_PROT_READ, _FIXED_PRIVATE_ANONYMOUS = 1, 0x10 | 0x02 | 0x20
_PAGE_BYTES = mmap.PAGESIZE
_SIGBUS = 7
_HANDLER = "void(int64, int64, int64)"  # signal (an int: its upper half is not defined), siginfo_t, context


class MappedFile:
    """A file's bytes [offset_bytes, offset_bytes + n_bytes) as `array`, uint8, read-only, for as long as it is used.

    mapping: of the whole file. Raises OSError or ValueError where the file cannot be mapped or is shorter.
    """

    def __init__(self, path: Path, offset_bytes: int, n_bytes: int) -> None:
        with path.open("rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array = np.frombuffer(self.mapping, np.uint8, n_bytes, offset_bytes)
        self._row = _watched(self.mapping, self.array) if n_bytes and is_watching() else None

    @property
    def n_lost_pages(self) -> int:
        """Pages of it that did not come, and read as zeros since."""
        return 0 if self._row is None else int(_rows()[self._row, 2])


@cache
def is_watching() -> bool:
    """Whether lost pages are noticed here."""
    on_linux = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return on_linux and sys.maxsize > 1 << 32 and not numba.config.DISABLE_JIT and _installed()


class _Action(ctypes.Structure):
    """`struct sigaction` of Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_lock = threading.Lock()


@cache
def _table() -> np.ndarray:
    return page_aligned(_TABLE_BYTES).view(np.int64)


def _rows() -> np.ndarray:
    """int64 [most, 4]: start, end, lost pages, unused."""
    return _table()[_ROWS_AT // _WORD :].reshape(-1, _ROW_BYTES // _WORD)


def _watched(mapped: mmap.mmap, array: np.ndarray) -> int | None:
    """The row of the table for a mapping, free again once it is gone; None where all rows are taken."""
    with _lock:
        rows, n_rows = _rows(), int(_table()[0])
        free = np.flatnonzero(rows[:n_rows, 1] == 0)
        if not free.size and n_rows == _MOST_ROWS:
            return None
        row = int(free[0]) if free.size else n_rows
        rows[row, 2] = 0
        rows[row, 0] = array.ctypes.data // _PAGE_BYTES * _PAGE_BYTES
        rows[row, 1] = array.ctypes.data + array.nbytes
        _table()[0] = max(n_rows, row + 1)
    weakref.finalize(mapped, _forget, row)
    return row


def _forget(row: int) -> None:
    _rows()[row, 1] = 0


def _installed() -> bool:
    """Whether the handler stands, from now on."""
    binding.add_symbol(_TABLE, _table().ctypes.data)
    made = CFunc(_on_lost_page, normalize_signature(_HANDLER), {}, {"nopython": True, "error_model": "numpy"})
    keep_on_disk(made, PACKAGE)
    made.compile()
    _kept.append(made)
    action = _Action(handler=made.address, flags=_SA_SIGINFO | _SA_ONSTACK)
    before = ctypes.c_void_p(_table().ctypes.data + _BEFORE_AT)
    done: int = ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), before)
    return done == 0


_kept: list[CFunc] = []


def _on_lost_page(number: int, info: int, context: int) -> None:
    """Compiled; runs in whichever thread touched the page, and calls nothing but the system."""
    table = _table_address()
    address = _load(info + _ADDRESS_AT)
    for index in range(_load(table)):
        row = table + _ROWS_AT + index * _ROW_BYTES
        if _load(row) <= address and address < _load(row + _WORD):
            page = address // _PAGE_BYTES * _PAGE_BYTES
            if _mmap(page, _PAGE_BYTES, _PROT_READ, _FIXED_PRIVATE_ANONYMOUS, -1, 0) == page:
                _store(row + 2 * _WORD, _load(row + 2 * _WORD) + 1)
                return
    _sigaction(_SIGBUS, table + _BEFORE_AT, 0)  # the touch is repeated, and answered as before


_mmap = types.ExternalFunction(
    "mmap", types.int64(types.int64, types.int64, types.int32, types.int32, types.int32, types.int64)
)
_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.int64, types.int64))


@intrinsic
def _table_address(typingctx: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        found = builder.module.globals.get(_TABLE) or ir.GlobalVariable(builder.module, _I64, _TABLE)
        return builder.ptrtoint(found, _I64)

    return types.int64(), code


@intrinsic
def _load(typingctx: Any, address: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _I64.as_pointer()))

    return types.int64(types.int64), code


@intrinsic
def _store(typingctx: Any, address: Any, value: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code
