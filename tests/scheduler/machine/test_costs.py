"""Cost model and profiles: floor then linear, tables, contention, drift within bounds, bad values."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import CostError, CostModel, HardwareProfile, ModelShape, ObservedTask, ProfileError
from scheduler.machine.costs import DRIFT_BOUNDS, GRID_TOKENS, LAUNCH_EXPERTS

SHAPE = ModelShape("toy", n_layers=3, n_experts=8, top_k=2, hidden=1000, inter=500)
MAPPING = {
    "name": "box",
    "provenance": "datasheet",
    "cpu": {"read_gbps": 10.0, "gflops": {"bfloat16": 100.0}, "overhead_us": 5.0},
    "accel": {"mem_gbps": 500.0, "tflops": 10.0, "launch_us": 8.0},
    "link": {"gbps": 10.0, "latency_us": 10.0},
    "contention": {"cpu_with_link": 0.8, "link_with_cpu": 0.5},
    "dense": {"attention_us": 30.0, "gate_us": 5.0, "sync_us": 2.0},
}


def mapping(**changes: object) -> dict:
    return {**MAPPING, **changes}


def model(**changes: object) -> CostModel:
    return CostModel(HardwareProfile.from_mapping(mapping(**changes)), SHAPE, "bfloat16")


def test_memory_floor_then_linear() -> None:
    """1.5 M weights = 3 MB in bfloat16: 300 us at 10 GB/s; 3 MFLOP a token = 30 us at 100 GFLOP/s: 10 tokens."""
    costs = model()
    assert costs.cpu_us(0, [0, 1, 10, 20]).tolist() == pytest.approx([0.0, 305.0, 305.0, 605.0])
    assert costs.accel_us(0, 1) == pytest.approx(8 + 6.0)
    assert costs.transfer_us(0) == pytest.approx(10 + 300.0)
    beyond = GRID_TOKENS + 500
    assert float(costs.cpu_us(0, beyond)) == pytest.approx(5 + 30.0 * beyond)


def test_contention_and_dense_parts() -> None:
    costs = model()
    assert float(costs.cpu_us(0, 1, link_busy=True)) == pytest.approx(305 / 0.8)
    assert costs.transfer_us(0, cpu_busy=True) == pytest.approx(310 / 0.5)
    assert costs.dense_us == 37.0


def test_measured_table_beats_the_formula() -> None:
    table = {"1000x500/bfloat16": [[1, 100.0], [4, 130.0], [8, 210.0]]}
    costs = model(cpu={**MAPPING["cpu"], "table": table})
    assert costs.cpu_us(0, [1, 2, 4, 8]).tolist() == pytest.approx([100, 110, 130, 210])
    assert float(costs.cpu_us(0, 10)) == pytest.approx(250.0), "20 us a token goes on"


def test_record_bytes_by_layer_and_wrong_sizes() -> None:
    profile = HardwareProfile.from_mapping(MAPPING)
    costs = CostModel(profile, SHAPE, "bfloat16", record_bytes=[10**6, 2 * 10**6, 10**6])
    assert [costs.transfer_us(layer) for layer in range(3)] == pytest.approx([110, 210, 110])
    with pytest.raises(CostError, match="record_bytes"):
        CostModel(profile, SHAPE, "bfloat16", record_bytes=[1, 2])
    with pytest.raises(ProfileError, match="did you mean 'bfloat16'"):
        CostModel(profile, SHAPE, "bfloat")


def test_drift_follows_observations_within_bounds() -> None:
    costs = model()
    for _ in range(200):
        costs.observe(ObservedTask("cpu", 0, 1, 610.0))
    assert float(costs.cpu_us(0, 1)) == pytest.approx(610, rel=0.01)
    assert float(costs.accel_us(0, 1)) == pytest.approx(14), "one lane does not move another"
    for _ in range(500):
        costs.observe(ObservedTask("accel", 0, 1, 1e6))
        costs.observe(ObservedTask("link", 1, 0, 0.001))
    assert costs.drift.tolist()[1:] == [DRIFT_BOUNDS[1], DRIFT_BOUNDS[0]]


def test_a_read_costs_what_the_disk_says_and_then_what_it_took() -> None:
    costs = model(disk={"gbps": 2.0, "latency_us": 80.0})
    assert costs.read_us(0) == pytest.approx(3 * 1000 * 500 * 2 / 2e3)
    assert costs.alone_read_us().tolist() == pytest.approx([costs.read_us(0) + 80.0] * 3)
    for _ in range(300):
        costs.observe(ObservedTask("disk", 1, 0, 15000.0))
    assert costs.read_us(0) == pytest.approx(15000.0, rel=0.01)
    assert costs.drift.tolist() == [1.0, 1.0, 1.0]
    assert CostModel.from_mapping(costs.as_mapping()).read_us(2) == costs.read_us(2)
    assert model().read_us(0) > 0.0, "a machine whose disk nobody described"


@pytest.mark.parametrize("us", [float("nan"), -1.0, float("inf")])
def test_observed_nonsense_is_refused(us: float) -> None:
    with pytest.raises(CostError, match="finite"):
        model().observe(ObservedTask("cpu", 0, 1, us))
    with pytest.raises(CostError, match="known lane"):
        model().observe(ObservedTask("cpu", 9, 1, 1.0))


def test_profile_round_trip() -> None:
    profile = HardwareProfile.from_mapping(
        mapping(disk={"gbps": 3.0}, cpu={**MAPPING["cpu"], "table": {"a": [[1, 2.0]]}})
    )
    assert HardwareProfile.from_mapping(profile.to_mapping()) == profile


BAD_PROFILES = [
    (mapping(cpux={}), "did you mean 'cpu'"),
    (mapping(cpu={"read_gbps": 10.0}), "missing gflops"),
    (mapping(link={"gbps": 0.0}), "link.gbps must be above 0"),
    (mapping(link={"gbps": float("nan")}), "finite"),
    (mapping(link={"gbps": "fast"}), "finite number"),
    (mapping(link=None), "link is empty"),
    (mapping(provenance="guess"), "provenance"),
    (mapping(contention={"cpu_with_link": 1.5}), r"share in \(0, 1\]"),
    (mapping(cpu={**MAPPING["cpu"], "table": {"a": [[2, 1.0], [1, 2.0]]}}), "must rise"),
    (mapping(cpu={**MAPPING["cpu"], "table": {"a": []}}), "is empty"),
    (mapping(cpu={**MAPPING["cpu"], "table": {"a": [[1, 0.0]]}}), "above 0"),
    (mapping(cpu={**MAPPING["cpu"], "table": {"a": [3]}}), "pairs"),
    ({k: v for k, v in MAPPING.items() if k != "link"}, "missing link"),
    ([], "expected a mapping"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_PROFILES)
def test_bad_profiles(bad: object, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        HardwareProfile.from_mapping(bad)  # type: ignore[arg-type]


def test_bad_shapes() -> None:
    with pytest.raises(ProfileError, match="top_k 9 is above"):
        ModelShape("x", 1, 8, 9, 10, 10)
    with pytest.raises(ProfileError, match="hidden must be a positive"):
        ModelShape("x", 1, 8, 2, 0, 10)
    with pytest.raises(ProfileError, match="did you mean 'hidden'"):
        ModelShape.from_mapping({"hiden": 3})
    with pytest.raises(ProfileError, match="unknown expert dtype"):
        SHAPE.expert_bytes("int7")
    assert SHAPE.expert_bytes("int4") == 1_500_000 * 0.5625
    assert SHAPE.expert_flops(2) == 6_000_000


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_uniform_rejects_bad_costs(value: float) -> None:
    with pytest.raises(CostError, match="finite and not negative"):
        CostModel.uniform(2, cpu_us=value)
    assert np.isfinite(CostModel.uniform(2).cpu_us(1, 3))


def observe_groups(costs: CostModel, n: int, launch_us: float, own_us: float) -> list[float]:
    """Groups of 1 to 8 experts on the accelerator; the cost of an expert after each."""
    random, found = np.random.default_rng(0), []
    for _ in range(n):
        size = int(random.integers(1, 9))
        costs.observe(ObservedTask("accel", 0, 1, launch_us + own_us * size, float(size), True))
        found.append(float(costs.accel_us(0, 1)))
    return found


def test_a_slow_launch_does_not_change_what_an_expert_costs() -> None:
    costs = CostModel.uniform(2, accel_us=20.0)
    observe_groups(costs, 100, launch_us=30.0, own_us=20.0)
    assert costs.launch_us(0) == pytest.approx(30.0, rel=0.05)
    learnt = observe_groups(costs, 300, launch_us=400.0, own_us=20.0)
    assert learnt == pytest.approx([20.0] * 300, rel=0.2)
    assert costs._groups[1, 0] == pytest.approx(400.0, rel=0.05)
    assert costs.launch_us(0) == LAUNCH_EXPERTS * learnt[-1], "so that the accelerator is still tried"
    again = CostModel.from_mapping(costs.as_mapping())
    assert again.launch_us(0) == costs.launch_us(0)


def test_one_launch_that_takes_very_long_is_hardly_believed() -> None:
    """The first one on a card may wait for a compiler."""
    costs = CostModel.uniform(2, accel_us=20.0)
    for us in (300_000.0, 40.0, 300_000.0, 50.0):
        costs.observe(ObservedTask("accel", 0, 1, us, 2.0, True))
    assert costs.launch_us(0) < 5.0
    assert float(costs.accel_us(0, 1)) == pytest.approx(20.0, rel=0.2)


def test_launches_by_the_host_are_not_the_devices() -> None:
    costs = CostModel.uniform(2, accel_us=20.0)
    random = np.random.default_rng(0)
    for _ in range(100):
        size = int(random.integers(1, 9))
        costs.observe(ObservedTask("accel", 0, 1, 5000.0 + 20.0 * size, float(size)))
    assert costs.launch_us(0) == 0.0
    assert float(costs.accel_us(0, 1)) == pytest.approx(20.0, rel=0.2)


@pytest.mark.parametrize("own_us", [10.0, 40.0])
def test_what_an_expert_costs_is_learnt_beside_the_launch(own_us: float) -> None:
    costs = CostModel.uniform(2, accel_us=20.0)
    learnt = observe_groups(costs, 400, launch_us=30.0, own_us=own_us)
    assert learnt[-1] == pytest.approx(own_us, rel=0.05)
    assert costs.launch_us(0) == pytest.approx(30.0, rel=0.1)


def test_groups_of_one_size_that_are_faster_than_believed_make_experts_cheaper() -> None:
    costs = CostModel.uniform(2, accel_us=20.0)
    for _ in range(300):
        costs.observe(ObservedTask("accel", 0, 1, 40.0, 4.0, True))
    assert costs.launch_us(0) + 4 * float(costs.accel_us(0, 1)) == pytest.approx(40.0, rel=0.05)
