"""The compiled loop over a token's layers, and how it and Python hand each other a session's state.

While the loop runs, the copies under way are entries of its queue; when it stops they are the accelerator's and the
session's again, so that whatever else uses the session between two tokens finds it as Python would have left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.backends.base import not_finite
from cpu_kernels.backends.numba_backend import NumbaBackend, Sheet
from cpu_kernels.engine.team import helpers, start_team
from cpu_kernels.engine.waiting import CLOCK, library_functions
from gpu_kernels import TorchAccelerator
from gpu_kernels.driver.functions import ELAPSED, QUERY, Driver
from gpu_kernels.driver.queue import CAPACITY, FAILED, KEY
from gpu_kernels.driver.queue import SLOT as ENTRY_SLOT
from gpu_kernels.driver.queued import QueuedCopy
from gpu_kernels.errors import DriverError
from gpu_kernels.graphs import Graph
from gpu_kernels.waiting import BUSY_S
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.choosing import NOTHING_AHEAD, Ahead, AtOnce, Slate
from hybrimoe.runtime.layer_call.reports import OBSERVE_EVERY
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.slots import InFlight
from hybrimoe.runtime.layer_call.tallies import ACCEL_US
from hybrimoe.runtime.token_loop import compiled as at_place
from hybrimoe.runtime.token_loop.compiled import run_token
from scheduler import ObservedTask, Transfer
from scheduler.compiled import straight
from scheduler.planner.at_once import HANDS_ON, Desk

MOST_TAKEN_OVER = CAPACITY // 2
"""Copies under way with which a token begins; with more, Python runs it."""
Stop = tuple[int, bool]
"""Where a token goes on: at which place, whose piece has been launched, and whether its call has been answered. Beyond
the last place: the token is done."""


class NoLoopError(ValueError):
    """Why Python runs between the pieces of a step; the text says it."""


class TokenLoop:
    """A captured step's layers as one compiled call. Raises NoLoopError or DriverError where there cannot be one.

    graphs: of the pieces, one more than calls. n_tokens: how many it has run to their ends without Python, of n_begun.
    """

    def __init__(
        self, runner: ExpertsCall, accelerator: TorchAccelerator, driver: Driver, graphs: Sequence[Graph],
        calls: Sequence[SentCall],
    ) -> None:  # fmt: skip
        self.runner, self.calls = runner, list(calls)
        self._accelerator, self._driver, self._graphs = accelerator, driver, list(graphs)
        require_loop(runner, accelerator)
        self._backends = _backends_of(runner, self.calls)
        self._n_threads = max(backend.n_threads for backend in self._backends)
        self.n_tokens = self.n_begun = 0
        self.pieces_ns = 0
        """Of the latest run: in which the host was busy with pieces, or waited for one."""
        self._queue = accelerator.driver_queue(driver)
        self._places = np.zeros((len(self.calls) + 1, at_place.PLACE_SIZE), np.int64)
        self._token, self._numbers = np.zeros(at_place.TOKEN_SIZE, np.int64), np.zeros(at_place.N_NUMBERS)
        self._slates: list[Slate] = []
        self._sheets: list[Sheet] = []
        self._aheads: list[Ahead] = [NOTHING_AHEAD] * len(self.calls)
        self._gate_words: npt.NDArray[np.int64] = np.zeros(at_place.GATES_SIZE, np.int64)
        self._desk: Desk | None = None
        self._observed = self._is_inside = False
        self._write_down_what_stays()
        make_ready()
        self._run = straight(run_token)

    @property
    def at(self) -> int:
        """The place at which the latest run has stopped."""
        return int(self._token[at_place.AT])

    def times_us(self) -> npt.NDArray[np.float64]:
        """float64 [3, places], of the latest token: what the device has waited for beside the CPU's experts, these, and
        what came after the release."""
        columns = self._places[:-1, [at_place.ANSWERED_NS, at_place.CPU_NS, at_place.SETTLED_NS]].T * 1e-3
        columns[0] -= columns[1]
        return np.asarray(columns)

    # What is written down ---------------------------------------------------------------------------------------

    def _write_down_what_stays(self) -> None:
        """Graphs, the calls' tensors, where records and counters are."""
        token, experts, graph_of = self._token, self.runner.experts, self._driver.graph
        for place, graph in zip(self._places, self._graphs, strict=True):
            place[at_place.GRAPH] = graph_of(graph)
        for place, call in zip(self._places, self.calls, strict=False):
            assert call.exchange.places is not None
            index, weights, weights_kind, _, top_k, hidden, hidden_kind = call.exchange.places
            place[at_place.EXPERTS] = 0 if call.graph is None else graph_of(call.graph)
            place[[at_place.IDS_AT, at_place.WEIGHTS_AT, at_place.WEIGHTS_KIND]] = index, weights, weights_kind
            place[[at_place.TOP_K, at_place.HIDDEN_AT, at_place.HIDDEN_KIND]] = top_k, hidden, hidden_kind
            place[at_place.LAYER], place[at_place.OUT_ROWS] = call.layer, call.exchange.rows.ctypes.data
            with self._accelerator.current():
                place[[at_place.BEGAN, at_place.ENDED_AT]] = self._queue.new_event(), self._queue.new_event()
        self._addresses = np.array([array.ctypes.data for array in experts.lanes.addresses], np.int64)
        self._record_bytes, rows = np.array(experts.record_bytes, np.int64), experts.stats.rows
        token[[at_place.QUEUE, at_place.PLACES]] = self._queue.address, self._places.ctypes.data
        token[[at_place.ADDRESSES, at_place.RECORD_BYTES]] = self._addresses.ctypes.data, self._record_bytes.ctypes.data
        token[[at_place.TALLIES, at_place.N_ROWS]] = rows.ctypes.data, rows.shape[0] * rows.shape[1]
        token[[at_place.NUMBERS, at_place.GATES]] = self._numbers.ctypes.data, self._gate_words.ctypes.data
        token[at_place.STAGE], self._numbers[at_place.BUSY_NS] = at_place.OWING, BUSY_S * 1e9

    def _write_down_decisions(self, at_once: AtOnce, desk: Desk) -> None:
        """What decides and computes, as planner and kernels have it now."""
        experts = self.runner.experts
        self._slates, self._sheets = [], []
        for place, call, backend in zip(self._places, self.calls, self._backends, strict=False):
            space, shape = experts.spaces[call.layer], (1, call.ids.shape[-1])
            slate = at_once.new_slate(space, desk, shape, call.exchange)
            sheet = backend.sheet(space.layer.spec, experts.lanes.addresses[call.layer], *shape)
            place[at_place.SLATE], place[at_place.SHEET] = slate.address, sheet.address
            self._slates.append(slate)
            self._sheets.append(sheet)
        self._write_down_gates(at_once)
        self._write_down_launches()
        self._token[[at_place.DESK_AT, at_place.N_PLACES]] = desk.address, len(self.calls)
        workspace = np.zeros(max(sheet.needed for sheet in self._sheets), np.uint8)
        for sheet in self._sheets:
            sheet.work_in(workspace)
        self._desk = desk

    def _write_down_gates(self, at_once: AtOnce) -> None:
        """The gates, and which of them foretells which place at the place before it."""
        self._aheads = [NOTHING_AHEAD] * len(self.calls)
        self._places[:, [at_place.N_GIVEN, at_place.N_TARGET]] = 0
        gates = at_once.gates()
        if gates is None:
            return
        arrays = gates.halves, gates.bias, gates.correction, gates.corrected, gates.scoring
        self._gate_words[:] = *(array.ctypes.data for array in arrays), *gates.halves.shape
        for number in range(1, len(self.calls)):
            before, call = self.calls[number - 1], self.calls[number]
            ahead = at_once.foretold_for(call.layer, before.ids.shape[-1])
            if before.layer != call.layer - 1 or not ahead[0]:
                continue
            self._aheads[number], ((prediction,), ids, scores, n) = ahead, ahead
            place, behind = self._places[number - 1], self._places[number]
            place[[at_place.TARGET, at_place.N_TARGET]] = prediction.layer, n
            place[[at_place.TARGET_IDS, at_place.TARGET_SCORES]] = ids, scores
            behind[[at_place.GIVEN, at_place.SCORES, at_place.N_GIVEN]] = ids, scores, n

    def _write_down_launches(self) -> None:
        """What a group of experts costs beside the experts, as the costs have it now."""
        costs = self.runner.costs
        assert costs is not None
        for place, call in zip(self._places, self.calls, strict=False):
            place[at_place.LAUNCH_NS] = round(costs.launch_us(call.layer) * 1e3)

    # A run ------------------------------------------------------------------------------------------------------

    def run(self, at: int, *, launched: bool) -> Stop | None:
        """Goes on with a token from place `at`, whose piece was launched or is to be; where it stopped. None, with
        nothing done, where Python has to run the place: what the loop needs is not known yet, or is in disorder.

        Raises what the call of experts raises, LostError where the device hangs or its driver has failed.
        """
        self.pieces_ns = 0
        if not self._may_run():
            return None
        self._enter(at, launched)
        try:
            with self._accelerator.current():
                return self._go_on()
        finally:
            self.pieces_ns = int(self._numbers[at_place.PIECES_NS])
            self._leave()

    def _go_on(self) -> Stop:
        while True:
            answer = self._run(self._token.ctypes.data)
            at = int(self._token[at_place.AT])
            if answer == at_place.WAITS_LONG:
                self.calls[min(at, len(self.calls) - 1)].exchange.wait()
                continue
            if answer == at_place.HANDED_ON:
                self._leave()
                self._answer_rest(at)
                return at, True
            if answer not in (at_place.DONE, at_place.IN_PYTHON):
                raise self._error(answer)
            self.n_tokens += answer == at_place.DONE
            self.runner.consistent = True
            return at, answer == at_place.DONE

    def _answer_rest(self, at: int) -> None:
        """The call of a place on whose decision HANDS_ON was told."""
        runner, call, start_ns = self.runner, self.calls[at], perf_counter_ns()
        assert runner.at_once is not None
        space, n_active = runner.experts.spaces[call.layer], int(self._token[at_place.N_ACTIVE])
        choice = runner.at_once.handed_on(space, self._slates[at], runner.phase, n_active, call)
        runner.answer_rest(call, choice, max(runner.link_free_us - start_ns * 1e-3, 0.0), start_ns)

    def _error(self, answer: int) -> Exception:
        """What has gone wrong, as Python tells it."""
        bad, at_once = int(self._token[at_place.BAD]), self.runner.at_once
        assert at_once is not None
        if answer == at_place.NOT_PINNED:
            return at_once.planner.slots.not_pinned(bad)
        if answer == at_place.REFUSED:
            code, self._queue.words[FAILED] = int(self._queue.words[FAILED]), 0
            return self._accelerator.wait_limit.failed(DriverError(self._driver.told(code)))
        return not_finite(bad)

    def _may_run(self) -> bool:
        """Whether the loop has all it needs, and the session is in order. Nothing has happened where it is not."""
        runner, at_once = self.runner, self.runner.at_once
        if at_once is None or runner.experts.tracing or runner.routing_recorder is not None:
            return False
        planner, desk = at_once.planner, at_once.planner.desk
        if desk is None or planner.slots.overtaking or not (at_once.is_ready or at_once.get_ready()):
            return False
        (transfers,), spaces = runner.experts.lanes.queues, runner.experts.spaces
        if len(transfers.pending) > MOST_TAKEN_OVER:
            return False
        known = desk is self._desk and all(
            slate.buffers is spaces[call.layer].buffers for slate, call in zip(self._slates, self.calls, strict=True)
        )
        if not known and any(planner.desk_for(call.layer, 1, call.ids.shape[-1]) is None for call in self.calls):
            return False
        if not known:
            self._write_down_decisions(at_once, desk)
        return True

    def _enter(self, at: int, launched: bool) -> None:
        """From Python's objects to the loop's memory."""
        runner, token, numbers, at_once, layer = (
            self.runner, self._token, self._numbers, self.runner.at_once, self.calls[at].layer
        )  # fmt: skip
        assert at_once is not None
        if len(helpers) < self._n_threads - 1:
            start_team(self._n_threads)
        runner.settle()
        if at == 0:
            self.n_begun += 1
            self._tell_what_was_observed()
        if self._has_news():
            runner.experts.reports.collect(runner.phase)
        runner.begin_call(layer, 1)
        token[[at_place.NOW, at_place.RUN]], numbers[at_place.HORIZON] = (turn := at_once.arrive(layer))[:2], turn[2]
        self._take_copies()
        self._accelerator.hand_to(self._queue)
        token[[at_place.AT, at_place.OWES, at_place.N_MOVED, at_place.N_AWAITED]] = at, 0, 0, 0
        token[at_place.STAGE] = at_place.WAITS if launched else at_place.LAUNCHES
        token[at_place.FIRST_ROW] = at_once.first_row(runner.phase)
        token[at_place.OBSERVING] = self._observed = not runner.experts.step % OBSERVE_EVERY
        numbers[at_place.PIECES_NS], numbers[at_place.LINK_FREE_NS] = 0.0, runner.link_free_us * 1e3
        self._places[at:, [at_place.N_CPU, at_place.N_ACCEL, at_place.IS_TOLD]] = 0
        self._places[at, at_place.IS_TOLD] = at_once.was_told(layer, self._aheads[at])
        self._is_inside, runner.consistent = True, False

    def _leave(self) -> None:
        """From the loop's memory to Python's objects; does nothing where that was done."""
        if not self._is_inside:
            return
        self._is_inside = False
        runner, token, at_once, at = self.runner, self._token, self.runner.at_once, int(self._token[at_place.AT])
        assert at_once is not None
        assert self._desk is not None
        runner.link_free_us = float(self._numbers[at_place.LINK_FREE_NS]) * 1e-3
        last = self.calls[-1].layer if at == len(self.calls) else self.calls[at].layer - 1
        if token[at_place.N_AWAITED] == HANDS_ON:
            last += 1
        runner.tracker.last_layer = last
        self._desk.decided_up_to(last, int(token[at_place.N_MOVED]))
        if at < len(self.calls) and self._places[at, at_place.IS_TOLD]:
            at_once.tell(self.calls[at].layer, self._aheads[at])
        self._give_copies()
        if at_once.planner.slots.validating:
            at_once.planner.slots.validate()

    # Copies and times -------------------------------------------------------------------------------------------

    def _has_news(self) -> bool:
        """Whether something has been left to tell the planner that the loop knows nothing of."""
        (transfers,) = self.runner.experts.lanes.queues
        return self.runner.experts.reports.has_news or any(
            not isinstance(item.event, QueuedCopy) for item in transfers.pending
        )

    def _take_copies(self) -> None:
        """The session's copies under way become entries of the queue, or are those still."""
        (transfers,), at_once = self.runner.experts.lanes.queues, self.runner.at_once
        assert at_once is not None
        n_ours = sum(isinstance(item.event, QueuedCopy) for item in transfers.pending)
        self._queue.keep(n_ours)
        for item in list(transfers.pending)[n_ours:]:
            move = item.transfer
            self._queue.take_over(move.layer * at_once.planner.n_experts + move.expert, move.slot)
        transfers.pending.clear()

    def _give_copies(self) -> None:
        """The entries of the queue become the session's copies under way."""
        (transfers,), at_once = self.runner.experts.lanes.queues, self.runner.at_once
        assert at_once is not None
        step, under_way = self.runner.experts.step, {}
        for number, entry in enumerate(self._queue.under_way()):
            (layer, expert), slot = divmod(int(entry[KEY]), at_once.planner.n_experts), int(entry[ENTRY_SLOT])
            under_way[slot] = event = self._accelerator.queued_copy(self._queue, number)
            move = Transfer(layer, expert, slot, None, "prefetch", 0.0, admit=True)
            transfers.pending.append(InFlight(move, event, int(self._record_bytes[layer]), step, False))
        self._accelerator.take_from(self._queue, under_way)

    def _tell_what_was_observed(self) -> None:
        """The times of the token before correct the costs, where they were to be observed."""
        if not self._observed:
            return
        self._observed, at_once = False, self.runner.at_once
        assert at_once is not None
        for place in self._places[:-1]:
            layer, n_cpu, n_accel = place[[at_place.LAYER, at_place.N_CPU, at_place.N_ACCEL]].tolist()
            if n_cpu:
                us, share = float(place[at_place.CPU_NS]) * 1e-3 / n_cpu, float(place[at_place.SHARE])
                at_once.planner.observe(ObservedTask("cpu", layer, 1, us), share / at_place.SHARE_UNIT)
            us = self._took_us(*place[[at_place.BEGAN, at_place.ENDED_AT]].tolist()) if n_accel else 0.0
            if us > 0.0:
                self.runner.experts.stats.spent.append(
                    (self.runner.experts.stats.counters["decode"][layer], ACCEL_US, us * OBSERVE_EVERY)
                )
                at_once.planner.observe(ObservedTask("accel", layer, 1, us, float(n_accel), True))
        self._write_down_launches()

    def _took_us(self, start: int, end: int) -> float:
        """us between two events; 0 where they have not passed, or the driver does not know."""
        call, milliseconds = self._driver.call, np.zeros(1, np.float32)
        if call(QUERY, end) or call(ELAPSED, milliseconds.ctypes.data, start, end):
            return 0.0
        return float(milliseconds[0]) * 1e3


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first token would otherwise wait for: here there is no place."""
    token = np.zeros(at_place.TOKEN_SIZE, np.int64)
    token[at_place.STAGE] = at_place.OWING
    run_token(token.ctypes.data)


def require_loop(runner: ExpertsCall, accelerator: TorchAccelerator) -> None:
    """Raises NoLoopError where no token of a session can be a compiled loop."""
    if runner.at_once is None:
        raise NoLoopError("only policy `ours` decides in compiled code")
    if not all(isinstance(layer.backend, NumbaBackend) for layer in runner.layers):
        raise NoLoopError("the CPU's experts are not computed by the numba backend")
    if accelerator.needs_pinned_host() and not torch.from_numpy(runner.experts.store.record(0, 0)).is_pinned():
        raise NoLoopError("experts in host memory are not page-locked, so that Python copies them")
    if not library_functions()[CLOCK]:
        raise NoLoopError("this system has no clock for compiled code")


def _backends_of(runner: ExpertsCall, calls: Sequence[SentCall]) -> list[NumbaBackend]:
    """What computes the CPU's experts of each call. Raises NoLoopError where these calls cannot be a compiled loop."""
    if not calls or any(call.exchange.places is None for call in calls):
        raise NoLoopError("its calls of experts have tensors that compiled code does not read")
    if any(len(call.ids) != 1 for call in calls):
        raise NoLoopError("it has several sequences")
    layers = [call.layer for call in calls]
    if any(after <= before for before, after in pairwise(layers)):
        raise NoLoopError("it calls a layer's experts more than once")
    backends = (runner.layers[layer].backend for layer in layers)
    return [backend for backend in backends if isinstance(backend, NumbaBackend)]
