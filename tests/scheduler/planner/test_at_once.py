"""The decision in one compiled call against the same decision piece by piece: plans, slots, story and forecast."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler import CostModel, LaneState, LayerDemand, LayerEnded, ObservedTask, Planner, Transfer, TransferEnded
from scheduler.demand import Prediction
from scheduler.errors import SchedulerError
from scheduler.planner.open_plans import FIRST_DEPTH

N_LAYERS, N_EXPERTS = 4, 12


class Twin:
    """Two planners of policy ``ours``, one of which decides piece by piece, living through the same steps."""

    def __init__(self, seed: int, n_slots: int, top_k: int, *, fixed: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.top_k = top_k
        transfer_us = float(self.random.choice([0.0, 15.0, 60.0, 300.0]))
        certainty = float(self.random.choice([0.1, 0.65]))
        placements = ["hybrid", "cpu" if fixed else "hybrid", "hybrid", "hybrid"]
        self.both = [
            Planner(
                N_LAYERS, N_EXPERTS, n_slots, CostModel.uniform(N_LAYERS, 100.0, 10.0, transfer_us, dense_us=40.0),
                "ours", placements=placements, first_layer=2, first_slot=5,  # type: ignore[arg-type]
                certainty=certainty,
            )
            for _ in range(2)
        ]  # fmt: skip
        self.both[1].desk = None
        self.under_way: list[Transfer] = []
        self.told("begin_sequence")
        self.land(self.told("warm_up"))

    def told(self, name: str, *values: object) -> Any:
        """Calls both; their answers are the same. Returns the first one's."""
        ours, parts = (getattr(planner, name)(*values) for planner in self.both)
        assert ours == parts
        return ours

    def land(self, transfers: Sequence[Transfer]) -> None:
        """Transfers have ended."""
        for transfer in transfers:
            self.told("on_event", TransferEnded(transfer.layer, transfer.expert, transfer.slot, 20.0))

    def step(self, n_tokens: int) -> None:
        """One step of all layers; transfers end whenever the random generator says so, in link order."""
        random = self.random
        self.told("begin_step", "prefill" if n_tokens > 4 else "decode", n_tokens)
        for layer in range(N_LAYERS):
            active = np.sort(random.choice(N_EXPERTS, self.top_k, replace=False)).astype(np.int32)
            loads = random.integers(1, n_tokens + 1, active.size).astype(np.int32)
            scores = random.random(N_EXPERTS).astype(np.float32)
            ahead = tuple(
                Prediction(later, active, loads.astype(np.float32), random.random(active.size).astype(np.float32))
                for later in range(layer + 1, N_LAYERS)
            )
            demand = LayerDemand(layer, "decode", n_tokens, active, loads, scores, ahead)
            lanes = LaneState(*(random.choice([0.0, 35.0, 150.0], 3).tolist()))
            plan = self.told("plan_layer", demand, lanes)
            self.compare()
            self.under_way += [*plan.transfers, *plan.prefetches]
            n_ended = int(random.integers(0, len(self.under_way) + 1))
            self.land(self.under_way[:n_ended])
            del self.under_way[:n_ended]
            self.told("on_event", LayerEnded(layer + 2, (ObservedTask("cpu", layer + 2, 1, 120.0),)))
        self.compare_stories()

    def compare(self) -> None:
        """Everything that later decisions depend on is the same, to the last bit."""
        ours, parts = self.both
        for name in ("slot_of", "key_of", "state", "pins"):
            np.testing.assert_array_equal(getattr(ours.slots, name), getattr(parts.slots, name))
        np.testing.assert_array_equal(ours.cache.keep, parts.cache.keep)
        for name in ("odds", "far", "blends", "next_token", "same_token"):
            use, other = ours.cache.model.use, parts.cache.model.use  # type: ignore[attr-defined]
            np.testing.assert_array_equal(getattr(use, name), getattr(other, name))
        np.testing.assert_array_equal(ours.costs.drift, parts.costs.drift)

    def compare_stories(self) -> None:
        """What errors would tell of each slot is the same."""
        ours, parts = self.both
        for slot in range(ours.slots.n_slots):
            assert ours.slots.story(slot) == parts.slots.story(slot)


@settings(max_examples=60, deadline=None)
@example(seed=2, n_slots=1, top_k=1, fixed=False)
@example(seed=2, n_slots=1, top_k=1, fixed=True)
@given(st.integers(0, 10**6), st.integers(0, N_LAYERS * N_EXPERTS), st.sampled_from([1, 3, 6]), st.booleans())
def test_one_call_decides_as_its_parts_do(seed: int, n_slots: int, top_k: int, fixed: bool) -> None:
    twin = Twin(seed, n_slots, top_k, fixed=fixed)
    for n_tokens in (6, 1, 1, 2, 1, 4, 1, 6, 1, 1):
        twin.step(n_tokens)
    if n_slots > 2 and not twin.under_way:
        twin.told("resize", n_slots - 1)
        twin.step(1)


def test_the_one_call_is_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps of known layers do not go through the parts."""
    twin = Twin(0, 16, 3, fixed=False)
    twin.step(1)
    monkeypatch.setattr(type(twin.both[0]), "_decide_in_parts", None)
    twin.both[1] = twin.both[0]
    twin.random = np.random.default_rng(1)
    demand = LayerDemand(0, "decode", 1, np.arange(3, dtype=np.int32), np.ones(3, np.int32), np.zeros(12, np.float32))
    assert len(twin.both[0].plan_layer(demand).cpu) + len(twin.both[0].plan_layer(demand).accel) == 3


def test_more_plans_of_a_layer_are_open_than_there_was_room_for() -> None:
    """Each is ended once, oldest first, and then there is none."""
    twin = Twin(3, 16, 3, fixed=False)
    twin.step(1)
    twin.land(twin.under_way)
    n_plans, random = 3 * FIRST_DEPTH, np.random.default_rng(2)
    for _ in range(n_plans):
        twin.told("begin_step", "decode", 1)
        active = np.sort(random.choice(N_EXPERTS, 3, replace=False)).astype(np.int32)
        demand = LayerDemand(0, "decode", 1, active, np.ones(3, np.int32), np.zeros(N_EXPERTS, np.float32))
        plan = twin.told("plan_layer", demand, LaneState())
        twin.land([*plan.transfers, *plan.prefetches])
        twin.compare()
    assert twin.both[0].slots.pins.sum() > 0
    for _ in range(n_plans):
        twin.told("on_event", LayerEnded(2))
        twin.compare()
    assert twin.both[0].slots.pins.sum() == 0
    with pytest.raises(SchedulerError, match="no plan of it is open"):
        twin.both[0].on_event(LayerEnded(2))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]))
def test_predictions_that_are_said_not_to_be_read_change_nothing(seed: int, n_away: int) -> None:
    """A transfer that takes as long as `n_away` layers: the prediction for the layer so far ahead is the one read."""
    costs = CostModel.uniform(N_LAYERS, 100.0, 10.0, 90.0 * n_away)
    told_all, told_some = (Planner(N_LAYERS, N_EXPERTS, 12, costs, "ours", certainty=0.1) for _ in range(2))
    assert (told_all.layers_skipped, told_all.layers_ahead) == (n_away - 1, n_away)
    random, plans = np.random.default_rng(seed), []
    for _ in range(4):
        for planner in (told_all, told_some):
            planner.begin_step("decode", 1)
        for layer in range(N_LAYERS):
            active = np.sort(random.choice(N_EXPERTS, 3, replace=False)).astype(np.int32)
            ones, scores = np.ones(3, np.int32), random.random(3).astype(np.float32)
            ahead = tuple(Prediction(at, active, ones.astype(np.float32), scores) for at in range(layer + 1, N_LAYERS))
            for planner, known in ((told_all, ahead), (told_some, ahead[n_away - 1 : n_away])):
                demand = LayerDemand(layer, "decode", 1, active, ones, np.zeros(N_EXPERTS, np.float32), known)
                plan = planner.plan_layer(demand)
                plans.append(plan)
                for transfer in (*plan.transfers, *plan.prefetches):
                    planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
                planner.on_event(LayerEnded(layer))
            assert plans[-1] == plans[-2]


def test_a_desk_is_not_copied_to_decide_on_the_arrays_of_another_planner() -> None:
    planner = Planner(N_LAYERS, N_EXPERTS, 12, CostModel.uniform(N_LAYERS), "ours")
    with pytest.raises(SchedulerError, match="make a new one"):
        copy.deepcopy(planner.desk)
