"""The stopwatch: self times by section, the calling thread only, everything put back afterwards."""

from __future__ import annotations

import threading
import time

import pytest

from hybrimoe.bench.stopwatch import Stopwatch, Timed, Times


class Work:
    """Something with an outer function, an inner one that sleeps, and one that computes."""

    def outer(self) -> int:
        self.sleep()
        return self.compute()

    def sleep(self) -> None:
        time.sleep(0.01)

    def compute(self) -> int:
        return sum(range(200_000))


TIMED = (Timed("rest", Work, "outer"), Timed("asleep", Work, "sleep"), Timed("computing", Work, "compute"))


def test_each_section_gets_its_own_time() -> None:
    watch, work = Stopwatch("rest"), Work()
    with watch.watching(TIMED):
        assert work.outer() == sum(range(200_000))
        work.outer()
    assert len(watch.calls) == 2
    for call in watch.calls:
        assert call["asleep"].wall_us >= 10_000
        assert call["asleep"].cpu_us < call["asleep"].wall_us
        assert call["computing"].cpu_us > 0
        assert call["rest"].cpu_us < call["computing"].cpu_us, "CPU time: other programs may interrupt this one"
    assert watch.median_us(lambda call: call["asleep"].wall_us) >= 10_000


def test_functions_are_put_back_also_after_an_error() -> None:
    before = Work.outer
    watch = Stopwatch("rest")
    with pytest.raises(RuntimeError, match="stop"), watch.watching(TIMED):
        raise RuntimeError("stop")
    assert Work.outer is before
    Work().outer()
    assert watch.calls == []
    assert watch.median_us(lambda call: call.get("rest", Times()).wall_us) == 0.0


def test_other_threads_are_not_timed() -> None:
    watch, work = Stopwatch("rest"), Work()
    with watch.watching(TIMED):
        thread = threading.Thread(target=work.outer)
        thread.start()
        thread.join()
    assert watch.calls == []
