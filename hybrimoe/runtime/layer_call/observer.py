"""What has ended on the lanes, told to planner and counters, and kept as a timeline while recording."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from hybrimoe.runtime.layer_call.executor import LayerRun, accel_records, share_out
from hybrimoe.runtime.layer_call.slots import SlotCache
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from scheduler import ObservedTask, Phase
from scheduler.planner.protocol import LayerPlanner
from scheduler.records import TaskRecord

OBSERVE_EVERY = 4
"""Steps from one correction of the costs by observed times to the next."""
MAX_UNREPORTED = 4
"""Layers whose accelerator times are still unknown (real devices run behind the host) before the oldest is dropped."""


class Observer:
    """`timeline`: what ran of traced calls, in the order in which it became known. `planner` None: only counted."""

    def __init__(self, caches: Sequence[SlotCache], planner: LayerPlanner | None, stats: StatsRecorder) -> None:
        self._caches, self._planner, self._stats = caches, planner, stats
        self._unreported: deque[LayerRun] = deque()
        self.timeline: list[TaskRecord] = []

    def began(self, run: LayerRun) -> None:
        """A layer's work was submitted; its end on the accelerator may only be known later."""
        self._unreported.append(run)

    def cpu_tasks(self, run: LayerRun) -> tuple[ObservedTask, ...]:
        """The CPU lane's time of one expert, in the steps that correct the costs."""
        planner = self._planner
        if not run.cpu_n_tokens or planner is None or run.step % OBSERVE_EVERY:
            return ()
        us = share_out(run.cpu_us, run.cpu_n_tokens, partial(planner.costs.cpu_us, run.layer))
        return (ObservedTask("cpu", run.layer, run.cpu_n_tokens[0], us),)

    def transfers(self, phase: Phase) -> None:
        """Tells the planner which copies have ended."""
        for slots in self._caches:
            for item in slots.take_ended():
                ended = item.ended()
                self._stats.of(phase, ended.layer).link_us += ended.us
                if item.traced:
                    self.timeline.append(item.record())
                if self._planner is not None:
                    self._planner.on_event(ended)

    def runs(self, phase: Phase, *, keep: bool) -> None:
        """Accelerator times of layers whose work has ended: counted, observed, and recorded if traced.

        `keep`: also more than MAX_UNREPORTED layers.
        """
        while self._unreported and all(event.done() for event in self._unreported[0].events):
            self._report(phase, self._unreported.popleft())
        while len(self._unreported) > MAX_UNREPORTED and not keep:
            self._unreported.popleft()

    def _report(self, phase: Phase, run: LayerRun) -> None:
        total_us, n_tokens = 0.0, []
        for group in run.groups:
            start_us, end_us = group.event.span_us()
            total_us += end_us - start_us
            n_tokens += group.n_tokens
        if not n_tokens:
            return
        self._stats.of(phase, run.layer).accel_us += total_us
        if run.traced:
            self.timeline += accel_records(run)
        if self._planner is not None and not run.step % OBSERVE_EVERY:
            us = share_out(total_us, n_tokens, partial(self._planner.costs.accel_us, run.layer))
            self._planner.observe(ObservedTask("accel", run.layer, n_tokens[0], us))
