"""The planner: demand and events in, plans out. The runtime and the simulator drive this one object.

No clock, no threads: the same calls give the same plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from math import inf
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scheduler.balancing import ACCEL_ONLY, CPU_ONLY, parameters_of_balance
from scheduler.balancing.problem import ACCEL, COUNT, CPU, HOST, LINK, TRANSFER
from scheduler.cache import CACHE_POLICIES
from scheduler.cache.base import CachePolicy
from scheduler.cache.value import ValueCache
from scheduler.demand import Demand, LayerDemand, Phase
from scheduler.errors import DemandError, PolicyError, SlotError
from scheduler.forecast.affinity import MAX_ACTIVE
from scheduler.forecast.use_model import FEW_TOKENS, Learnt
from scheduler.forecast.value_model import ValueModel
from scheduler.future import Future
from scheduler.host import HostView, fill_waits, price_of_absence
from scheduler.machine.costs import CostModel
from scheduler.plan import Event, LaneState, LayerEnded, LayerPlan, ObservedTask, Placement, Transfer, TransferEnded
from scheduler.planner.at_once import Desk, int32s
from scheduler.planner.decide import SLOT, decision_of
from scheduler.planner.explain import Explanation, explain
from scheduler.planner.movement import Movement
from scheduler.planner.open_plans import ENDED, NONE_OPEN, OpenPlans
from scheduler.planner.plan_view import PlanView
from scheduler.planner.policies import Policy, resolve_policy
from scheduler.planner.warm_up import preferred
from scheduler.prefetch import PREFETCH_POLICIES
from scheduler.prefetch.base import PrefetchPolicy
from scheduler.prefetch.value import ValuePrefetch
from scheduler.setting import Scorer, Setting, make
from scheduler.slots import IN_FLIGHT, PINNED, RESIDENT, SlotTable

Floats = npt.NDArray[np.float64]

NOW: Final = LaneState()
NO_SLOTS: Final = np.empty(0, np.int64)
_FORCED: Final = {"cpu": CPU_ONLY, "accelerator": ACCEL_ONLY}


class Planner:
    """Plans every layer of every step, and keeps the slot table that its plans lead to.

    ``n_slots`` are shared by all layers (more than there are experts is cut; 0 plans everything on the CPU).
    ``policy``: a preset or ``balance/prefetch/cache``, ``params`` its parameters. ``placements``: one of "hybrid",
    "cpu", "accelerator" a layer. ``future``: recorded routing for the oracles. ``scorer``, ``prefetch_scorer``: for
    the ``learned`` policies. Nothing is drawn at random: the same demands give the same plans. ``first_layer``,
    ``first_slot``: where its layers and slots stand among those of several planners (``planner.group``): plans and
    events use these numbers, demands count its own layers from 0.
    Raises PolicyError, SlotError or DemandError for what cannot be.
    """

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        n_slots: int,
        costs: CostModel,
        policy: str | Policy = "ours",
        lookahead: int = 3,
        *,
        placements: Sequence[Placement] | None = None,
        future: Future | None = None,
        scorer: Scorer | None = None,
        prefetch_scorer: Scorer | None = None,
        first_layer: int = 0,
        first_slot: int = 0,
        **params: Any,
    ) -> None:
        if costs.n_layers != n_layers:
            raise DemandError(f"the cost model has {costs.n_layers} layers, the planner {n_layers}")
        if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0:
            raise PolicyError(f"lookahead must be an integer of at least 0, found {lookahead!r}")
        self.n_layers, self.n_experts, self.costs = n_layers, n_experts, costs
        self.policy = resolve_policy(policy, **params)
        self.first_layer, self.first_slot = first_layer, first_slot
        self.slots = SlotTable(n_slots, n_layers, n_experts, first_layer, first_slot)
        self._setting = Setting(n_layers, n_experts, self.slots, costs, lookahead, future, scorer, prefetch_scorer)
        self.cache = make("cache", self.policy.cache, CACHE_POLICIES, self._setting, self.policy.params)
        self.prefetch = make("prefetch", self.policy.prefetch, PREFETCH_POLICIES, self._setting, self.policy.params)
        self._placements = _check_placements(placements, n_layers)
        self._by_value = self.policy.balance == "value"
        self._balance = self._balance_of_layers()
        self._last_use = np.zeros(n_layers * n_experts)
        self._clock, self._step = 0, -1
        fixed = [placement == "cpu" for placement in self._placements]
        self._known = [False] * n_layers
        self._movement = Movement(self.slots, self.cache, self.prefetch, costs, fixed)
        self._observing = [policy.observe for policy in (self.cache, self.prefetch) if _learns(policy)]
        self._refreshes = type(self.cache).refresh is not CachePolicy.refresh
        self.layers_ahead = self.prefetch.layers_ahead
        """How many following layers' predictions the policies read: more need not be made."""
        self.all_cached = self.slots.n_slots == n_layers * n_experts
        """Every expert has a slot: there is nothing to prefetch."""
        by_forecast = type(self.cache) is ValueCache and type(self.prefetch) is ValuePrefetch
        self.layers_skipped = max(self.layers_ahead - 1, 0) if by_forecast else 0
        """Of few tokens, predictions of so many nearest layers are not read: what they need is under way or late."""
        self._open = OpenPlans(self.slots)
        self._demands: list[Demand | None] = [None] * n_layers
        self._hosts: list[HostView | None] = [None] * n_layers
        self._priced = np.zeros(n_layers * n_experts)
        self._lanes = np.zeros((n_layers, 3))
        self._scales = np.zeros(3)
        self._plan = PlanView()
        self.desk = self._new_desk()
        """What decides at once (see ``desk_for``), made anew with the number of slots; None for policies that cannot.
        """

    def _new_desk(self) -> Desk | None:
        """What decides at once, for the policies that can (``at_once``); None for others."""
        cache, prefetch = self.cache, self.prefetch
        if self._by_value and self.slots.n_slots and type(cache) is ValueCache and type(prefetch) is ValuePrefetch:
            return Desk(self._movement, cache, prefetch, self.costs, self._balance[0][1], self._lanes, self._open)
        return None

    def _balance_of_layers(self) -> list[tuple[Callable[..., float], npt.NDArray[np.float64], bool]]:
        """Of each layer: how it decides, the policy's parameters, whether that reads the last use of experts."""
        known = parameters_of_balance(self.policy.balance)
        given = {key: value for key, value in self.policy.params.items() if key in known}
        if self._by_value:
            given = {"cpu_rate": self.costs.cpu_with_link, **given}
        own = decision_of(self.policy.balance, given)
        policies = []
        for placement in self._placements:
            forced = CPU_ONLY if self.slots.n_slots == 0 else _FORCED.get(placement)
            decide = own[0] if forced is None else decision_of(forced, {})[0]
            policies.append((decide, own[1], forced is None and self.policy.balance == "bandwidth"))
        return policies

    @property
    def cost_models(self) -> tuple[CostModel, ...]:
        """The cost model of each accelerator: here the only one."""
        return (self.costs,)

    def table(self, layer: int) -> tuple[SlotTable, int]:
        """The slots of the layer's accelerator (here the only one), and the layer's number in them."""
        return self.slots, layer

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool [experts]: bytes are in a slot now."""
        return self.slots.resident_mask(layer)

    def contents(self) -> dict[int, tuple[int, int]]:
        """Slot -> (layer, expert) that it holds or will once its transfer has ended, numbered as outside."""
        return self.slots.contents()

    def warm_up(self, frequencies: npt.ArrayLike | None = None) -> tuple[Transfer, ...]:
        """Fills the free slots before the first step: by use ``frequencies`` [n_layers, n_experts], or low ids first.

        The transfers are in link order; each needs its TransferEnded event. Raises DemandError for a wrong shape.
        """
        known = None if frequencies is None else np.asarray(frequencies, np.float64)
        if known is not None and (known.shape != (self.n_layers, self.n_experts) or not np.all(known >= 0)):
            raise DemandError(
                f"frequencies: expected [{self.n_layers}, {self.n_experts}] of at least 0, found shape {known.shape}"
            )
        self.cache.warmed(known)
        offered = np.array([placement != "cpu" for placement in self._placements])
        transfers = []
        free = iter(np.flatnonzero(self.slots.key_of < 0).tolist())
        for key in preferred(self.cache, self.slots, known, offered):
            slot = next(free, None)
            if slot is None:
                break
            transfers.append(self._movement.start(slot, key, "warmup", 0.0, True))
        return tuple(transfers)

    def study(self, demands: Sequence[Demand], begins: bool) -> None:
        """One step of an earlier sequence, the demands of all layers, from which a forecast learns before the first
        step is planned; policies without one learn nothing. ``begins``: it is the sequence's first step."""
        if isinstance(self._setting.forecast, ValueModel):
            self._setting.forecast.study(demands, begins)

    def learnt(self) -> Learnt | None:
        """What the forecast has learnt, one row a layer, for ``recall`` of a later planner; None where the policy has
        no forecast. The arrays are those that it works on."""
        forecast = self._setting.forecast
        return forecast.use.learnt() if isinstance(forecast, ValueModel) else None

    def recall(self, learnt: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Begins with what an earlier planner's forecast has learnt. Returns whether there is a forecast that it fits;
        nothing has changed where there is none."""
        forecast = self._setting.forecast
        return isinstance(forecast, ValueModel) and forecast.use.recall(learnt)

    def begin_sequence(self, future: Future | None = None) -> None:
        """A new sequence starts; what is resident stays. ``future``: its recorded routing, for the oracles."""
        if future is not None:
            self._setting.future = future
        self._setting.step = -1
        if self._setting.forecast is not None:
            self._setting.forecast.begin_sequence()
        self.cache.begin_sequence()
        self.prefetch.begin_sequence()

    def begin_step(self, phase: Phase, n_tokens: int) -> None:
        """One forward pass starts: a prefill chunk or a decode step of ``n_tokens`` tokens."""
        if phase not in ("prefill", "decode") or n_tokens < 0:
            raise DemandError(f"expected prefill or decode and n_tokens >= 0, found {phase!r} and {n_tokens}")
        self._step += 1
        self._setting.step += 1

    def plan_layer(self, demand: LayerDemand, lanes: LaneState = NOW, host: HostView | None = None) -> LayerPlan:
        """``decide`` as a frozen value, for everything that is not the hot path."""
        return self.decide(demand, lanes.cpu_ready_us, lanes.accel_ready_us, lanes.link_ready_us, host).plan(demand)

    def decide(
        self, demand: Demand, cpu_ready_us: float = 0.0, accel_ready_us: float = 0.0, link_ready_us: float = 0.0,
        host: HostView | None = None,
    ) -> PlanView:  # fmt: skip
        """The plan of one layer; its transfers are in flight and its slots pinned from now on.

        The times say when each lane gets free, in us from now. host: what is in host memory, where some experts are on
        disk; None where all are there, or nobody says. What is returned is filled anew by the next call. Raises
        DemandError if the demand does not fit the model (the full check is ``LayerDemand.validate``).
        """
        layer, ids = demand.layer, demand.expert_ids
        n = ids.size
        if not 0 <= layer < self.n_layers:
            raise DemandError(f"layer {layer} is outside 0..{self.n_layers - 1}")
        if n and not (ids[0] >= 0 and ids[-1] < self.n_experts and demand.n_tokens.size == n):
            raise DemandError(
                f"layer {layer}: expert ids must ascend within 0..{self.n_experts - 1}, one n_tokens each"
            )
        self._demands[layer] = demand
        plan = self._plan
        plan.step, plan.layer = self._step, layer + self.first_layer
        forecast, desk = self._setting.forecast, self.desk
        if forecast is not None:
            if forecast.arrive(demand) and desk is not None and n and self._known[layer] and host is None:
                done = desk.decide(demand, cpu_ready_us, accel_ready_us, link_ready_us)
                if done is not None:
                    self.chosen(demand, *done[0])
                    if done[1]:
                        desk.prefetched(done[1], plan)
                    return plan
            else:
                forecast.follow(demand)
                self._known[layer] |= n > 0 and self._placements[layer] == "hybrid"
        self._decide_in_parts(demand, cpu_ready_us, accel_ready_us, link_ready_us, host)
        return plan

    @property
    def decides_at_once(self) -> bool:
        """Whether decisions on few tokens are one compiled call (policy ``ours``)."""
        return self.desk is not None

    def desk_for(self, layer: int, n_tokens: int, n_most: int) -> Desk | None:
        """What decides at once on calls of a layer of ``n_tokens`` tokens and at most ``n_most`` active experts; None
        where ``decide`` is to be asked.

        The caller tells the desk's forecast that such a call arrives (``ValueModel.arrive_few``), and where at least
        one expert is active has ``at_once.choose_at_once`` run. Then comes ``chosen``, and ``prefetched`` with what
        ``at_once.prefetch_at_once`` answers; or ``decide_rest`` where the first has found HANDS_ON.
        """
        few = n_tokens <= FEW_TOKENS and n_most <= MAX_ACTIVE
        return self.desk if few and self._known[layer] else None

    def lend(self, n: int) -> bool:
        """Empties the last ``n`` slots, which somebody else fills, without a plan, until the next decision. False, with
        nothing done, where one of them is in use or under way."""
        slots = self.slots
        if (slots.state[slots.n_slots - n :] >= PINNED).any() or (slots.state[slots.n_slots - n :] == IN_FLIGHT).any():
            return False
        for slot in range(slots.n_slots - n, slots.n_slots):
            if slots.state[slot] == RESIDENT:
                key = slots.free(slot)
                if self.cache.tracks_slots:
                    self.cache.evicted(key)
        return True

    def saw(self, demand: Demand) -> None:
        """A layer's routing that was computed without a plan: the forecast and the policies learn from it."""
        for observe in self._observing:
            observe(demand)
        forecast = self._setting.forecast
        if forecast is not None:
            forecast.arrive(demand)
            forecast.follow(demand)
            self._known[demand.layer] |= demand.expert_ids.size > 0 and self._placements[demand.layer] == "hybrid"

    def chosen(self, demand: Demand, counts: Sequence[int], makespan_us: float, n_awaited: int) -> PlanView:
        """The plan that ``choose_at_once`` has performed for a demand; the numbers are its answers, counts: how many
        experts it has put on each lane (see ``PlanView.take``)."""
        desk, plan, slots, layer = self.desk, self._plan, self.slots, demand.layer
        assert desk is not None
        self._demands[layer] = demand
        plan.step, plan.layer = self._step, layer + self.first_layer
        plan.take(desk.views[demand.expert_ids.size], counts, makespan_us, self.first_slot)
        if n_awaited:
            plan.awaited = desk.awaited[:n_awaited].tolist()
        if plan.n_moved:
            plan.transfers = desk.started(demand, plan)
        if slots.validating:
            slots.validate()
        return plan

    def prefetched(self, n_fetched: int) -> list[Transfer]:
        """Adds to the latest plan, which ``chosen`` has told, what ``prefetch_at_once`` has started for it."""
        desk, plan = self.desk, self._plan
        assert desk is not None
        desk.prefetched(n_fetched, plan)
        return plan.prefetches

    def decide_rest(
        self, demand: Demand, cpu_ready_us: float, accel_ready_us: float, link_ready_us: float
    ) -> PlanView:  # fmt: skip
        """``decide`` of a demand that the forecast has followed already."""
        self._demands[demand.layer] = demand
        self._plan.step, self._plan.layer = self._step, demand.layer + self.first_layer
        self._decide_in_parts(demand, cpu_ready_us, accel_ready_us, link_ready_us)
        return self._plan

    def _decide_in_parts(
        self, demand: Demand, cpu_ready_us: float, accel_ready_us: float, link_ready_us: float,
        host: HostView | None = None,
    ) -> None:  # fmt: skip
        """A decision of any policy, for any demand; the forecast knows of it."""
        layer, n, plan = demand.layer, demand.expert_ids.size, self._plan
        lanes = self._lanes[layer]
        lanes[:] = cpu_ready_us, accel_ready_us, link_ready_us
        for observe in self._observing:
            observe(demand)
        if self._refreshes:
            self.cache.refresh(layer)
        self._hosts[layer] = host
        table, keep, held = plan.start(n), self.cache.keep, None
        if host is not None:
            table, keep, held = self._beside_disk(host, table, n)
        link_end_us, transfer_us = link_ready_us, self.costs.transfer_us(layer, cpu_busy=True)
        if n:
            self._choose(demand, lanes, transfer_us, plan, table, keep)
            link_end_us = self._start(demand, plan, link_ready_us, host)
        else:
            self._open.open(layer, NO_SLOTS, NO_SLOTS, 0.0)
        idle_us = plan.makespan_us + self.costs.dense_us - link_end_us
        if idle_us > 0.0 and self.slots.n_slots:
            plan.prefetches = self._movement.start_prefetches(demand, idle_us, transfer_us, keep, held)
        if host is not None:
            plan.reads = host.reads

    def _beside_disk(self, host: HostView, table: Floats, n: int) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """Where some experts are on disk: the cost table of ``n`` active ones, with the row HOST if one of them waits;
        what residents are kept by, with the price of reading them back; and which of the planner's experts are in host
        memory."""
        first_key = self.first_layer * self.n_experts
        held, keep = host.held[first_key : first_key + self.n_layers * self.n_experts], self.cache.keep
        if host.waits_us.any():
            table = np.empty((HOST + 1, n))
            fill_waits(table, host.waits_us)
        if isinstance(self._setting.forecast, ValueModel) and self.cache.keeps_us:
            savings_us, reads_us = self._setting.forecast.savings_us(), self.costs.alone_read_us()
            price_of_absence(self.slots.key_of, held, keep, savings_us, reads_us, self.n_experts, self._priced)
            keep = self._priced
        return table, keep, held

    def _choose(
        self, demand: Demand, lanes: Floats, transfer_us: float, plan: PlanView, table: Floats, keep: Floats
    ) -> None:
        """The compiled decision: which lane and which slot each active expert gets (see ``decide``); keep: what
        residents are kept by."""
        layer, costs, cache, slots = demand.layer, self.costs, self.cache, self.slots
        first_key = layer * self.n_experts
        link_ready_us = float(lanes[LINK])
        contended = link_ready_us > 0 and not self._by_value
        scales, drift = self._scales, costs.drift
        scales[CPU] = drift[CPU] / (costs.cpu_with_link if contended else 1.0)
        scales[ACCEL], scales[TRANSFER] = drift[ACCEL], transfer_us
        if len(self._movement.in_flight):
            self._movement.estimate_arrivals(link_ready_us, transfer_us)
        decide, params, by_last_use = self._balance[layer]
        ids, n_tokens = demand.expert_ids, demand.n_tokens
        if ids.dtype != np.int32 or n_tokens.dtype != np.int32:
            ids, n_tokens = int32s(ids), int32s(n_tokens)
        capacity = int(cache.capacities[layer]) if cache.scope == "layer" else -1
        plan.makespan_us = decide(
            params, ids, n_tokens, first_key, first_key + self.n_experts, capacity, costs.cpu_rows[layer],
            costs.accel_rows[layer], scales, lanes, slots.slot_of, slots.key_of, slots.state, slots.pins,
            self._movement.arrival, keep, keep if self._by_value else self._last_use, table, plan.rows,
        )  # fmt: skip
        if by_last_use:
            self._clock += 1
            self._last_use[ids + first_key] = self._clock

    def _start(self, demand: Demand, plan: PlanView, link_ready_us: float, host: HostView | None) -> float:
        """Starts the decision's transfers and pins its slots. Returns the us from now until they leave the link."""
        movement, layer, first_slot = self._movement, demand.layer, self.first_slot
        plan.take(plan.rows, plan.rows[:SLOT, COUNT].tolist(), plan.makespan_us, first_slot)
        if n_flight := len(movement.in_flight):
            known = movement.in_flight.keys[:n_flight].tolist()
            first_key, ids = layer * self.n_experts, demand.expert_ids.tolist()
            for position in plan.accel:
                if first_key + ids[position] in known:
                    plan.awaited.append(position)
        pinned_already = plan.n_moved > 0 and movement.start_demands(demand, plan, plan.slot_of)
        pinned, makespan_us = plan.rows[SLOT, plan.accel], plan.makespan_us
        if not pinned_already:
            self.slots.pin_all(pinned)
        link_end_us = link_ready_us + plan.n_moved * float(self._scales[TRANSFER])
        if host is not None:
            link_end_us = link_ready_us
            for position in plan.moved:
                link_end_us = max(link_end_us, float(host.waits_us[position])) + float(self._scales[TRANSFER])
        link_share = 0.0
        if self._by_value and makespan_us > 0.0:
            link_share = min(link_end_us / makespan_us, 1.0)
        left = [transfer.slot - first_slot for transfer in plan.transfers if not transfer.admit]
        self._open.open(layer, pinned, np.array(left, np.int64) if left else NO_SLOTS, link_share)
        return link_end_us

    def on_event(self, event: Event) -> None:
        """``end_transfer`` or ``end_layer``, as a value. Raises SlotError for anything else."""
        if isinstance(event, TransferEnded):
            self.end_transfer(event.layer, event.expert, event.slot, event.us)
        elif isinstance(event, LayerEnded):
            self.end_layer(event.layer, event.observed)
        else:
            raise SlotError(f"expected TransferEnded or LayerEnded, found {type(event).__name__}")

    def end_transfer(self, layer: int, expert: int, slot: int, us: float = 0.0) -> None:
        """The bytes of an expert are in its slot, see ``TransferEnded``. Raises SlotError if that was not planned."""
        own, slots, desk = layer - self.first_layer, self.slots, self.desk
        key, slot = own * self.n_experts + expert, slot - self.first_slot
        if desk is not None and not slots.overtaking and 0 <= own < self.n_layers and 0.0 <= us < inf:
            if not desk.land(slot, key, us):
                raise slots.not_under_way(slot, key)
            if slots.validating:
                slots.validate()
            return
        slots.end_transfer(slot, key)
        if slots.slot_of[key] == slot:  # else another expert of the plan has the slot now, and is under way itself
            self._movement.in_flight.drop(key)
        if us > 0.0:
            self.costs.observe_transfer(own, us)

    def end_layer(self, layer: int, observed: Sequence[ObservedTask] = ()) -> None:
        """The oldest open plan of the layer has run, see ``LayerEnded``. Raises SlotError if none is open."""
        own = layer - self.first_layer
        ended, link_share = NONE_OPEN, 0.0
        if 0 <= own < self.n_layers:
            link_share = self._open.oldest_link_share(own) if observed else 0.0
            ended = self._open.end(own)
        if ended == NONE_OPEN:
            raise SlotError(f"layer {layer} has ended, but no plan of it is open")
        if ended != ENDED:
            raise self.slots.not_pinned(ended)
        if self.slots.validating:
            self.slots.validate()
        for task in observed:
            self.observe(task, link_share)

    def observe(self, task: ObservedTask, link_share: float = 0.0) -> None:
        """A task's duration, see ``CostModel.observe``. Raises CostError for a time that cannot be."""
        if self.first_layer:
            task = replace(task, layer=task.layer - self.first_layer)
        self.costs.observe(task, link_share)

    def resize(self, n_slots: int) -> tuple[tuple[int, int], ...]:
        """Changes the number of slots between steps; returns the (layer, expert) that lost theirs.

        The last slots go first. Raises SlotError if one of them is in flight or in use.
        """
        gone = self.slots.resize(n_slots)
        self._movement.resized()
        self._open.write_down()
        self.cache.resized(self.slots.n_slots)
        self.all_cached = self.slots.n_slots == self.n_layers * self.n_experts
        if self.cache.tracks_slots:
            for key in gone:
                self.cache.evicted(key)
        self._balance = self._balance_of_layers()
        self.desk = self._new_desk()
        return tuple(divmod(key, self.n_experts) for key in gone)

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        """An independent planner as this one is now; what the desk wrote down by address is written down anew."""
        memo.update({id(self.desk): None, id(self.policy): self.policy})
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(deepcopy(self.__dict__, memo))
        made._open.write_down()
        made._movement.resized()
        made.desk = made._new_desk()
        return made

    def believe(self, costs: CostModel) -> None:
        """From now on work costs what ``costs`` says, as corrected so far."""
        self.costs.become(costs)
        self.desk = self._new_desk()

    def explain(self, plan: LayerPlan) -> Explanation:
        """Why the latest plan of a layer is as it is. Raises DemandError for an older plan."""
        layer = plan.layer - self.first_layer
        demand = self._demands[layer]
        if demand is None or plan.step != self._step:
            raise DemandError(f"only plans of the current step can be explained, found step {plan.step}")
        lanes = LaneState(*self._lanes[layer].tolist())
        return explain(plan, demand, lanes, self.costs, self.slots, self._hosts[layer])


def _check_placements(placements: Sequence[Placement] | None, n_layers: int) -> tuple[Placement, ...]:
    everywhere: Placement = "hybrid"
    given = (everywhere,) * n_layers if placements is None else tuple(placements)
    if len(given) != n_layers or any(p not in ("hybrid", "cpu", "accelerator") for p in given):
        raise PolicyError(f"placements: expected {n_layers} of hybrid, cpu, accelerator, found {given}")
    return given


def _learns(policy: CachePolicy | PrefetchPolicy) -> bool:
    """Whether the policy looks at demands; one that shares the planner's forecast need not."""
    return type(policy).observe not in (CachePolicy.observe, PrefetchPolicy.observe)
