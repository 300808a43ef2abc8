"""Several accelerators: who has which layers, the same plans as one where nothing is shared, lanes, slots, errors."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from scheduler.errors import DemandError, ProfileError
from scheduler.graph import TaskGraph, chrome_trace, gantt
from scheduler.machine.profile import AccelProfile, CpuProfile, DiskProfile, HardwareProfile, LinkProfile, ModelShape
from scheduler.planner.layer_blocks import Block, blocks, layers_of, slots_of
from scheduler.simulator.accelerators import MultiSimulator
from scheduler.simulator.run import simulate, simulator_class
from scheduler.simulator.simulator import SimulationConfig, SimulationError, Simulator
from scheduler.traces.synthetic import generate
from scheduler.traces.trace import Trace

SHAPE = ModelShape("toy", 6, 16, 2, 256, 512, attention_params=100_000, kv_bytes=64)
CPU = CpuProfile(10.0, {"int4": 50.0})
ONE = HardwareProfile("toy", "datasheet", CPU, AccelProfile(100.0, 5.0), LinkProfile(4.0), disk=DiskProfile(1.0))
TWO = replace(ONE, accel=replace(ONE.accel, count=2))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(6, 16, 2, 48, n_prefill=16, locality="olmoe-1b-7b", seed=1)


def simulator(trace: Trace, profile: HardwareProfile, **config: object) -> Simulator:
    found = SimulationConfig(cache_ratio=0.25, **config)  # type: ignore[arg-type]
    return simulator_class(profile, found)(trace, profile, SHAPE, found, keep_records=True)


def test_blocks_of_layers_and_slots() -> None:
    assert blocks(6, 24, 1) == [Block(0, 6, 0, 24)]
    assert blocks(7, 21, 2) == [Block(0, 4, 0, 12), Block(4, 3, 12, 9)]
    assert sum(block.n_slots for block in blocks(5, 13, 3)) == 13
    with pytest.raises(DemandError, match="7 accelerators for 6"):
        blocks(6, 24, 7)


@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "freetoken", "oracle"])
def test_execution_follows_the_graph_on_both_accelerators(trace: Trace, policy: str) -> None:
    run = simulator(trace, TWO, policy=policy)
    assert isinstance(run, MultiSimulator)
    resident = run.resident_slots()
    results = run.run()
    assert [r.phase for r in results] == ["prefill", "decode"]
    graph = TaskGraph.from_plans(run.layers, run.engine.costs, run.engine.expert_bytes)
    graph.validate(run.n_slots, resident)
    lanes = {name for name, order in graph.lane_order.items() if order}
    assert {"accel", "accel:1", "link", "link:1"} <= lanes
    records = [r for r in run.records if r.kind in ("accel_expert", "transfer", "prefetch")]
    assert {(r.lane, r.accelerator) for r in records if r.layer < 3} <= {("accel", 0), ("link", 0)}
    assert {(r.lane, r.accelerator) for r in records if r.layer >= 3} <= {("accel", 1), ("link", 1)}
    for item in run.layers:
        for copy in (*item.plan.transfers, *item.plan.prefetches):
            assert copy.slot // 12 == item.accelerator == (copy.layer >= 3)
            assert copy.evicts is None or (copy.evicts[0] >= 3) == item.accelerator


def test_static_mapping_takes_as_long_as_on_one(trace: Trace) -> None:
    """Nothing moves, so only the layout of the slots differs: with even use of the layers not even that."""
    even = np.tile(np.arange(16.0, 0.0, -1.0), (6, 1))
    config = SimulationConfig(policy="static", cache_ratio=0.25)
    one, two = (simulate(trace, profile, SHAPE, config, frequencies=even) for profile in (ONE, TWO))
    assert [r.latency_ms for r in two] == pytest.approx([r.latency_ms for r in one])
    assert [r.hit_rate for r in two] == pytest.approx([r.hit_rate for r in one])


def test_a_shared_link_is_one_lane(trace: Trace) -> None:
    run = simulator(trace, replace(TWO, link=replace(TWO.link, shared=True)), policy="hybrimoe")
    run.run()
    assert {(r.lane, r.accelerator) for r in run.records if r.lane == "link"} == {("link", 0)}
    assert {r.accelerator for r in run.records if r.lane == "accel"} == {0, 1}
    ends = sorted((r.start_us, r.end_us) for r in run.records if r.lane == "link")
    assert all(after[0] >= before[1] - 1e-6 for before, after in pairwise(ends))


def test_drawings_number_the_lanes(trace: Trace) -> None:
    run = simulator(trace, TWO)
    run.advance_to(2)
    run.step_us(2, explained=True)
    assert {"accel:0", "accel:1"} <= {row.lane for row in gantt(run.records)}
    events = chrome_trace(run.records)["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"accelerator 0", "accelerator 1"} <= names
    threads = [e["tid"] for e in events if e["name"] == "thread_name"]
    assert len(threads) == len(set(threads))


def test_reads_from_disk_are_records(trace: Trace) -> None:
    run = simulator(trace, ONE, host_ratio=0.5)
    run.run()
    reads = [r for r in run.records if r.lane == "disk"]
    assert reads
    assert all(r.kind == "read" and r.bytes == run.engine.expert_bytes for r in reads)
    assert sum(r.duration_us for r in reads) == pytest.approx(run.engine.busy.disk)


def test_bad_profiles() -> None:
    with pytest.raises(ProfileError, match="count must be an integer of at least 1"):
        replace(ONE, accel=replace(ONE.accel, count=0))
    with pytest.raises(ProfileError, match=r"link\.shared"):
        replace(ONE, link=replace(ONE.link, shared=1))  # type: ignore[arg-type]
    many = replace(ONE, accel=replace(ONE.accel, count=9))
    with pytest.raises(DemandError, match="9 accelerators for 6"):
        simulator(generate(6, 16, 2, 4, locality="olmoe-1b-7b"), many)
    with pytest.raises(SimulationError, match="one accelerator only"):
        simulator_class(TWO, SimulationConfig(lossy=object()))  # type: ignore[arg-type]


def test_blocks_by_shares_and_by_experts_that_may_have_slots() -> None:
    assert layers_of([8] * 6, [1.0, 1.0]) == [3, 3]
    assert layers_of([8] * 8, [3.0, 1.0]) == [6, 2], "three times the memory, three times the layers"
    assert layers_of([0, 0, 0, 0, 8, 8], [1.0, 1.0]) == [5, 1], "layers on the CPU count for nothing"
    assert layers_of([8] * 3, [1.0, 0.0, 0.0]) == [1, 1, 1], "each has at least one layer"
    assert layers_of([0] * 3, [0.0, 0.0]) == [1, 2], "no experts and no shares: any cut will do"
    assert layers_of([1] * 9, [1 / 3] * 3) == [3, 3, 3], "rounding of floats moves no layer"
    assert slots_of([8, 8, 8, 8, 0, 8], [4, 2], 10) == [8, 2]
    assert slots_of([0, 0], [1, 1], 4) == [0, 0]
    assert sum(slots_of([7, 5, 3, 9], [1, 1, 2], 11)) == 11
