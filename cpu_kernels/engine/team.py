"""The team: this process's own threads for compiled workers, one team for all that compute.

A worker takes tasks by tickets until none is left. `run_on_team` offers seats at a call to the team, works itself, and
returns when its own worker has and those helpers have that took a seat. Nobody waits for a helper that has not come:
one that sleeps, or whose core another program has, is not needed, since the tickets it would have taken are gone.

Inside a worker, work that needs the work before it waits with `finish_tasks`: for the tasks, not for threads.

A process after ``fork`` has the memory of the team but not its threads: calls run on their own thread until
`start_team` starts new ones. torch cannot do that: GNU OpenMP waits for its lost threads for ever, so in the child
torch gets one thread. Of several callers each gets the helpers that are free, and works alone if none is.
"""

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpu_kernels.engine.waiting import (
    BUSY_SPIN_NS,
    EVENT,
    IDLE_SPIN_NS,
    LAUNCH_BYTES,
    LAUNCHES,
    MEMORY,
    N_LAUNCHES,
    SPIN_NS,
    STOPPING,
    library_functions,
    team_address,
    wait_while,
    wake,
)
from cpu_kernels.host.threads import pinned_cores
from cpu_kernels.jit.atomics import add, load, replace, store
from cpu_kernels.jit.compiled import Whole, inline_kernel, kernel
from cpu_kernels.jit.primitives import call_worker

# Byte offsets of the words of a launch. STATE holds how many seats were taken and how many are free.
STATE, OWNED, WORKER, CALL, FINISHED = (8 * word for word in (0, 1, 8, 9, 16))
SEAT = 1 << 32
"""Of STATE: a seat that was taken. The lower half counts the free ones."""
FREE = SEAT - 1
PHASE_BYTES = 128
"""Memory of a phase: its next ticket (int64) on a cache line, the finished tasks and their sleepers on another."""
DONE = 64
"""From a phase's start to the number of its finished tasks."""


@kernel
def run_on_team(worker: int, call: int, n_threads: int) -> None:
    """Runs the worker at an address on this thread and on up to n_threads - 1 of the team; returns when all is done.

    worker: address of a `Worker` ``(call, thread) -> None``, which takes tasks by tickets until none is left. It runs
    once to n_threads times, each time with a number of its own below n_threads, 0 on this thread.
    """
    launch = _own_launch() if n_threads > 1 else 0
    if launch == 0:
        call_worker(worker, call, 0)
        return
    store(launch + WORKER, worker)
    store(launch + CALL, call)
    store(launch + FINISHED, 0)
    store(launch + STATE, n_threads - 1)
    event = team_address() + EVENT
    add(event, 1)
    wake(event, n_threads - 1)
    call_worker(worker, call, 0)
    _wait_for_helpers(launch)
    store(launch + OWNED, 0)


@inline_kernel
def _own_launch() -> Whole:
    """Address of a launch that is this thread's until it clears OWNED; 0 where all are taken."""
    for i in range(N_LAUNCHES):
        launch = team_address() + LAUNCHES + i * LAUNCH_BYTES
        if load(launch + OWNED) == 0 and replace(launch + OWNED, 0, 1):
            return launch
    return 0


@inline_kernel
def _wait_for_helpers(launch: Whole) -> None:
    taken = _close(launch)
    while True:
        finished = load(launch + FINISHED)
        if finished == taken:
            return
        wait_while(launch + FINISHED, finished, load(team_address() + SPIN_NS))


@inline_kernel
def _close(launch: Whole) -> Whole:
    """Takes the free seats away; returns how many were taken."""
    while True:
        state = load(launch + STATE)
        if replace(launch + STATE, state, state & ~FREE):
            return state // SEAT


@kernel
def serve_team() -> None:
    """What a helper does until the team is stopped: take a seat and work, or wait for the next launch."""
    team = team_address()
    while True:
        event = load(team + EVENT)
        if load(team + STOPPING):
            return
        if not _take_seat():
            wait_while(team + EVENT, event, load(team + IDLE_SPIN_NS))


@inline_kernel
def _take_seat() -> bool:
    """Whether a launch had a free seat; its work is done then."""
    for i in range(N_LAUNCHES):
        launch = team_address() + LAUNCHES + i * LAUNCH_BYTES
        state = load(launch + STATE)
        while state & FREE:
            if replace(launch + STATE, state, state + SEAT - 1):
                call_worker(load(launch + WORKER), load(launch + CALL), state // SEAT + 1)
                _close(launch)  # this worker found no task: nobody else has to come
                add(launch + FINISHED, 1)
                wake(launch + FINISHED, 1)
                return True
            state = load(launch + STATE)
    return False


@inline_kernel
def finish_tasks(phase: Whole, n_done: Whole, n_tasks: Whole) -> None:
    """Inside a worker: says that this thread did n_done of a phase's n_tasks; returns when all of them are done.

    phase: address of PHASE_BYTES, zero at the start of the call, on a cache line; its first word is the counter that
    `take_ticket` takes the phase's tasks from. Only tasks are waited for, not threads: one that comes to a call late
    finds the first phases done and passes them. A phase serves once in a call.
    """
    done = phase + DONE
    if n_done and add(done, n_done) + n_done == n_tasks:
        wake(done, ALL)
    while True:
        finished = load(done)
        if finished == n_tasks:
            return
        wait_while(done, finished, load(team_address() + SPIN_NS))


ALL = 1 << 30
_LOCK = threading.Lock()
helpers: list[threading.Thread] = []
"""The threads of the team beside the callers' own. `start_team` and `stop_team` alone change it."""


def start_team(n_threads: int) -> None:
    """Makes sure that calls can run on n_threads threads, this one among them.

    With HYBRIMOE_PIN=1 each helper is pinned to a core. The calling thread stays free: it is the program's own, and
    with the others in place the system finds it the rest.
    """
    if len(helpers) >= n_threads - 1:
        return
    cores = pinned_cores()
    with _LOCK:
        if not helpers:  # compiled here, so that no call finds its helpers compiling
            _set(STOPPING, 1)
            serve_team()
            _set(STOPPING, 0)
        while len(helpers) < n_threads - 1:
            core = cores[(len(helpers) + 1) % len(cores)] if cores else None
            name = f"hybrimoe-cpu-{len(helpers) + 1}"
            thread = threading.Thread(target=_help, args=(core,), name=name, daemon=True)
            thread.start()
            helpers.append(thread)


def _help(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    serve_team()


def stop_team() -> None:
    """Ends all helpers; calls then run on their own thread until `start_team` is called again."""
    with _LOCK:
        _set(STOPPING, 1)
        _announce()
        for thread in helpers:
            thread.join()
        helpers.clear()
        _set(STOPPING, 0)


@kernel
def _announce() -> None:
    event = team_address() + EVENT
    add(event, 1)
    wake(event, ALL)


@contextmanager
def spinning() -> Iterator[None]:
    """Inside, threads that wait never sleep, as those of other pools: what a benchmark compares our patience with."""
    words = (SPIN_NS, IDLE_SPIN_NS, BUSY_SPIN_NS)
    before = [int(MEMORY[word // 8]) for word in words]
    for word in words:
        _set(word, 1 << 60)
    try:
        yield
    finally:
        for word, value in zip(words, before, strict=True):
            _set(word, value)


def _set(word: int, value: int) -> None:
    MEMORY[word // 8] = value


def _after_fork() -> None:
    """In the child: no helpers, no launches, and nobody who holds the lock."""
    global _LOCK
    _LOCK = threading.Lock()
    helpers.clear()
    _reset()
    torch.set_num_threads(1)


def _reset() -> None:
    """Fills the memory as it is before the first launch."""
    MEMORY[:] = 0
    for word, value in library_functions().items():
        _set(word, value)
    _set(SPIN_NS, 100_000)
    _set(IDLE_SPIN_NS, 3_000_000)
    _set(BUSY_SPIN_NS, 20_000)


_reset()
atexit.register(stop_team)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
