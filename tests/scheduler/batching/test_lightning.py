"""MoE-Lightning's model by hand, and what its plan does when a resource changes."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.batching import MemoryLeft, Roofline, Workload, plan_lightning
from scheduler.errors import SchedulerError
from scheduler.machine.profile import LinkProfile, ModelShape

SHAPE = ModelShape("m", n_layers=2, n_experts=4, top_k=1, hidden=100, inter=100, attention_params=40_000, kv_bytes=400)
WORK = Workload(n_prompts=64, prompt_tokens=100, new_tokens=50)


@pytest.fixture
def roofline(tiny_profile):
    return Roofline(tiny_profile, SHAPE, expert_dtype="bfloat16", dense_dtype="bfloat16", cached_share=0.5)


def test_distinct_experts_of_independent_tokens(roofline, tiny_profile):
    assert roofline.distinct(1) == pytest.approx(1.0)
    assert roofline.distinct(2) == pytest.approx(4 * (1 - 0.75**2))
    skewed = Roofline(tiny_profile, SHAPE, "bfloat16", frequencies=np.array([[1.0, 0.0, 0.0, 0.0]]))
    assert skewed.distinct(8) == pytest.approx(1.0)


def test_stages_by_hand(roofline):
    """Expert: 30,000 weights of 2 bytes = 60,000 bytes: 10 + 12 us over the link; accelerator 2 + max(0.6, 0.06 n)."""
    stages = roofline.decode(micro_batch=2, n_micro_batches=3, context=100, attention="cpu")
    distinct_all, distinct_one = 4 * (1 - 0.75**6), 4 * (1 - 0.75**2)
    hidden_us = 10.0 + 2 * 100 * 2 / 5e3
    # 2 prompts * 100 tokens * 400 bytes at 10 GB/s = 8 us; 4 * 100 * 100 * 2 operations at 50 GFLOP/s = 1.6 us
    attention_us = 4.0 + 8.0
    assert stages.cpu_us == pytest.approx(3 * attention_us)
    assert stages.link_us == pytest.approx(0.5 * distinct_all * 22.0 + 3 * hidden_us)
    dense_us = roofline.dense.attention_us(2, 0, 2) + roofline.dense.gate_us(2)
    accel_us = dense_us + distinct_one * 2.6
    assert stages.accel_us == pytest.approx(3 * accel_us)
    assert stages.chain_us == pytest.approx(accel_us + attention_us + 2 * hidden_us)
    assert stages.layer_us == max(stages.link_us, stages.cpu_us, stages.accel_us, stages.chain_us)
    assert stages.bound_by == "link"


def test_a_transferred_expert_serves_all_micro_batches(roofline):
    """Layer-major: three micro-batches in one batch bring fewer experts than three batches of one."""
    together, alone = roofline.decode(2, 3, 100, "accelerator"), roofline.decode(2, 1, 100, "accelerator")
    assert together.link_us < 3 * alone.link_us


def test_streamed_keys_and_values_cross_the_link(roofline):
    at_home, streamed = roofline.decode(2, 1, 100, "accelerator"), roofline.decode(2, 1, 100, "streamed")
    assert streamed.link_us == pytest.approx(at_home.link_us + 10.0 + 2 * 100 * 400 / 5e3)
    assert at_home.cpu_us == streamed.cpu_us == 0.0


def test_the_plan_is_the_best_of_all_it_may_choose_from(roofline):
    plan = plan_lightning(roofline, WORK)
    for m, n in ((1, 1), (1, 4), (8, 1), (8, 8), (64, 1)):
        for place in ("cpu", "accelerator", "streamed"):
            layer_us = roofline.prefill_us(m * n, 100) + 50 * roofline.decode(m, n, 125, place).layer_us
            total_us = -(-64 // (m * n)) * 2 * layer_us
            assert plan.tokens_per_s >= 64 * 50 / total_us * 1e6 * (1 - 1e-12)


def test_a_slower_link_wants_larger_batches(tiny_profile):
    """The slower the weights come, the more prompts must share them; memory is what stops it."""
    memory = MemoryLeft(accel_bytes=16 * 100 * 100 * 8 * 4)
    slow = Roofline(replace(tiny_profile, link=LinkProfile(0.01)), SHAPE, "bfloat16", "bfloat16", 0.0)
    plan = plan_lightning(slow, WORK, memory)
    assert plan.batch == 16, "as much as the memory holds"
    assert plan.stages.bound_by == "link"


def test_cpu_and_accelerator_overlap_where_they_take_as_long(tiny_profile):
    """With attention on the CPU one micro-batch would leave each lane idle while the other works."""
    roofline = Roofline(tiny_profile, replace(SHAPE, kv_bytes=20_000), "bfloat16", "bfloat16", cached_share=1.0)
    plan = plan_lightning(roofline, WORK, places=("cpu",))
    assert plan.n_micro_batches > 1
    assert plan.stages.bound_by != "chain"


def test_memory_bounds_the_batch_and_moves_the_attention(roofline):
    kv_bytes = 150 * 400 * 2  # of one prompt
    activations = 100 * 100 * 8 * 4
    assert plan_lightning(roofline, WORK, MemoryLeft(accel_bytes=4 * activations)).batch <= 4
    on_host = plan_lightning(roofline, WORK, MemoryLeft(accel_bytes=activations))
    assert on_host.batch == 1
    assert on_host.attention != "accelerator"
    tight = MemoryLeft(4 * activations + 3 * kv_bytes, 2 * kv_bytes - 1)
    assert plan_lightning(roofline, WORK, tight, places=("cpu",)).batch == 1
    assert plan_lightning(roofline, WORK, max_batch=5).batch <= 5
    with pytest.raises(SchedulerError, match="does not fit the memory"):
        plan_lightning(roofline, WORK, MemoryLeft(accel_bytes=10))


@pytest.mark.parametrize("bad", [{"n_prompts": 0}, {"prompt_tokens": 0}, {"new_tokens": 0}])
def test_an_empty_workload_is_refused(bad):
    with pytest.raises(SchedulerError, match="at least 1"):
        replace(WORK, **bad)


def test_a_share_above_one_is_refused(tiny_profile):
    with pytest.raises(SchedulerError, match="cached share"):
        Roofline(tiny_profile, SHAPE, "bfloat16", cached_share=1.5)
