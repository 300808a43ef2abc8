"""The lower bound: by hand, against the linear program that it approximates, and below every policy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

from scheduler.lossy import resolve_lossy
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.planner.policies import PRESETS
from scheduler.simulator.bound import LANES, Prices, Work, least_us, lower_bounds, priced, work_of
from scheduler.simulator.engine import SimulationError
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.streaming import Streaming
from scheduler.traces.predictions import predictions_for
from scheduler.traces.synthetic import generate

POLICIES = (*PRESETS, "optimal/perfect/belady", "value/perfect/belady", "on_demand/gate_topk/lru", "cpu_only/none/lru")


def machine(cpu=10.0, link=8.0, accel=400.0, sync=0.0, handoff=0.0, contention=(1.0, 1.0)):
    return HardwareProfile.from_mapping(
        {
            "name": "toy", "provenance": "datasheet",
            "cpu": {"read_gbps": cpu, "gflops": {"int4": 200.0}},
            "accel": {"mem_gbps": accel, "tflops": 20.0, "launch_us": 3.0},
            "link": {"gbps": link, "latency_us": 4.0}, "dense": {"sync_us": sync, "handoff_us": handoff},
            "contention": {"cpu_with_link": contention[0], "link_with_cpu": contention[1]},
        }
    )  # fmt: skip


def toy(n_layers=3, n_experts=8, top_k=2):
    return ModelShape(
        name="toy", n_layers=n_layers, n_experts=n_experts, top_k=top_k, hidden=256, inter=512,
        attention_params=262144, kv_bytes=64, shared_params=98304,
    )  # fmt: skip


def simulator(trace, policy="static", ratio=0.5, profile=None, phase=None, **fields):
    shape = toy(trace.n_layers, trace.n_experts, trace.top_k)
    config = SimulationConfig(policy=policy, cache_ratio=ratio, **fields)
    return Simulator(
        trace, profile or machine(), shape, config, predictions_for(trace, "transition", trace), phase=phase
    )


def linear_program(work: Work) -> float:
    """The program of the module, stated anew: experts' shares in slots and copies of every moment, by HiGHS."""
    n, n_uses = work.dense_us.size, work.at.size
    keys = np.flatnonzero(np.diff(work.first))
    of_use = np.repeat(np.arange(keys.size), np.diff(work.first)[keys])
    width = keys.size * n
    time, beside, handed, there, copied, on_accel = np.cumsum([0, n, n, n, width, width])
    n_variables = on_accel + n_uses
    rows, limits = [], []

    def at_most(limit, *terms):
        rows.append(terms)
        limits.append(limit)

    for m in range(n):
        uses = np.flatnonzero(work.at == m)
        cpu = [(on_accel + i, -work.cpu_us[i]) for i in uses]
        whole, slowed = float(work.cpu_us[uses].sum()), (beside + m, 1.0 - work.cpu_rate)
        at_most(-whole, (time + m, -1.0), (handed + m, work.handoff_us), slowed, *cpu)
        at_most(-work.shared_us[m], (time + m, -1.0), *[(on_accel + i, work.accel_us[i]) for i in uses])
        each = min(work.handoff_us, work.all_accel_us[m]) - work.all_accel_us[m]
        more = [(on_accel + i, -(work.cpu_us[i] + each)) for i in uses]
        at_most(-work.all_accel_us[m] - whole - each * uses.size, (time + m, -1.0), slowed, *more)
        at_most(whole, (beside + m, work.cpu_rate), *[(c, -us) for c, us in cpu])
        both = work.cpu_rate + work.link_rate - 1.0
        if not work.idle[m]:
            carried = [(copied + j * n + m, work.copy_us[key]) for j, key in enumerate(keys)]
            at_most(work.dense_us[m] - whole, (time + m, -1.0), (beside + m, -both), *cpu, *carried)
        at_most(work.n_slots, *[(there + j * n + m, 1.0) for j in range(keys.size)])
        for i in uses:
            at_most(-1.0, (on_accel + i, -1.0), (handed + m, -1.0))
            at_most(0.0, (on_accel + i, 1.0), (there + of_use[i] * n + m, -1.0), (copied + of_use[i] * n + m, -1.0))
        for j in range(keys.size if m else 0):
            now = there + j * n + m
            at_most(0.0, (now, 1.0), (now - 1, -1.0), (copied + j * n + m - 1, -1.0))
    entries = [(row, column, value) for row, terms in enumerate(rows) for column, value in terms]
    row, column, value = zip(*entries, strict=True)
    most = np.full(n_variables, np.inf)
    most[handed:copied], most[on_accel:] = 1.0, 1.0
    cost = np.zeros(n_variables)
    cost[:n] = 1.0
    matrix = sparse.csr_matrix((value, (row, column)), shape=(len(rows), n_variables))
    found = linprog(cost, matrix, limits, bounds=np.stack([np.zeros(n_variables), most], axis=1), method="highs")
    assert found.status == 0, found.message
    return float(found.fun + work.dense_us.sum())


@pytest.mark.parametrize("handoff", [0.0, 25.0])
@pytest.mark.parametrize("contention", [(1.0, 1.0), (0.65, 0.9)])
def test_it_comes_close_to_the_linear_program_and_stays_below(contention, handoff):
    trace = generate(3, 8, 2, 16, 1, seed=2)
    work = work_of(simulator(trace, ratio=0.25, profile=machine(handoff=handoff, contention=contention)), "decode")
    optimum = linear_program(work)
    found = least_us(work, 1500)
    assert 0.985 * optimum < found <= optimum * (1.0 + 1e-7)


def test_without_slots_all_is_done_by_the_cpu_or_copied():
    """One layer, one expert a token: the least of CPU and copy; what the dense part takes comes on top."""
    trace = generate(1, 4, 1, 40, 1, seed=0)
    made = simulator(trace, ratio=0.0, profile=machine(link=0.01))
    work = work_of(made, "decode")
    assert least_us(work) == pytest.approx(float(work.dense_us.sum() + work.cpu_us.sum()), rel=2e-2)


def test_with_all_in_slots_it_is_the_accelerators_time():
    trace = generate(3, 8, 2, 24, 1, seed=0)
    made = simulator(trace, "optimal/none/lru", ratio=1.0, profile=machine(cpu=0.5))
    work = work_of(made, "decode")
    bound = lower_bounds(made)["decode"]
    assert bound == pytest.approx(float((work.dense_us + work.all_accel_us).sum()) / trace.n_tokens / 1e3, rel=1e-2)
    (result,) = made.run()
    assert bound <= result.latency_ms == pytest.approx(bound, rel=1e-2)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 50), ratio=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]), policy=st.sampled_from(POLICIES),
    cpu=st.sampled_from([1.0, 10.0, 60.0]), link=st.sampled_from([0.5, 6.0, 60.0]), sync=st.sampled_from([0.0, 400.0]),
    handoff=st.sampled_from([0.0, 150.0]), contention=st.sampled_from([(1.0, 1.0), (0.65, 0.9), (0.5, 0.4)]),
    prompt=st.sampled_from([0, 5]),
)  # fmt: skip
def test_no_policy_beats_it(seed, ratio, policy, cpu, link, sync, handoff, contention, prompt):
    trace = generate(3, 8, 2, 12, 2, n_prefill=prompt, seed=seed)
    profile = machine(cpu, link, 400.0, sync, handoff, contention)
    made = simulator(trace, policy, ratio, profile)
    bounds = lower_bounds(made, rounds=60)
    for result in made.run():
        assert 0.0 < bounds[result.phase] <= result.latency_ms


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_any_prices_give_a_bound(seed):
    """Weak duality: also at prices that nobody looked for."""
    trace = generate(3, 8, 2, 10, 1, seed=seed % 7)
    made = simulator(trace, "oracle", 0.25, machine(contention=(0.65, 0.9), handoff=20.0))
    work, draw = work_of(made, "decode"), np.random.default_rng(seed)
    n = work.dense_us.size
    link = draw.random(int(work.group[-1]) + 1)[work.group]
    shares = draw.dirichlet(np.ones(LANES), n).T
    bound, _ = priced(work, Prices((1.0 - link) * shares, link, draw.exponential(5.0, n)))
    (result,) = made.run()
    assert bound <= result.latency_ms * 1e3 * result.steps


def test_streamed_prompts_and_chunks_are_bounded_too():
    trace = generate(3, 8, 2, 24, 2, n_prefill=16, seed=3)
    made = simulator(trace, "ours", 0.25, machine(link=20.0), streaming=Streaming(8, ahead=True))
    bounds = lower_bounds(made)
    assert all(bounds[result.phase] <= result.latency_ms for result in made.run())
    chunked = list(trace.steps("prefill", 5))
    parts = Simulator(trace, machine(), toy(), SimulationConfig(cache_ratio=0.5), steps=chunked)
    bounds = lower_bounds(parts)
    (result,) = parts.run()
    assert bounds["prefill"] <= result.latency_ms


def test_what_it_does_not_cover_is_refused():
    trace = generate(3, 8, 2, 6, 1, seed=0)
    with pytest.raises(SimulationError, match="lossless"):
        lower_bounds(simulator(trace, "ours", lossy=resolve_lossy("skip")))


def test_more_slots_never_raise_it():
    trace = generate(3, 8, 2, 24, 1, seed=4)
    work = work_of(simulator(trace, ratio=0.25), "decode")
    assert least_us(replace(work, n_slots=work.n_slots + 4), 600) <= least_us(work, 600) * 1.01
