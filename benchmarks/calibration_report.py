"""The simulator against public measurements (benchmarks/public_rows.yaml): docs/calibration.md and its picture.

    python benchmarks/calibration_report.py        # the page (matplotlib; minutes, most of them for the crossed fits)
    python benchmarks/calibration_report.py --fit    # fits yaml_rules/engines/llama_cpp.yaml first (a minute)

Every figure that we give is simulated; the public ones were measured by the authors of their pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe.tracing.study import plots
from scheduler.machine.costs import CostModel
from scheduler.machine.engine_profile import EngineProfile
from scheduler.machine.profile import AccelProfile, CpuProfile, DenseProfile, HardwareProfile, LinkProfile, ModelShape
from scheduler.simulator.dense import DenseCosts
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.demands import DemandSource
from scheduler.traces.synthetic import generate
from yaml_rules.engines import load_engine
from yaml_rules.located import read_yaml
from yaml_rules.shapes import load_shape
from yaml_rules.shapes.derive import derive_shape

ROOT = Path(__file__).resolve().parents[1]
ROWS, PAGE = ROOT / "benchmarks" / "public_rows.yaml", ROOT / "docs" / "calibration.md"
PICTURE = ROOT / "docs" / "pictures" / "calibration.svg"
ENGINE_FOLDER = ROOT / "yaml_rules" / "engines"
DECODE_TOKENS = 1
#: As in the shipped data sheet profiles (yaml_rules/hardware): shares of nominal memory rate, link and tensor rate.
SHARE_OF_NOMINAL, SHARE_OF_TENSOR = 0.8, 0.5
#: GFLOPS of a core on int4 experts; decode is bound by memory, so that it hardly matters.
CORE_GFLOPS = 125.0
DATASHEET_LAUNCH_US, DATASHEET_SYNC_US = 8.0, 20.0
GOAL_MEDIAN, GOAL_WORST = 0.15, 0.35
EXPERT_LAUNCHES, ATTENTION_LAUNCHES, DENSE_LAUNCHES = 7, 11, 16
"""Kernels that llama.cpp launches a layer: router and experts, plain attention, and a layer of a dense model."""
#: What decode and prompts decide: name in the fit, least, most, start. Bounds are physical: at most 97 % of a nominal
#: memory rate, and int8 rates of up to 1.5 times the nominal tensor rate.
DECODE = {
    "accel_memory": (0.5, 0.97 / SHARE_OF_NOMINAL, 1.05), "rocm_accel_memory": (0.375, 0.97 / SHARE_OF_NOMINAL, 1.0),
    "captured_launch_us": (0.5, 6.0, 2.3), "launch_us": (1.0, 12.0, 3.5), "rocm_launch_us": (1.0, 12.0, 5.0),
    "old_launches": (1.0, 4.0, 1.3), "cpu_read": (0.4, 0.97 / SHARE_OF_NOMINAL, 0.85), "handoff_us": (0.0, 600.0, 50.0),
    "windows_handoff_us": (0.0, 2000.0, 400.0), "cache_share": (0.2, 1.0, 0.6),
}  # fmt: skip
PROMPTS = {
    "accel_tensor": (0.2, 3.0, 1.6), "rocm_accel_tensor": (0.2, 3.0, 1.6), "attention_share": (0.1, 1.0, 0.5),
    "fill_tokens": (0.0, 128.0, 40.0), "token_passes": (0.0, 10.0, 4.0),
}  # fmt: skip
#: Loss of the fit: rows further off than so much (of the logarithm) count less; one run of llama-bench differs from the
#: next by about 5 %, kernels for prompts differ by more from card to card. A machine's rows share its weight.
DECODE_LOSS: tuple[Literal["cauchy"], float] = ("cauchy", 0.05)
PROMPTS_LOSS: tuple[Literal["soft_l1"], float] = ("soft_l1", 0.2)
ENGINES = {"llama_cpp": "", "llama_cpp_2025": "builds before 2025-11", "llama_cpp_rocm": "AMD cards"}
#: Before, llama.cpp fused fewer kernels (pull request 16991 and those before it); prompts went over the host a layer.
FUSED_FROM, PROMPTS_FROM = "2025-11", "2025-08"
OTHER = "other engine version"
SHARED_VALUES = (
    "handoff_us", "windows_handoff_us", "cache_share", "attention_share", "fill_tokens", "token_passes",
)  # fmt: skip
RATIOS = (
    ("decode_ratios", "decode", False), ("mixed_decode_ratios", "decode", True), ("prefill_ratios", "prefill", False),
)  # fmt: skip
WRITTEN = ("accel_memory", "accel_tensor", "cpu_read", "launch_us", "captured_launch_us", *SHARED_VALUES)


class Row(NamedTuple):
    """A public row beside its two predictions, in tokens/s."""

    row: dict[str, Any]
    datasheet: float
    calibrated: float

    @property
    def error(self) -> float:
        """Predicted / public - 1."""
        return self.calibrated / float(self.row["speed"]) - 1.0


def main() -> None:
    """Fits where asked, and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit the engines to the calibration half first")
    data = public()
    if parser.parse_args().fit:
        write_engines(data)
    rows = compare(data, engines())
    page = document(data, rows)
    PAGE.write_text(page, encoding="utf-8")
    PICTURE.write_text(picture(rows), encoding="utf-8")
    print(page)


def engines() -> dict[str, EngineProfile]:
    """The shipped engines by name."""
    return {name: EngineProfile.from_mapping(load_engine(name)) for name in ENGINES}


@cache
def public() -> dict[str, Any]:
    """The file of rows."""
    return dict(read_yaml(ROWS).data)


def compare(data: dict[str, Any], known: Mapping[str, EngineProfile]) -> list[Row]:
    """Every row, by the data sheet alone and as its engine drives the machine."""
    return [
        Row(row, speed(data, row, machine(data, row)), speed(data, row, driven(data, row, known)))
        for row in data["rows"]
    ]


def driven(data: dict[str, Any], row: dict[str, Any], known: Mapping[str, EngineProfile]) -> HardwareProfile:
    """The row's machine as its engine drives it."""
    return known[engine_of(data, row)].on(machine(data, row), row["graphs"], row.get("windows", False))


def engine_of(data: dict[str, Any], row: dict[str, Any]) -> str:
    """Name of the engine whose parameters a row is simulated with, by card and date of build."""
    if is_amd(data, row):
        return "llama_cpp_rocm"
    return "llama_cpp" if build(data, row) >= FUSED_FROM else "llama_cpp_2025"


def half(data: dict[str, Any], row: dict[str, Any]) -> str:
    """The row's half; or that its build, by date, is an engine without calibration rows: neither fitted nor judged."""
    old_amd = is_amd(data, row) and build(data, row) < FUSED_FROM
    old_prompt = row["phase"] == "prefill" and build(data, row) < PROMPTS_FROM
    return OTHER if old_amd or old_prompt else str(row["half"])


def build(data: dict[str, Any], row: dict[str, Any]) -> str:
    """Year and month."""
    return str(data["sources"][row["source"]]["build"])


def is_amd(data: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the row's card is AMD's."""
    return str(data["machines"][row["machine"]]["gpu"]).startswith(("Radeon", "RX "))


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
    decode = row["phase"] == "decode"
    source = demands(
        shape.name, shape.n_layers, shape.n_experts, shape.top_k, DECODE_TOKENS if decode else row["tokens"], decode
    )
    config = SimulationConfig("llama_cpp", n_slots=row["on_gpu"] * shape.n_experts, context_tokens=row["context"])
    steps = [step if decode else replace(step, position=row["context"]) for step in source.trace.steps()]
    (result,) = Simulator(source.trace, profile, shape, config, source=source, steps=steps).run()
    return (1 if decode else row["tokens"]) * 1e3 / result.latency_ms


def speed_by_sums(data: dict[str, Any], row: dict[str, Any], profile: HardwareProfile) -> float:
    """``speed``, without a simulation: with whole layers placed, a step is a sum. For fits, which ask often."""
    shape, n = shape_of(data, row["model"], row["quant"]), row["tokens"]
    dense, costs = DenseCosts(profile, shape), CostModel(profile, shape, "int4")
    counts = np.ones((1, shape.top_k), np.int64) if n == 1 else tokens_by_expert(shape.name, *_sizes(shape), n)
    shared_us, on_gpu = dense.shared_us(n), row["on_gpu"] / shape.n_layers
    accel_us = shared_us + costs.accel_us(0, counts).sum() / len(counts)
    cpu_us = max(shared_us, profile.dense.handoff_us + costs.cpu_us(0, counts).sum() / len(counts))
    layer_us = dense.attention_us(n, row["context"]) + dense.gate_us(n) + dense.combine_us()
    step_us = shape.n_layers * (layer_us + on_gpu * accel_us + (1 - on_gpu) * cpu_us) + dense.head_us()
    return float(n * 1e6 / step_us)


def _sizes(shape: ModelShape) -> tuple[int, int, int]:
    return shape.n_layers, shape.n_experts, shape.top_k


@cache
def tokens_by_expert(name: str, n_layers: int, n_experts: int, top_k: int, n_tokens: int) -> NDArray[np.int64]:
    """int64 [layers, experts]: tokens of each expert in one micro-batch of made routing, 0 for those without."""
    source = demands(name, n_layers, n_experts, top_k, n_tokens, False)
    counts = np.zeros((n_layers, n_experts), np.int64)
    for demand in source.step(next(iter(source.trace.steps()))):
        counts[demand.layer, demand.expert_ids] = demand.n_tokens
    return counts


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
def demands(name: str, n_layers: int, n_experts: int, top_k: int, n_tokens: int, decode: bool) -> DemandSource:
    """Made routing: llama.cpp's placement does not look at it."""
    n_prefill = 0 if decode else n_tokens
    trace = generate(n_layers, n_experts, top_k, n_tokens, 1, n_prefill, "olmoe-1b-7b", None)
    return DemandSource(trace)


def fit(data: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Values of DECODE and PROMPTS: the least loss of log(predicted / public) over these rows; decode first."""
    values = {name: bounds[2] for name, bounds in {**DECODE, **PROMPTS}.items()}
    for phase, wanted, loss in (("decode", DECODE, DECODE_LOSS), ("prefill", PROMPTS, PROMPTS_LOSS)):
        values |= _fit_phase(data, [row for row in rows if row["phase"] == phase], wanted, loss, values)
    return values


def _fit_phase(
    data: dict[str, Any], rows: Sequence[dict[str, Any]], wanted: Mapping[str, tuple[float, float, float]],
    loss: tuple[Literal["cauchy", "soft_l1"], float], values: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    from scipy.optimize import least_squares

    weight = {row["machine"]: sum(r["machine"] == row["machine"] for r in rows) ** -0.5 for row in rows}
    dense = [row for row in data["dense_rows"] if wanted is DECODE and row["machine"] in weight]

    def residuals(at: Any) -> list[float]:
        now = {**values, **dict(zip(wanted, at, strict=True))}
        known = {name: made(now, name) for name in ENGINES}
        off = [
            weight[row["machine"]] * np.log(speed_by_sums(data, row, driven(data, row, known)) / row["speed"])
            for row in rows
        ]
        share = {row["machine"]: sum(r["machine"] == row["machine"] for r in dense) ** -0.5 for row in dense}
        return off + [share[row["machine"]] * np.log(dense_speed(data, row, now) / row["speed"]) for row in dense]

    least, most, start = (np.array(column) for column in zip(*wanted.values(), strict=True))
    found = least_squares(
        residuals,
        start,
        bounds=(least, most),
        x_scale=start,
        diff_step=np.full(start.size, 1e-3),
        loss=loss[0],
        f_scale=loss[1],
        max_nfev=60,
    )
    return {name: float(value) for name, value in zip(wanted, found.x, strict=True)}


def dense_speed(data: dict[str, Any], row: dict[str, Any], values: Mapping[str, float]) -> float:
    """tokens/s of a dense model that is all on the GPU, in captured graphs."""
    rate = values["accel_memory"] * SHARE_OF_NOMINAL * data["machines"][row["machine"]]["gpu_gbps"] * 1e3
    us = row["layers"] * DENSE_LAUNCHES * values["captured_launch_us"] + row["read_gb"] * 1e9 / rate
    return float(1e6 / us)


def made(values: Mapping[str, float], name: str) -> EngineProfile:
    """One of ENGINES with these values."""
    old = values["old_launches"] if name == "llama_cpp_2025" else 1.0
    amd = "rocm_" if name == "llama_cpp_rocm" else ""
    launch_us = old * values[f"{amd}launch_us"]
    shared: dict[str, Any] = {key: values[key] for key in SHARED_VALUES}
    return EngineProfile(
        name, accel_memory=values[f"{amd}accel_memory"], accel_tensor=values[f"{amd}accel_tensor"],
        cpu_read=values["cpu_read"], launch_us=launch_us,
        captured_launch_us=launch_us if amd else old * values["captured_launch_us"],
        **shared, expert_launches=EXPERT_LAUNCHES,
        attention_launches=ATTENTION_LAUNCHES,
    )  # fmt: skip


def write_engines(data: dict[str, Any]) -> None:
    """Writes the engines with the ratios of the held-out rows."""
    values = fit(data, [row for row in data["rows"] if half(data, row) == "calibrate"])
    known = {name: made(values, name) for name in ENGINES}
    held = [row for row in compare(data, known) if half(data, row.row) == "held-out"]
    for name, engine in known.items():
        lines = [
            "# Written by `python benchmarks/calibration_report.py --fit`; see docs/calibration.md.",
            f"name: {name}",
            f"source: llama.cpp{f', {ENGINES[name]}' if ENGINES[name] else ''}; fitted to one half of"
            " benchmarks/public_rows.yaml, ratios are measured / predicted of the other half",
            *(f"{key}: {getattr(engine, key):.4g}" for key in WRITTEN),
            f"expert_launches: {engine.expert_launches}",
            f"attention_launches: {engine.attention_launches}",
        ]
        for key, phase, mixed in RATIOS:
            near = [row for row in held if row.row["phase"] == phase and is_mixed(data, row.row) == mixed]
            ratios = sorted(row.row["speed"] / row.calibrated for row in near)
            lines.append(f"{key}: [{', '.join(f'{ratio:.3f}' for ratio in ratios)}]")
        (ENGINE_FOLDER / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def left_out(data: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """(row, predicted speed) of every row, by parameters that are fitted to all rows of the other machines."""
    rows = [row for row in data["rows"] if half(data, row) != OTHER]
    found = []
    for name in sorted({row["machine"] for row in rows}):
        values = fit(data, [row for row in rows if row["machine"] != name])
        known = {engine: made(values, engine) for engine in ENGINES}
        found += [(row, speed_by_sums(data, row, driven(data, row, known))) for row in rows if row["machine"] == name]
    return found


def document(data: dict[str, Any], rows: Sequence[Row]) -> str:
    """docs/calibration.md."""
    crossed = left_out(data)
    summary = [line for name in TITLES for line in summary_lines(data, name, rows, crossed)]
    values = "\n".join(value_line(name) for name in WRITTEN)
    return INTRODUCTION.format(
        rows=len(rows), machines=len({row.row["machine"] for row in rows}), summary="\n".join(summary), values=values,
        places="\n".join(place_lines(data, rows)), worst="\n".join(worst_lines(data, rows)),
        dense=len(data["dense_rows"]), expert_launches=EXPERT_LAUNCHES, attention_launches=ATTENTION_LAUNCHES,
        tables="\n\n".join(f"## {TITLES[name]}\n\n{table(data, name, rows)}" for name in TITLES),
    )  # fmt: skip


def value_line(key: str) -> str:
    """A value of all engines."""
    unit = "us" if key.endswith("_us") else UNITS.get(key, "share of the data sheet profile's rate")
    return f"| `{key}` | {' | '.join(f'{load_engine(name)[key]:.3g}' for name in ENGINES)} | {unit} |"


def place_lines(data: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Errors of the held-out half by where the experts are."""
    lines = []
    for told, phase, mixed in (
        ("decode, all experts on the GPU", "decode", False), ("decode, experts on the CPU", "decode", True),
        ("prompts, all experts on the GPU", "prefill", False),
    ):  # fmt: skip
        found = [
            row for row in rows
            if half(data, row.row) == "held-out" and row.row["phase"] == phase and is_mixed(data, row.row) == mixed
        ]  # fmt: skip
        errors = [abs(row.error) for row in found]
        machines = len({row.row["machine"] for row in found})
        lines.append(f"| {told} | {len(found)} of {machines} machines | {median(errors):.0%} / {max(errors):.0%} |")
    return lines


def is_mixed(data: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the CPU has experts."""
    return bool(row["on_gpu"] < shape_of(data, row["model"], row["quant"]).n_layers)


def worst_lines(data: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """The rows of the held-out half that miss the goal, the furthest first."""
    missed = [row for row in rows if half(data, row.row) == "held-out" and abs(row.error) > GOAL_WORST]
    return [
        f"  - {row.error:+.0%}: {data['machines'][row.row['machine']]['gpu']}, {row.row['model']}, {row.row['phase']}, "
        f"{row.row['tokens']} a step after {row.row['context']}"
        for row in sorted(missed, key=lambda row: -abs(row.error))
    ] or ["  - none"]


def picture(rows: Sequence[Row]) -> str:
    """SVG: predicted over public speed, each half in its colour, with the goal's band of 35 %."""
    data = public()
    figure, axis = plots.new_figure(7.0, 4.5)
    ends = (0.7 * min(row.row["speed"] for row in rows), 1.5 * max(row.row["speed"] for row in rows))
    axis.fill_between(ends, *([(1.0 + sign * GOAL_WORST) * end for end in ends] for sign in (-1.0, 1.0)), alpha=0.15,
                      color="gray", label=f"within {GOAL_WORST:.0%}")  # fmt: skip
    axis.plot(ends, ends, color="gray", linewidth=0.8)
    for name, colour in (("calibrate", "tab:blue"), ("held-out", "tab:red"), (OTHER, "tab:gray")):
        for phase, marker in (("decode", "o"), ("prefill", "s")):
            found = [row for row in rows if (half(data, row.row), row.row["phase"]) == (name, phase)]
            axis.scatter([row.row["speed"] for row in found], [row.calibrated for row in found], color=colour,
                         marker=marker, s=22, label=f"{name}, {phase}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="public, tokens/s (measured by others)", ylabel="simulated, tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return plots.svg(figure)


def summary_lines(
    data: dict[str, Any], name: str, rows: Sequence[Row], crossed: Sequence[tuple[dict[str, Any], float]]
) -> list[str]:
    """A line of the summary for each phase."""
    lines = []
    for phase in ("decode", "prefill"):
        found = [row for row in rows if half(data, row.row) == name and row.row["phase"] == phase]
        errors = [abs(row.error) for row in found]
        before = [abs(row.datasheet / row.row["speed"] - 1.0) for row in found]
        apart = [
            abs(predicted / row["speed"] - 1.0) for row, predicted in crossed
            if half(data, row) == name and row["phase"] == phase
        ]  # fmt: skip
        lines.append(f"| {name}, {phase} | {len(found)} | {_errors(before)} | {_errors(errors)} | {_errors(apart)} |")
    return lines


def _errors(found: Sequence[float]) -> str:
    return f"{median(found):.0%} / {max(found):.0%}" if found else "-"


def table(data: dict[str, Any], name: str, rows: Sequence[Row]) -> str:
    """The rows of one half."""
    lines = [
        "| machine | model | setting | public | data sheet alone | calibrated | error | build | source |",
        "|---" * 9 + "|",
    ]
    for found in (row for row in rows if half(data, row.row) == name):
        row, source = found.row, data["sources"][found.row["source"]]
        known = data["machines"][row["machine"]]
        step = "decode" if row["phase"] == "decode" else f"prefill, {row['tokens']} a step"
        where = f"{row['on_gpu']} MoE layers on the GPU, {step}; {row['settings']}"
        lines.append(
            f"| {known['gpu']}, {known['cpu']} | {row['model']} {row['quant']} | {where} | {row['speed']:.0f} "
            f"| {found.datasheet:.0f} | {found.calibrated:.0f} | {found.error:+.0%} | {source['build']} "
            f"| {source['project']}, {source['page']}, {source['date']} |"
        )
    return "\n".join(lines)


UNITS = {"fill_tokens": "tokens", "token_passes": "passes", "cache_share": "share", "attention_share": "share"}
TITLES = {
    "calibrate": "Rows that the parameters are fitted to",
    "held-out": "Rows of machines that were held out",
    OTHER: "Rows of engine versions without calibration rows",
}
INTRODUCTION = """# The simulator against public measurements

Written by `benchmarks/calibration_report.py` from `benchmarks/public_rows.yaml`: {rows} measurements of llama.cpp
that others published, on {machines} machines, and {dense} of dense models. Speeds are tokens/s; those of the
simulator are simulated, with made routing. Error is predicted / public - 1.

A machine, and a card, is in one half only. The machines of the file's first version keep their half, later ones fall
by the hash of their name. The fit sees the calibrate half alone. What the simulator models, what counts as an outlier
in the fit, and which kernels a family has were chosen with both halves in view: the held-out half is no blind test.
Beside it stands the error of each row where the parameters are fitted to all rows of the other machines ("one machine
left out").

Which engine a row is simulated as is decided by its card and the month of its build: `llama_cpp`; `llama_cpp_2025`,
builds before November 2025, which fused fewer kernels; `llama_cpp_rocm`, AMD cards. AMD rows before November 2025,
and prompts before August 2025, are of engine versions without calibration rows: shown, neither fitted nor judged.

"Data sheet alone" is the convention of the shipped profiles: 80 % of the nominal memory rates, 50 % of the tensor
rate, each expert launched alone at 8 us, 20 us of synchronisation a layer.

| rows | number | data sheet alone: median / worst error | calibrated | one machine left out |
|---|---|---|---|---|
{summary}

The goal is a median of at most 15 % and no row above 35 % on the held-out half. Its rows by where the experts are:

| held-out rows | number | calibrated: median / worst error |
|---|---|---|
{places}

![Simulated over public speeds of both halves](pictures/calibration.svg)

## What is modelled

| parameter | llama_cpp | llama_cpp_2025 | llama_cpp_rocm | unit |
|---|---|---|---|---|
{values}

- A kernel costs `captured_launch_us` in a captured graph (decode with all experts on an NVIDIA card), else
  `launch_us`. A layer has {attention_launches} kernels of plain attention, {expert_launches} of router and experts, 3
  of a shared expert, 1 that adds; norms of queries and keys take 2 more, latent attention and linear attention 10.
  What remains of a matrix's time is its bytes, by the file's own bits a weight, at `accel_memory`: dense models fix
  that share.
- The CPU reads its experts at `cpu_read`, with 5 us an expert, after `handoff_us` a layer (`windows_handoff_us` where
  Windows ran).
- Keys and values are read at `cache_share`; only the layers that see the whole context read all of it.
- Several tokens of an expert take as long as `fill_tokens` more would (tiles that are not full), and the values
  between matrices cross the memory `token_passes` times.

{tables}

## What this says, and what it does not

- `hybrimoe plan` uses the calibrated machine where it knows a machine from data sheets only, and gives the range from
  the 10th to the 90th percentile of the held-out rows that are like it: decode with all experts on the GPU, with
  experts on the CPU, prompts with all on the GPU. Where none is like it (prompts whose experts are not all on the
  GPU), it says so.
- Rows of the held-out half beyond the goal:
{worst}
- Prompts miss the goal, and on their held-out rows the data sheet alone has the lower median. What bounds them: on the
  GB10 the values between matrices take two thirds of the simulated time, and the card is 1.4 to 1.7 times faster than
  that; with few tokens an expert, kernels differ from card to card and were rewritten several times (DeepSeek-V2's row
  is of August 2025). The fit of prompts has 14 rows of 4 cards, 8 of them NVIDIA's.
- Old processors, and one with more threads than cores, are slower than their memory's rate by up to two times (RTX
  2080 and RTX 4070 rows of the calibrate half); the model has no parameter for a processor's kernels.
- All rows are of llama.cpp: its kernels, not HybriMoE's. No row is of a prompt whose experts are streamed over the
  link, of another engine, of several GPUs, or of a disk. Rows of streamed prompts exist; they are not simulated so
  yet.
- Where a page does not name the memory's speed or the GPU, the file says what was assumed. Some pages are known by
  their text only: the index that they were found in does not name the repository.
- `simulate`, `bench ablation` and the tables made with them keep the shipped profiles: they compare policies on a
  machine that is stated."""


if __name__ == "__main__":
    main()
