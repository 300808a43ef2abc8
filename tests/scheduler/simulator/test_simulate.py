"""The simulator: hand-computed times, conservation, agreement with the task graph, determinism, bad input."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.demand import LayerDemand
from scheduler.errors import SchedulerError
from scheduler.graph import TaskGraph
from scheduler.machine.costs import CostModel
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LayerPlan, Transfer
from scheduler.simulator.dense import DenseCosts
from scheduler.simulator.engine import Engine, SimulationError
from scheduler.simulator.lanes import run_lanes, run_link
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.predictions import predictions_for
from scheduler.traces.synthetic import generate

SHAPE = ModelShape(
    name="toy", n_layers=3, n_experts=8, top_k=2, hidden=256, inter=512, attention_params=262144, kv_bytes=64
)
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy", "provenance": "datasheet",
        "cpu": {"read_gbps": 10.0, "gflops": {"int4": 200.0, "bfloat16": 100.0}},
        "accel": {"mem_gbps": 400.0, "tflops": 20.0, "launch_us": 3.0},
        "link": {"gbps": 8.0, "latency_us": 4.0},
        "disk": {"gbps": 2.0},
    }
)  # fmt: skip


def demand(layer, experts, tokens=1):
    ids = np.array(experts, np.int32)
    return LayerDemand(layer, "decode", tokens, ids, np.full(ids.size, tokens, np.int32), np.zeros(8, np.float32))


def plan(cpu=(), accel=(), slots=(), transfers=(), prefetches=()):
    return LayerPlan(0, 0, tuple(cpu), tuple(accel), tuple(slots), tuple(transfers), tuple(prefetches), 0.0)


def transfer(expert, slot, evicts=None, layer=0):
    return Transfer(layer, expert, slot, evicts, "demand", 0.0, True)


def engine(**contention):
    costs = CostModel.uniform(3, cpu_us=100.0, accel_us=20.0, transfer_us=60.0)
    for name, value in contention.items():
        setattr(costs, name, value)
    return Engine(costs, expert_bytes=1000, keep_records=True)


def test_paper_figure_5_by_hand():
    """g = 1 for any load, c = load, t = 3; CPU runs A B E (1 each), accelerator D (resident) then C (transferred)."""
    no, where = np.full(2, -1, np.int64), np.full(3, 0.0)
    times = [np.full(3, -1.0), np.full(3, -1.0), np.full(2, -1.0), np.full(2, -1.0), np.full(1, -1.0), np.full(1, -1.0)]
    wait = np.array([-1, 0], np.int64)
    end = run_lanes(
        0.0, np.ones(3), where, np.ones(2), wait, 0.0, np.array([3.0]), no[:1], np.zeros(1), 1.0, 1.0, *times
    )
    assert end == pytest.approx(4.0)
    assert times[1].tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert times[2].tolist() == pytest.approx([0.0, 3.0])


def test_three_lanes_run_at_once():
    ran = engine()
    ran.run_layer(
        plan(cpu=[0, 1], accel=[2, 3], slots=[0, 1], transfers=[transfer(3, 1)]), demand(0, [0, 1, 2, 3]), 5.0
    )
    assert ran.now_us == pytest.approx(200.0)
    starts = {(r.kind, r.expert): (r.start_us, r.end_us) for r in ran.records}
    assert starts["accel_expert", 2] == pytest.approx((5.0, 25.0))
    assert starts["transfer", 3] == pytest.approx((0.0, 60.0))
    assert starts["accel_expert", 3] == pytest.approx((60.0, 80.0))
    assert (ran.busy.cpu, ran.busy.accel, ran.busy.link) == pytest.approx((200.0, 45.0, 60.0))
    (event,) = ran.take_ended()
    assert (event.expert, event.slot, event.us) == (3, 1, pytest.approx(60.0))
    assert ran.take_ended() == []


def test_slot_reuse_waits_for_the_reader():
    ran = engine()
    ran.run_layer(plan(accel=[0, 1], slots=[0, 0], transfers=[transfer(1, 0, (0, 0))]), demand(0, [0, 1]), 0.0)
    times = {(r.kind, r.expert): r.start_us for r in ran.records}
    assert times["transfer", 1] == pytest.approx(20.0)
    assert ran.now_us == pytest.approx(100.0)


def test_prefetch_goes_on_through_dense_work_and_is_awaited():
    ran = engine()
    ran.run_layer(
        plan(cpu=[0], prefetches=[replace(transfer(5, 2, layer=1), kind="prefetch")] * 2), demand(0, [0]), 0.0
    )
    assert ran.link_ready_us() == pytest.approx(20.0)
    assert len(ran.take_ended()) == 1
    ran.dense("attention", 1, 1, 15.0, 0)
    assert ran.link_ready_us() == pytest.approx(5.0)
    second = LayerPlan(0, 1, (), (5,), (2,), (), (), 0.0, awaited=(5,))
    ran.run_layer(second, demand(1, [5]), 0.0)
    assert ran.now_us == pytest.approx(100.0 + 20.0 + 20.0)


def test_contention_slows_both_lanes_while_both_run():
    ran = engine(cpu_with_link=0.5, link_with_cpu=0.75)
    ran.run_layer(plan(cpu=[0], prefetches=[transfer(5, 2, layer=1)]), demand(0, [0]), 0.0)
    # the link needs 80 at three quarters of its rate; the CPU does 40 of its 100 meanwhile: 80 + 60
    assert ran.now_us == pytest.approx(140.0)
    assert ran.busy.link == pytest.approx(80.0)


def test_circular_waiting_is_an_error():
    ran = engine()
    bad = plan(accel=[1, 0], slots=[0, 0], transfers=[transfer(1, 0, (0, 0))])
    with pytest.raises(SimulationError, match="wait for each other"):
        ran.run_layer(bad, demand(0, [0, 1]), 0.0)


def test_link_alone():
    left, start, end = np.array([30.0, 50.0]), np.full(2, -1.0), np.full(2, -1.0)
    run_link(10.0, 70.0, left, np.zeros(2), start, end)
    assert left.tolist() == pytest.approx([0.0, 20.0])
    assert end.tolist() == pytest.approx([40.0, -1.0])


@pytest.fixture(scope="module")
def trace():
    return generate(3, 8, 2, 24, 2, n_prefill=8, seed=1)


def run(trace, policy="ours", ratio=0.5, predict="recorded", **fields):
    return Simulator(
        trace, PROFILE, SHAPE, SimulationConfig(policy=policy, cache_ratio=ratio, **fields), predictions_for(trace,
        predict), keep_records=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "policy", ["static", "hybrimoe", "freetoken", "fiddler", "llama_cpp", "adapmoe", "ours", "oracle"]
)
def test_every_run_is_a_linear_extension_of_its_plans(trace, policy):
    """The same plans as a task graph: valid, and executed in an order that the graph allows."""
    simulator = run(trace, policy)
    before = simulator.resident_slots()
    results = simulator.run()
    graph = TaskGraph.from_plans(simulator.layers, simulator.engine.costs, simulator.engine.expert_bytes)
    graph.validate(simulator.n_slots, before)
    kinds = {"cpu_expert", "accel_expert", "transfer", "prefetch"}
    graph.check_execution([r for r in simulator.records if r.kind in kinds], slack_us=1e-6)
    assert [r.phase for r in results] == ["prefill", "decode"]
    assert [r.tokens for r in results] == [16, 32]
    for result in results:
        assert 0.0 <= result.hit_rate <= 1.0
        assert max(result.cpu_busy, result.accel_busy) <= 1.0 + 1e-9
        assert result.latency_ms > 0.0


def test_busy_time_and_latency_add_up(trace):
    simulator = run(trace, "static")
    results = simulator.run()
    total_ms = sum(r.latency_ms * r.steps for r in results)
    assert total_ms * 1e3 == pytest.approx(simulator.engine.now_us)
    cpu_us = sum(r.duration_us for r in simulator.records if r.lane == "cpu")
    assert cpu_us == pytest.approx(sum(r.cpu_busy * r.latency_ms * r.steps for r in results) * 1e3)


def test_static_by_formula():
    """Without slots every expert runs on the CPU: the latency is a sum that can be written down."""
    trace = generate(3, 8, 2, 10, 1, recall=None)
    (result,) = simulate(trace, PROFILE, SHAPE, SimulationConfig(policy="static", cache_ratio=0.0))
    costs, dense = CostModel(PROFILE, SHAPE, "int4"), DenseCosts(PROFILE, SHAPE)
    layer = dense.attention_us(1, 512) + dense.gate_us(1) + dense.combine_us() + 2 * float(costs.cpu_us(0, 1))
    assert result.latency_ms * 1e3 == pytest.approx(3 * layer + dense.head_us(1))
    assert (result.hit_rate, result.transfers, result.prefetch_precision) == (0.0, 0, 0.0)


def test_all_slots_hit_everything(trace):
    for result in simulate(trace, PROFILE, SHAPE, SimulationConfig(policy="static", cache_ratio=1.0)):
        assert result.hit_rate == 1.0
        assert result.cpu_busy == 0.0


def test_deterministic(trace):
    first, second = (run(trace, "ours").run() for _ in range(2))
    assert first == second


def test_perfect_prefetch_is_precise_and_the_oracle_is_fastest(trace):
    results = {p: run(trace, p).run()[1] for p in ("static", "freetoken", "oracle")}
    assert results["oracle"].prefetch_precision == 1.0
    assert results["oracle"].latency_ms <= min(r.latency_ms for r in results.values())


def test_more_of_a_resource_never_hurts_static(trace):
    slow = simulate(trace, PROFILE, SHAPE, SimulationConfig(policy="static"))[1]
    fast = simulate(
        trace, replace(PROFILE, cpu=replace(PROFILE.cpu, read_gbps=40.0)), SHAPE, SimulationConfig(policy="static")
    )
    assert fast[1].latency_ms < slow.latency_ms


def test_disk_tier_costs_time(trace):
    config = SimulationConfig(policy="static", cache_ratio=0.25)
    whole = simulate(trace, PROFILE, SHAPE, config)[1]
    half = simulate(trace, PROFILE, SHAPE, replace(config, host_ratio=0.5))[1]
    assert half.latency_ms > whole.latency_ms
    assert half.disk_busy > 0.0
    with pytest.raises(SimulationError, match="no disk"):
        simulate(trace, replace(PROFILE, disk=None), SHAPE, replace(config, host_ratio=0.5))


def test_shared_experts_dense_layers_and_context_cost_time():
    base = DenseCosts(PROFILE, SHAPE)
    more = DenseCosts(PROFILE, replace(SHAPE, shared_params=10**6, n_dense_layers=1, dense_params=10**6))
    assert base.shared_us(1) == 0.0 < more.shared_us(1)
    assert more.attention_us(1, 100) > base.attention_us(1, 100)
    assert base.attention_us(1, 10**6) > base.attention_us(1, 0)
    assert base.attention_us(4096, 0) > base.attention_us(1, 0)
    with pytest.raises(SchedulerError, match="did you mean 'int8'"):
        DenseCosts(PROFILE, SHAPE, "int9")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_ratio": 1.5}, "cache ratio must lie in 0..1"),
        ({"cache_ratio": float("nan")}, "cache ratio"),
        ({"n_slots": 25}, "25 slots for 24 experts"),
        ({"n_slots": -1}, "must not be negative"),
        ({"host_ratio": 0.0}, "host ratio"),
        ({"policy": "outs"}, "did you mean 'ours'"),
        ({"policy": "ours", "params": {"certainly": 1}}, "did you mean 'certainty'"),
        ({"expert_dtype": "int7"}, "did you mean 'int4'"),
    ],
)
def test_bad_settings(trace, fields, message):
    with pytest.raises(SchedulerError, match=message):
        simulate(trace, PROFILE, SHAPE, SimulationConfig(**fields))


def test_a_trace_of_another_model_is_refused(trace):
    for change, message in (
        ({"n_layers": 4}, "3 MoE layers"),
        ({"n_experts": 9}, "8 experts a layer"),
        ({"top_k": 3}, "top-k"),
    ):
        with pytest.raises(SimulationError, match=message):
            simulate(trace, PROFILE, replace(SHAPE, **change))
