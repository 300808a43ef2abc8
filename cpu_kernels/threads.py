"""The thread pool: Numba's, on OpenMP or TBB, sized to physical cores.

The workqueue layer is refused: it takes about 470 us a region where OpenMP takes 4 (measured), and it aborts the process
when two Python threads use it at once.
"""

import os
import threading
from functools import cache

import numba

from cpu_kernels.errors import ThreadingError

ENV_THREADS = "HYBRIMOE_THREADS"
SAFE_LAYERS = ("omp", "tbb")


@cache
def physical_cores() -> int:
    """Cores this process may use, without counting hyper-threads twice."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, len({_core_of(cpu) for cpu in usable}))


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


_LOCK = threading.Lock()
_layer: list[str] = []


def ensure_safe_layer() -> str:
    """Starts the pool on a safe layer and returns its name; raises ThreadingError with what to install otherwise."""
    with _LOCK:
        if not _layer:
            _layer.append(_start())
        return _layer[0]


def _start() -> str:
    from numba.np.ufunc import parallel

    if not getattr(parallel, "_is_initialized", False):
        wanted = str(numba.config.THREADING_LAYER)
        if wanted not in (*SAFE_LAYERS, "threadsafe"):
            numba.config.THREADING_LAYER = "threadsafe"
            numba.config.THREADING_LAYER_PRIORITY = [*SAFE_LAYERS, "workqueue"]
    try:
        parallel._launch_threads()
        name = str(numba.threading_layer())
    except ValueError as error:
        raise ThreadingError(_ADVICE) from error
    if name not in SAFE_LAYERS:
        raise ThreadingError(_ADVICE)
    return name


_ADVICE = (
    "no safe threading layer loads. Numba needs OpenMP (package libgomp1 on Debian and Ubuntu, libomp on macOS) or TBB "
    "(pip install tbb). Its workqueue layer is not used: two generations at once would abort the process."
)
