"""How an engine drives a machine of data sheets, and the range of its held-out rows."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.errors import ProfileError
from scheduler.machine.costs import CostModel
from scheduler.machine.engine_profile import EngineProfile, Residuals
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.simulator.dense import DenseCosts

ENGINE = EngineProfile(
    "test", accel_memory=0.5, accel_tensor=0.5, cpu_read=0.8, launch_us=10.0, captured_launch_us=2.0, handoff_us=30.0,
    windows_handoff_us=90.0, cache_share=0.5, attention_share=0.25, token_passes=3.0, link_share=0.6, tile_tokens=128,
    tile_by_expert=False, vector_tokens=8, reads_apart=True, expert_launches=3, attention_launches=4,
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


def driven(**changes):
    made = ENGINE.on(PROFILE)
    return replace(made, accel=replace(made.accel, **changes))


def accel_us(profile, tokens, step_tokens):
    return CostModel(profile, SHAPE, "int4", step_tokens=step_tokens).accel_us(0, np.array(tokens))


def test_an_empty_column_of_a_tile_takes_as_long_as_a_full_one():
    """Nothing but arithmetic: memory is fast. Tiles are as wide as the step, in eights, and at most 128 columns."""
    fast = driven(mem_gbps=1e9, reads_apart=False)
    one = SHAPE.expert_flops() / (fast.accel.tflops * 1e6)
    assert accel_us(fast, [1, 3, 30], 30) == pytest.approx([32 * one] * 3)
    assert accel_us(fast, [1, 128, 129], 512) == pytest.approx([128 * one, 128 * one, 256 * one])
    assert accel_us(fast, [2000, 4000], 4096) == pytest.approx([2064 * one, 4064 * one]), (
        "beyond the table: half a tile"
    )
    by_expert = replace(fast, accel=replace(fast.accel, tile_by_expert=True))
    assert accel_us(by_expert, [1, 9], 30) == pytest.approx([8 * one, 16 * one]), "7.5 tokens an expert in the mean"
    assert accel_us(fast, [1], 1) == pytest.approx([one]), "a reply's token has no tiles"
    planned = CostModel(fast, SHAPE, "int4").accel_us(0, np.array([1, 2]))
    assert planned == pytest.approx([one, 128 * one]), "who does not know the step takes the widest tile"


def test_few_tokens_read_their_experts_one_by_one():
    slow = driven(mem_gbps=1.0)
    read_us = SHAPE.expert_bytes("int4") / 1e3
    assert accel_us(slow, [1, 4], 8) == pytest.approx([read_us, 4 * read_us])
    assert accel_us(slow, [4], 9) < 2 * read_us


def test_of_several_tokens_a_matrix_is_read_then_multiplied():
    apart, meanwhile = driven(), driven(reads_apart=False)
    read_us = SHAPE.expert_bytes("int4") / (apart.accel.mem_gbps * 1e3)
    multiply_us = 128 * SHAPE.expert_flops() / (apart.accel.tflops * 1e6)
    assert accel_us(apart, [64], 512) == pytest.approx([read_us + multiply_us])
    assert accel_us(meanwhile, [64], 512) == pytest.approx([max(read_us, multiply_us)])
    assert accel_us(apart, [1], 1) == pytest.approx(accel_us(meanwhile, [1], 1))
    native = replace(apart, accel=replace(apart.accel, expert_speed=2.0))
    assert accel_us(native, [64], 512) == pytest.approx([read_us + multiply_us / 2])
    head = replace(SHAPE, head_params=0, shared_params=1 << 22)
    read_us, multiply_us = (1 << 22) * 1.0625 / 5e5, 2 * (1 << 22) * 64 / 5e6
    launches_us = 3 * apart.accel.launch_us
    assert DenseCosts(apart, head).shared_us(64) == pytest.approx(launches_us + read_us + multiply_us)
    assert DenseCosts(meanwhile, head).shared_us(64) == pytest.approx(launches_us + max(read_us, multiply_us))


def test_uploads_reach_a_share_of_the_link_only_where_prompts_are_streamed():
    assert ENGINE.on(PROFILE).link.gbps == 20.0
    assert ENGINE.on(PROFILE, streamed=True).link.gbps == pytest.approx(12.0)


def test_attention_multiplies_the_width_of_its_heads_where_an_engine_drives():
    wide = replace(SHAPE, attention_width=4096)
    made = driven(attention_share=1e-6)
    assert DenseCosts(made, wide).attention_us(64, 4096) == pytest.approx(
        4 * DenseCosts(made, SHAPE).attention_us(64, 4096), rel=1e-2
    )
    assert DenseCosts(PROFILE, wide).attention_us(64, 4096) == DenseCosts(PROFILE, SHAPE).attention_us(64, 4096)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tile_tokens": -1}, "tile_tokens must be an integer of at least 0"),
        ({"vector_tokens": 0}, "vector_tokens must be an integer of at least 1"),
        ({"reads_apart": 1}, "reads_apart must be true or false"),
        ({"expert_speed": 0.0}, "expert_speed must be above 0"),
    ],
)
def test_impossible_kernels_are_refused(change, said):
    with pytest.raises(ProfileError, match=said):
        driven(**change)


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
    known = Residuals.from_mapping(
        {
            "decode_ratios": [0.5, 1.0, 1.5],
            "mixed_decode_ratios": [2.0],
            "streamed_prefill_ratios": [1.0],
            "prompt_tokens": [8, 512],
        }
    )
    assert known.interval("decode", 100.0) == pytest.approx((60.0, 140.0))
    assert known.interval("decode", 100.0, mixed=True) == pytest.approx((200.0, 200.0))
    assert known.interval("prefill", 1.0, tokens=64) is None
    assert known.interval("prefill", 1.0, mixed=True, tokens=64) is None, "the CPU computes a part: no such row"
    assert known.interval("prefill", 1.0, mixed=True, streamed=True, tokens=64) == (1.0, 1.0)
    assert known.interval("prefill", 1.0, mixed=True, streamed=True, tokens=4) is None, "no row of such a prompt"
    with pytest.raises(ProfileError, match="cpu_read must be above 0"):
        replace(ENGINE, cpu_read=0.0)
    with pytest.raises(ProfileError, match="engine profile"):
        EngineProfile.from_mapping({"name": "x"})
