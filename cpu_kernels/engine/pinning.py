"""Pins the pool's threads to cores, if the user asks (HYBRIMOE_PIN=1); Linux only.

The calling thread stays free: it is the program's own, and with the others in place the system finds it the rest.
"""

import os
import threading

import numba
import numpy as np
from numba import types

from cpu_kernels.engine.layer import run_on_threads
from cpu_kernels.jit.compiled import Worker

ENV_PIN = "HYBRIMOE_PIN"
MASK_BYTES = 128  # of a cpu_set_t: 1024 CPUs
_set_affinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))
_pinned = threading.local()


def _pin(masks: int, thread: int) -> None:
    """Worker: this thread (0) onto mask number `thread`."""
    if thread > 0:
        _set_affinity(0, MASK_BYTES, masks + MASK_BYTES * thread)


PIN_WORK = Worker(_pin)


def pin_once(n_threads: int, cores: tuple[int, ...]) -> None:
    """Pins the threads that serve the calling thread, one a core, at its first call; nothing without HYBRIMOE_PIN."""
    if getattr(_pinned, "n_threads", 0) >= n_threads or not wanted():
        return
    masks = np.zeros((n_threads, MASK_BYTES), np.uint8)
    for thread in range(n_threads):
        core = cores[thread % len(cores)]
        masks[thread, core // 8] = 1 << core % 8
    numba.set_num_threads(n_threads)
    run_on_threads(PIN_WORK.address, masks.ctypes.data, n_threads)
    _pinned.n_threads = n_threads


def wanted() -> bool:
    """Whether pinning is asked for and possible here."""
    return os.environ.get(ENV_PIN, "") not in ("", "0") and hasattr(os, "sched_setaffinity")
