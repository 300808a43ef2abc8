"""Simulated against measured makespan on the emulated accelerator.

    python benchmarks/sim_vs_measured.py [--steps 60] [--plot error.png]

A model with random weights decodes on the runtime: CPU kernels for real, accelerator and link emulated and paced to
a profile that is slower than this host, so that the pace and not the host decides. The plans of the second half of the
steps are simulated as task graphs with the median task times of the first half; the time between layers (attention,
router) is taken as measured. Printed: median and 90th percentile of |simulated - measured| / measured over those steps,
for the time in which layers ran. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe.experts_layout import find_experts
from hybrimoe.runtime import RuntimeConfig, Session
from hybrimoe.tracing import plots
from scheduler.graph import DenseTimes, PlannedLayer, TaskGraph
from scheduler.profile import AccelProfile, CpuProfile, HardwareProfile, LinkProfile
from scheduler.records import TaskRecord

LAYERS, EXPERTS, TOP_K, HIDDEN, INTER = 6, 32, 4, 512, 512
#: The emulated device: an expert of 1.6 MB (bfloat16) takes 0.4 ms there and 0.5 ms over the link.
PACING = HardwareProfile(
    name="paced emulation",
    provenance="datasheet",
    source="made up: slower than the host that emulates it",
    cpu=CpuProfile(read_gbps=10.0, gflops={"bfloat16": 50.0}),
    accel=AccelProfile(mem_gbps=4.0, tflops=0.1, launch_us=5.0),
    link=LinkProfile(gbps=3.0, latency_us=5.0),
)
COMPUTE = ("cpu_expert", "accel_expert")
WARM_UP_STEPS = 8
#: Steps of the same policy between two changes of policy; rounds alternate so that drift of the machine is shared.
POLICIES = ("static", "hybrimoe", "ours")


def build_model() -> torch.nn.Module:
    """A mixture-of-experts model with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=INTER,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        decoder_sparse_step=1, max_position_embeddings=512, norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def errors(policy: str, steps: int) -> list[tuple[float, float]]:
    """(simulated, measured) us of each decode step."""
    model = build_model()
    session = Session(
        RuntimeConfig(accelerator="emulated", gpu_expert_slots=0.25, policy=policy, pacing=PACING, threads=1)
    )
    for path, module in find_experts(model):
        setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], session.add_layer(path, module))
    session.finalize(model)
    try:
        decode(model, WARM_UP_STEPS, 0)
        session.record_timeline(True)
        decode(model, steps, WARM_UP_STEPS)
        session.record_timeline(False)
        return compare(session.plans, session.timeline, session)
    finally:
        session.close()


def decode(model: torch.nn.Module, steps: int, first: int) -> None:
    """``steps`` single tokens, each on its own: the experts are the same work as with a cache."""
    with torch.inference_mode():
        for step in range(steps):
            model(input_ids=torch.tensor([[(7 * (step + first)) % 512]]), use_cache=False)


class MedianTimes:
    """Task times of recorded decode steps (one token an expert): the median of each kind."""

    def __init__(self, records: Sequence[TaskRecord]) -> None:
        kinds = {"cpu": ("cpu_expert",), "accel": ("accel_expert",), "link": ("transfer", "prefetch")}
        self._us = {
            lane: median([r.duration_us for r in records if r.kind in of_lane] or [0.0])
            for lane, of_lane in kinds.items()
        }

    def cpu_us(self, layer: int, n_tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Median time of a CPU expert."""
        return np.full(len(n_tokens), self._us["cpu"])

    def accel_us(self, layer: int, n_tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Median time of an accelerator expert."""
        return np.full(len(n_tokens), self._us["accel"])

    def transfer_us(self, layer: int) -> float:
        """Median time of a transfer."""
        return float(self._us["link"])


def compare(
    plans: Sequence[PlannedLayer], timeline: Sequence[TaskRecord], session: Session
) -> list[tuple[float, float]]:
    """(simulated, measured) us in layers, by step of the second half."""
    n_bytes = session.layer_specs()[0].spec.record_bytes
    steps = sorted({item.plan.step for item in plans})
    half = steps[len(steps) // 2]
    times = MedianTimes([record for record in timeline if record.step < half])
    pairs = []
    for step in (step for step in steps if step >= half):
        layers = [item for item in plans if item.plan.step == step]
        spans = [layer_span(item, timeline) for item in layers]
        if any(span is None for span in spans):
            continue
        known = [span for span in spans if span is not None]
        gaps = [0.0, *(max(0.0, after[0] - before[1]) for before, after in pairwise(known))]
        items = [
            replace_dense(item, DenseTimes(attention_us=gap, lane="disk"))
            for item, gap in zip(layers, gaps, strict=True)
        ]
        graph = TaskGraph.from_plans(items, times, n_bytes)
        measured = known[-1][1] - known[0][0] - sum(gaps)
        pairs.append((compute_end(graph) - sum(gaps), measured))
    return pairs


def replace_dense(item: PlannedLayer, dense: DenseTimes) -> PlannedLayer:
    """The same layer with other dense times; they go to a lane of their own."""
    return item._replace(dense=replace(dense))


def compute_end(graph: TaskGraph) -> float:
    """End of the last computation (prefetches may go on)."""
    schedule = graph.simulate()
    return max(schedule.end_us[task.id] for task in graph.tasks if task.kind in COMPUTE)


def layer_span(item: PlannedLayer, timeline: Sequence[TaskRecord]) -> tuple[float, float] | None:
    """(start, end) of a layer's own computations and demand transfers."""
    mine = [r for r in timeline if r.step == item.plan.step and r.layer == item.plan.layer and r.kind != "prefetch"]
    ends = [r.end_us for r in mine if r.kind in COMPUTE]
    return (min(r.start_us for r in mine), max(ends)) if ends else None


def main() -> None:
    """Print the errors of each policy and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every: dict[str, list[float]] = {}
    for policy in POLICIES:
        pairs = errors(policy, arguments.steps)
        every[policy] = [abs(simulated - measured) / measured for simulated, measured in pairs]
        simulated, measured = (median(values) for values in zip(*pairs, strict=True))
        print(
            f"{policy:10s} {len(pairs)} steps: simulated {simulated:.0f} us, "
            f"measured (emulated accelerator) {measured:.0f} us, "
            f"median error {median(every[policy]):.1%}, 90th percentile {np.percentile(every[policy], 90):.1%}"
        )
    print(f"all        median error {median(e for found in every.values() for e in found):.1%}")
    if arguments.plot is not None:
        shares = [float(share) for share in np.linspace(0, 100, 21)]
        curves = {policy: [float(v) for v in np.percentile(found, shares)] for policy, found in every.items()}
        arguments.plot.write_bytes(
            plots.lines("Simulated against measured", "percentile of steps", "error", shares, curves)
        )


if __name__ == "__main__":
    main()
