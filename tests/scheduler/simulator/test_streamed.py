"""Prompts that are streamed: hand-computed times, what moves, what stays, and settings that cannot be."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from scheduler.errors import PolicyError
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.planner.policies import POLICIES
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig, SimulationSettingError, Simulator
from scheduler.streaming import Streaming
from scheduler.traces.synthetic import generate

SHAPE = ModelShape(name="toy", n_layers=4, n_experts=8, top_k=2, hidden=256, inter=512)
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy", "provenance": "datasheet",
        "cpu": {"read_gbps": 10.0, "gflops": {"int4": 20.0}},
        "accel": {"mem_gbps": 400.0, "tflops": 20.0, "launch_us": 3.0},
        "link": {"gbps": 8.0, "latency_us": 4.0}, "disk": {"gbps": 2.0},
    }
)  # fmt: skip
TRACE = generate(4, 8, 2, 80, 2, 64)
TRANSFER_US = 4.0 + SHAPE.expert_bytes("int4") / 8e3


def simulated(streaming, n_slots=8, steps=None, policy="static", profile=PROFILE):
    config = SimulationConfig(policy, n_slots=n_slots, streaming=streaming)
    simulator = Simulator(TRACE, profile, SHAPE, config, keep_records=True, steps=steps)
    return simulator, simulator.run()


def busy_us(simulator, lane, kind):
    return sum(r.duration_us for r in simulator.records if (r.lane, r.kind) == (lane, kind))


def test_a_layer_waits_for_its_experts_and_then_computes_them_all():
    """Nothing overlaps: a prompt takes what its lanes take together, and the CPU has no part in it."""
    steps = list(TRACE.steps("prefill"))
    simulator, (prefill,) = simulated(Streaming(32), steps=steps)
    dense_us = sum(busy_us(simulator, "accel", kind) for kind in ("attention", "gate", "combine"))
    together = dense_us + busy_us(simulator, "link", "transfer") + busy_us(simulator, "accel", "accel_expert")
    assert prefill.latency_ms * prefill.steps * 1e3 == pytest.approx(together)
    assert prefill.cpu_busy == 0.0
    active = sum(demand.expert_ids.size for step in steps for demand in simulator.source.step(step))
    assert prefill.transfers == round(active * (1 - prefill.hit_rate))
    assert busy_us(simulator, "link", "transfer") == pytest.approx(prefill.transfers * TRANSFER_US)
    assert prefill.link_bytes == prefill.transfers * SHAPE.expert_bytes("int4")


def test_slots_keep_what_they_have_and_no_record_overlaps_another_of_its_lane():
    for ahead in (False, True):
        simulator, _ = simulated(Streaming(32, ahead), steps=list(TRACE.steps("prefill")))
        other, _ = simulated(None, steps=list(TRACE.steps("decode"))[:1])
        assert set(simulator.resident_slots().values()) == set(other.resident_slots().values())
        for lane in ("accel", "link"):
            times = [(r.start_us, r.end_us) for r in simulator.records if r.lane == lane]
            assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(times))


def test_uploading_ahead_hides_the_shorter_lane_and_brings_whole_layers():
    steps = list(TRACE.steps("prefill"))
    _, (waits,) = simulated(Streaming(32), n_slots=0, steps=steps)
    simulator, (ahead,) = simulated(Streaming(32, ahead=True), n_slots=0, steps=steps)
    assert ahead.transfers == ahead.steps * SHAPE.n_layers * SHAPE.n_experts
    link_ms = busy_us(simulator, "link", "transfer") / 1e3 / ahead.steps
    accel_ms = sum(r.duration_us for r in simulator.records if r.lane == "accel") / 1e3 / ahead.steps
    first_ms = SHAPE.n_experts * TRANSFER_US / 1e3
    assert max(link_ms, accel_ms) < ahead.latency_ms <= max(link_ms, accel_ms) + first_ms + accel_ms / SHAPE.n_layers
    slow_experts = replace(PROFILE, accel=replace(PROFILE.accel, tflops=0.05))
    _, (waits,) = simulated(Streaming(32), n_slots=0, steps=steps, profile=slow_experts)
    _, (ahead,) = simulated(Streaming(32, ahead=True), n_slots=0, steps=steps, profile=slow_experts)
    assert ahead.latency_ms < waits.latency_ms


def test_short_prompts_and_replies_are_planned_as_ever():
    without, with_one = (simulated(streaming)[1] for streaming in (None, Streaming(65)))
    assert with_one == without
    assert simulated(Streaming(64))[1][1].transfers == without[1].transfers


def test_a_prompt_in_chunks_carries_its_experts_once_a_chunk():
    whole = simulated(Streaming(16), n_slots=0, steps=list(TRACE.steps("prefill")))[1][0]
    chunks = simulated(Streaming(16), n_slots=0, steps=list(TRACE.steps("prefill", 16)))[1][0]
    assert chunks.steps == whole.steps == 2, "a prompt is one, however many chunks it has"
    assert chunks.tokens == whole.tokens
    assert chunks.transfers > 2 * whole.transfers
    assert chunks.latency_ms > whole.latency_ms


def test_several_accelerators_stream_too():
    config = SimulationConfig("static", n_slots=8, streaming=Streaming(32, ahead=True))
    two = replace(PROFILE, accel=replace(PROFILE.accel, count=2))
    one, both = (simulate(TRACE, profile, SHAPE, config)[0] for profile in (PROFILE, two))
    assert both.link_bytes == one.link_bytes
    assert np.isclose(both.latency_ms, one.latency_ms)


def test_llama_cpps_preset_says_how_it_streams():
    assert POLICIES["llama_cpp"].streaming == Streaming(32, ahead=False)
    assert POLICIES["static"].streaming is None


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(PolicyError, match="min_tokens must be an integer of at least 1, found 0"):
        Streaming(0)
    with pytest.raises(PolicyError, match="ahead must be true or false"):
        Streaming(1, 1)
    with pytest.raises(SimulationSettingError, match="not with experts on disk"):
        SimulationConfig(host_ratio=0.5, streaming=Streaming())
