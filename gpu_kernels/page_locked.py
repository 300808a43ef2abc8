"""Host memory that a device's copy engine reads by itself: page-locked, without rounding its size up."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import page_aligned


def page_locked(n_bytes: int, what: str = "experts") -> npt.NDArray[np.uint8]:
    """uint8 [n_bytes] of zeros for `what` at a page boundary, on huge pages where the system has them, page-locked.

    torch's own page-locked allocations round up to a power of two (23.6 GiB of experts would take 32 GiB). So the
    memory is ours, and the device's runtime (CUDA, ROCm) is asked to lock it; where there is no such call (XPU) torch
    allocates. A system that refuses is warned of once: the memory is then pageable, and copies go through staging
    buffers. Raises OSError, ValueError or OverflowError where there is no such memory at all.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not n_bytes or device is None:  # a torch that was built for cards names one on a machine that has none
        return page_aligned(n_bytes)
    runtime = getattr(torch.get_device_module(device), "cudart", None)
    if runtime is None:
        return _allocated_by_torch(n_bytes, what)
    memory = page_aligned(n_bytes)
    _lock(memory, runtime(), device, what)
    return memory


_LOCKS: dict[int, weakref.finalize[..., Any]] = {}
"""By address: what unlocks memory that this module has locked, which it does once, with its end at the latest."""


def unlock(memory: npt.NDArray[np.uint8]) -> None:
    """Makes memory of `page_locked` pageable; what torch has allocated stays as it is. No copy may be under way."""
    lock = _LOCKS.pop(memory.ctypes.data, None)
    if lock is not None:
        lock()


def _lock(memory: npt.NDArray[np.uint8], runtime: Any, device: torch.device, what: str) -> None:
    """Locks the pages of `memory` until it is freed."""
    address = memory.ctypes.data
    code = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if code == 0:
        _LOCKS[address] = lock = weakref.finalize(memory, runtime.cudaHostUnregister, address)
        lock.atexit = False
        return
    with contextlib.suppress(RuntimeError):  # the failed call's error would else be blamed on the next kernel
        torch.zeros(1, device=device).add_(1)
    _warn(memory.nbytes, what, f"error {code} of the device's runtime")


def _allocated_by_torch(n_bytes: int, what: str) -> npt.NDArray[np.uint8]:
    try:
        memory: npt.NDArray[np.uint8] = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        _warn(n_bytes, what, str(error))
        return page_aligned(n_bytes)
    return memory


def _warn(n_bytes: int, what: str, reason: str) -> None:
    warnings.warn(
        f"{n_bytes / 2**30:.2f} GiB of {what} could not be page-locked ({reason}): transfers to the accelerator take a"
        " copy on the host first and are slower. Raise the limit of locked memory (ulimit -l; in WSL2 the memory of the"
        " virtual machine), or choose a smaller expert_dtype",
        RuntimeWarning,
        stacklevel=3,
    )
