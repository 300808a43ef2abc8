"""Simulation with lossy policies: the lossless one where nothing is changed, both parts' work on the same lanes."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.lossy import LOSSY_POLICIES, resolve_lossy
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LayerPlan, Transfer
from scheduler.simulator.engine import SimulationError
from scheduler.simulator.lossy import _merged
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.synthetic import generate

from .test_simulate import demand

SHAPE = ModelShape(name="toy", n_layers=3, n_experts=8, top_k=4, hidden=256, inter=512, attention_params=262144)
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy", "provenance": "datasheet",
        "cpu": {"read_gbps": 2.0, "gflops": {"int4": 200.0, "bfloat16": 200.0}},
        "accel": {"mem_gbps": 400.0, "tflops": 20.0, "launch_us": 1.0},
        "link": {"gbps": 4.0, "latency_us": 1.0},
        "disk": {"gbps": 2.0},
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def trace():
    return generate(3, 8, 4, 42, 3, n_prefill=12, seed=0)


def run(trace, lossy, **settings):
    config = SimulationConfig(expert_dtype="bfloat16", lossy=resolve_lossy(lossy), **settings)
    return simulate(trace, PROFILE, SHAPE, config)


@pytest.mark.parametrize("policy", ["ours", "static", "hybrimoe", "freetoken"])
def test_a_policy_that_changes_nothing_is_simulated_as_the_lossless_one(trace, policy):
    plain = run(trace, None, policy=policy)
    unchanged = run(trace, {"kind": "hobbit", "t1": 1.0, "t2": 1.0, "low_share": 0.0}, policy=policy)
    assert [replace(result, lossy="") for result in unchanged] == plain
    assert all(result.lossy.startswith("hobbit") and result.changed == 0.0 for result in unchanged)


@pytest.mark.parametrize("kind", sorted(kind for kind in LOSSY_POLICIES if not LOSSY_POLICIES[kind].uses_planes))
@pytest.mark.parametrize("policy", ["ours", "static"])
def test_every_kind_is_simulated_in_both_phases_and_is_deterministic(trace, kind, policy):
    first, again = run(trace, kind, policy=policy), run(trace, kind, policy=policy)
    assert first == again
    assert [result.phase for result in first] == ["prefill", "decode"]
    assert first[0].latency_ms > 0
    decode = first[1]
    assert decode.changed > 0
    if (kind, policy) != ("defer", "ours"):  # late experts stay off this machine's link, which is faster than its CPU
        assert 0 < decode.latency_ms < run(trace, None, policy=policy)[1].latency_ms


def test_low_copies_take_the_time_of_their_size(trace):
    """All but the heaviest from the copy, nothing cached: the CPU reads 1 + 3 * 0.5625 / 2 experts' bytes a token."""
    lossy = {"kind": "hobbit", "t1": 0.0, "t2": 1.0}
    slow, fast = run(trace, None, cache_ratio=0.0)[1], run(trace, lossy, cache_ratio=0.0)[1]
    assert fast.changed == pytest.approx(0.75)
    busy = {result.lossy: result.cpu_busy * result.latency_ms for result in (slow, fast)}
    overhead_ms = 12 * PROFILE.cpu.overhead_us * 1e-3
    ratio = (busy[fast.lossy] - overhead_ms) / (busy[""] - overhead_ms)
    assert ratio == pytest.approx((1 + 3 * 0.5625 / 2) / 4, rel=0.02)


def test_two_plans_become_one_with_copies_as_experts_of_their_own():
    plan = LayerPlan(0, 1, (3,), (0,), (5,), (), (), 1.0)
    low = LayerPlan(0, 1, (), (2,), (0,), (Transfer(1, 2, 0, (1, 7), "demand", 1.0, True),), (), 1.0)
    both, wanted = _merged(plan, low, demand(1, [0, 3]), demand(1, [2]), 8)
    assert (both.cpu, both.accel, both.accel_slots) == ((3,), (0, 10), (5, 0))
    assert (both.transfers[0].expert, both.transfers[0].evicts) == (10, (1, 15))
    assert wanted.expert_ids.tolist() == [0, 3, 10]
    assert _merged(plan, None, demand(1, [0, 3]), demand(1, []), 8)[0] is plan


def test_the_slot_memory_is_shared_and_copies_must_be_smaller(trace):
    config = SimulationConfig(
        expert_dtype="bfloat16", cache_ratio=0.5, lossy=resolve_lossy({"kind": "hobbit", "low_share": 0.5})
    )
    simulator = Simulator(trace, PROFILE, SHAPE, config)
    assert simulator.planner.slots.n_slots == 6
    assert simulator.stage.low.slots.n_slots == 21
    with pytest.raises(SimulationError, match="copy as int4 is not smaller than an expert as int4"):
        simulate(trace, PROFILE, SHAPE, replace(config, expert_dtype="int4"))
    with pytest.raises(SimulationError, match="host ratio 1"):
        simulate(trace, PROFILE, SHAPE, replace(config, host_ratio=0.5))


def test_a_kept_set_is_all_that_is_ever_demanded(trace):
    config = SimulationConfig(
        expert_dtype="bfloat16", policy="on_demand/none/lru", cache_ratio=0.5, lossy=resolve_lossy("emoe")
    )
    simulator = Simulator(trace, PROFILE, SHAPE, config)
    simulator.run()
    assert simulator.stage.policy.kept.sum() == 12
    held = [divmod(int(key), 8) for key in simulator.planner.slots.key_of if key >= 0]
    assert np.mean([simulator.stage.policy.kept[key] for key in held]) == 1.0
