"""Property: what was executed is a linear extension of the task graph of its plans, and no poison was ever read."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpu_kernels import relative_error
from cpu_kernels.backends.torch_backend import TorchBackend
from gpu_kernels import EmulatedAccelerator
from hybrimoe.runtime import RuntimeConfig, Session
from scheduler import CostModel, HardwareProfile
from scheduler.graph import TaskGraph
from scheduler.machine.profile import LinkProfile
from scheduler.records import TaskRecord

from .conftest import PROFILE, MiniExperts, Rig, routing

POLICIES = [
    "hybrimoe", "ours", "static", "llama_cpp", "moe_infinity", "fiddler", "freetoken", "adapmoe", "hobbit", "fate",
    "promoe", "cpu_only/none/lru", "accel_only/none/lru", "hybrimoe/gate_topk/lru", "on_demand/impact/mrs",
]  # fmt: skip
N_LAYERS, N_EXPERTS = 4, 6
SLACK_US = 1.0
"""Host timestamps of two threads: taken just before and after the same hand-over."""

ORIGINALS = [MiniExperts(N_EXPERTS, seed) for seed in range(N_LAYERS)]
SLOW = replace(PROFILE, link=LinkProfile(gbps=0.2, latency_us=50.0))
"""Paces copies to 300 us each, so that computations wait for them."""


class TinyMoE(torch.nn.Module):
    """Blocks with a linear router, so that policies have predictions to prefetch by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for experts in ORIGINALS:
            block = torch.nn.Module()
            block.gate = torch.nn.Linear(experts.hidden_dim, N_EXPERTS, bias=False)
            block.experts = experts
            self.layers.append(block)


def open_rig(policy: str, slots: int, placements: list[str], slow: bool) -> Rig:
    model = TinyMoE()
    pacing: HardwareProfile | None = SLOW if slow else None
    config = RuntimeConfig(
        "emulated", slots, "float32", backend="torch", policy=policy, profile=pacing or PROFILE, pacing=pacing
    )
    session = Session(config)
    layers = []
    for index, experts in enumerate(ORIGINALS):
        path = f"layers.{index}.experts"
        layers.append(session.add_layer(path, experts, placements[index]))  # type: ignore[arg-type]
        model.set_submodule(path, layers[-1])
    session.finalize(model)
    rig = Rig(session, layers, ORIGINALS)
    rig.model = model  # type: ignore[attr-defined]
    return rig


def routed(rig: Rig, layer: int, n_tokens: int, top_k: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Hidden states routed by the layer's own gate, so that lookahead learns it."""
    hidden = routing(n_tokens, N_EXPERTS, top_k, seed)[0]
    with torch.no_grad():
        weights, index = rig.model.layers[layer].gate(hidden).softmax(-1).topk(top_k)  # type: ignore[attr-defined]
    return hidden, index, weights


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    policy=st.sampled_from(POLICIES),
    slots=st.integers(1, N_LAYERS * N_EXPERTS),
    placements=st.lists(st.sampled_from(["hybrid", "hybrid", "cpu", "accelerator"]), min_size=4, max_size=4),
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5),
    slow=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_execution_extends_the_task_graph(
    policy: str, slots: int, placements: list[str], steps: list[tuple[int, int]], slow: bool, seed: int
) -> None:
    slots = min(slots, N_EXPERTS * sum(placement != "cpu" for placement in placements))
    rig = open_rig(policy, slots, placements, slow)
    session = rig.session
    resident = session.slot_contents()
    session.record_timeline(True)
    for step, (n_tokens, top_k) in enumerate(steps):
        for layer in range(N_LAYERS):
            call = routed(rig, layer, n_tokens, top_k, seed + 17 * step + layer)
            out = rig.call(layer, *call)
            assert torch.isfinite(out).all()
            assert relative_error(out, rig.expected(layer, *call)) < 1e-5
    records, plans = session.timeline, session.plans
    assert len(plans) == len(steps) * N_LAYERS
    costs = session.costs or CostModel.uniform(N_LAYERS)  # no layer with slots: nothing was planned by costs
    graph = TaskGraph.from_plans(plans, costs, session.layer_specs()[0].spec.record_bytes)
    graph.validate(slots, resident)
    graph.check_execution(records, SLACK_US)
    check_each_expert_once(plans, records)
    session.close()


def check_each_expert_once(plans: list, records: list[TaskRecord]) -> None:
    ran = sorted((r.step, r.layer, r.expert, r.n_tokens) for r in records if r.kind in ("cpu_expert", "accel_expert"))
    wanted = sorted(
        (item.plan.step, item.plan.layer, expert, n_tokens)
        for item in plans
        for expert, n_tokens in zip(item.demand.expert_ids.tolist(), item.demand.n_tokens.tolist(), strict=True)
    )
    assert ran == wanted


def test_lanes_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU lane works while a transfer is under way, which here ends once somebody works, or after a while."""
    works, met = threading.Event(), list[bool]()
    copy, run = EmulatedAccelerator._transfer, TorchBackend.run

    def copying(accelerator: EmulatedAccelerator, *arguments: Any) -> None:
        works.clear()
        copy(accelerator, *arguments)
        if sum(met) < 5:  # one may have begun to work right before the copy began
            met.append(works.wait(0.25))

    def running(backend: TorchBackend, *arguments: Any) -> None:
        works.set()
        run(backend, *arguments)

    monkeypatch.setattr(EmulatedAccelerator, "_transfer", copying)
    monkeypatch.setattr(TorchBackend, "run", running)
    rig = open_rig("hybrimoe", 4, ["hybrid"] * 4, slow=True)
    rig.session.record_timeline(True)
    for step in range(4):
        for layer in range(N_LAYERS):
            rig.call(layer, *routed(rig, layer, 8, 4, step * 7 + layer))
    records = rig.session.timeline
    copies = [r for r in records if r.lane == "link"]
    others = [r for r in records if r.lane != "link"]
    rig.session.close()
    assert copies
    assert any(c.start_us < r.start_us < c.end_us for c in copies for r in others)
