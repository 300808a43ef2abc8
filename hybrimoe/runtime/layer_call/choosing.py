"""A call of few tokens from the router's tensors to a decision that is performed, in one compiled call.

For planners whose decision is compiled (`scheduler.planner.at_once`); others are asked once the routing has been read
(`CallSpace.read`, `Experts.plan`). What a layer's experts wait for is only this call. The rest of planning comes when
their output is there: counting, and experts of later layers that are fetched (`AtOnce.settle`; at once where no card
waits), and the gates' prediction for the layer that the next call forecasts (`AtOnce.foretell`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.engine.routed import FLOAT32, Places, read_call
from cpu_kernels.jit.primitives import floats_at as singles_at
from cpu_kernels.jit.primitives import int32s_at, int64s_at
from gpu_kernels.exchange import Exchange
from hybrimoe.runtime.layer_call.compiled import HIT, ON_ITS_WAY, describe_routing, place_pairs, with_gil
from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.lookahead import GateStack, Lookahead
from hybrimoe.runtime.layer_call.routing import CallSpace
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.layer_call.tallies import N_TALLIES, count_call
from scheduler import Phase, Planner, Prediction, Transfer
from scheduler.balancing.problem import ACCEL, COUNT, CPU, TRANSFER
from scheduler.compiled import straight
from scheduler.planner.at_once import (
    DESK_SIZE,
    FETCHED,
    HANDS_ON,
    N_SLOTS,
    ROWS,
    SLOT_OF,
    STATE,
    Desk,
    choose_at_once,
    prefetch_at_once,
)
from scheduler.planner.at_once import N_EXPERTS as N_PLANNED
from scheduler.planner.at_once import N_LAYERS as N_PLANNED_LAYERS
from scheduler.planner.movement import MAX_PREFETCHES
from scheduler.views import floats_at, ints_at

Singles = npt.NDArray[np.float32]

(HOST_HIDDEN, WIDTH, LAYER, N_EXPERTS, ROUTING, COUNTS, EXPERT_IDS, OFFSETS, PAIR_ROWS, USES, TOKENS, SCORES, FOUND,
 DESK, SLOTS, SOURCE, ADDRESSES, POSITIONS, RECORDS, RECORD_BYTES, TALLIES, N_ROWS, ISSUED, N_TOKENS, N_ACTIVE, IDLE_US,
 SLATE_SIZE) = range(27)  # fmt: skip
"""Places of a slate int64[SLATE_SIZE]: sizes and addresses; SLOTS and SOURCE are 0 where no exchange carries the call.
The call's own are written when it is read: N_TOKENS, N_ACTIVE, and at the address IDLE_US for how many us the link
idles before the next layer."""
Answer = tuple[int, int, int, int, int, int, float]
"""Of `read_and_choose`: the fields of a `Choice` down to makespan_us."""
Ahead = tuple[tuple[Prediction, ...], int, int, int]
"""A prediction (or none), the addresses of its experts and scores, and how many they are."""
NOTHING_AHEAD: Ahead = (), 0, 0, 0


@dataclass(slots=True, eq=False)
class Choice:
    """What was decided on a layer's latest call; filled anew by the next one.

    First the answer of `read_and_choose`. n_active: 0, or negative for a routing that it refuses, and nothing has
    happened; otherwise how many experts are active, how many of them are awaited (or HANDS_ON), run on each lane and
    are moved, how many prefetches were decided with that, and when the lanes end. For a call whose output is there
    before all is done: whether this is the space's plan already, and what the call took, of which the lanes.
    """

    n_active: int = 0
    n_awaited: int = 0
    n_cpu: int = 0
    n_accel: int = 0
    n_moved: int = 0
    n_fetched: int = 0
    makespan_us: float = 0.0
    is_planned: bool = False
    took_ns: int = 0
    lanes_ns: int = 0


@with_gil
def read_and_choose(
    slate_address: int, index: int, weights: int, weights_kind: int, n_tokens: int, top_k: int, hidden: int,
    hidden_kind: int, given: int, scores: int, n_given: int, now: int, run: int, horizon: float,
    number: int, cpu_ready_us: float, accel_ready_us: float, link_ready_us: float,
) -> Answer:  # fmt: skip
    """Reads and describes a call, has it decided, and writes the CPU lane's positions and records. For an exchange it
    writes where each pair is computed; else, where no card waits, it does what `settle_call` does as well.

    All that it works on is told by address, since taking an array into compiled code is ten times a number. index to
    hidden_kind: `cpu_kernels.engine.routed.Places`; given, scores, n_given: an `Ahead`; number: of the row of counters;
    else see `choose_at_once`.
    """
    slate = int64s_at(slate_address, SLATE_SIZE)
    n_experts, layer = slate[N_EXPERTS], slate[LAYER]
    n_rows, desk = n_tokens * top_k, int64s_at(slate[DESK], DESK_SIZE)
    ids, offsets = int32s_at(slate[EXPERT_IDS], n_rows), int32s_at(slate[OFFSETS], n_rows + 1)
    routing, rows = singles_at(slate[ROUTING], n_rows), int32s_at(slate[PAIR_ROWS], n_rows)
    n_active = read_call(
        index, weights, weights_kind, n_tokens, top_k, hidden, hidden_kind,
        singles_at(slate[HOST_HIDDEN], n_tokens * slate[WIDTH]), routing, int32s_at(slate[COUNTS], n_experts), ids,
        offsets, rows,
    )  # fmt: skip
    if n_active <= 0:
        return n_active, 0, 0, 0, 0, 0, 0.0
    n_planned, n_slots = desk[N_PLANNED], desk[N_SLOTS]
    active, tokens, found = ids[:n_active], int32s_at(slate[TOKENS], n_planned), int64s_at(slate[FOUND], 2)
    gate_scores = singles_at(slate[SCORES], n_planned)
    describe_routing(
        active, offsets, rows, routing, n_tokens, floats_at(slate[USES], n_planned), tokens, gate_scores,
        layer * n_planned, int64s_at(desk[SLOT_OF], desk[N_PLANNED_LAYERS] * n_planned),
        int64s_at(desk[STATE], n_slots), found,
    )  # fmt: skip
    makespan_us, n_awaited, idle_us = choose_at_once(
        desk, layer, n_tokens, now, run, horizon, cpu_ready_us, accel_ready_us, link_ready_us, active,
        tokens[:n_active], gate_scores, int32s_at(given, n_given), singles_at(scores, n_given),
    )  # fmt: skip
    if n_awaited == HANDS_ON:
        return n_active, n_awaited, 0, 0, 0, 0, makespan_us
    slate[N_TOKENS], slate[N_ACTIVE], floats_at(slate[IDLE_US], 1)[0] = n_tokens, n_active, idle_us
    plan = ints_at(desk[ROWS], (5, n_active + 1))
    n_cpu, n_accel = plan[CPU, COUNT], plan[ACCEL, COUNT]
    positions, records = int32s_at(slate[POSITIONS], n_cpu), int64s_at(slate[RECORDS], n_cpu)
    addresses = int64s_at(slate[ADDRESSES], n_experts)
    for i in range(n_cpu):
        positions[i] = plan[CPU, i]
        records[i] = addresses[ids[plan[CPU, i]]]
    n_fetched = 0
    if slate[SLOTS] == 0:
        n_fetched = settle_call(slate_address, number)
    else:
        slots, source = int32s_at(slate[SLOTS], n_rows), int32s_at(slate[SOURCE], n_rows)
        place_pairs(plan, n_cpu, n_accel, offsets, rows, slots, source)
    return n_active, n_awaited, n_cpu, n_accel, plan[TRANSFER, COUNT], n_fetched, makespan_us


@with_gil
def settle_call(slate_address: int, number: int) -> int:
    """What nobody waits for, once a call is decided: starts prefetches, counts the call in row `number`. Returns the
    number of prefetches."""
    slate = int64s_at(slate_address, SLATE_SIZE)
    layer, desk = slate[LAYER], int64s_at(slate[DESK], DESK_SIZE)
    n_planned, n_layers, n_active = desk[N_PLANNED], desk[N_PLANNED_LAYERS], slate[N_ACTIVE]
    n_fetched = prefetch_at_once(desk, layer, floats_at(slate[IDLE_US], 1)[0])
    found = int64s_at(slate[FOUND], 2)
    count_call(
        number, slate[N_TOKENS], found[HIT], found[ON_ITS_WAY], int32s_at(slate[EXPERT_IDS], n_active),
        layer * n_planned,
        ints_at(desk[ROWS], (5, n_active + 1)), ints_at(desk[FETCHED], (3, MAX_PREFETCHES)), n_fetched,
        ints_at(slate[RECORD_BYTES], n_layers), n_planned, floats_at(slate[TALLIES], (slate[N_ROWS], N_TALLIES)),
        ints_at(slate[ISSUED], n_layers * n_planned),
    )  # fmt: skip
    return n_fetched


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first call would otherwise wait for: here no expert is active."""
    absent, weight = np.full(1, -1, np.int64), np.ones(1, np.float32)
    counts, ends = np.zeros(1, np.int32), np.zeros(2, np.int32)
    slate = np.zeros(SLATE_SIZE, np.int64)
    slate[[WIDTH, N_EXPERTS]] = 1
    slate[[HOST_HIDDEN, ROUTING]] = floats = weight.ctypes.data
    slate[[COUNTS, EXPERT_IDS, PAIR_ROWS]], slate[OFFSETS] = counts.ctypes.data, ends.ctypes.data
    places: Places = absent.ctypes.data, floats, FLOAT32, 1, 1, floats, FLOAT32
    desk = np.zeros(DESK_SIZE, np.int64)
    slate[DESK] = desk.ctypes.data
    read_and_choose(slate.ctypes.data, *places, *NOTHING_AHEAD[1:], 0, 0, 0.0, 0, 0.0, 0.0, 0.0)
    row, plan = np.zeros(N_TALLIES), np.zeros(5, np.int64)
    desk[ROWS], slate[TALLIES], slate[N_ROWS] = plan.ctypes.data, row.ctypes.data, 1
    desk[N_PLANNED], slate[RECORD_BYTES] = 1, plan.ctypes.data
    slate[FOUND], slate[IDLE_US] = plan.ctypes.data, row.ctypes.data
    settle_call(slate.ctypes.data, 0)


class Slate:
    """What `read_and_choose` works on, of one layer's space, at `address`, and its answers.

    desk: None where nothing has a slot. shape: tokens of its calls, and experts of a token; they are sent by `exchange`
    or not. inputs, rows float32 [T, H], [T * top_k, H]: hidden states and result rows on the host.
    """

    def __init__(
        self, space: CallSpace, desk: Desk | None, addresses: npt.NDArray[np.uint64], shape: tuple[int, int],
        exchange: Exchange | None, inputs: Singles, rows: Singles, stats: StatsRecorder,
        record_bytes: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        self.desk, self.buffers, self.choice = desk, space.buffers, Choice()
        self.shape, self.exchange = shape, exchange
        self.inputs, self.rows = inputs, rows if exchange is None else exchange.rows
        routing_counts, tokens, scores, *_ = space.counted
        buffers, words = space.buffers, np.zeros(SLATE_SIZE, np.int64)
        self._kept: dict[int, npt.NDArray[Any]] = {
            HOST_HIDDEN: inputs, ROUTING: buffers.weights, COUNTS: buffers.counts, EXPERT_IDS: buffers.expert_ids,
            OFFSETS: buffers.offsets, PAIR_ROWS: buffers.rows, USES: routing_counts, TOKENS: tokens, SCORES: scores,
            FOUND: space.found, ADDRESSES: addresses, POSITIONS: space.positions,
            RECORDS: space.records, RECORD_BYTES: record_bytes, TALLIES: stats.rows, ISSUED: stats.issued,
            IDLE_US: np.zeros(1),
        }  # fmt: skip
        if desk is not None:
            self._kept[DESK] = desk.words
        for place, array in self._kept.items():
            assert array.flags.c_contiguous
            words[place] = array.ctypes.data
        words[[WIDTH, LAYER, N_EXPERTS]] = space.layer.spec.hidden, space.index, space.layer.num_experts
        words[N_ROWS] = stats.rows.size // N_TALLIES
        if exchange is not None:
            words[[SLOTS, SOURCE]] = exchange.plan_addresses
        self._words, self.address = words, words.ctypes.data


def new_slate(
    experts: Experts, space: CallSpace, desk: Desk | None, shape: tuple[int, int], exchange: Exchange | None
) -> Slate:
    """What calls of a layer of one shape (tokens, experts of a token) are read and decided on."""
    n_tokens, top_k = shape
    space.room_for(n_tokens * top_k)
    memory = experts.workspace.of_few(n_tokens, top_k, space.layer.spec.hidden)
    record_bytes = np.array(experts.record_bytes, np.int64)
    return Slate(
        space, desk, experts.lanes.addresses[space.index], shape, exchange, *memory, experts.stats, record_bytes
    )


class AtOnce:
    """Plans calls of few tokens of all layers by `read_and_choose`."""

    def __init__(self, experts: Experts, planner: Planner, lookahead: Lookahead | None) -> None:
        self.experts, self.planner, self._lookahead = experts, planner, lookahead
        n_layers = len(experts.layers)
        self.read_and_choose, self.settle_call = read_and_choose, settle_call
        assert experts.stats.issued.size == n_layers * planner.n_experts
        self.slates: list[Slate | None] = [None] * n_layers
        """Each layer's, of its latest call that was decided so."""
        self.foretells = lookahead is not None and planner.layers_ahead > 0 and not planner.all_cached
        """Whether calls are decided with the gates' predictions, which `foretell` makes."""
        self.is_ready = not self.foretells
        """As `get_ready` told last."""
        self._ahead: list[Ahead] = [NOTHING_AHEAD] * n_layers
        self._ahead_of = [-1] * n_layers
        """Of each layer: the prediction that its next call is decided with, and the step that it is for."""

    def get_ready(self) -> bool:
        """Whether calls can be decided so: not while the gates are not known yet."""
        self.is_ready = self.is_ready or (self._lookahead is not None and self._lookahead.stacked)
        return self.is_ready

    def choose(
        self, desk: Desk, space: CallSpace, phase: Phase, given: torch.Tensor, hidden: torch.Tensor, places: Places,
        exchange: Exchange | None, link_ready_us: float,
    ) -> Choice:  # fmt: skip
        """Decides on a call whose tensors are at `places` on the host; the space's `work` and `demand` are then filled,
        and where no card waits its plan is there and counted as well.

        desk: the planner's, for such calls. given, hidden: the hidden states where the model has them, and on the host.
        See `Choice` for what it refuses.
        """
        index, n_tokens, top_k, model = space.index, places[3], places[4], desk.model
        if model.last_layer >= index or not model.few:
            model.arrive_few(index)
        model.last_layer = index
        slate = self.slates[index]
        known = slate is not None and slate.desk is desk and slate.buffers is space.buffers
        if slate is None or not known or slate.exchange is not exchange or slate.shape != (n_tokens, top_k):
            if self.read_and_choose is read_and_choose:
                self.read_and_choose, self.settle_call = straight(read_and_choose), straight(settle_call)
            slate = self.slates[index] = new_slate(self.experts, space, desk, (n_tokens, top_k), exchange)
        ahead = self._ahead[index] if self._ahead_of[index] == self.experts.step else NOTHING_AHEAD
        predictions, given_at, scores_at, n_given = ahead
        use, choice = model.use, slate.choice
        launch_us = 0.0 if exchange is None else self.planner.costs.launch_us(index)
        (
            choice.n_active, choice.n_awaited, choice.n_cpu, choice.n_accel, choice.n_moved, choice.n_fetched,
            choice.makespan_us,
        ) = self.read_and_choose(
            slate.address, *places, given_at, scores_at, n_given, use.now, use.run - 1, desk.residency.horizon,
            self._row_of(phase, index), 0.0, launch_us, link_ready_us,
        )  # fmt: skip
        if choice.n_active > 0:
            space.filled(n_tokens, top_k, choice.n_active, given, hidden, slate.inputs, slate.rows)
            self.experts.expect(space, phase, predictions)
            if exchange is None and choice.n_awaited != HANDS_ON:
                self.take(space, choice)
        return choice

    def take(self, space: CallSpace, choice: Choice) -> None:
        """A choice becomes the space's plan; not at HANDS_ON."""
        counts = choice.n_cpu, choice.n_accel, choice.n_moved
        space.plan = self.planner.chosen(space.demand, counts, choice.makespan_us, choice.n_awaited)

    def decide_rest(self, space: CallSpace, link_ready_us: float) -> None:
        """The plan of a call on which `choose` has told HANDS_ON."""
        space.plan = self.planner.decide_rest(space.demand, 0.0, 0.0, link_ready_us)

    def settle(self, space: CallSpace, phase: Phase) -> Sequence[Transfer]:
        """What was not done with the choice, which is the space's plan: the call is counted, and transfers of experts
        of later layers start, which are returned."""
        slate = self.slates[space.index]
        if slate is None or slate.choice.n_awaited == HANDS_ON:
            self.count(space)
            return ()
        choice = slate.choice
        choice.n_fetched = self.settle_call(slate.address, self._row_of(phase, space.index))
        return self.planner.prefetched(choice.n_fetched) if choice.n_fetched else ()

    def count(self, space: CallSpace) -> None:
        """Counts a call that was decided by `decide_rest`."""
        experts, demand, (hits, late) = self.experts, space.demand, space.found.tolist()
        experts.stats.found(
            space.counters, space.index, demand.expert_ids, demand.n_tokens_total, hits, late, space.plan,
            experts.record_bytes,
        )  # fmt: skip

    # For compiled code that decides on several layers --------------------------------------------------------------

    def arrive(self, layer: int) -> tuple[int, int, float]:
        """The forecast is told that a call of one token of a layer arrives: what `choose_at_once` is told of the step
        (now, run, horizon)."""
        desk = self.planner.desk
        assert desk is not None
        model = desk.model
        if model.last_layer >= layer or not model.few:
            model.arrive_few(layer)
        return model.use.now, model.use.run - 1, desk.residency.horizon

    def handed_on(self, space: CallSpace, slate: Slate, phase: Phase, n_active: int, call: SentCall) -> Choice:
        """What compiled code has found HANDS_ON for, as `choose` leaves it; slate: what it has decided by."""
        choice, top_k = slate.choice, slate.shape[1]
        choice.n_active, choice.n_awaited, choice.is_planned = n_active, HANDS_ON, True
        choice.n_cpu = choice.n_accel = choice.n_moved = choice.n_fetched = 0
        self.slates[space.index] = slate
        space.filled(1, top_k, n_active, call.hidden, call.exchange.hidden, slate.inputs, slate.rows)
        self.experts.expect(space, phase, ())
        return choice

    def first_row(self, phase: Phase) -> int:
        """The row of `StatsRecorder.rows` of the first layer."""
        return self._row_of(phase, 0)

    def gates(self) -> GateStack | None:
        """The gates that foretell, where calls are decided with what they tell."""
        return self._lookahead.stack if self.foretells and self._lookahead is not None else None

    def foretold_for(self, layer: int, top_k: int) -> Ahead:
        """Where the prediction lies that a call of one token of a layer is decided with: always in the same place."""
        target, gates = layer + self.planner.layers_ahead, self.gates()
        if gates is None or layer == 0 or target >= len(self._ahead):
            return NOTHING_AHEAD
        space = gates.space(target, target, top_k)
        ids, scores = space.ids[0], space.scores[0]
        return space.predictions, ids.ctypes.data, scores.ctypes.data, ids.size

    def was_told(self, layer: int, ahead: Ahead) -> bool:
        """Whether the prediction for a layer of this step is there, at this place."""
        return self._ahead_of[layer] == self.experts.step and self._ahead[layer][1:] == ahead[1:]

    def tell(self, layer: int, ahead: Ahead) -> None:
        """The prediction for a layer of this step is at this place."""
        self._ahead[layer], self._ahead_of[layer] = ahead, self.experts.step

    def _row_of(self, phase: Phase, layer: int) -> int:
        """Of `StatsRecorder.rows`, by number."""
        return layer if phase == "prefill" else layer + len(self.slates)

    def foretell(self, space: CallSpace) -> None:
        """Predicts what the next layer's call needs to know, from this call's hidden states."""
        index, lookahead = space.index, self._lookahead
        target = index + 1 + self.planner.layers_ahead
        if lookahead is None or not self.foretells or target >= len(self._ahead):
            return
        skipped, work = target - index - 1, space.work
        for prediction in lookahead.predict(
            index, work.hidden, work.host_hidden, work.dispatch.top_k, skipped + 1, skipped
        ):
            if prediction.layer == target:
                told = self._ahead[index + 1][0]
                if not told or told[0] is not prediction:  # else it is the same memory, filled anew
                    ids, scores = prediction.expert_ids, prediction.scores
                    addresses = ids.ctypes.data, scores.ctypes.data
                    self._ahead[index + 1] = (prediction,), *addresses, ids.size
                self._ahead_of[index + 1] = self.experts.step
