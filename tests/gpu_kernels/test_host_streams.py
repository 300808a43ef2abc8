"""FIFO streams and events on host threads."""

from __future__ import annotations

import os
import threading
import time
from itertools import pairwise

import pytest

from gpu_kernels import streams
from gpu_kernels.errors import ClosedError, LaneError
from gpu_kernels.streams import HostEvent, HostStream, Pacer, clock_us


def test_jobs_run_in_order_of_submission_and_off_the_calling_thread() -> None:
    stream = HostStream("test")
    seen: list[tuple[int, str]] = []
    events = [
        stream.submit(lambda event, i=i: seen.append((i, threading.current_thread().name)), HostEvent())
        for i in range(50)
    ]
    for event in events:
        event.wait()
    stream.close()
    assert [i for i, _ in seen] == list(range(50))
    assert {name for _, name in seen} == {"test"}


def test_submission_does_not_wait_for_the_job() -> None:
    stream, gate = HostStream("test"), threading.Event()
    event = stream.submit(lambda event: gate.wait(), HostEvent())
    assert not event.ended
    gate.set()
    event.wait()
    assert event.ended
    stream.close()


def test_a_failing_job_raises_at_the_waiter_and_the_stream_goes_on() -> None:
    stream = HostStream("test")

    def fail(event: HostEvent) -> None:
        raise ZeroDivisionError("bad job")

    named = HostEvent()
    named.label = "the copy"
    failed = stream.submit(fail, named)
    after = stream.submit(lambda event: event.begin(), HostEvent())
    with pytest.raises(LaneError, match=r"the copy failed.*bad job") as caught:
        failed.wait()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    after.wait()
    failed.wait(also_failed=True)
    stream.close()


def test_spans_start_at_begin_and_end_at_the_end() -> None:
    stream = HostStream("test")

    def job(event: HostEvent) -> None:
        time.sleep(0.01)
        event.begin()
        time.sleep(0.005)

    before_us = clock_us()
    event = stream.submit(job, HostEvent())
    event.wait()
    start_us, end_us = event.span_us
    assert start_us - before_us >= 9_000
    assert end_us - start_us >= 4_000
    stream.close()


def test_close_runs_what_is_queued_and_refuses_more() -> None:
    stream = HostStream("test")
    events = [stream.submit(lambda event: time.sleep(0.001), HostEvent()) for _ in range(5)]
    stream.close()
    stream.close()
    assert all(event.ended for event in events)
    assert not stream.alive
    with pytest.raises(ClosedError, match="closed"):
        stream.submit(lambda event: None, HostEvent())


def test_many_threads_may_wait_for_one_event() -> None:
    stream, gate = HostStream("test"), threading.Event()
    event = stream.submit(lambda event: gate.wait(), HostEvent())
    threads = [threading.Thread(target=event.wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(timeout=600)
    assert not any(thread.is_alive() for thread in threads)
    stream.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_instead_of_waiting_forever() -> None:
    stream = HostStream("test")
    child = os.fork()
    if child == 0:
        try:
            stream.submit(lambda event: None, HostEvent())
        except ClosedError as error:
            os._exit(0 if "fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stream.close()


def paced(pacer: Pacer, ready_us: float, duration_us: float, rest_us: float = 0.0) -> HostEvent:
    """A job that does nothing but keep the pace."""
    event = HostEvent()
    event.begin()
    pacer.pace(event, ready_us, duration_us, rest_us)
    event.finish()
    return event


def test_pacing_does_not_drift_over_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's own, whose sleeps are all a little too long."""
    late_us, now_us, really_sleep = 150.0, 1e6, time.sleep

    def sleep(seconds: float) -> None:
        nonlocal now_us
        if threading.current_thread() is not threading.main_thread():
            really_sleep(seconds)  # of what other tests have left to do
            return
        now_us += seconds * 1e6 + late_us

    monkeypatch.setattr(streams, "clock_us", lambda: now_us)
    monkeypatch.setattr(streams.time, "sleep", sleep)
    pacer = Pacer()
    events = [paced(pacer, 1e6, 1_000.0) for _ in range(20)]
    assert 20_000.0 <= now_us - 1e6 <= 20_000.0 + late_us
    assert all(after.span_us[0] >= before.span_us[1] for before, after in pairwise(events))


def test_a_paced_job_that_waited_is_not_shortened() -> None:
    """It was ready 400 us after the lane's last job had ended, and takes its whole time from then on."""
    pacer, started_us = Pacer(), clock_us()
    paced(pacer, started_us, 1_000.0)
    paced(pacer, started_us + 1_400.0, 1_000.0)
    assert clock_us() - started_us >= 2_390.0


def test_the_rest_of_a_paced_job_is_left_to_the_caller() -> None:
    pacer, started_us = Pacer(), clock_us()
    first = paced(pacer, started_us, 500_000.0, rest_us=499_000.0)
    assert first.span_us[1] - started_us < 400_000.0


def test_a_paced_job_never_ends_before_it_starts() -> None:
    """Its rest was estimated longer than it takes on the device, as after a copy that the system interrupted."""
    pacer, started_us = Pacer(), clock_us()
    paced(pacer, started_us, 30_000.0, rest_us=29_000.0)
    event = paced(pacer, started_us, 1_000.0, rest_us=31_000.0)
    assert event.span_us[0] == started_us + 30_000.0
    assert event.span_us[1] >= event.span_us[0]
