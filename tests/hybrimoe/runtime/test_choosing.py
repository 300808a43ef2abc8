"""Calls that a card has sent, read and decided in one compiled call: the plans are those of the planner's parts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe.bench.overhead import Call, Request, SentContender
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.runtime import Session
from hybrimoe.runtime.layer_call import lanes
from scheduler import LaneState, LayerPlan, Planner

N_LAYERS, N_STEPS = 6, 60
USUAL, FEW_SLOTS = 0.25, 0.011
"""Shares of the experts that have a slot; the smaller one is two slots, beside a CPU that takes long."""
CPU_LANE_US = 200
"""What the CPU lane is told that a call took: where this machine is fast or busy, moving an expert may not pay."""
TOLD = ("begin_sequence", "begin_step", "end_transfer", "end_layer", "observe")


class Twins:
    """The planner of a session, and one that lives through the same in parts, by what it is told beside the first."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        planner, accelerator, runner = session.planner, session.accelerators[0], session._runner
        assert isinstance(planner, Planner)
        assert runner is not None
        at_once = runner.at_once
        assert at_once is not None
        self.planner, self.parts = planner, copy.deepcopy(planner)
        self.parts.desk = None
        self.plans: list[tuple[LayerPlan, LayerPlan]] = []
        self.lanes = LaneState()
        self.waits: list[tuple[set[int], set[int]]] = []
        """Of each launch: the slots that it waited for, and those into which its experts were being copied."""
        self._asked: LayerPlan | None = None
        self._awaited: set[int] | None = None
        self._telling = False
        for name in TOLD:
            monkeypatch.setattr(planner, name, self._both(name))
        own, chosen, told = at_once.read_and_choose, planner.chosen, planner.end_layer

        def read_and_choose(*args: Any) -> Any:
            self.lanes = LaneState(*args[-3:])
            return own(*args)

        def ask_parts(demand: Any, *answers: Any) -> Any:
            self._asked = self.parts.plan_layer(demand.frozen(), self.lanes)
            return chosen(demand, *answers)

        def compare(layer: int, observed: Any = ()) -> None:
            assert self._asked is not None
            demand = planner._demands[layer]
            assert demand is not None
            plan = planner._plan.plan(demand)
            self.plans.append((plan, self._asked))
            if self._awaited is not None:
                late = {*plan.awaited, *(transfer.expert for transfer in plan.transfers)}
                slots = {slot for expert, slot in zip(plan.accel, plan.accel_slots, strict=True) if expert in late}
                self.waits.append((self._awaited, slots))
            self._awaited = None
            told(layer, observed)

        launch = accelerator.launch  # type: ignore[attr-defined]

        def launched(replay: Any, awaited: Any, **options: Any) -> Any:
            self._awaited = set(awaited)
            return launch(replay, awaited, **options)

        monkeypatch.setattr(accelerator, "launch", launched)
        monkeypatch.setattr(at_once, "read_and_choose", read_and_choose)
        monkeypatch.setattr(planner, "chosen", ask_parts)
        monkeypatch.setattr(planner, "end_layer", compare)

    def _both(self, name: str) -> Any:
        own, other = getattr(self.planner, name), getattr(self.parts, name)

        def both(*args: Any) -> Any:
            if self._telling:
                return own(*args)  # the first planner tells itself, and so will the other
            self._telling = True
            try:
                return own(*args), other(*args)
            finally:
                self._telling = False

        return both


def recorded_steps(contender: SentContender) -> list[list[Call]]:
    """Decode steps with the routing of the demo model's recorded trace."""
    with np.load(str(files("hybrimoe.tracing") / "data" / "demo.npz")) as trace:
        ids, weights = (trace[name][trace["phase"] == 1] for name in ("expert_ids", "expert_weights"))
    hidden = contender.calls(1)[0][0][0]
    steps = []
    for step in range(N_STEPS):
        calls: list[Call] = []
        for layer in range(N_LAYERS):
            at = step, layer % ids.shape[1]
            routed = torch.from_numpy(ids[at].astype(np.int64)), torch.from_numpy(weights[at].astype(np.float32))
            calls.append((hidden, routed[0][None], routed[1][None]))
        steps.append(calls)
    return steps


@pytest.fixture
def contender(
    request: pytest.FixtureRequest, small_shape: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SentContender]:
    with np.load(str(files("hybrimoe.tracing") / "data" / "demo.npz")) as trace:
        n_experts, top_k = int(trace["expert_ids"].max()) + 1, trace["expert_ids"].shape[2]
    shape = small_shape(num_hidden_layers=N_LAYERS, num_experts=n_experts, num_experts_per_tok=top_k)
    slots = getattr(request, "param", USUAL)
    if slots == FEW_SLOTS:
        known = open_hardware("h100")
        slow = replace(known, cpu=replace(known.cpu, read_gbps=1e-2, gflops=dict.fromkeys(known.cpu.gflops, 1e-2)))
        monkeypatch.setattr(SentContender, "_profile", staticmethod(lambda: slow))
    ticks = itertools.count(0, CPU_LANE_US * 1000)
    monkeypatch.setattr(lanes, "perf_counter_ns", lambda: next(ticks))
    made = SentContender(Request(shape, N_LAYERS, ("ours",), "float32", slots, N_STEPS, 1), "ours")
    yield made
    made.session.close()


@pytest.mark.parametrize("recorded", [True, False])
def test_plans_and_slots_are_those_of_the_parts(
    contender: SentContender, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    contender.run(contender.calls(4))
    planner = contender.session.planner
    assert isinstance(planner, Planner)
    twins = Twins(contender.session, monkeypatch)
    contender.run(recorded_steps(contender) if recorded else contender.calls(N_STEPS))
    assert len(twins.plans) == N_STEPS * N_LAYERS
    for ours, parts in twins.plans:
        assert ours == parts
    assert any(plan.transfers for plan, _ in twins.plans)
    assert any(slots for _, slots in twins.waits)
    for awaited, slots in twins.waits:
        assert awaited == slots, "a launch waits for the copies that its experts need"
    for name in ("slot_of", "key_of", "state", "pins"):
        np.testing.assert_array_equal(getattr(planner.slots, name), getattr(twins.parts.slots, name))
    np.testing.assert_array_equal(planner.costs.drift, twins.parts.costs.drift)


def test_what_a_call_leaves_to_do_is_done_by_whoever_comes_next(contender: SentContender) -> None:
    """A step that ends between the release of a layer and what follows it loses nothing."""
    session, steps = contender.session, contender.calls(6)
    contender.run(steps[:4])
    session.reset_stats()
    contender.prepared(0, steps[4][0])  # sends it
    session.run_sent(contender._sent[0])
    total = session.stats().total
    assert total.calls == 1
    assert total.cpu_experts + total.accel_experts == total.activated > 0
    assert not any(int(pins) for pins in session.planner.slots.pins)  # type: ignore[union-attr]
    session.settle()
    assert session.stats().total.calls == 1


@pytest.mark.parametrize("contender", [FEW_SLOTS], indirect=True)
def test_one_expert_that_takes_over_a_slot_is_decided_in_parts(
    contender: SentContender, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender.run(contender.calls(4))
    planner = contender.session.planner
    assert isinstance(planner, Planner)
    rest, in_parts = planner.decide_rest, []
    monkeypatch.setattr(planner, "decide_rest", lambda *args: in_parts.append(args) or rest(*args))
    contender.session.reset_stats()
    contender.run(contender.calls(N_STEPS))
    assert in_parts
    total = contender.session.stats().total
    assert total.calls == N_STEPS * N_LAYERS
    assert total.cpu_experts + total.accel_experts == total.activated
    contender.check()
