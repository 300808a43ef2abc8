"""The public measurements of public_rows.yaml, and what the simulator says of each: rows, machines, shapes, speeds.

Behind calibration_fit.py and calibration_report.py. Every figure that we give is simulated; the public ones were
measured by the authors of their pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.machine.costs import CostModel
from scheduler.machine.engine_profile import EngineProfile
from scheduler.machine.profile import AccelProfile, CpuProfile, DenseProfile, HardwareProfile, LinkProfile, ModelShape
from scheduler.planner.policies import POLICIES
from scheduler.simulator.dense import DenseCosts
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.demands import DemandSource
from scheduler.traces.synthetic import Locality, generate, locality_named
from yaml_rules.engines import load_engine
from yaml_rules.located import read_yaml
from yaml_rules.shapes import load_shape
from yaml_rules.shapes.derive import derive_shape

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "public_rows.yaml"
DECODE_TOKENS = 1
#: As in the shipped data sheet profiles (yaml_rules/hardware): shares of nominal memory rate, link and tensor rate.
SHARE_OF_NOMINAL, SHARE_OF_TENSOR = 0.8, 0.5
#: GFLOPS of a core on int4 experts; decode is bound by memory, so that it hardly matters.
CORE_GFLOPS = 125.0
DATASHEET_LAUNCH_US, DATASHEET_SYNC_US = 8.0, 20.0
#: Blackwell's units multiply MXFP4 so many times faster than int8 (llama.cpp, pull request 17906).
NATIVE_FP4_SPEED = 2.0
ENGINES = {
    "llama_cpp": "", "llama_cpp_2025": "builds before 2025-11", "llama_cpp_rocm": "AMD cards",
    "llama_cpp_rocm_2025": "AMD cards, builds before 2026-08",
}  # fmt: skip
#: Before, llama.cpp fused fewer kernels (pull request 16991 and those before it); prompts went over the host a layer;
#: on AMD cards tiles were as wide as the step (pull requests 24546 and 28552).
FUSED_FROM, PROMPTS_FROM, AMD_TILES_FROM = "2025-11", "2025-08", "2026-08"
OTHER = "other engine version"
#: Routing of models that the file says nothing of, and how closely a published share of used experts is met.
LOCALITY, POPULARITY_STEPS, ROUTED_LAYERS = "olmoe-1b-7b", 8, 8
DECODE, PREFILL = "decode", "prefill"
STREAMING = POLICIES["llama_cpp"].streaming


def engines() -> dict[str, EngineProfile]:
    """The shipped engines by name."""
    return {name: EngineProfile.from_mapping(load_engine(name)) for name in ENGINES}


@cache
def public() -> dict[str, Any]:
    """The file of rows."""
    return dict(read_yaml(ROWS).data)


def driven(data: dict[str, Any], row: dict[str, Any], known: Mapping[str, EngineProfile]) -> HardwareProfile:
    """The row's machine as its engine drives it."""
    speed = NATIVE_FP4_SPEED if row.get("native_fp4") else 1.0
    engine = known[engine_of(data, row)]
    return engine.on(machine(data, row), row["graphs"], row.get("windows", False), speed, is_streamed(data, row))


def engine_of(data: dict[str, Any], row: dict[str, Any]) -> str:
    """Name of the engine whose parameters a row is simulated with, by card and date of build."""
    if is_amd(data, row):
        return "llama_cpp_rocm" if build(data, row) >= AMD_TILES_FROM else "llama_cpp_rocm_2025"
    return "llama_cpp" if build(data, row) >= FUSED_FROM else "llama_cpp_2025"


def half(data: dict[str, Any], row: dict[str, Any]) -> str:
    """The row's half; or that its build, by date, is an engine without calibration rows: neither fitted nor judged."""
    old_amd = is_amd(data, row) and build(data, row) < FUSED_FROM
    old_prompt = row["phase"] == PREFILL and build(data, row) < PROMPTS_FROM
    return OTHER if old_amd or old_prompt else str(row["half"])


def build(data: dict[str, Any], row: dict[str, Any]) -> str:
    """Year and month."""
    return str(data["sources"][row["source"]]["build"])


def is_amd(data: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the row's card is AMD's."""
    return card(data, row).startswith(("Radeon", "RX "))


def card(data: dict[str, Any], row: dict[str, Any]) -> str:
    """The row's GPU."""
    return str(data["machines"][row["machine"]]["gpu"])


def is_mixed(data: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether not all experts are on the GPU."""
    return bool(row["on_gpu"] < shape_of(data, row["model"], row["quant"]).n_layers)


def is_streamed(data: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether it is a prompt whose experts are uploaded."""
    assert STREAMING is not None
    return bool(row["phase"] == PREFILL and row["tokens"] >= STREAMING.min_tokens and is_mixed(data, row))


def machine(data: dict[str, Any], row: dict[str, Any]) -> HardwareProfile:
    """A row's machine by the convention of the shipped data sheet profiles: the routing comes to the host a layer."""
    known = data["machines"][row["machine"]]
    rate = CORE_GFLOPS * known["cores"]
    return HardwareProfile(
        row["machine"], "datasheet",
        CpuProfile(
            SHARE_OF_NOMINAL * row.get("host_gbps", known["host_gbps"]),
            dict.fromkeys(("float32", "bfloat16", "int8", "int4"), rate),
        ),
        AccelProfile(SHARE_OF_NOMINAL * known["gpu_gbps"], SHARE_OF_TENSOR * known["gpu_tflops"], DATASHEET_LAUNCH_US),
        LinkProfile(SHARE_OF_NOMINAL * known["link_gbps"]), dense=DenseProfile(sync_us=DATASHEET_SYNC_US),
    )  # fmt: skip


def speed(data: dict[str, Any], row: dict[str, Any], profile: HardwareProfile) -> float:
    """Simulated tokens/s of a row."""
    shape = shape_of(data, row["model"], row["quant"])
    decode = row["phase"] == DECODE
    source = demands(row["model"], shape, DECODE_TOKENS if decode else row["tokens"], decode)
    config = SimulationConfig(
        "llama_cpp", n_slots=row["on_gpu"] * shape.n_experts, context_tokens=row["context"],
        streaming=STREAMING if is_streamed(data, row) else None,
    )  # fmt: skip
    steps = [step if decode else replace(step, position=row["context"]) for step in source.trace.steps()]
    (result,) = Simulator(source.trace, profile, shape, config, source=source, steps=steps).run()
    return (1 if decode else row["tokens"]) * 1e3 / result.latency_ms


def speed_by_sums(data: dict[str, Any], row: dict[str, Any], profile: HardwareProfile) -> float:
    """``speed``, without a simulation: with whole layers placed, a step is a sum. For fits, which ask often."""
    shape, n = shape_of(data, row["model"], row["quant"]), row["tokens"]
    dense, costs = DenseCosts(profile, shape), CostModel(profile, shape, "int4", step_tokens=n)
    counts = np.ones((1, shape.top_k), np.int64) if n == 1 else tokens_by_expert(row["model"], shape, n)
    shared_us, on_gpu = dense.shared_us(n), row["on_gpu"] / shape.n_layers
    experts_us = costs.accel_us(0, counts).sum() / len(counts)
    if is_streamed(data, row):
        away = counts[row["on_gpu"] :]
        upload_us = costs.transfer_us(0) * np.count_nonzero(away) / len(away)
        away_us = max(upload_us, shared_us) + costs.accel_us(0, away).sum() / len(away)
        experts_us = costs.accel_us(0, counts[: row["on_gpu"]]).sum() / max(row["on_gpu"], 1)
    else:
        away_us = max(shared_us, profile.dense.handoff_us + costs.cpu_us(0, counts).sum() / len(counts))
    layer_us = dense.attention_us(n, row["context"]) + dense.gate_us(n) + dense.combine_us()
    step_us = shape.n_layers * (layer_us + on_gpu * (shared_us + experts_us) + (1 - on_gpu) * away_us) + dense.head_us()
    return float(n * 1e6 / step_us)


@cache
def _counted(model: str, n_layers: int, n_experts: int, top_k: int, n_tokens: int) -> NDArray[np.int64]:
    source = _demands(model, n_layers, n_experts, top_k, n_tokens, False)
    counts = np.zeros((n_layers, n_experts), np.int64)
    for demand in source.step(next(iter(source.trace.steps()))):
        counts[demand.layer, demand.expert_ids] = demand.n_tokens
    return counts


def tokens_by_expert(model: str, shape: ModelShape, n_tokens: int) -> NDArray[np.int64]:
    """int64 [layers, experts]: tokens of each expert in one micro-batch of made routing, 0 for those without."""
    return _counted(model, shape.n_layers, shape.n_experts, shape.top_k, n_tokens)


@cache
def _shape(name: str) -> ModelShape:
    return ModelShape.from_mapping(load_shape(name))


def shape_of(data: dict[str, Any], name: str, quant: str) -> ModelShape:
    """A shape of the file, or a shipped one, with the bits of a quantisation."""
    own = data["shapes"].get(name)
    shape = _shape(name) if own is None else _own_shape(data, name)
    return replace(shape, weight_bits=tuple(data["quants"][quant]))


def _own_shape(data: dict[str, Any], name: str) -> ModelShape:
    own = data["shapes"][name]
    return ModelShape.from_mapping({**derive_shape(own["config"], name), **own.get("sizes", {})})


@cache
def _demands(model: str, n_layers: int, n_experts: int, top_k: int, n_tokens: int, decode: bool) -> DemandSource:
    n_prefill = 0 if decode else n_tokens
    locality = routing_of(model, n_experts, top_k)
    return DemandSource(generate(n_layers, n_experts, top_k, n_tokens, 1, n_prefill, locality, None))


def demands(model: str, shape: ModelShape, n_tokens: int, decode: bool) -> DemandSource:
    """Made routing: llama.cpp's placement does not look at it, but prompts cost by how many experts they use."""
    return _demands(model, shape.n_layers, shape.n_experts, shape.top_k, n_tokens, decode)


@cache
def routing_of(model: str, n_experts: int, top_k: int) -> Locality:
    """How a model's prompts are routed; where the share of used experts is published, popularity is set to it."""
    known = public()["routing"].get(model, {})
    like = locality_named(known.get("locality", LOCALITY))
    if "used" not in known:
        return like
    low, high = 0.0, 4.0 * like.popularity
    for _ in range(POPULARITY_STEPS):
        middle = (low + high) / 2
        made = generate(ROUTED_LAYERS, n_experts, top_k, known["tokens"], 1, known["tokens"],
                        replace(like, popularity=middle), None)  # fmt: skip
        used = np.mean([np.unique(made.expert_ids[:, layer]).size for layer in range(ROUTED_LAYERS)]) / n_experts
        low, high = (middle, high) if used > known["used"] else (low, middle)
    return replace(like, popularity=(low + high) / 2)
