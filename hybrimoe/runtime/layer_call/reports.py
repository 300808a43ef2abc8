"""What has ended, told once: copies and layers to the planner, times to the counters, records to the timeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from gpu_kernels import LaneError
from hybrimoe.runtime.layer_call.failures import with_story
from hybrimoe.runtime.layer_call.routing import CallSpace
from hybrimoe.runtime.layer_call.slots import InFlight, TransferQueue
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.layer_call.tallies import ACCEL_US, CPU_US, LINK_US
from hybrimoe.runtime.tier.cache import EndedRead, HostCache
from hybrimoe.runtime.tier.reader import Urgency
from scheduler import ObservedTask, Phase
from scheduler.planner.protocol import LayerPlanner
from scheduler.records import TaskRecord

OBSERVE_EVERY = 4
"""Steps from one correction of the costs by observed times to the next."""
MAX_UNREPORTED = 4
"""Layers whose accelerator times are still unknown (real devices run behind the host) before the oldest is dropped."""


class Reports:
    """Follows the calls of one precision's experts from `finish` until all of their work is known to have ended.

    `timeline`: the tasks of calls that were traced, in the order in which their ends became known; reads from disk into
    `tier` while `tracing`.
    """

    def __init__(
        self, planner: LayerPlanner | None, stats: StatsRecorder, queues: Sequence[TransferQueue],
        tier: HostCache | None = None,
    ) -> None:  # fmt: skip
        self._planner, self._stats, self._queues, self._tier = planner, stats, list(queues), tier
        self.tracing, self._step = False, -1
        self.timeline: list[TaskRecord] = []
        self.finished: CallSpace | None = None
        """The latest call, until the planner is told of its end."""
        self._unreported: deque[CallSpace] = deque()

    @property
    def has_news(self) -> bool:
        """Whether `collect` may have something to tell, copies aside."""
        return self.finished is not None or bool(self._unreported)

    def collect(self, phase: Phase) -> None:
        """What has ended since the last call: copies, then the layer before, then work on accelerators.

        Raises LaneError, with the story of its expert, where a copy failed.
        """
        for queue in self._queues:
            pending = queue.pending
            while pending and pending[0].event.ended:
                self._end_transfer(pending.popleft(), phase)
        if self._tier is not None:
            reads = self._tier.take_ended()
            for read in reads:
                self._end_read(read, phase)
            if reads and self._planner is not None:
                us = self._tier.read_took_us()
                self._planner.observe(ObservedTask("disk", reads[-1].layer, 0, us))
        finished, planner = self.finished, self._planner
        if finished is not None and planner is not None:
            self.finished = None
            observing = not finished.step % OBSERVE_EVERY and finished.cpu_us > 0.0
            planner.end_layer(finished.index, self._observed_on_cpu(finished, planner) if observing else ())
        unreported = self._unreported
        while unreported and unreported[0].ends[-1].ended:  # a lane ends its work in the order of submission
            ended = unreported.popleft()
            for end in ended.ends:
                start_us, end_us = end.span_us
                self._stats.spent.append((ended.counters, ACCEL_US, (end_us - start_us) * ended.stands_for))
            if ended.traced or not ended.step % OBSERVE_EVERY:
                self._tell_of_work(ended)
            ended.ends.clear()
            ended.sent.clear()
        while len(unreported) > MAX_UNREPORTED and not unreported[0].traced:
            unreported.popleft()

    def _end_read(self, read: EndedRead, phase: Phase) -> None:
        """A read from disk has ended: its time and bytes are its layer's."""
        counters = self._stats.counters[phase][read.layer]
        counters.disk_us += read.end_us - read.start_us
        counters.disk_bytes += read.n_bytes
        if read.urgency is not Urgency.NEEDED:
            counters.disk_ahead += 1
        if self.tracing:
            self.timeline.append(
                TaskRecord("disk", "read", read.layer, read.expert, 0, read.n_bytes, read.start_us, read.end_us,
                           self._step)
            )  # fmt: skip

    def forget(self, space: CallSpace) -> None:
        """The space is filled anew: what its layer's last call left unreported stays unknown."""
        if space in self._unreported:
            self._unreported.remove(space)
        space.ends.clear()
        space.sent.clear()

    def finish(self, space: CallSpace) -> None:
        """The call's result is there: the next `collect` tells the planner of it."""
        self.finished, self._step = space, space.step
        if space.ends and not space.sent:
            space.sent.append(space.plan.accel)  # by one launch
        space.release()
        self._stats.spent.append((space.counters, CPU_US, space.cpu_us))
        if space.traced:
            self.timeline += space.ran
        if space.ends:
            self._unreported.append(space)

    def _end_transfer(self, item: InFlight, phase: Phase) -> None:
        """A copy has ended."""
        move = item.transfer
        try:
            item.event.wait()
        except LaneError as error:
            raise with_story(error, self._planner, move.layer, (move.expert,)) from error
        start_us, end_us = item.event.span_us
        us = end_us - (start_us if item.began is None else item.began.span_us[0])
        self._stats.spent.append((self._stats.counters[phase][move.layer], LINK_US, us))
        if item.traced:
            self.timeline.append(item.record())
        if self._planner is not None:
            self._planner.end_transfer(move.layer, move.expert, move.slot, us)

    def _tell_of_work(self, space: CallSpace) -> None:
        """A layer's work on the accelerator has ended: recorded if traced, and in some steps it corrects the costs."""
        planner = None if space.step % OBSERVE_EVERY else self._planner
        if planner is not None:
            for end, positions in zip(space.ends, space.sent, strict=True):
                start_us, end_us = end.span_us
                planner.observe(self._observed_group(space, planner, positions, end_us - start_us))
        if space.traced:
            self._record_work(space)

    @staticmethod
    def _observed_group(
        space: CallSpace, planner: LayerPlanner, positions: list[int], us: float
    ) -> ObservedTask:  # fmt: skip
        """The accelerator's experts at `positions`, which were launched together and took `us`: as so many like the
        first of them."""
        n_tokens = space.demand.n_tokens[positions].tolist()
        alike = float(len(n_tokens))
        if min(n_tokens) != max(n_tokens):
            alike = 1.0 / share_out(1.0, n_tokens, partial(planner.costs.accel_us, space.index))
        return ObservedTask("accel", space.index, n_tokens[0], us, alike, space.recorded)

    def _record_work(self, space: CallSpace) -> None:
        """The timeline's entries of work on the accelerator, which a traced call submits expert by expert."""
        ids, n_tokens = space.demand.expert_ids, space.demand.n_tokens
        for end, (position,) in zip(space.ends, space.sent, strict=True):
            self.timeline.append(
                TaskRecord("accel", "accel_expert", space.index, int(ids[position]), int(n_tokens[position]), 0,
                           *end.span_us, space.step, space.unit)
            )  # fmt: skip

    def _observed_on_cpu(self, space: CallSpace, planner: LayerPlanner) -> tuple[ObservedTask, ...]:
        """The CPU lane's time of one expert, for the steps that correct the costs."""
        n_tokens = space.demand.n_tokens[space.positions[: space.n_cpu]].tolist()
        us = share_out(space.cpu_us, n_tokens, partial(planner.costs.cpu_us, space.index))
        return (ObservedTask("cpu", space.index, n_tokens[0], us),)


def share_out(
    total_us: float, n_tokens: list[int], cost_us: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]
) -> float:
    """us of the first of several experts that took `total_us` together, in proportion to predicted costs."""
    if min(n_tokens) == max(n_tokens):
        return total_us / len(n_tokens)
    predicted = cost_us(np.asarray(n_tokens, np.int64))
    return float(total_us * predicted[0] / predicted.sum())
