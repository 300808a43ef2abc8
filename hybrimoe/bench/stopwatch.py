"""Where the calling thread's time goes: the functions of each section are timed while a benchmark runs.

Times are self times: what a timed function spends in another timed one counts for the other only. Other threads are
not timed. Two clocks run: the wall's, and the CPU time of the calling thread. Where they differ the thread slept, or
waited for a core or for Python's lock, which others held.

Sections are measured in the running model, not with empty kernels: after kernels that stream megabytes of weights the
interpreter's own code and data have left the caches, and the same calls cost several times as much.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter_ns, thread_time_ns
from typing import Any


@dataclass(frozen=True, slots=True)
class Timed:
    """A function of a section: `name` of `owner`, a module or a class."""

    section: str
    owner: Any
    name: str


@dataclass(frozen=True, slots=True)
class Times:
    """us of one section in one call: by the wall's clock, and of the thread's CPU time."""

    wall_us: float = 0.0
    cpu_us: float = 0.0

    def plus(self, wall_us: float, cpu_us: float) -> Times:
        """Both added."""
        return Times(self.wall_us + wall_us, self.cpu_us + cpu_us)


@dataclass(slots=True)
class Stopwatch:
    """Self times by section, one entry a call of the outermost timed function, which is of section `outer`.

    While functions run only the clocks are read and written down, since what the stopwatch does on the way counts for
    the section around it; `calls` is made of that when the watching ends.
    """

    outer: str
    calls: list[dict[str, Times]] = field(default_factory=list)
    _marks: list[tuple[str | None, int, int]] = field(default_factory=list)
    """(section that begins, or None where one ends; ns by the wall's clock; ns of CPU time)."""
    _thread: int = field(default_factory=threading.get_ident)

    def median_us(self, us: Callable[[dict[str, Times]], float]) -> float:
        """Median over the calls of what `us` makes of their sections. Zero without a call."""
        return median(map(us, self.calls)) if self.calls else 0.0

    @contextmanager
    def watching(self, functions: Sequence[Timed]) -> Iterator[None]:
        """Times `functions` inside the block."""
        before = [getattr(item.owner, item.name) for item in functions]
        for item, function in zip(functions, before, strict=True):
            setattr(item.owner, item.name, self._timed(item.section, function))
        try:
            yield
        finally:
            for item, function in zip(functions, before, strict=True):
                setattr(item.owner, item.name, function)
            self._resolve()

    def _timed(self, section: str, function: Callable[..., Any]) -> Callable[..., Any]:
        mark, thread = self._marks.append, self._thread

        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*args, **kwargs)
            mark((section, perf_counter_ns(), thread_time_ns()))
            try:
                return function(*args, **kwargs)
            finally:
                mark((None, perf_counter_ns(), thread_time_ns()))

        return timed

    def _resolve(self) -> None:
        """Turns the marks into calls: what lies between two marks belongs to the innermost section that is open."""
        open_sections: list[str] = []
        now: dict[str, Times] = {}
        last_wall = last_cpu = 0
        for begins, wall, cpu in self._marks:
            if open_sections:
                section = open_sections[-1]
                wall_us, cpu_us = (wall - last_wall) * 1e-3, (cpu - last_cpu) * 1e-3
                now[section] = now.get(section, Times()).plus(wall_us, cpu_us)
            last_wall, last_cpu = wall, cpu
            if begins is not None:
                open_sections.append(begins)
                continue
            ended = open_sections.pop()
            if not open_sections:
                if ended == self.outer:
                    self.calls.append(now)
                now = {}
        self._marks.clear()
