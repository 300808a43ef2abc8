"""The thread pool: Numba's, on OpenMP or TBB, sized to physical cores.

The workqueue layer is refused: it takes about 470 us a region where OpenMP takes 4 (measured), and it aborts the
process when two Python threads use it at once.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numba
import torch
from numba.np.ufunc import parallel

from cpu_kernels.errors import ThreadingError

ENV_THREADS = "HYBRIMOE_THREADS"
SAFE_LAYERS = ("omp", "tbb")


@cache
def physical_cores() -> int:
    """Cores this process may use, without counting hyper-threads twice."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, len({_core_of(cpu) for cpu in usable}))


def core_ids() -> tuple[int, ...]:
    """One usable CPU number of each physical core, ascending."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    first: dict[str, int] = {}
    for cpu in sorted(usable):
        first.setdefault(_core_of(cpu), cpu)
    return tuple(first.values())


def _core_of(cpu: int) -> str:
    """A name that hyper-threads of one core share."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return str(cpu)


def resolve_threads(threads: int | None = None) -> int:
    """`threads`, else HYBRIMOE_THREADS, else the physical cores; raises ThreadingError outside 1..pool size."""
    wanted: int | str = threads if threads is not None else os.environ.get(ENV_THREADS) or physical_cores()
    limit = int(numba.config.NUMBA_NUM_THREADS)
    try:
        count = int(wanted)
    except ValueError:
        raise ThreadingError(f"{ENV_THREADS}={wanted!r} is not a number of threads") from None
    if count < 1 or (count > limit and threads is not None):
        raise ThreadingError(f"asked for {count} threads, the pool has {limit} (NUMBA_NUM_THREADS sets its size)")
    return min(count, limit)


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Inside, torch's operators that this thread calls run on `n_threads`.

    torch keeps one number for each thread and another for threads yet to come, and `set_num_threads` writes both: put
    back, so that a thread started later does not run on one core because this one once asked for that.
    """
    before = torch.get_num_threads()
    if before != n_threads:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        if before != n_threads:
            torch.set_num_threads(before)


_LOCK = threading.Lock()
_layer: list[str] = []


def start_pool(n_threads: int) -> str:
    """Starts Numba's pool (kernels from the disk cache need it even for one thread) and returns the name of its layer.

    Raises ThreadingError, with what to install, if more than one thread is wanted and no safe layer loads.
    """
    with _LOCK:
        if not _layer:
            _layer.append(_start())
    if n_threads > 1 and _layer[0] not in SAFE_LAYERS:
        raise ThreadingError(
            f"Numba's threading layer is {_layer[0]!r}; {n_threads} threads need OpenMP (libgomp1 on Debian and "
            "Ubuntu, libomp on macOS) or TBB (pip install tbb). Install one, or run with 1 thread."
        )
    return _layer[0]


def _start() -> str:
    if str(numba.config.THREADING_LAYER) not in SAFE_LAYERS:  # a choice made by the user stays
        numba.config.THREADING_LAYER = "default"
        numba.config.THREADING_LAYER_PRIORITY = [*SAFE_LAYERS, "workqueue"]
    before = torch.get_num_threads()
    parallel._launch_threads()
    torch.set_num_threads(before)  # both may share one OpenMP library, and launching sets this thread's default
    return str(numba.threading_layer())
