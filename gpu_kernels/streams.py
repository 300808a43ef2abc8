"""FIFO streams and events on host threads: the asynchrony of the emulated accelerator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NoReturn
from weakref import WeakSet

from gpu_kernels.errors import ClosedError, LaneError, LostError
from gpu_kernels.waiting import LEAST_HOST_WAIT_S, WaitLimit

PR_SET_TIMERSLACK = 29
"""prctl option, linux/prctl.h."""
TIMER_SLACK_NS = 1000
"""Linux' default of 50 us would be a fifth of a paced transfer."""


def clock_us() -> float:
    """The host's monotonic clock in us; all spans of all lanes use it."""
    return time.perf_counter_ns() * 1e-3


class HostEvent:
    """The end of a job of a HostStream. Jobs move it: begin, then finish or fail.

    Who has to wait brings a lock, which the end releases: most events are never waited for. A waiter adds its lock
    before it looks whether the job has ended, and the end is marked before it looks for locks, so none is missed.
    What an event begins with is its class's, so that making one runs no code.
    """

    label: str = "work"
    """What errors call the job."""
    limit: WaitLimit | None = None
    """Of waits for it; None: any time."""
    ended: bool = False
    """True once the job has ended or failed."""
    succeeded: bool = False
    """True once the job has ended without an error."""
    span_us: tuple[float, float] = 0.0, 0.0
    """(start, end) in us of `clock_us`, each 0 until it has come."""
    _error: BaseException | None = None
    _gates: Sequence[threading.Lock] = ()

    def begin(self) -> None:
        """Marks the start: after what the job had to wait for."""
        self.span_us = clock_us(), 0.0

    def finish(self, error: BaseException | None = None) -> None:
        """Ends the job and wakes the waiters; further calls are ignored."""
        if self.ended:
            return
        self.span_us = self.span_us[0], clock_us()
        self._error = error
        self.succeeded = error is None
        self.ended = True
        gates = self.__dict__.get("_gates")
        while gates:
            gates.pop().release()

    def wait(self, *, also_failed: bool = False) -> None:
        """Blocks until the job has ended. Raises LaneError with the cause if it failed, unless `also_failed` will do,
        and LostError where it does not end in time, or its lane hangs."""
        if not self.ended:
            gate = threading.Lock()
            gate.acquire()
            self.__dict__.setdefault("_gates", []).append(gate)  # one step, also for several waiters
            if not self.ended:
                if self.limit is None:
                    gate.acquire()
                else:
                    self.limit.wait_for_lock(gate, self.label)
        if self._error is not None and not also_failed:
            if isinstance(self._error, LostError):
                raise LostError(str(self._error)) from self._error
            raise LaneError(f"{self.label} failed: {self._error!r}") from self._error


Job = Callable[[HostEvent], None]


class HostStream:
    """One daemon thread that runs jobs in the order of submission."""

    def __init__(self, name: str, *, precise_sleep: bool = False, limit: WaitLimit | None = None) -> None:
        """limit: of waits for all that is queued."""
        self.name = name
        self.limit = WaitLimit(name, LEAST_HOST_WAIT_S) if limit is None else limit
        self._precise_sleep = precise_sleep
        self._jobs: SimpleQueue[tuple[Job, HostEvent] | None] = SimpleQueue()
        self.put: Callable[[tuple[Job, HostEvent]], None] = self._jobs.put
        """Queues a job with its event, as `submit` does: while the stream takes jobs that is the queue's own."""
        self._closed = False
        self._lost = False
        """Whether this is a forked process, in which the thread is missing."""
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()
        _STREAMS.add(self)

    def submit(self, job: Job, event: HostEvent) -> HostEvent:
        """Queues a job and returns its event. Raises ClosedError after close(), and in a forked process."""
        self.put((job, event))
        return event

    def _refuse(self, _job: tuple[Job, HostEvent]) -> NoReturn:
        """`put` of a stream that takes no jobs."""
        if self._closed:
            raise ClosedError(f"{self.name} is closed; open a new accelerator")
        raise ClosedError(f"{self.name} belongs to process {self._process}: threads do not survive a fork")

    def drain(self) -> None:
        """Blocks until everything submitted so far has ended. Raises LostError where that takes too long."""
        if not self._closed and self.alive and self._thread is not threading.current_thread():
            self.limit.require()
            event = HostEvent()
            event.limit, event.label = self.limit, f"all work of {self.name}"
            self.submit(lambda event: event.begin(), event).wait(also_failed=True)

    def close(self) -> None:
        """Runs what is queued, stops the thread and joins it, unless that hangs; safe to call twice."""
        if not self._closed:
            self._closed, self.put = True, self._refuse
            self._jobs.put(None)
        if self.alive and self._thread is not threading.current_thread():
            self._thread.join(self.limit.seconds)

    @property
    def alive(self) -> bool:
        """True while the thread runs (in this process)."""
        return not self._lost and self._thread.is_alive()

    def _loop(self) -> None:
        if self._precise_sleep:
            _reduce_timer_slack()
        while (item := self._jobs.get()) is not None:
            job, event = item
            try:
                job(event)
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the event
                event.finish(error)
            else:
                event.finish()
            del item, job, event


_STREAMS: WeakSet[HostStream] = WeakSet()


def _after_fork() -> None:
    for stream in _STREAMS:
        stream._lost, stream.put = True, stream._refuse


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Pacer:
    """Stretches jobs of one lane to given durations, as a device would that starts a job as soon as it can.

    What the host adds (a thread that wakes up late, a sleep that is a little long) is not the device's: up to
    `HOST_JITTER_US` the next job makes up for it. Beyond that the host's own work was slower than the device.
    """

    HOST_JITTER_US = 200.0

    def __init__(self) -> None:
        self._lane_end_us = 0.0
        self._last = HostEvent()

    def pace(self, event: HostEvent, ready_us: float, duration_us: float, rest_us: float = 0.0) -> None:
        """Sleeps until `rest_us` before the job's end on the device; its start there becomes the event's.

        ready_us: when the job was submitted and all it depends on had ended; it starts then, or when the lane's last
        job has ended. rest_us: time that the caller still needs to do the job, as it estimates; too high an estimate
        never lets the job end before that start.
        """
        start_us = max(self._lane_end_us, ready_us)
        event.span_us, self._last = (max(start_us, self._last.span_us[1]), 0.0), event
        self._lane_end_us = start_us + duration_us
        remaining_us = max(start_us, self._lane_end_us - rest_us) - clock_us()
        if remaining_us > 0.0:
            time.sleep(remaining_us * 1e-6)
        elif remaining_us < -self.HOST_JITTER_US:
            self._lane_end_us -= remaining_us


def _reduce_timer_slack() -> None:
    """Makes sleeps of this thread exact to a few us where the system has prctl (Linux)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)
