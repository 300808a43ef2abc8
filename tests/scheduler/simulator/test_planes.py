"""Bit planes on the simulated link: what crosses it, in which order, how long it takes, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scheduler.lossy import resolve_lossy
from scheduler.machine.costs import CostModel
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LayerPlan, Transfer, TransferEnded
from scheduler.simulator.engine import SimulationError
from scheduler.simulator.planes import HIGH_SHARE, PlaneEngine, planes
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig
from scheduler.traces.synthetic import generate
from scheduler.traces.trace import Trace

from .test_simulate import demand

SHAPE = ModelShape(name="toy", n_layers=3, n_experts=8, top_k=4, hidden=256, inter=512, attention_params=262144)
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy", "provenance": "datasheet",
        "cpu": {"read_gbps": 2.0, "gflops": {"int4": 200.0, "bfloat16": 200.0}},
        "accel": {"mem_gbps": 400.0, "tflops": 20.0, "launch_us": 1.0},
        "link": {"gbps": 4.0, "latency_us": 1.0},
    }
)  # fmt: skip
BYTES = SHAPE.expert_bytes("int4")
HIGH, LOW = planes(PROFILE, BYTES)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(3, 8, 4, 42, 3, n_prefill=12, seed=0)


def engine(wanted: list[int]) -> PlaneEngine:
    made = PlaneEngine(CostModel(PROFILE, SHAPE, "int4"), BYTES, keep_records=True, high=HIGH, low=LOW, n_experts=8)
    made.wanted = np.isin(np.arange(8), wanted)
    return made


def move(expert: int, slot: int, kind: Any = "demand", layer: int = 0) -> Transfer:
    return Transfer(layer, expert, slot, None, kind, 1.0, True)


def copies(run: PlaneEngine) -> list[tuple[int, int]]:
    """(expert, bytes) in link order."""
    return [(r.expert, r.bytes) for r in run.records if r.lane == "link"]


def test_the_planes_are_the_record_and_the_high_one_has_the_scales() -> None:
    assert HIGH.n_bytes + LOW.n_bytes == BYTES
    assert HIGH.n_bytes == round(BYTES * 2.5 / 4.5) == round(BYTES * HIGH_SHARE)
    assert HIGH.us == pytest.approx(1.0 + HIGH.n_bytes / 4e3 + 1.0 + (HIGH.n_bytes + BYTES) / 4e5)
    assert LOW.us == pytest.approx(1.0 + LOW.n_bytes / 4e3 + 1.0 + (LOW.n_bytes + 2 * BYTES) / 4e5)


def test_low_bits_cross_only_for_what_is_wanted_now() -> None:
    run = engine(wanted=[1])
    plan = LayerPlan(0, 0, (), (1, 2), (0, 1), (move(1, 0), move(2, 1)), (move(5, 2, "prefetch", 1),), 1.0)
    run.run_layer(plan, demand(0, [1, 2]), 0.0)
    run.dense("attention", 0, 1, 1e4, 0)
    assert copies(run) == [(1, BYTES), (2, HIGH.n_bytes), (5, HIGH.n_bytes)]
    assert run.busy.link_bytes == BYTES + 2 * HIGH.n_bytes
    assert run.busy.link == pytest.approx(HIGH.us + LOW.us + 2 * HIGH.us)
    assert run.take_rough() == [2]
    assert [(event.layer, event.expert) for event in run.take_ended()] == [(0, 1), (0, 2), (1, 5)]


def test_a_rough_resident_gets_its_low_bits_before_it_is_computed_once_it_is_wanted() -> None:
    run = engine(wanted=[])
    run.run_layer(LayerPlan(0, 0, (), (3,), (0,), (move(3, 0),), (), 1.0), demand(0, [3]), 0.0)
    assert run.take_rough() == [3]
    run.take_ended()
    run.wanted = np.isin(np.arange(8), [3])
    again = LayerPlan(1, 0, (), (3,), (0,), (), (move(6, 1, "prefetch", 1),), 1.0)
    run.run_layer(again, demand(0, [3]), 0.0)
    (low,) = (r for r in run.records if r.lane == "link" and r.bytes == LOW.n_bytes)
    compute = [r for r in run.records if r.kind == "accel_expert"][-1]
    assert low.expert == 3
    assert compute.start_us >= low.end_us
    assert run.take_rough() == []
    run.dense("attention", 0, 1, 1e4, 1)
    assert run.take_ended() == [TransferEnded(1, 6, 1, pytest.approx(HIGH.us))], "the low bits are no event"
    run.run_layer(replace(again, step=2, prefetches=()), demand(0, [3]), 0.0)
    assert sum(r.bytes == LOW.n_bytes for r in run.records if r.lane == "link") == 1, "whole from then on"


def test_low_bits_come_before_the_transfer_that_rewrites_their_slot() -> None:
    run = engine(wanted=[])
    run.run_layer(LayerPlan(0, 0, (), (1,), (0,), (move(1, 0),), (), 1.0), demand(0, [1]), 0.0)
    run.wanted = None
    handed_on = replace(move(2, 0), evicts=(0, 1))
    plan = LayerPlan(1, 0, (), (1, 2), (0, 0), (handed_on,), (), 1.0)
    run.run_layer(plan, demand(0, [1, 2]), 0.0)
    assert copies(run) == [(1, HIGH.n_bytes), (1, LOW.n_bytes), (2, BYTES)]
    starts = {r.expert: r.start_us for r in run.records if r.kind == "accel_expert" and r.step == 1}
    assert starts[1] < starts[2]


def run_trace(trace: Trace, lossy: Any, **settings: Any) -> list[Any]:
    config = SimulationConfig(expert_dtype="int4", lossy=resolve_lossy(lossy), **settings)
    return simulate(trace, PROFILE, SHAPE, config)


@pytest.mark.parametrize("policy", ["ours", "on_demand/none/lru", "hybrimoe"])
def test_d2moe_is_simulated_and_moves_less(trace: Trace, policy: str) -> None:
    plain, d2moe, again = (run_trace(trace, kind, policy=policy)[1] for kind in (None, "d2moe", "d2moe"))
    assert d2moe == again
    assert plain.link_bytes == (plain.transfers + plain.prefetches) * BYTES
    assert 0.0 < d2moe.changed < 1.0
    moved = d2moe.transfers + d2moe.prefetches
    assert moved * HIGH.n_bytes < d2moe.link_bytes
    if policy == "on_demand/none/lru":  # the same transfers, with fewer bytes
        assert moved == plain.transfers
        assert d2moe.link_bytes < plain.link_bytes
        assert d2moe.latency_ms < plain.latency_ms


def test_full_bits_for_all_change_nothing_but_the_second_copy(trace: Trace) -> None:
    """Without prefetches every transfer brings both planes: two latencies and two launches in place of one copy."""
    plain, whole = (
        run_trace(trace, kind, policy="on_demand/none/lru")[1] for kind in (None, {"kind": "d2moe", "full_share": 0.0})
    )
    assert whole.changed == 0.0
    assert whole.link_bytes == plain.link_bytes
    assert whole.latency_ms > plain.latency_ms


def test_other_dtypes_have_no_planes(trace: Trace) -> None:
    with pytest.raises(SimulationError, match=r"bit planes need int4 experts, found bfloat16.*--expert-dtype int4"):
        simulate(trace, PROFILE, SHAPE, SimulationConfig(expert_dtype="bfloat16", lossy=resolve_lossy("d2moe")))
