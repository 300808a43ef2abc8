"""How an engine drives a machine of data sheets, and the range of its held-out rows."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.errors import ProfileError
from scheduler.machine.costs import CostModel
from scheduler.machine.engine_profile import EngineProfile
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.simulator.dense import DenseCosts

ENGINE = EngineProfile(
    "test", accel_memory=0.5, accel_tensor=0.5, cpu_read=0.8, launch_us=10.0, captured_launch_us=2.0, handoff_us=30.0,
    host_us=7.0, expert_launches=3, attention_launches=4, tile_tokens=16, decode_ratios=(0.5, 1.0, 1.5),
)  # fmt: skip
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "sheet",
        "provenance": "datasheet",
        "cpu": {"read_gbps": 50.0, "gflops": {"int4": 1000.0}},
        "accel": {"mem_gbps": 1000.0, "tflops": 10.0, "launch_us": 8.0},
        "link": {"gbps": 20.0},
        "dense": {"sync_us": 20.0},
    }
)
SHAPE = ModelShape("toy", 2, 8, 2, 1024, 1024, head_params=1 << 20)


def test_rates_and_overheads_are_the_engines():
    made = ENGINE.on(PROFILE, captured=True)
    assert (made.cpu.read_gbps, made.accel.mem_gbps, made.accel.tflops) == (40.0, 500.0, 5.0)
    assert (made.accel.launch_us, ENGINE.on(PROFILE).accel.launch_us) == (2.0, 10.0)
    assert (made.dense.sync_us, made.dense.handoff_us) == (0.0, 30.0)


def test_experts_of_a_layer_are_launched_together():
    """Alone: 8 us an expert. Together: nothing an expert, and three launches of 2 us at the gate."""
    shape_us = SHAPE.expert_bytes("int4") / 1e6
    assert CostModel(PROFILE, SHAPE, "int4").accel_us(0, 1) == pytest.approx(8.0 + shape_us)
    made = ENGINE.on(PROFILE, captured=True)
    assert CostModel(made, SHAPE, "int4").accel_us(0, 1) == pytest.approx(2 * shape_us)
    alone = replace(made, accel=replace(made.accel, expert_launches=0))
    assert DenseCosts(made, SHAPE).gate_us(1) - DenseCosts(alone, SHAPE).gate_us(1) == pytest.approx(6.0)
    assert DenseCosts(made, SHAPE).head_us() > 7.0


def test_a_part_of_a_tile_takes_as_long_as_a_whole_one():
    slow = replace(ENGINE.on(PROFILE), accel=replace(ENGINE.on(PROFILE).accel, tflops=0.1))
    us = CostModel(slow, SHAPE, "int4").accel_us(0, np.array([1, 2, 16, 17, 32]))
    assert us[1] == us[2]
    assert us[3] == us[4] == pytest.approx(2 * us[2])
    assert us[0] < us[1]
    far = CostModel(slow, SHAPE, "int4").accel_us(0, np.array([2000, 4000]))
    assert far[1] == pytest.approx(2 * far[0], rel=0.01), "beyond the table it goes on in proportion"


def test_the_interval_is_that_of_the_held_out_rows():
    assert ENGINE.interval("decode", 100.0) == pytest.approx((60.0, 140.0))
    with pytest.raises(ProfileError, match="no held-out rows of prefill"):
        ENGINE.interval("prefill", 1.0)
    with pytest.raises(ProfileError, match="cpu_read must be above 0"):
        replace(ENGINE, cpu_read=0.0)
    with pytest.raises(ProfileError, match="engine profile"):
        EngineProfile.from_mapping({"name": "x"})
