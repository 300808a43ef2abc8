"""Fits the engines of yaml_rules/engines to one half of the public rows; writes them with the other half's residuals.

python benchmarks/calibration_fit.py        # a minute or two; then calibration_report.py writes the page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from public_rows import (
    DECODE,
    ENGINES,
    OTHER,
    PREFILL,
    ROOT,
    SHARE_OF_NOMINAL,
    card,
    driven,
    half,
    is_mixed,
    machine,
    public,
    speed,
    speed_by_sums,
)

from scheduler.machine.engine_profile import EngineProfile

ENGINE_FOLDER = ROOT / "yaml_rules" / "engines"
EXPERT_LAUNCHES, ATTENTION_LAUNCHES, DENSE_LAUNCHES = 7, 11, 16
"""Kernels that llama.cpp launches a layer: router and experts, plain attention, and a layer of a dense model."""
TILE_TOKENS = 128
"""Most columns of a tile of llama.cpp's integer matrix kernels (mmq.cuh, MMQ_X of cards with tensor units)."""
VECTOR_TOKENS = 8
"""Tokens up to which experts are multiplied as vectors, in builds from 2026 on (pull request 18958, mmvq.cuh)."""
TOKEN_PASSES = 2.0
"""Counted by what the graph of a layer has to do, not in llama.cpp's sources, as multiples of
``DenseCosts._values_us``'s values: an expert's inputs are written and read once more as int8 blocks, gate and up are
written, read by the activation, written, and read again, the products are written, weighted, and read by the sum;
queries, keys and values are written, rotated, and read."""
#: What decode and prompts decide: name in the fit, least, most, start. Bounds are physical: at most 97 % of a nominal
#: rate of memory or link, and tensor rates of up to 1.5 times the nominal bf16 rate, since int8's is higher.
WANTED_OF_DECODE = {
    "accel_memory": (0.5, 0.97 / SHARE_OF_NOMINAL, 1.05), "rocm_accel_memory": (0.375, 0.97 / SHARE_OF_NOMINAL, 1.0),
    "captured_launch_us": (0.5, 6.0, 2.3), "launch_us": (1.0, 12.0, 3.5), "rocm_launch_us": (1.0, 12.0, 5.0),
    "old_launches": (1.0, 4.0, 1.3), "cpu_read": (0.4, 0.97 / SHARE_OF_NOMINAL, 0.85), "handoff_us": (0.0, 600.0, 50.0),
    "windows_handoff_us": (0.0, 2000.0, 400.0), "cache_share": (0.2, 1.0, 0.6),
}  # fmt: skip
WANTED_OF_PROMPTS = {
    "accel_tensor": (0.2, 3.0, 1.6), "rocm_accel_tensor": (0.2, 3.0, 1.0), "attention_share": (0.05, 1.0, 0.3),
    "link_share": (0.2, 0.97 / SHARE_OF_NOMINAL, 0.7),
}  # fmt: skip
#: Loss of the fit: rows further off than so much (of the logarithm) count less; one run of llama-bench differs from the
#: next by about 5 %, kernels for prompts differ by more from card to card. A machine's rows share its weight.
DECODE_LOSS: tuple[Literal["cauchy"], float] = ("cauchy", 0.05)
PROMPTS_LOSS: tuple[Literal["soft_l1"], float] = ("soft_l1", 0.2)
SHARED_VALUES = ("handoff_us", "windows_handoff_us", "cache_share", "attention_share", "link_share")
FITTED = ("accel_memory", "accel_tensor", "cpu_read", "launch_us", "captured_launch_us", *SHARED_VALUES)
COUNTED = (
    "token_passes", "tile_tokens", "tile_by_expert", "vector_tokens", "reads_apart", "expert_launches",
    "attention_launches",
)  # fmt: skip
RATIOS = (
    ("decode_ratios", DECODE, False), ("mixed_decode_ratios", DECODE, True),
    ("prefill_ratios", PREFILL, False), ("streamed_prefill_ratios", PREFILL, True),
)  # fmt: skip
DATASHEET = "datasheet"


class Row(NamedTuple):
    """A public row beside its two predictions, in tokens/s."""

    row: dict[str, Any]
    datasheet: float
    calibrated: float

    @property
    def error(self) -> float:
        """Predicted / public - 1."""
        return self.calibrated / float(self.row["speed"]) - 1.0


def compare(data: dict[str, Any], known: Mapping[str, EngineProfile]) -> list[Row]:
    """Every row, by the data sheet alone and as its engine drives the machine."""
    return [
        Row(row, speed(data, row, machine(data, row)), speed(data, row, driven(data, row, known)))
        for row in data["rows"]
    ]


def fit(data: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Values of WANTED_OF_DECODE, then WANTED_OF_PROMPTS: the least loss of log(predicted / public) over these rows."""
    values = {name: bounds[2] for name, bounds in {**WANTED_OF_DECODE, **WANTED_OF_PROMPTS}.items()}
    for phase, wanted, loss in ((DECODE, WANTED_OF_DECODE, DECODE_LOSS), (PREFILL, WANTED_OF_PROMPTS, PROMPTS_LOSS)):
        values |= _fit_phase(data, [row for row in rows if row["phase"] == phase], wanted, loss, values)
    return values


def _fit_phase(
    data: dict[str, Any], rows: Sequence[dict[str, Any]], wanted: Mapping[str, tuple[float, float, float]],
    loss: tuple[Literal["cauchy", "soft_l1"], float], values: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    from scipy.optimize import least_squares

    weight = {row["machine"]: sum(r["machine"] == row["machine"] for r in rows) ** -0.5 for row in rows}
    dense = [row for row in data["dense_rows"] if wanted is WANTED_OF_DECODE and row["machine"] in weight]

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
    amd = "rocm_" if name.startswith("llama_cpp_rocm") else ""
    launch_us = old * values[f"{amd}launch_us"]
    shared: dict[str, Any] = {key: values[key] for key in SHARED_VALUES}
    return EngineProfile(
        name, accel_memory=values[f"{amd}accel_memory"], accel_tensor=values[f"{amd}accel_tensor"],
        cpu_read=values["cpu_read"], launch_us=launch_us,
        captured_launch_us=launch_us if amd else old * values["captured_launch_us"],
        **shared, token_passes=TOKEN_PASSES, tile_tokens=TILE_TOKENS, tile_by_expert=name == "llama_cpp_rocm",
        vector_tokens=1 if name.endswith("_2025") else VECTOR_TOKENS, reads_apart=True,
        expert_launches=EXPERT_LAUNCHES, attention_launches=ATTENTION_LAUNCHES,
    )  # fmt: skip


def write_engines(data: dict[str, Any]) -> None:
    """Writes the engines, and the data sheets' convention, with the ratios of the held-out rows."""
    values = fit(data, [row for row in data["rows"] if half(data, row) == "calibrate"])
    known = {name: made(values, name) for name in ENGINES}
    held = [row for row in compare(data, known) if half(data, row.row) == "held-out"]
    of_engines = ratio_lines(data, held, lambda row: row.calibrated)
    for name, engine in known.items():
        told = f"llama.cpp{f', {ENGINES[name]}' if ENGINES[name] else ''}; fitted to one half of"
        _write(name, [
            f"source: {told} benchmarks/public_rows.yaml, ratios are measured / predicted of the other half",
            *(f"{key}: {round(getattr(engine, key), 6):.4g}" for key in FITTED),
            *(f"{key}: {str(getattr(engine, key)).lower()}" for key in COUNTED), *of_engines,
        ])  # fmt: skip
    _write(DATASHEET, [
        "source: the convention of the shipped data sheet profiles; ratios are measured / predicted of the half of"
        " benchmarks/public_rows.yaml that the engines are not fitted to",
        *ratio_lines(data, held, lambda row: row.datasheet),
    ])  # fmt: skip


def _write(name: str, lines: list[str]) -> None:
    first = ["# Written by `python benchmarks/calibration_fit.py`; see docs/calibration.md.", f"name: {name}"]
    (ENGINE_FOLDER / f"{name}.yaml").write_text("\n".join(first + lines) + "\n", encoding="utf-8")


def ratio_lines(data: dict[str, Any], held: Sequence[Row], predicted: Callable[[Row], float]) -> list[str]:
    """Residuals as they stand in an engine's file (``scheduler.machine.engine_profile.Residuals``)."""
    lines = []
    for key, phase, mixed in RATIOS:
        near = [row for row in held if row.row["phase"] == phase and is_mixed(data, row.row) == mixed]
        ratios = sorted(row.row["speed"] / predicted(row) for row in near)
        lines.append(f"{key}: [{', '.join(f'{ratio:.3f}' for ratio in ratios)}]")
    prompts = [row.row["tokens"] for row in held if row.row["phase"] == PREFILL]
    return [*lines, f"prompt_tokens: [{min(prompts)}, {max(prompts)}]"]


def left_out(data: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """(row, predicted speed) of every row, by parameters that are fitted to all rows of other cards."""
    rows = [row for row in data["rows"] if half(data, row) != OTHER]
    found = []
    for name in sorted({card(data, row) for row in rows}):
        values = fit(data, [row for row in rows if card(data, row) != name])
        known = {engine: made(values, engine) for engine in ENGINES}
        found += [(row, speed_by_sums(data, row, driven(data, row, known))) for row in rows if card(data, row) == name]
    return found


if __name__ == "__main__":
    write_engines(public())
