"""Does a policy keep the contract? Many small planners of it live through prefill and decode, every plan is looked at.

Behind `hybrimoe policy check`. The walk is over a made-up model of 4 layers with 8 experts, with no slot, few, and one
for every expert, with and without predictions, with late transfers, a second sequence, and fewer slots on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.extensions.policies import NamedPolicy
from scheduler.demand import LayerDemand, Phase, Prediction
from scheduler.errors import PolicyError, SchedulerError
from scheduler.future import Future
from scheduler.graph import GraphError, PlannedLayer, TaskGraph
from scheduler.machine.costs import CostModel
from scheduler.plan import LaneState, LayerEnded, LayerPlan, Transfer, TransferEnded
from scheduler.planner.planner import Planner

LAYERS, EXPERTS, TOP_K = 4, 8, 2
SLOTS = (0, 1, 6, 13, LAYERS * EXPERTS)
TOKENS = (9, 1, 1, 1, 5, 1, 1, 1)
"""Tokens of each step: a prompt and its reply, then another."""
NEW_SEQUENCE = 4
SEEDS = (0, 1)
EXPERT_BYTES = 1
LATE_TRANSFER_US = 40.0


class ContractError(PolicyError):
    """A policy breaks the contract; the message names the policy, the step, the rule and the plan."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Checked:
    """What was looked at of a policy that keeps the contract. ``decision_us``: median time of a layer's decision."""

    name: str
    planners: int
    plans: int
    transfers: int
    prefetches: int
    decision_us: float


def check_policy(policy: NamedPolicy) -> Checked:
    """Raises ContractError for the first plan that breaks a rule, and for what the policy itself raises."""
    walks = [_Walk(policy, n_slots, seed) for n_slots in SLOTS for seed in SEEDS]
    for walk in walks:
        plans = _run(walk)
        again = _run(_Walk(policy, walk.n_slots, walk.seed))
        for first, second in zip(plans, again, strict=True):
            if first != second:
                raise ContractError(
                    f"policy {policy.text}, {walk.n_slots} slots, step {first.step}, layer {first.layer}: the same "
                    f"calls gave two plans; take a generator with a fixed seed. First {first}, then {second}"
                )
    times = [us for walk in walks for us in walk.decision_us]
    return Checked(
        policy.text, 2 * len(walks), sum(len(walk.plans) for walk in walks),
        sum(len(plan.transfers) for walk in walks for plan in walk.plans),
        sum(len(plan.prefetches) for walk in walks for plan in walk.plans), median(times),
    )  # fmt: skip


def _run(walk: _Walk) -> list[LayerPlan]:
    try:
        return walk.run()
    except ContractError:
        raise
    except PolicyError as error:  # found by the guard around extensions
        raise ContractError(str(error)) from error


class _Walk:
    """One planner of the policy through all steps; every plan is checked when it is made."""

    def __init__(self, policy: NamedPolicy, n_slots: int, seed: int) -> None:
        self.policy, self.n_slots, self.seed = policy, n_slots, seed
        self.rng = np.random.default_rng(seed)
        self.routes = [
            np.argsort(self.rng.random((n, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.int64) for n in TOKENS
        ]
        self.costs = CostModel.uniform(LAYERS, cpu_us=100.0, accel_us=10.0, transfer_us=60.0, dense_us=50.0)
        self.planner = Planner(
            LAYERS, EXPERTS, n_slots, self.costs, policy.name, 3,
            future=Future(self.routes, LAYERS, EXPERTS), **policy.params,
        )  # fmt: skip
        self.plans: list[LayerPlan] = []
        self.decision_us: list[float] = []
        self._under_way: list[Transfer] = []

    def run(self) -> list[LayerPlan]:
        frequencies = self.rng.random((LAYERS, EXPERTS))
        self._land(list(self.planner.warm_up(frequencies if self.seed else None)))
        self.planner.begin_sequence()
        for step, route in enumerate(self.routes):
            if step == NEW_SEQUENCE:
                self._settle()
                if self.n_slots > 1:
                    self.planner.resize(self.n_slots - 1)
                self.planner.begin_sequence(Future(self.routes[step:], LAYERS, EXPERTS))
            self.planner.begin_step("prefill" if len(route) > 1 else "decode", len(route))
            for demand in self._demands(route):
                self._layer(step, demand)
        return self.plans

    def _demands(self, route: npt.NDArray[np.int64]) -> Iterator[LayerDemand]:
        """Every layer's demand; predictions for all later layers with an odd seed, none else."""
        phase: Phase = "prefill" if len(route) > 1 else "decode"
        counts = [np.bincount(route[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
        for layer in range(LAYERS):
            ids = np.flatnonzero(counts[layer]).astype(np.int32)
            scores = (counts[layer] / counts[layer].sum()).astype(np.float32)
            ahead = tuple(_prediction(later, counts[later]) for later in range(layer + 1, LAYERS)) if self.seed else ()
            yield LayerDemand(layer, phase, len(route), ids, counts[layer][ids].astype(np.int32), scores, ahead)

    def _layer(self, step: int, demand: LayerDemand) -> None:
        before = _arrays(demand)
        resident = {} if self.n_slots == 0 else self.planner.contents()
        lanes = LaneState(0.0, 5.0, LATE_TRANSFER_US * len(self._under_way))
        began = perf_counter()
        plan = self.planner.plan_layer(demand, lanes)
        self.decision_us.append((perf_counter() - began) * 1e6)
        self.plans.append(plan)
        where = f"policy {self.policy.text}, {self.n_slots} slots, step {step} ({demand.phase}), layer {demand.layer}"
        for name, array in _arrays(demand).items():
            if not np.array_equal(array, before[name]):
                raise ContractError(f"{where}: the policy changed the demand's {name}; copy what is to be changed")
        self._check(where, plan, demand, resident)
        self._under_way += [*plan.transfers, *plan.prefetches]
        keep_back = 0 if plan.transfers or plan.awaited else int(self.rng.integers(0, 2))
        self._land(self._under_way[: len(self._under_way) - keep_back])
        self._under_way = self._under_way[len(self._under_way) - keep_back :]
        self.planner.on_event(LayerEnded(demand.layer))

    def _check(self, where: str, plan: LayerPlan, demand: LayerDemand, resident: Mapping[int, tuple[int, int]]) -> None:
        try:
            graph = TaskGraph.from_plans([PlannedLayer(plan, demand)], self.costs, EXPERT_BYTES)
            graph.validate(self.planner.slots.n_slots, resident)
            self.planner.slots.validate()
        except (GraphError, SchedulerError) as error:
            raise ContractError(f"{where}: {error}; the plan: {plan}") from error

    def _settle(self) -> None:
        self._land(self._under_way)
        self._under_way = []

    def _land(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            self.planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))


def _prediction(layer: int, counts: npt.NDArray[np.int64]) -> Prediction:
    ids = np.flatnonzero(counts).astype(np.int32)
    share = (counts[ids] / counts.sum()).astype(np.float32)
    return Prediction(layer, ids, counts[ids].astype(np.float32), share)


def _arrays(demand: LayerDemand) -> dict[str, npt.NDArray[Any]]:
    """Copies of everything that a policy could write to."""
    found: dict[str, npt.NDArray[Any]] = {
        "expert_ids": demand.expert_ids.copy(), "n_tokens": demand.n_tokens.copy(),
        "gate_scores": demand.gate_scores.copy(),
    }  # fmt: skip
    for ahead in demand.predictions:
        found[f"prediction of layer {ahead.layer}"] = ahead.scores.copy()
    return found
