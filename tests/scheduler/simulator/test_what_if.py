"""Alternatives of one step from the frozen state before it: more of a resource never shows a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.simulator.run import simulator_class
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.simulator.what_if import us_with_a_slot, us_with_machine
from scheduler.traces.synthetic import generate

SHAPE = ModelShape("toy", 4, 16, 2, 256, 512, attention_params=1 << 20, head_params=1 << 20, kv_bytes=512)
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy",
        "provenance": "datasheet",
        "cpu": {"read_gbps": 20.0, "gflops": {"int4": 200.0}},
        "accel": {"mem_gbps": 300.0, "tflops": 10.0, "launch_us": 4.0},
        "link": {"gbps": 8.0},
        "contention": {"cpu_with_link": 0.7, "link_with_cpu": 0.9},
    }
)
POLICIES = ("static", "hybrimoe", "ours", "freetoken")
STEP = 9


def simulator(policy: str, profile: HardwareProfile = PROFILE) -> Simulator:
    trace = generate(SHAPE.n_layers, SHAPE.n_experts, SHAPE.top_k, 24, 1, 6, "olmoe-1b-7b", seed=3)
    config = SimulationConfig(policy, cache_ratio=0.3)
    made = simulator_class(profile, config)(trace, profile, SHAPE, config)
    made.advance_to(STEP)
    return made


@pytest.mark.parametrize("policy", POLICIES)
def test_a_snapshot_goes_on_as_the_original_does(policy):
    run = simulator(policy)
    frozen = run.snapshot()
    times = [run.step_us(step) for step in range(STEP, STEP + 6)]
    again = [frozen.step_us(step) for step in range(STEP, STEP + 6)]
    assert times == again


@pytest.mark.parametrize("policy", POLICIES)
def test_more_of_a_resource_is_never_a_loss(policy):
    run = simulator(policy)
    frozen = run.snapshot()
    latency_us = run.step_us(STEP, explained=True)
    plans = [item.plan for item in run.layers]
    assert us_with_machine(frozen, STEP, plans, PROFILE) == pytest.approx(latency_us), "the same machine"
    for section, field, more in (("cpu", "read_gbps", 1.0), ("link", "gbps", 1.0), ("accel", "mem_gbps", 10.0)):
        part = getattr(PROFILE, section)
        machine = replace(PROFILE, **{section: replace(part, **{field: getattr(part, field) + more})})
        assert us_with_machine(frozen, STEP, plans, machine) <= latency_us + 1e-6
    faster = replace(PROFILE, cpu=replace(PROFILE.cpu, read_gbps=40.0))
    if any(plan.cpu for plan in plans):
        assert us_with_machine(frozen, STEP, plans, faster) < latency_us
    assert us_with_a_slot(frozen, STEP, run.explanations) > 0.0


def test_one_more_slot_holds_what_was_missing():
    run = simulator("static")
    frozen = run.snapshot()
    latency_us = run.step_us(STEP, explained=True)
    assert us_with_a_slot(frozen, STEP, run.explanations) < latency_us
    two = replace(PROFILE, accel=replace(PROFILE.accel, count=2))
    run = simulator("static", two)
    frozen = run.snapshot()
    latency_us = run.step_us(STEP, explained=True)
    assert us_with_a_slot(frozen, STEP, run.explanations) <= latency_us
    assert us_with_machine(frozen, STEP, [item.plan for item in run.layers], two) == pytest.approx(latency_us)


@settings(max_examples=12, deadline=None)
@given(
    policy=st.sampled_from(POLICIES), step=st.integers(2, 15), seed=st.integers(0, 50), more=st.floats(1.0, 8.0),
    part=st.sampled_from((("cpu", "read_gbps"), ("link", "gbps"), ("accel", "mem_gbps"), ("accel", "tflops"))),
)  # fmt: skip
def test_a_faster_part_is_never_a_loss_at_any_step(policy, step, seed, more, part):
    """However much faster, and before anything is rounded up to zero for the reader."""
    trace = generate(SHAPE.n_layers, SHAPE.n_experts, SHAPE.top_k, 24, 1, 6, "olmoe-1b-7b", seed=seed)
    config = SimulationConfig(policy, cache_ratio=0.3)
    run = simulator_class(PROFILE, config)(trace, PROFILE, SHAPE, config)
    run.advance_to(step)
    frozen = run.snapshot()
    latency_us = run.step_us(step, explained=True)
    section, field = part
    faster = replace(getattr(PROFILE, section), **{field: getattr(getattr(PROFILE, section), field) * more})
    plans = [item.plan for item in run.layers]
    assert us_with_machine(frozen, step, plans, replace(PROFILE, **{section: faster})) <= latency_us + 1e-6
