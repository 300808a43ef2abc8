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
    windows_handoff_us=90.0, cache_share=0.5, attention_share=0.25, fill_tokens=16.0, token_passes=3.0,
    expert_launches=3, attention_launches=4, decode_ratios=(0.5, 1.0, 1.5), mixed_decode_ratios=(2.0,),
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
    assert ENGINE.on(PROFILE, windows=True).dense.handoff_us == 90.0


def test_experts_of_a_layer_are_launched_together():
    """Alone: 8 us an expert. Together: nothing an expert, and three launches of 2 us at the gate."""
    shape_us = SHAPE.expert_bytes("int4") / 1e6
    assert CostModel(PROFILE, SHAPE, "int4").accel_us(0, 1) == pytest.approx(8.0 + shape_us)
    made = ENGINE.on(PROFILE, captured=True)
    assert CostModel(made, SHAPE, "int4").accel_us(0, 1) == pytest.approx(2 * shape_us)
    alone = replace(made, accel=replace(made.accel, expert_launches=0))
    assert DenseCosts(made, SHAPE).gate_us(1) - DenseCosts(alone, SHAPE).gate_us(1) == pytest.approx(6.0)


def test_tiles_that_are_not_full_cost_as_many_tokens_more():
    slow = replace(ENGINE.on(PROFILE), accel=replace(ENGINE.on(PROFILE).accel, tflops=0.1))
    us = CostModel(slow, SHAPE, "int4").accel_us(0, np.array([1, 2, 16, 2000, 4000]))
    assert us[0] < us[1]
    assert us[2] / us[1] == pytest.approx(32 / 18)
    assert us[4] / us[3] == pytest.approx(4016 / 2016), "beyond the table it goes on"


def test_attention_is_the_models_own_where_an_engine_drives():
    """Three kernels more at 2 us, and a quarter of the layers reads the cache, at half the rate."""
    plain = replace(SHAPE, attention_params=1 << 20, kv_bytes=1 << 16)
    own = replace(plain, attention_kernels=3, full_attention=0.25)
    driven, sheet = ENGINE.on(PROFILE, captured=True), PROFILE
    assert DenseCosts(sheet, own).attention_us(1, 4096) == DenseCosts(sheet, plain).attention_us(1, 4096)
    read_us = (1 << 16) * 4097 / (driven.accel.mem_gbps * 0.5 * 1e3)
    more_us = DenseCosts(driven, own).attention_us(1, 4096) - DenseCosts(driven, plain).attention_us(1, 4096)
    assert more_us == pytest.approx(3 * 2.0 - 0.75 * read_us)


def test_values_between_matrices_cross_the_memory_only_of_several_tokens():
    driven = ENGINE.on(PROFILE, captured=True)
    still = replace(driven, accel=replace(driven.accel, token_passes=0.0))

    def extra_us(n_tokens: int) -> float:
        return DenseCosts(driven, SHAPE).gate_us(n_tokens) - DenseCosts(still, SHAPE).gate_us(n_tokens)

    assert extra_us(1) == 0.0
    assert extra_us(64) == pytest.approx(2 * extra_us(32))
    values = 3 * 2 * (1024 + 1024) + 6 * 1024
    assert extra_us(32) == pytest.approx(3 * 4 * values * 32 / (driven.accel.mem_gbps * 1e3))


def test_bits_of_a_file_beat_the_dtype():
    file = replace(SHAPE, weight_bits=(4.25, 8.0, 6.0))
    assert file.expert_bytes("int4") == SHAPE.expert_params * 4.25 / 8
    driven = ENGINE.on(PROFILE, captured=True)
    at_8_bits = DenseCosts(driven, file).head_us() - driven.accel.launch_us
    assert at_8_bits == pytest.approx((1 << 20) / (driven.accel.mem_gbps * 1e3))
    with pytest.raises(ProfileError, match="full_attention is a share"):
        replace(SHAPE, full_attention=0.0)


def test_the_interval_is_that_of_the_held_out_rows_that_are_like_it():
    assert ENGINE.interval("decode", 100.0) == pytest.approx((60.0, 140.0))
    assert ENGINE.interval("decode", 100.0, mixed=True) == pytest.approx((200.0, 200.0))
    assert ENGINE.interval("prefill", 1.0) is None
    assert ENGINE.interval("prefill", 1.0, mixed=True) is None
    with pytest.raises(ProfileError, match="cpu_read must be above 0"):
        replace(ENGINE, cpu_read=0.0)
    with pytest.raises(ProfileError, match="engine profile"):
        EngineProfile.from_mapping({"name": "x"})
