"""A layer of a decode step of policy ``ours`` in one compiled call: from its routing to pinned slots and transfers.

It is what ``Planner.decide`` does piece by piece, for a demand of few tokens: follow the forecast, balance, take slots,
start transfers, pin, prefetch. A test holds both to the same plans. What the call works on is written down once, as a
vector of addresses (``Desk``).

It has two parts, which other compiled code may call one after the other: ``choose_at_once`` says where the layer's own
experts run, and ``prefetch_at_once``, for which nobody waits, brings experts of later layers.
"""

from __future__ import annotations

import math
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, COUNT, CPU, LINK, TRANSFER
from scheduler.cache.value import WORTHLESS, ValueCache
from scheduler.compiled import compiled, straight
from scheduler.demand import Demand
from scheduler.errors import SchedulerError
from scheduler.forecast.affinity import MAX_ACTIVE
from scheduler.forecast.use_model import BLEND_SIZE, N_RATES, N_STEPS, take_turn
from scheduler.forecast.value_model import CANDIDATES, MAX_SURE, N_BINS, follow_layer, saving_us, sure_absent
from scheduler.machine.costs import DRIFT_BOUNDS, CostModel, moved_drift
from scheduler.plan import Transfer
from scheduler.planner.decide import EVICTED, REUSE, SLOT, decide_by_value, pick_slot
from scheduler.planner.flight import add_flight, drop_flight, flight_slots
from scheduler.planner.movement import MAX_PREFETCHES, Movement
from scheduler.planner.open_plans import OpenPlans, has_room, open_plan
from scheduler.planner.plan_view import PlanView
from scheduler.prefetch.value import ValuePrefetch, worth_us
from scheduler.slots import BEGIN_TRANSFER, FREE, IN_FLIGHT, STORY_EVENTS, land, pin_slot, tell
from scheduler.views import floats_at, ids_at, ints_at, singles_at

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

(N_LAYERS, N_EXPERTS, N_SLOTS, N_KINDS, N_GRID, N_SOURCES, DISTANCE, LOOKAHEAD, SLOT_OF, KEY_OF, STATE, PINS, ARRIVAL,
 FLIGHT, KEEP, CPU_US, ACCEL_US, LINK_US, KIND, DRIFT, RATES, ROUTES, GATES, OWN_ODDS, BLENDS, ODDS, FAR_ODDS, AHEAD,
 NEXT_TOKEN, SAME_TOKEN, SEEN, EVEN, FORETOLD, BINS, SHARED_BINS, N_LISTED, LISTED, CELLS, CHANCES, SURE_KEYS,
 SURE_CHANCES, PARAMS, NUMBERS, FIXED, LANES, TABLE, ROWS, GAINS, ADMITTED, AWAITED, FETCHED, FETCH_GAINS, TOLD,
 OPEN, DESK_SIZE) = range(55)  # fmt: skip
"""Places of a desk int64[DESK_SIZE]: sizes, then addresses."""
LINK_WITH_CPU, DENSE_US, CERTAINTY, PRICE, N_NUMBERS = range(5)
"""Places of the desk's NUMBERS. PRICE: of a prefetch, as a share of a transfer's time."""
FETCHED_KEY, FETCHED_SLOT, FETCHED_EVICTED = range(3)
"""Rows of the desk's FETCHED int64[3, MAX_PREFETCHES]."""
HANDS_ON: Final = -1
"""Number of awaited experts where nothing was started: one expert of the plan takes over the slot of another, or there
is no room for another open plan of the layer."""


@compiled
def follow_at_once(
    desk: Ints, layer: int, n_total: int, now: int, run: int, horizon: float, ids: Ids, n_tokens: Ids,
    gate_scores: Singles, given: Ids, scores: Singles,
) -> None:  # fmt: skip
    """``ValueModel.follow`` of few tokens."""
    n_layers, n_experts, n_kinds = desk[N_LAYERS], desk[N_EXPERTS], desk[N_KINDS]
    by_layer, weights = (n_layers, n_experts), (n_layers, desk[N_SOURCES], n_experts, n_experts)
    seen = floats_at(desk[SEEN], n_layers)
    since, target = take_turn(layer, n_total, True, desk[DISTANCE], seen, ints_at(desk[FORETOLD], n_layers))
    rates = floats_at(desk[RATES] + 8 * N_RATES * n_experts * layer, (N_RATES, n_experts))
    cpu = floats_at(desk[CPU_US], (n_kinds, desk[N_GRID]))
    accel = floats_at(desk[ACCEL_US], (n_kinds, desk[N_GRID]))
    n_bins, listed = N_BINS * N_BINS, (n_layers, CANDIDATES)
    follow_layer(
        layer, target, ids, n_tokens, gate_scores, n_total, now, run, since, seen[layer],
        floats_at(desk[EVEN], n_layers)[layer], True, horizon, cpu, accel, ints_at(desk[KIND], n_layers),
        floats_at(desk[DRIFT], 3),
        ints_at(desk[SLOT_OF], n_layers * n_experts), given, scores, floats_at(desk[KEEP], n_layers * n_experts), rates,
        ids_at(desk[ROUTES], (N_STEPS, n_layers, MAX_ACTIVE)), singles_at(desk[GATES], (N_STEPS, n_layers, MAX_ACTIVE)),
        singles_at(desk[OWN_ODDS], (N_STEPS, n_layers, N_RATES, n_experts)),
        floats_at(desk[BLENDS], (n_layers, 2, BLEND_SIZE)), singles_at(desk[ODDS], by_layer),
        singles_at(desk[FAR_ODDS], by_layer), singles_at(desk[AHEAD], by_layer),
        singles_at(desk[NEXT_TOKEN], weights), singles_at(desk[SAME_TOKEN], weights),
        floats_at(desk[BINS], (n_layers, 2, n_bins)), floats_at(desk[SHARED_BINS], (2, n_bins)),
        ints_at(desk[N_LISTED], n_layers), ints_at(desk[LISTED], listed), ints_at(desk[CELLS], listed),
        floats_at(desk[CHANCES], listed),
    )  # fmt: skip


@compiled
def receive(desk: Ints, slot: int, key: int, slot_of: Ints, key_of: Ints, state: Ints, told: Ints) -> int:
    """``Movement.start`` into a slot that ``pick_slot`` found. Returns the evicted key, -1 for none."""
    old = key_of[slot]
    if old >= 0:
        slot_of[old] = -1
    key_of[slot], slot_of[key], state[slot] = key, slot, IN_FLIGHT
    tell(told, BEGIN_TRANSFER, slot, key)
    add_flight(desk[FLIGHT], key, slot)
    return int(old)


@compiled
def land_at_once(desk_address: int, slot: int, key: int, us: float) -> bool:
    """``Planner.end_transfer`` of a transfer whose slot nobody has taken over, which took ``us`` (0: not known); the
    planner's own numbers. Returns whether there was such a transfer; nothing has happened where there was none."""
    desk = ints_at(desk_address, DESK_SIZE)
    n_slots, n_layers = desk[N_SLOTS], desk[N_LAYERS]
    key_of, state, pins = ints_at(desk[KEY_OF], n_slots), ints_at(desk[STATE], n_slots), ints_at(desk[PINS], n_slots)
    if not land(slot, key, key_of, state, pins, _told(desk)):
        return False
    drop_flight(desk[FLIGHT], key)
    if us > 0.0:
        link_us = floats_at(desk[LINK_US], n_layers)[key // desk[N_EXPERTS]]
        expected_us = link_us / floats_at(desk[NUMBERS], N_NUMBERS)[LINK_WITH_CPU]
        drift = floats_at(desk[DRIFT], 3)
        drift[TRANSFER] = moved_drift(drift[TRANSFER], us, expected_us, DRIFT_BOUNDS)
    return True


@compiled
def decide_at_once(
    desk: Ints, layer: int, n_total: int, now: int, run: int, horizon: float, cpu_ready_us: float,
    accel_ready_us: float, link_ready_us: float, ids: Ids, n_tokens: Ids, gate_scores: Singles, given: Ids,
    scores: Singles,
) -> tuple[float, int, int]:  # fmt: skip
    """``choose_at_once``, then ``prefetch_at_once``. Returns (makespan in us, number of awaited experts or HANDS_ON,
    number of prefetches)."""
    makespan_us, n_awaited, idle_us = choose_at_once(
        desk, layer, n_total, now, run, horizon, cpu_ready_us, accel_ready_us, link_ready_us, ids, n_tokens,
        gate_scores, given, scores,
    )  # fmt: skip
    n_fetched = 0 if n_awaited == HANDS_ON else prefetch_at_once(desk, layer, idle_us)
    return makespan_us, n_awaited, n_fetched


@compiled
def choose_at_once(
    desk: Ints, layer: int, n_total: int, now: int, run: int, horizon: float, cpu_ready_us: float,
    accel_ready_us: float, link_ready_us: float, ids: Ids, n_tokens: Ids, gate_scores: Singles, given: Ids,
    scores: Singles,
) -> tuple[float, int, float]:  # fmt: skip
    """Decides on a layer and performs that in the slot table; the plan is then open, and in the desk's ROWS, and beside
    it which of its accelerated experts are AWAITED, GAINS and ADMITTED of its transfers.

    gate_scores float32[E]: the demand's. given, scores: the gate's prediction for the layer that is forecast next.
    Returns (makespan in us, number of awaited experts or
    HANDS_ON, us for which the link then idles until the next layer). At HANDS_ON the forecast has followed the layer,
    and nothing else has happened.
    """
    follow_at_once(desk, layer, n_total, now, run, horizon, ids, n_tokens, gate_scores, given, scores)
    n_layers, n_experts, n_slots, n = desk[N_LAYERS], desk[N_EXPERTS], desk[N_SLOTS], ids.size
    numbers, drift, kind = floats_at(desk[NUMBERS], N_NUMBERS), floats_at(desk[DRIFT], 3), ints_at(desk[KIND], n_layers)
    slot_of, key_of = ints_at(desk[SLOT_OF], n_layers * n_experts), ints_at(desk[KEY_OF], n_slots)
    state, pins = ints_at(desk[STATE], n_slots), ints_at(desk[PINS], n_slots)
    keep, arrival = floats_at(desk[KEEP], n_layers * n_experts), floats_at(desk[ARRIVAL], n_slots)
    told = _told(desk)
    if not has_room(desk[OPEN], layer):
        return 0.0, HANDS_ON, 0.0
    transfer_us = _transfer_us(desk, layer)
    flight = flight_slots(desk[FLIGHT])
    for i in range(flight.size):  # the link is in order: the last one lands when it gets free
        arrival[flight[i]] = max(link_ready_us - (flight.size - 1 - i) * transfer_us, 0.0)
    ready = floats_at(desk[LANES] + 8 * 3 * layer, 3)
    ready[CPU], ready[ACCEL], ready[LINK] = cpu_ready_us, accel_ready_us, link_ready_us
    scales = np.empty(3)
    scales[CPU], scales[ACCEL], scales[TRANSFER] = drift[CPU], drift[ACCEL], transfer_us
    plan, table = ints_at(desk[ROWS], (5, n + 1)), floats_at(desk[TABLE], (5, n))
    cpu_us = floats_at(desk[CPU_US] + 8 * desk[N_GRID] * kind[layer], desk[N_GRID])
    accel_us = floats_at(desk[ACCEL_US] + 8 * desk[N_GRID] * kind[layer], desk[N_GRID])
    first_key = layer * n_experts
    makespan_us = decide_by_value(
        floats_at(desk[PARAMS], 2), ids, n_tokens, first_key, first_key + n_experts, -1, cpu_us, accel_us, scales,
        ready, slot_of, key_of, state, pins, arrival, keep, keep, table, plan,
    )  # fmt: skip
    for i in range(plan[TRANSFER, COUNT]):
        if plan[EVICTED, plan[TRANSFER, i]] == REUSE:
            return makespan_us, HANDS_ON, 0.0
    awaited = ints_at(desk[AWAITED], n)
    n_awaited = 0
    for i in range(plan[ACCEL, COUNT]):
        slot = plan[SLOT, plan[ACCEL, i]]
        if state[slot] == IN_FLIGHT and key_of[slot] == first_key + ids[plan[ACCEL, i]]:
            awaited[n_awaited] = plan[ACCEL, i]
            n_awaited += 1
    gains, admitted = floats_at(desk[GAINS], n), ints_at(desk[ADMITTED], n)
    saved_us = _saved_us(desk, layer)
    for i in range(plan[TRANSFER, COUNT]):
        position = plan[TRANSFER, i]
        key, tokens = first_key + ids[position], n_tokens[position]
        gains[i] = cpu_us[tokens] * drift[CPU] - accel_us[tokens] * drift[ACCEL]
        admitted[i] = keep[key] >= WORTHLESS * saved_us
        receive(desk, plan[SLOT, position], key, slot_of, key_of, state, told)
    taken = np.empty(plan[ACCEL, COUNT], np.int64)
    for i in range(taken.size):
        taken[i] = plan[SLOT, plan[ACCEL, i]]
        pin_slot(taken[i], state, pins, told)
    link_us = plan[TRANSFER, COUNT] * transfer_us
    link_share = min((link_ready_us + link_us) / makespan_us, 1.0) if makespan_us > 0.0 else 0.0
    leaving, n_leaving = np.empty(plan[TRANSFER, COUNT], np.int64), 0
    for i in range(leaving.size):
        if not admitted[i]:
            leaving[n_leaving] = plan[SLOT, plan[TRANSFER, i]]
            n_leaving += 1
    open_plan(desk[OPEN], layer, taken, leaving[:n_leaving], link_share)
    return makespan_us, n_awaited, makespan_us + numbers[DENSE_US] - (link_ready_us + link_us)


@compiled
def prefetch_at_once(desk: Ints, layer: int, idle_us: float) -> int:
    """``Movement.start_prefetches`` of what ``ValuePrefetch`` proposes for few tokens: FETCHED and FETCH_GAINS of the
    desk. Returns how many it started; idle_us: for how long the link idles before the next layer."""
    if idle_us <= 0.0 or desk[LOOKAHEAD] <= 0:
        return 0
    transfer_us, saved_us = _transfer_us(desk, layer), _saved_us(desk, layer)
    n_layers, n_experts, n_slots = desk[N_LAYERS], desk[N_EXPERTS], desk[N_SLOTS]
    numbers, fixed = floats_at(desk[NUMBERS], N_NUMBERS), ints_at(desk[FIXED], n_layers)
    slot_of, key_of = ints_at(desk[SLOT_OF], n_layers * n_experts), ints_at(desk[KEY_OF], n_slots)
    state, pins, keep = ints_at(desk[STATE], n_slots), ints_at(desk[PINS], n_slots), floats_at(desk[KEEP], slot_of.size)
    limit = MAX_PREFETCHES
    if transfer_us > 0.0:
        limit = math.ceil(min(idle_us / transfer_us, float(MAX_PREFETCHES)))
    keys, chances = ints_at(desk[SURE_KEYS], MAX_SURE), floats_at(desk[SURE_CHANCES], MAX_SURE)
    n_sure = sure_absent(
        layer, min(layer + desk[DISTANCE], n_layers - 1), numbers[CERTAINTY], ints_at(desk[N_LISTED], n_layers),
        ints_at(desk[LISTED], (n_layers, CANDIDATES)),
        floats_at(desk[CHANCES], (n_layers, CANDIDATES)), slot_of, n_experts, keys, chances,
    )  # fmt: skip
    if n_sure == 0:
        return 0
    fetched, told = ints_at(desk[FETCHED], (3, MAX_PREFETCHES)), _told(desk)
    gains, nobody = floats_at(desk[FETCH_GAINS], MAX_PREFETCHES), np.zeros(n_slots, np.bool_)
    price_us = numbers[PRICE] * transfer_us
    started = 0
    for i in range(min(n_sure, limit)):
        key, gain_us = keys[i], worth_us(chances[i], saved_us, price_us)
        target = key // n_experts
        if fixed[target]:
            continue
        first_key = target * n_experts
        slot = pick_slot(key_of, state, pins, keep, nobody, first_key, first_key + n_experts, -1)
        if slot < 0:
            continue
        loss_us = 0.0 if state[slot] == FREE else keep[key_of[slot]]
        if gain_us + keep[key] > loss_us:
            fetched[FETCHED_KEY, started], fetched[FETCHED_SLOT, started] = key, slot
            fetched[FETCHED_EVICTED, started] = receive(desk, slot, key, slot_of, key_of, state, told)
            gains[started] = gain_us
            started += 1
    return started


@compiled
def _told(desk: Ints) -> Ints:
    """The slot table's ``told``."""
    return ints_at(desk[TOLD], (STORY_EVENTS + 1, 3))


@compiled
def _transfer_us(desk: Ints, layer: int) -> float:
    """us of one expert of the layer over the link, beside the CPU."""
    us = floats_at(desk[LINK_US], desk[N_LAYERS])[layer] * floats_at(desk[DRIFT], 3)[2]
    return float(us / floats_at(desk[NUMBERS], N_NUMBERS)[LINK_WITH_CPU])


@compiled
def _saved_us(desk: Ints, layer: int) -> float:
    """us that one use of a resident of the layer saves for one token."""
    n_kinds, n_grid = desk[N_KINDS], desk[N_GRID]
    cpu = floats_at(desk[CPU_US], (n_kinds, n_grid))
    accel = floats_at(desk[ACCEL_US], (n_kinds, n_grid))
    return saving_us(cpu, accel, ints_at(desk[KIND], desk[N_LAYERS])[layer], floats_at(desk[DRIFT], 3))


def int32s(array: npt.NDArray[Any]) -> Ids:
    """A contiguous writable int32 array: the one type that the compiled decision knows."""
    if array.dtype == np.int32 and array.flags.carray:
        return array
    return np.array(array, np.int32)


def float32s(array: npt.NDArray[Any]) -> Singles:
    """A contiguous writable float32 array, likewise."""
    if array.dtype == np.float32 and array.flags.carray:
        return array
    return np.array(array, np.float32)


class Desk:
    """What ``decide_at_once`` works on, of one planner, and how its answer becomes a plan.

    Made anew when the number of slots changes. ``cache`` and ``prefetch`` share ``cache.model``. ``params`` float64[2]:
    of balance ``value``; ``lanes`` float64[n_layers, 3]: when each lane gets free, as of the layer's latest decision;
    ``plans``: the planner's open ones.
    """

    def __init__(
        self, movement: Movement, cache: ValueCache, prefetch: ValuePrefetch, costs: CostModel, params: Floats,
        lanes: Floats, plans: OpenPlans,
    ) -> None:  # fmt: skip
        self.movement, self.model = movement, cache.model
        slots, model, use, setting = movement.slots, cache.model, cache.model.use, cache.setting
        self.residency, self._setting = model.residency, setting
        self._rows = np.zeros(5 * (MAX_ACTIVE + 1), np.int64)
        self._gains, self._admitted = np.zeros(MAX_ACTIVE), np.zeros(MAX_ACTIVE, np.int64)
        self.awaited = np.zeros(MAX_ACTIVE, np.int64)
        """Of the latest choice: positions of the experts on their way."""
        self._fetched, self._fetch_gains = np.zeros((3, MAX_PREFETCHES), np.int64), np.zeros(MAX_PREFETCHES)
        numbers = np.zeros(N_NUMBERS)
        numbers[LINK_WITH_CPU], numbers[DENSE_US] = costs.link_with_cpu, costs.dense_us
        numbers[CERTAINTY], numbers[PRICE] = prefetch.certainty, prefetch.link_share
        fixed = np.array(movement.fixed, np.int64)
        link_us = np.asarray(costs.link_us[costs.kind])
        self.words = np.zeros(DESK_SIZE, np.int64)
        words = self.words
        words[[N_LAYERS, N_EXPERTS, N_SLOTS]] = slots.n_layers, slots.n_experts, slots.n_slots
        words[[N_KINDS, N_GRID]] = costs.cpu_grid.shape
        words[OPEN], words[FLIGHT] = plans.address, movement.in_flight.address
        words[[N_SOURCES, DISTANCE, LOOKAHEAD]] = use.next_token.shape[1], model.distance, setting.lookahead
        self._kept: dict[int, npt.NDArray[Any]] = {
            SLOT_OF: slots.slot_of, KEY_OF: slots.key_of, STATE: slots.state, PINS: slots.pins,
            ARRIVAL: movement.arrival, KEEP: cache.keep, CPU_US: costs.cpu_grid,
            ACCEL_US: costs.accel_grid, LINK_US: link_us, KIND: costs.kind, DRIFT: costs.drift, RATES: use.rates,
            ROUTES: use.routes, GATES: use.gates, OWN_ODDS: use.own, BLENDS: use.blends, ODDS: use.odds,
            FAR_ODDS: use.far, AHEAD: use.ahead, NEXT_TOKEN: use.next_token, SAME_TOKEN: use.same_token,
            SEEN: use.seen, EVEN: use.even, FORETOLD: use.foretold, BINS: model.own,
            SHARED_BINS: model.shared, N_LISTED: model.n_listed, LISTED: model.listed, CELLS: model.cells,
            CHANCES: model.chances, SURE_KEYS: model.sure_keys, SURE_CHANCES: model.sure_chances, PARAMS: params,
            NUMBERS: numbers, FIXED: fixed, LANES: lanes, TABLE: np.zeros(5 * MAX_ACTIVE), ROWS: self._rows,
            GAINS: self._gains, ADMITTED: self._admitted, AWAITED: self.awaited, FETCHED: self._fetched,
            FETCH_GAINS: self._fetch_gains, TOLD: slots.told,
        }  # fmt: skip
        for place, array in self._kept.items():
            assert array.flags.c_contiguous
            words[place] = array.ctypes.data
        self.address = words.ctypes.data
        self._land = land_at_once
        self.views: list[Ints] = [self._rows[: 5 * (n + 1)].reshape(5, n + 1) for n in range(MAX_ACTIVE + 1)]
        """By the number of active experts: the plan int64[5, A + 1] of the latest choice (``decide.new_plan``)."""
        self._nothing = np.empty(0, np.int32), np.empty(0, np.float32)

    def __reduce__(self) -> NoReturn:
        """A copy would decide on the original's arrays."""
        raise SchedulerError("a planner of policy ours cannot be copied or pickled: make a new one")

    def decide(
        self, demand: Demand, cpu_ready_us: float, accel_ready_us: float, link_ready_us: float
    ) -> tuple[tuple[list[int], float, int], int] | None:
        """Decides on a demand and performs that in the slot table.

        Returns (what ``Planner.chosen`` is told, the number of prefetches). None at HANDS_ON: the forecast
        has then followed the demand, and the rest is to be done piece by piece.
        """
        layer, use = demand.layer, self.model.use
        ids, n_tokens = demand.expert_ids, demand.n_tokens
        if ids.dtype != np.int32 or n_tokens.dtype != np.int32:
            ids, n_tokens = int32s(ids), int32s(n_tokens)
        given, scores = self._nothing
        target = layer + self.model.distance
        for prediction in demand.predictions:
            if prediction.layer == target:
                given, scores = prediction.expert_ids, prediction.scores
        makespan_us, n_awaited, n_fetched = decide_at_once(
            self.words, layer, demand.n_tokens_total, use.now, use.run - 1, self.residency.horizon, cpu_ready_us,
            accel_ready_us, link_ready_us, ids, n_tokens, float32s(demand.gate_scores), given, scores,
        )  # fmt: skip
        if n_awaited == HANDS_ON:
            return None
        return (self.views[ids.size][:SLOT, COUNT].tolist(), makespan_us, n_awaited), n_fetched

    def decided_up_to(self, layer: int, n_moved: int) -> None:
        """Layers of this step were decided on by compiled code that calls the two parts itself, the last of them
        ``layer`` (-1: none); it has started so many transfers."""
        self.model.last_layer = layer
        if self._setting.step >= 0:
            self.residency.count += n_moved

    def land(self, slot: int, key: int, us: float) -> bool:
        """See ``land_at_once``."""
        done = self._land(self.address, slot, key, us)
        if self._land is land_at_once:
            self._land = straight(land_at_once)
        return done

    def prefetched(self, n_fetched: int, plan: PlanView) -> None:
        """Adds to ``plan`` what ``prefetch_at_once`` has started."""
        keys, slots, evicted = self._fetched[:, :n_fetched].tolist()
        gains = self._fetch_gains[:n_fetched].tolist()
        if self._setting.step >= 0:
            self.residency.count += n_fetched
        movement, started = self.movement, []
        for key, slot, old, gain_us in zip(keys, slots, evicted, gains, strict=True):
            started.append(movement.transfer(slot, key, old, "prefetch", gain_us, True))
        plan.prefetches = started
        if movement.slots.validating:
            movement.slots.validate()

    def started(self, demand: Demand, plan: PlanView) -> list[Transfer]:
        """The transfers of a plan that ``choose_at_once`` has started."""
        movement, first_key = self.movement, demand.layer * self.movement.slots.n_experts
        ids, started = demand.expert_ids.tolist(), []
        _, _, moved, slot_of, evicted = plan.lists()
        gains, admits = self._gains.tolist(), self._admitted.tolist()
        for position, gain_us, admitted in zip(moved[: plan.n_moved], gains, admits, strict=False):
            key, slot = first_key + ids[position], slot_of[position]
            started.append(movement.transfer(slot, key, evicted[position], "demand", gain_us, bool(admitted)))
        if self._setting.step >= 0:
            self.residency.count += len(started)
        return started
