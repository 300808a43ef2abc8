"""What planner and loop hand each other where experts have slots.

While the loop runs, the copies under way are entries of its queue; when it stops they are the accelerator's and the
session's again, so that whatever else uses the session between two tokens finds it as Python would have left it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpu_kernels import TorchAccelerator
from gpu_kernels.driver.functions import ELAPSED, QUERY
from gpu_kernels.driver.queue import CAPACITY, KEY, Queue
from gpu_kernels.driver.queue import SLOT as ENTRY_SLOT
from gpu_kernels.driver.queued import QueuedCopy
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.choosing import NOTHING_AHEAD, Ahead, AtOnce
from hybrimoe.runtime.layer_call.reports import OBSERVE_EVERY
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.slots import InFlight
from hybrimoe.runtime.layer_call.tallies import ACCEL_US
from hybrimoe.runtime.token_loop import compiled as at_place
from scheduler import ObservedTask, Transfer
from scheduler.planner.at_once import HANDS_ON, Desk

MOST_TAKEN_OVER = CAPACITY // 2
"""Copies under way with which a token begins; with more, Python runs it."""


class HandOver:
    """token, numbers, places: the loop's memory (`compiled`)."""

    def __init__(
        self, runner: ExpertsCall, at_once: AtOnce, accelerator: TorchAccelerator, queue: Queue,
        calls: Sequence[SentCall], token: npt.NDArray[np.int64], numbers: npt.NDArray[np.float64],
        places: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        self._runner, self._at_once, self._accelerator, self._queue = runner, at_once, accelerator, queue
        self._calls, self._token, self._numbers, self._places = calls, token, numbers, places
        (self._transfers,) = runner.experts.lanes.queues
        self._aheads: list[Ahead] = [NOTHING_AHEAD] * len(calls)
        self._gate_words = np.zeros(at_place.GATES_SIZE, np.int64)
        self._addresses = np.array([array.ctypes.data for array in runner.experts.lanes.addresses], np.int64)
        self._record_bytes = np.array(runner.experts.record_bytes, np.int64)
        self._observed = False
        token[at_place.GATES], token[at_place.ADDRESSES] = self._gate_words.ctypes.data, self._addresses.ctypes.data
        token[at_place.RECORD_BYTES] = self._record_bytes.ctypes.data

    def desk(self) -> Desk | None:
        """What decides now; None where Python has to: decisions hang on what is not known yet, or copies are under way
        that only it can follow."""
        at_once, planner = self._at_once, self._at_once.planner
        if planner.slots.overtaking or len(self._transfers.pending) > MOST_TAKEN_OVER:
            return None
        return planner.desk if at_once.is_ready or at_once.get_ready() else None

    def knows_all(self) -> bool:
        """Whether the forecast has seen each layer."""
        desk_for = self._at_once.planner.desk_for
        return all(desk_for(call.layer, 1, call.ids.shape[-1]) is not None for call in self._calls)

    def write_down(self, desk: Desk) -> None:
        """What decides, as the planner has it now."""
        self._token[at_place.DESK_AT] = desk.address
        self._write_down_gates()
        self._write_down_launches()

    def _write_down_gates(self) -> None:
        """The gates, and which of them foretells which place at the place before it."""
        self._aheads = [NOTHING_AHEAD] * len(self._calls)
        self._places[:, [at_place.N_GIVEN, at_place.N_TARGET]] = 0
        gates = self._at_once.gates()
        if gates is None:
            return
        arrays = gates.halves, gates.bias, gates.correction, gates.corrected, gates.scoring
        self._gate_words[:] = *(array.ctypes.data for array in arrays), *gates.halves.shape
        for number in range(1, len(self._calls)):
            before, call = self._calls[number - 1], self._calls[number]
            ahead = self._at_once.foretold_for(call.layer, before.ids.shape[-1])
            if before.layer != call.layer - 1 or not ahead[0]:
                continue
            self._aheads[number], ((prediction,), ids, scores, n) = ahead, ahead
            place, behind = self._places[number - 1], self._places[number]
            place[[at_place.TARGET, at_place.N_TARGET]] = prediction.layer, n
            place[[at_place.TARGET_IDS, at_place.TARGET_SCORES]] = ids, scores
            behind[[at_place.GIVEN, at_place.SCORES, at_place.N_GIVEN]] = ids, scores, n

    def _write_down_launches(self) -> None:
        """What a group of experts costs beside the experts, as the costs have it now."""
        costs = self._runner.costs
        assert costs is not None
        for place, call in zip(self._places, self._calls, strict=False):
            place[at_place.LAUNCH_NS] = round(costs.launch_us(call.layer) * 1e3)

    def enter(self, at: int) -> None:
        """From Python's objects to the loop's memory, before place `at`."""
        runner, token, numbers, layer = self._runner, self._token, self._numbers, self._calls[at].layer
        if at == 0:
            self._tell_what_was_observed()
        if self._has_news():
            runner.experts.reports.collect(runner.phase)
        runner.begin_call(layer, 1)
        token[at_place.NOW], token[at_place.RUN], numbers[at_place.HORIZON] = self._at_once.arrive(layer)
        self._take_copies()
        self._accelerator.hand_to(self._queue)
        token[[at_place.N_MOVED, at_place.N_AWAITED]] = 0
        token[at_place.OBSERVING] = self._observed = not runner.experts.step % OBSERVE_EVERY
        numbers[at_place.LINK_FREE_NS] = runner.link_free_us * 1e3
        self._places[at:, [at_place.N_CPU, at_place.N_ACCEL, at_place.IS_TOLD]] = 0
        self._places[at, at_place.IS_TOLD] = self._at_once.was_told(layer, self._aheads[at])

    def leave(self, at: int, last: int) -> None:
        """From the loop's memory to Python's objects, at place `at`; last: the layer that was decided on last."""
        desk, planner = self._at_once.planner.desk, self._at_once.planner
        assert desk is not None
        self._runner.link_free_us = float(self._numbers[at_place.LINK_FREE_NS]) * 1e-3
        desk.decided_up_to(last, int(self._token[at_place.N_MOVED]))
        if at < len(self._calls) and self._places[at, at_place.IS_TOLD]:
            self._at_once.tell(self._calls[at].layer, self._aheads[at])
        self._give_copies()
        if planner.slots.validating:
            planner.slots.validate()

    @property
    def hands_on(self) -> bool:
        """Whether the latest decision has found HANDS_ON."""
        return bool(self._token[at_place.N_AWAITED] == HANDS_ON)

    def _has_news(self) -> bool:
        """Whether something has been left to tell the planner that the loop knows nothing of."""
        return self._runner.experts.reports.has_news or not all(map(self._is_ours, self._transfers.pending))

    def _is_ours(self, item: InFlight) -> bool:
        return isinstance(item.event, QueuedCopy) and item.event.queue is self._queue

    def _take_copies(self) -> None:
        """The session's copies under way become entries of the queue, or are those still."""
        pending, n_experts = self._transfers.pending, self._at_once.planner.n_experts
        n_ours = sum(map(self._is_ours, pending))
        self._queue.keep(n_ours)
        for item in list(pending)[n_ours:]:
            self._queue.take_over(item.transfer.layer * n_experts + item.transfer.expert, item.transfer.slot)
        pending.clear()

    def _give_copies(self) -> None:
        """The entries of the queue become the session's copies under way."""
        step, under_way, n_experts = self._runner.experts.step, {}, self._at_once.planner.n_experts
        for number, entry in enumerate(self._queue.under_way()):
            (layer, expert), slot = divmod(int(entry[KEY]), n_experts), int(entry[ENTRY_SLOT])
            under_way[slot] = event = self._accelerator.queued_copy(self._queue, number)
            move = Transfer(layer, expert, slot, None, "prefetch", 0.0, admit=True)
            self._transfers.pending.append(InFlight(move, event, int(self._record_bytes[layer]), step, False))
        self._accelerator.take_from(self._queue, under_way)

    def _tell_what_was_observed(self) -> None:
        """The times of the token before correct the costs, where they were to be observed."""
        if not self._observed:
            return
        self._observed, planner, stats = False, self._at_once.planner, self._runner.experts.stats
        for place in self._places[:-1]:
            layer, n_cpu, n_accel = place[[at_place.LAYER, at_place.N_CPU, at_place.N_ACCEL]].tolist()
            if n_cpu:
                us, share = float(place[at_place.CPU_NS]) * 1e-3 / n_cpu, float(place[at_place.SHARE])
                planner.observe(ObservedTask("cpu", layer, 1, us), share / at_place.SHARE_UNIT)
            us = self._took_us(*place[[at_place.BEGAN, at_place.ENDED_AT]].tolist()) if n_accel else 0.0
            if us > 0.0:
                stats.spent.append((stats.counters[self._runner.phase][layer], ACCEL_US, us * OBSERVE_EVERY))
                planner.observe(ObservedTask("accel", layer, 1, us, float(n_accel), True))
        self._write_down_launches()

    def _took_us(self, start: int, end: int) -> float:
        """us between two events; 0 where they have not passed, or the driver does not know."""
        call, milliseconds = self._queue.driver.call, np.zeros(1, np.float32)
        if call(QUERY, end) or call(ELAPSED, milliseconds.ctypes.data, start, end):
            return 0.0
        return float(milliseconds[0]) * 1e3
