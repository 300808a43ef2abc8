"""Host memory on the simulated disk: reads, plans that know of them, their end, and what knowing brings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import CostModel, LayerDemand, LayerEnded, Planner, TransferEnded
from scheduler.graph import TaskGraph
from scheduler.host import HostView
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LaneState
from scheduler.simulator.engine import Engine
from scheduler.simulator.host_tier import HostTier
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.predictions import predictions_for
from scheduler.traces.synthetic import generate
from scheduler.traces.trace import Trace

N_LAYERS, N_EXPERTS = 3, 8
NOTHING = np.zeros(N_LAYERS * N_EXPERTS, np.bool_)
SHAPE = ModelShape(
    name="toy", n_layers=N_LAYERS, n_experts=N_EXPERTS, top_k=2, hidden=256, inter=512, attention_params=262144,
    kv_bytes=64,
)  # fmt: skip
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy", "provenance": "datasheet",
        "cpu": {"read_gbps": 10.0, "gflops": {"int4": 200.0, "bfloat16": 100.0}},
        "accel": {"mem_gbps": 400.0, "tflops": 20.0, "launch_us": 3.0},
        "link": {"gbps": 8.0, "latency_us": 4.0},
        "disk": {"gbps": 1.0},
    }
)  # fmt: skip


def demand(layer: int, ids: list[int], loads: list[int] | None = None) -> LayerDemand:
    n_tokens = np.array(loads or [1] * len(ids), np.int32)
    return LayerDemand(
        layer, "decode", int(n_tokens.max()), np.array(ids, np.int32), n_tokens, np.zeros(N_EXPERTS, np.float32)
    )


def test_reads_of_a_call_share_the_disk_the_heaviest_load_first() -> None:
    tier = HostTier(N_LAYERS, N_EXPERTS, 6, read_us=10.0, latency_us=5.0)
    tier.preload([0])
    view = tier.demand(demand(0, [0, 1, 2], [1, 1, 3]), 100.0, NOTHING, ())
    assert view.waits_us.tolist() == [0.0, 25.0, 15.0]
    assert view.reads[:2] == ((0, 2), (0, 1))
    assert [read[:2] for read in tier.take_begun()[:2]] == [(2, 100.0), (1, 115.0)]
    tier.settle(125.0)
    assert tier.held[[0, 1, 2]].all()


def test_a_slot_needs_no_copy_and_what_it_holds_leaves_first() -> None:
    tier = HostTier(N_LAYERS, N_EXPERTS, 2, read_us=10.0)
    tier.preload([0, 1])
    in_slots = NOTHING.copy()
    in_slots[[0, 3]] = True
    view = tier.demand(demand(0, [2, 3]), 0.0, in_slots, ())
    assert view.waits_us.tolist() == [10.0, np.inf]
    assert not tier.held[0]
    assert tier.ready_us(2, 4.0) == 10.0
    assert tier.ready_us(3, 20.0) >= 30.0  # asked for all the same: it is read


def test_memory_is_never_more_than_there_is() -> None:
    rng = np.random.default_rng(0)
    tier, now_us = HostTier(N_LAYERS, N_EXPERTS, 5, read_us=10.0), 0.0
    for _ in range(200):
        for layer in range(N_LAYERS):
            ids = sorted(rng.choice(N_EXPERTS, 3, replace=False).tolist())
            view = tier.demand(demand(layer, ids), now_us, NOTHING, ())
            now_us += float(view.waits_us.max()) + 4.0
            tier.settle(now_us)
            assert tier.held.sum() <= 5
            assert all(tier.held[layer * N_EXPERTS + expert] for expert in ids)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_planned_end_is_the_simulated_one(seed: int) -> None:
    """Without contention the lanes end when the planner said so, read by read. There are slots enough that none is
    handed over within a layer, which plans do not wait for."""
    rng = np.random.default_rng(seed)
    costs = CostModel.uniform(N_LAYERS, 100.0, 20.0, float(rng.choice([10.0, 60.0, 300.0])), read_us=90.0)
    planner = Planner(N_LAYERS, N_EXPERTS, 12, costs, str(rng.choice(["ours", "hybrimoe", "optimal/none/lru"])))
    tier = HostTier(N_LAYERS, N_EXPERTS, 10, read_us=90.0, latency_us=30.0)
    engine = Engine(costs, 1000, host=tier)
    for transfer in planner.warm_up():
        planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
    planner.begin_sequence()
    waited = 0.0
    for _ in range(4):
        planner.begin_step("decode", 1)
        for layer in range(N_LAYERS):
            told = demand(layer, sorted(rng.choice(N_EXPERTS, 3, replace=False).tolist()))
            copying = [at * N_EXPERTS + expert for at, expert in engine.copying()]
            host = tier.demand(told, engine.now_us, planner.slots.slot_of >= 0, copying)
            waited += float(host.waits_us[np.isfinite(host.waits_us)].sum())
            began_us, link_us = engine.now_us, engine.link_ready_us()
            plan = planner.plan_layer(told, LaneState(link_ready_us=link_us), host)
            engine.run_layer(plan, told, 0.0)
            assert engine.now_us - began_us == pytest.approx(plan.predicted_makespan_us)
            for event in engine.take_ended():
                planner.on_event(event)
            planner.on_event(LayerEnded(layer))
    assert waited > 0.0


def test_the_graph_has_the_reads_and_what_waits_for_them() -> None:
    trace = generate(N_LAYERS, N_EXPERTS, 2, 24, 2, n_prefill=8, seed=1)
    run = Simulator(
        trace, PROFILE, SHAPE, SimulationConfig(cache_ratio=0.25, host_ratio=0.4), predictions_for(trace, "recorded"),
        keep_records=True,
    )  # fmt: skip
    before = run.resident_slots()
    run.run()
    graph = TaskGraph.from_plans(run.layers, run.engine.costs, run.engine.expert_bytes)
    graph.validate(run.n_slots, before)
    kinds = {"cpu_expert", "accel_expert", "transfer", "prefetch", "read"}
    graph.check_execution([r for r in run.records if r.kind in kinds], slack_us=1e-6)
    reads = [task for task in graph.tasks if task.kind == "read"]
    assert reads
    assert all(task.lane == "disk" and task.bytes == run.engine.expert_bytes for task in reads)
    kinds_after = {graph.tasks[node].kind for task in reads for node in graph.graph.successors(task.id)}
    assert "cpu_expert" in kinds_after
    waits = [one.wait_us for why in run.explanations for one in why.decisions]
    assert any(wait for wait in waits if wait)


def test_without_a_disk_nothing_is_different() -> None:
    """A planner that is told of a host memory with everything in it plans as one that is told nothing."""
    rng = np.random.default_rng(5)
    costs = CostModel.uniform(N_LAYERS, 100.0, 20.0, 60.0, dense_us=50.0, read_us=500.0)
    both = [Planner(N_LAYERS, N_EXPERTS, 8, costs, "ours") for _ in range(2)]
    for planner in both:
        for transfer in planner.warm_up():
            planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
        planner.begin_sequence()
    for _ in range(20):
        for planner in both:
            planner.begin_step("decode", 1)
        for layer in range(N_LAYERS):
            told = demand(layer, sorted(rng.choice(N_EXPERTS, 3, replace=False).tolist()))
            host = HostView(np.zeros(3), np.ones(N_LAYERS * N_EXPERTS, np.bool_))
            plans = both[0].plan_layer(told), both[1].plan_layer(told, host=host)
            assert plans[0] == plans[1]
            for planner in both:
                for transfer in (*plans[0].transfers, *plans[0].prefetches):
                    planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
                planner.on_event(LayerEnded(layer))


def gains(trace: Trace, profile: HardwareProfile, shape: ModelShape, host_ratio: float) -> tuple[float, float]:
    """ms a decode token of policy ours, told of the disk and not."""
    config = SimulationConfig(cache_ratio=0.25, host_ratio=host_ratio)
    known = expert_frequencies(trace)
    knowing, blind = (
        simulate(trace, profile, shape, one, frequencies=known, phase="decode")[-1].latency_ms
        for one in (config, replace(config, disk_blind=True))
    )
    return knowing, blind


@pytest.mark.parametrize("host_ratio", [0.25, 0.5, 0.75])
def test_knowing_the_price_of_a_read_is_faster(host_ratio: float) -> None:
    trace = generate(N_LAYERS, N_EXPERTS, 2, 160, 1, locality="olmoe-1b-7b", seed=3)
    knowing, blind = gains(trace, PROFILE, SHAPE, host_ratio)
    assert knowing <= blind


def test_knowing_is_faster_on_recorded_routing(real_traces: Path) -> None:
    from hybrimoe.machine.profiles import open_hardware, open_shape

    trace = Trace.load(real_traces / "gpt-oss-20b.decode.npz").head(60)
    knowing, blind = gains(trace, open_hardware("laptop"), open_shape("gpt-oss-20b"), 0.5)
    assert knowing < blind
