"""The planner: demand and events in, plans out. The runtime and the simulator drive this one object.

No clock, no threads: the same calls give the same plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from scheduler.balancing import kernel_of, parameters_of_balance
from scheduler.cache import CACHE_POLICIES
from scheduler.demand import LayerDemand, Phase
from scheduler.errors import DemandError, PolicyError, SlotError
from scheduler.future import Future
from scheduler.machine.costs import CostModel
from scheduler.plan import Event, LaneState, LayerEnded, LayerPlan, ObservedTask, Transfer, TransferEnded
from scheduler.planner.decide import decide
from scheduler.planner.explain import Explanation, explain
from scheduler.planner.movement import Movement
from scheduler.planner.policies import Policy, resolve_policy
from scheduler.planner.warm_up import preferred
from scheduler.prefetch import PREFETCH_POLICIES
from scheduler.setting import Scorer, Setting, make
from scheduler.slots import RESIDENT, SlotTable

Placement = Literal["hybrid", "cpu", "accelerator"]

NOW: Final = LaneState()
_FORCED: Final = {"cpu": "cpu_only", "accelerator": "accel_only"}


class Planner:
    """Plans every layer of every step, and keeps the slot table that its plans lead to.

    ``n_slots`` are shared by all layers (more than there are experts is cut; 0 plans everything on the CPU).
    ``policy``: a preset or ``balance/prefetch/cache``, ``params`` its parameters. ``placements``: one of "hybrid",
    "cpu", "accelerator" a layer. ``future``: recorded routing for the oracles. ``scorer``, ``prefetch_scorer``: for
    the ``learned`` policies. Nothing is drawn at random: the same demands give the same plans.
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
        **params: Any,
    ) -> None:
        if costs.n_layers != n_layers:
            raise DemandError(f"the cost model has {costs.n_layers} layers, the planner {n_layers}")
        if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0:
            raise PolicyError(f"lookahead must be an integer of at least 0, found {lookahead!r}")
        self.n_layers, self.n_experts, self.costs = n_layers, n_experts, costs
        self.policy = resolve_policy(policy, **params)
        self.slots = SlotTable(n_slots, n_layers, n_experts)
        self._setting = Setting(n_layers, n_experts, self.slots, costs, lookahead, future, scorer, prefetch_scorer)
        self.cache = make("cache", self.policy.cache, CACHE_POLICIES, self._setting, self.policy.params)
        self.prefetch = make("prefetch", self.policy.prefetch, PREFETCH_POLICIES, self._setting, self.policy.params)
        self._placements = _check_placements(placements, n_layers)
        self._valued = self.policy.balance == "value"
        self._balance = self._balance_of_layers()
        self._recency = np.zeros(n_layers * n_experts)
        self._clock, self._step = 0, -1
        fixed = [placement == "cpu" for placement in self._placements]
        self._movement = Movement(self.slots, self.cache, self.prefetch, costs, fixed)
        self._claimed: list[deque[tuple[npt.NDArray[np.int64], list[int], float]]] = [deque() for _ in range(n_layers)]
        self._demands: dict[int, tuple[LayerDemand, LaneState]] = {}
        self._ready, self._scales = np.zeros(3), np.zeros(3)
        self._flat = np.empty(3 + 5 * n_experts, np.int64)

    def _balance_of_layers(self) -> list[tuple[str, npt.NDArray[np.float64]]]:
        """Balance policy (as ``decide`` names it) and its parameters, of each layer."""
        known = parameters_of_balance(self.policy.balance)
        own = {key: value for key, value in self.policy.params.items() if key in known}
        if self._valued:
            own = {"cpu_rate": self.costs.cpu_with_link, **own}
        _, numbers = kernel_of(self.policy.balance, **own)
        name = "fiddler_max" if own.get("form") == "max" else self.policy.balance
        policies = []
        for placement in self._placements:
            forced = "cpu_only" if self.slots.n_slots == 0 else _FORCED.get(placement, name)
            policies.append((forced, numbers))
        return policies

    @property
    def layers_ahead(self) -> int:
        """How many following layers' predictions the policies read: more need not be made."""
        return self.prefetch.layers_ahead

    @property
    def all_cached(self) -> bool:
        """Every expert has a slot: there is nothing to prefetch."""
        return self.slots.n_slots == self.n_layers * self.n_experts

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

    def begin_sequence(self, future: Future | None = None) -> None:
        """A new sequence starts; what is resident stays. ``future``: its recorded routing, for the oracles."""
        if future is not None:
            self._setting.future = future
        self._setting.step = -1
        self.cache.begin_sequence()
        self.prefetch.begin_sequence()

    def begin_step(self, phase: Phase, n_tokens: int) -> None:
        """One forward pass starts: a prefill chunk or a decode step of ``n_tokens`` tokens."""
        if phase not in ("prefill", "decode") or n_tokens < 0:
            raise DemandError(f"expected prefill or decode and n_tokens >= 0, found {phase!r} and {n_tokens}")
        self._step += 1
        self._setting.step += 1

    def plan_layer(self, demand: LayerDemand, lanes: LaneState = NOW) -> LayerPlan:
        """The plan of one layer; its transfers are in flight and its experts in use from now on.

        Raises DemandError if the demand does not fit the model (the full check is ``demand.validate``).
        """
        layer, ids = demand.layer, _int32(demand.expert_ids)
        n = ids.size
        if not 0 <= layer < self.n_layers:
            raise DemandError(f"layer {layer} is outside 0..{self.n_layers - 1}")
        if n and not (ids[0] >= 0 and ids[-1] < self.n_experts and demand.n_tokens.size == n):
            raise DemandError(
                f"layer {layer}: expert ids must ascend within 0..{self.n_experts - 1}, one n_tokens each"
            )
        self._demands[layer] = (demand, lanes)
        self.cache.observe(demand)
        self.prefetch.observe(demand)
        self.cache.refresh(layer)
        if n == 0:
            self._claimed[layer].append((np.empty(0, np.int64), [], 0.0))
            prefetches = self._movement.start_prefetches(demand, lanes.link_ready_us, 0.0)
            return LayerPlan(self._step, layer, (), (), (), (), prefetches, 0.0)
        return self._plan_active(demand, ids, lanes)

    def _plan_active(self, demand: LayerDemand, ids: npt.NDArray[np.int32], lanes: LaneState) -> LayerPlan:
        layer, n, movement = demand.layer, ids.size, self._movement
        makespan, flat = self._decide(demand, ids, lanes)
        experts = ids.tolist()
        first_key = layer * self.n_experts
        accel_positions = flat[3 + n : 3 + n + flat[1]]
        demanded = flat[3 + 2 * n : 3 + 2 * n + flat[2]]
        accel = [experts[p] for p in accel_positions]
        slots = [flat[3 + 3 * n + p] for p in accel_positions]
        awaited: list[int] = []
        if movement.in_flight:
            awaited = [e for e in accel if first_key + e in movement.in_flight]
        started = movement.start_demands(demand, flat, accel_positions) if demanded else {}
        transfers = [started[p] for p in demanded]
        held = np.array(slots, np.int64)
        if not started or not movement.chained:
            self.slots.claim_all(held)
        link_end = lanes.link_ready_us + len(transfers) * float(self._scales[2])
        link_share = min(link_end / makespan, 1.0) if self._valued and makespan > 0.0 else 0.0
        self._claimed[layer].append((held, [t.slot for t in transfers if not t.admit], link_share))
        return LayerPlan(
            self._step, layer, tuple([experts[p] for p in flat[3 : 3 + flat[0]]]), tuple(accel), tuple(slots),
            tuple(transfers), movement.start_prefetches(demand, link_end, makespan), makespan, tuple(awaited),
        )  # fmt: skip

    def _decide(self, demand: LayerDemand, ids: npt.NDArray[np.int32], lanes: LaneState) -> tuple[float, list[int]]:
        """Runs the compiled decision: makespan and the flat plan (see ``decide``)."""
        layer, costs, cache, slots = demand.layer, self.costs, self.cache, self.slots
        first_key = layer * self.n_experts
        ready, scales = self._ready, self._scales
        ready[0], ready[1], ready[2] = lanes.cpu_ready_us, lanes.accel_ready_us, lanes.link_ready_us
        transfer_us = costs.transfer_us(layer, cpu_busy=True)
        contended = lanes.link_ready_us > 0 and not self._valued
        scales[0] = costs.drift[0] / (costs.cpu_with_link if contended else 1.0)
        scales[1], scales[2] = costs.drift[1], transfer_us
        if self._movement.in_flight:
            self._movement.estimate_arrivals(lanes.link_ready_us, transfer_us)
        policy, params = self._balance[layer]
        out = self._flat[: 3 + 5 * ids.size]
        makespan = decide(
            policy, params, ids, _int32(demand.n_tokens), first_key, first_key + self.n_experts, cache.capacity(layer),
            costs.cpu_rows[layer], costs.accel_rows[layer], scales, ready, slots.slot_of, slots.key_of, slots.state,
            slots.claims, self._movement.arrival, cache.keep, cache.keep if self._valued else self._recency, out,
        )  # fmt: skip
        self._clock += 1
        if policy == "bandwidth":
            self._recency[ids + first_key] = self._clock
        return makespan, out.tolist()

    def on_event(self, event: Event) -> None:
        """What the executor saw: a transfer or a layer has ended. Raises SlotError if that was not planned."""
        if isinstance(event, TransferEnded):
            self._movement.ended(event)
        elif isinstance(event, LayerEnded):
            self._end_layer(event)
        else:
            raise SlotError(f"expected TransferEnded or LayerEnded, found {type(event).__name__}")

    def observe(self, task: ObservedTask) -> None:
        """A task's duration that became known after its layer's end. Raises CostError for a time that cannot be."""
        self.costs.observe(task)

    def _end_layer(self, event: LayerEnded) -> None:
        if not 0 <= event.layer < self.n_layers or not self._claimed[event.layer]:
            raise SlotError(f"layer {event.layer} has ended, but no plan of it is open")
        slots, leaving, link_share = self._claimed[event.layer].popleft()
        self.slots.release_all(slots)
        for slot in leaving:
            if self.slots.state[slot] == RESIDENT and not self.slots.claims[slot]:
                self.slots.free(slot)
        for task in event.observed:
            self.costs.observe(task, link_share)

    def resize(self, n_slots: int) -> tuple[tuple[int, int], ...]:
        """Changes the number of slots between steps; returns the (layer, expert) that lost theirs.

        The last slots go first. Raises SlotError if one of them is in flight or in use.
        """
        gone = self.slots.resize(n_slots)
        self._movement.resized()
        self.cache.resized(self.slots.n_slots)
        if self.cache.tracks_slots:
            for key in gone:
                self.cache.evicted(key)
        self._balance = self._balance_of_layers()
        return tuple(divmod(key, self.n_experts) for key in gone)

    def explain(self, plan: LayerPlan) -> Explanation:
        """Why the latest plan of a layer is as it is. Raises DemandError for an older plan."""
        found = self._demands.get(plan.layer)
        if found is None or plan.step != self._step:
            raise DemandError(f"only plans of the current step can be explained, found step {plan.step}")
        return explain(plan, found[0], found[1], self.costs, self.slots)


def _check_placements(placements: Sequence[Placement] | None, n_layers: int) -> tuple[Placement, ...]:
    everywhere: Placement = "hybrid"
    given = (everywhere,) * n_layers if placements is None else tuple(placements)
    if len(given) != n_layers or any(p not in ("hybrid", "cpu", "accelerator") for p in given):
        raise PolicyError(f"placements: expected {n_layers} of hybrid, cpu, accelerator, found {given}")
    return given


def _int32(array: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """A contiguous writable int32 array: the one type that the compiled decision knows."""
    if array.dtype == np.int32 and array.flags.carray:
        return array
    return np.array(array, np.int32)
