"""The compiled loop over a token's layers, where it stops, and what Python makes of that."""

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
from gpu_kernels.driver.functions import Driver
from gpu_kernels.driver.queue import FAILED
from gpu_kernels.errors import DriverError
from gpu_kernels.graphs import Graph
from gpu_kernels.waiting import BUSY_S
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.choosing import Slate, new_slate
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.token_loop import compiled as at_place
from hybrimoe.runtime.token_loop.compiled import run_token
from hybrimoe.runtime.token_loop.hand_over import HandOver
from scheduler.compiled import straight
from scheduler.planner.at_once import Desk

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
        require_loop(runner, accelerator)
        self.runner, self.calls = runner, list(calls)
        self._accelerator, self._driver, self._graphs = accelerator, driver, list(graphs)
        self._backends = _backends_of(runner, self.calls)
        self._n_threads = max(backend.n_threads for backend in self._backends)
        self.n_tokens = self.n_begun = 0
        self.pieces_ns = 0
        """Of the latest run: in which the host was busy with pieces, or waited for one."""
        self._queue = accelerator.driver_queue(driver)
        self._places = np.zeros((len(self.calls) + 1, at_place.PLACE_SIZE), np.int64)
        self._token, self._numbers = np.zeros(at_place.TOKEN_SIZE, np.int64), np.zeros(at_place.N_NUMBERS)
        self._hand_over: HandOver | None = None
        if runner.at_once is not None:
            memory = self._token, self._numbers, self._places
            self._hand_over = HandOver(runner, runner.at_once, accelerator, self._queue, self.calls, *memory)
        self._slates: list[Slate] = []
        self._sheets: list[Sheet] = []
        self._is_inside = False
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
        """Graphs, the calls' tensors, where counters are."""
        token, rows, graph_of = self._token, self.runner.experts.stats.rows, self._driver.graph
        for place, graph in zip(self._places, self._graphs, strict=True):
            place[at_place.GRAPH] = graph_of(graph)
        for place, call in zip(self._places, self.calls, strict=False):
            assert call.exchange.places is not None
            index, weights, weights_kind, _, top_k, hidden, hidden_kind = call.exchange.places
            place[at_place.EXPERTS] = 0 if call.graph is None else graph_of(call.graph)
            place[[at_place.IDS_AT, at_place.WEIGHTS_AT, at_place.WEIGHTS_KIND]] = index, weights, weights_kind
            place[[at_place.TOP_K, at_place.HIDDEN_AT, at_place.HIDDEN_KIND]] = top_k, hidden, hidden_kind
            place[at_place.LAYER], place[at_place.OUT_ROWS] = call.layer, call.exchange.rows.ctypes.data
            place[at_place.SOURCE_AT] = call.exchange.plan_addresses[1]
            with self._accelerator.current():
                place[[at_place.BEGAN, at_place.ENDED_AT]] = self._queue.new_event(), self._queue.new_event()
        token[[at_place.QUEUE, at_place.PLACES]] = self._queue.address, self._places.ctypes.data
        token[[at_place.TALLIES, at_place.N_ROWS]] = rows.ctypes.data, rows.shape[0] * rows.shape[1]
        token[[at_place.NUMBERS, at_place.N_PLACES]] = self._numbers.ctypes.data, len(self.calls)
        self._numbers[at_place.BUSY_NS] = BUSY_S * 1e9

    def _write_down_calls(self, desk: Desk | None) -> None:
        """What reads, decides on and computes each call, as planner and kernels have it now."""
        experts = self.runner.experts
        self._slates, self._sheets = [], []
        for place, call, backend in zip(self._places, self.calls, self._backends, strict=False):
            space, shape = experts.spaces[call.layer], (1, call.ids.shape[-1])
            slate = new_slate(experts, space, desk, shape, call.exchange)
            sheet = backend.sheet(space.layer.spec, experts.lanes.addresses[call.layer], *shape)
            place[at_place.SLATE], place[at_place.SHEET] = slate.address, sheet.address
            self._slates.append(slate)
            self._sheets.append(sheet)
        workspace = np.zeros(max(sheet.needed for sheet in self._sheets), np.uint8)
        for sheet in self._sheets:
            sheet.work_in(workspace)
        if self._hand_over is not None and desk is not None:
            self._hand_over.write_down(desk)

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
            at = self.at
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
        if answer == at_place.NOT_PINNED and at_once is not None:
            return at_once.planner.slots.not_pinned(bad)
        if answer == at_place.REFUSED:
            code, self._queue.words[FAILED] = int(self._queue.words[FAILED]), 0
            return self._accelerator.wait_limit.failed(DriverError(self._driver.told(code)))
        return not_finite(bad)

    def _may_run(self) -> bool:
        """Whether the loop has all it needs, and the session is in order. Nothing has happened where it is not."""
        experts, hand_over, desk = self.runner.experts, self._hand_over, None
        if experts.tracing or self.runner.routing_recorder is not None:
            return False
        if hand_over is not None:
            desk = hand_over.desk()
            if desk is None:
                return False
        if len(self._slates) == len(self.calls) and all(
            slate.desk is desk and slate.buffers is experts.spaces[call.layer].buffers
            for slate, call in zip(self._slates, self.calls, strict=True)
        ):
            return True
        if hand_over is not None and not hand_over.knows_all():
            return False
        self._write_down_calls(desk)
        return True

    def _enter(self, at: int, launched: bool) -> None:
        """From Python's objects to the loop's memory."""
        runner, token = self.runner, self._token
        if len(helpers) < self._n_threads - 1:
            start_team(self._n_threads)
        runner.settle()
        self.n_begun += at == 0
        if self._hand_over is None:
            runner.begin_call(self.calls[at].layer, 1)
            self._accelerator.hand_to(self._queue)
        else:
            self._hand_over.enter(at)
        token[[at_place.AT, at_place.OWES]] = at, 0
        token[at_place.STAGE] = at_place.WAITS if launched else at_place.LAUNCHES
        token[at_place.FIRST_ROW] = runner.experts.stats.counters[runner.phase][0].number
        self._numbers[at_place.PIECES_NS] = 0.0
        self._is_inside, runner.consistent = True, False

    def _leave(self) -> None:
        """From the loop's memory to Python's objects; does nothing where that was done."""
        if not self._is_inside:
            return
        self._is_inside = False
        at, hand_over = self.at, self._hand_over
        last = self.calls[-1].layer if at == len(self.calls) else self.calls[at].layer - 1
        if hand_over is not None:
            last += hand_over.hands_on
            hand_over.leave(at, last)
        self.runner.tracker.last_layer = last


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first token would otherwise wait for: here there is no place."""
    token = np.zeros(at_place.TOKEN_SIZE, np.int64)
    token[at_place.STAGE] = at_place.OWING
    run_token(token.ctypes.data)


def require_loop(runner: ExpertsCall, accelerator: TorchAccelerator) -> None:
    """Raises NoLoopError where no token of a session can be a compiled loop."""
    if runner.experts.lanes.tier is not None:
        raise NoLoopError("experts are read from disk")
    if runner.planner is not None and runner.at_once is None:
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
