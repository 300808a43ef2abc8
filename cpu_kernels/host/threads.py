"""How many threads compute, on which cores, and how many of them torch uses."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import ParamSpec, TypeVar

import torch

from cpu_kernels.errors import ThreadingError

ENV_THREADS = "HYBRIMOE_THREADS"
ENV_PIN = "HYBRIMOE_PIN"

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Pool:
    """Threads that are started as they are needed. A process made by fork has the memory of a pool and none of its
    threads, and would wait for ever: there the pool begins anew."""

    def __init__(self, n_threads: int, name: str) -> None:
        self._n_threads, self._name = n_threads, name
        self._begin()

    def submit(
        self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
    ) -> Future[Result]:  # fmt: skip
        """Queues a call. Raises RuntimeError once the pool is shut down."""
        if self._process != os.getpid():
            self._begin()
        return self._threads.submit(work, *args, **kwargs)

    def shutdown(self) -> None:
        """Ends the threads once all that is queued has run."""
        if self._process == os.getpid():
            self._threads.shutdown()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix=self._name)


@cache
def physical_cores() -> int:
    """Cores this process may use, without counting hyper-threads twice."""
    return max(1, len({_core_of(cpu) for cpu in usable_cpus()}))


def usable_cpus() -> tuple[int, ...]:
    """Numbers of the CPUs that this process may use, hyper-threads among them, ascending."""
    numbers = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return tuple(sorted(numbers))


def core_ids() -> tuple[int, ...]:
    """One usable CPU number of each physical core, ascending."""
    first: dict[str, int] = {}
    for cpu in usable_cpus():
        first.setdefault(_core_of(cpu), cpu)
    return tuple(first.values())


def pinned_cores() -> tuple[int, ...]:
    """The cores to pin helpers to, if the user asks for it (HYBRIMOE_PIN=1) and the system can; else none."""
    asked = os.environ.get(ENV_PIN, "") not in ("", "0")
    return core_ids() if asked and hasattr(os, "sched_setaffinity") else ()


def _core_of(cpu: int) -> str:
    """A name that hyper-threads of one core share."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return str(cpu)


def resolve_threads(threads: int | None = None) -> int:
    """`threads`, else HYBRIMOE_THREADS, else the physical cores; ThreadingError outside 1 .. CPUs of this process."""
    wanted: int | str = threads if threads is not None else os.environ.get(ENV_THREADS) or physical_cores()
    limit = len(usable_cpus())
    try:
        count = int(wanted)
    except ValueError:
        raise ThreadingError(f"{ENV_THREADS}={wanted!r} is not a number of threads") from None
    if count < 1 or (count > limit and threads is not None):
        raise ThreadingError(f"asked for {count} threads; expected 1 to {limit}, the CPUs that this process may use")
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
