"""The simulator against public measurements (benchmarks/public_rows.yaml): docs/calibration.md and its picture.

    python benchmarks/calibration_report.py        # the page (matplotlib; minutes, most of them for the crossed fits)
    python benchmarks/calibration_report.py --fit    # calibration_fit.py first

Every figure that we give is simulated; the public ones were measured by the authors of their pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

from calibration_fit import (
    ATTENTION_LAUNCHES,
    COUNTED,
    EXPERT_LAUNCHES,
    FITTED,
    Row,
    compare,
    left_out,
    write_engines,
)
from public_rows import DECODE, ENGINES, OTHER, PREFILL, ROOT, card, engines, half, is_mixed, public

from hybrimoe.tracing.study import plots
from yaml_rules.engines import load_engine

PAGE = ROOT / "docs" / "calibration.md"
PICTURE = ROOT / "docs" / "pictures" / "calibration.svg"
GOAL_MEDIAN, GOAL_WORST = 0.15, 0.35
PLACES = (
    ("decode, all experts on the GPU", DECODE, False), ("decode, experts on the CPU", DECODE, True),
    ("prompts, all experts on the GPU", PREFILL, False), ("prompts, experts uploaded", PREFILL, True),
)  # fmt: skip


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


def document(data: dict[str, Any], rows: Sequence[Row]) -> str:
    """docs/calibration.md."""
    crossed = left_out(data)
    summary = [line for name in TITLES for line in summary_lines(data, name, rows, crossed)]
    values = "\n".join(value_line(name) for name in (*FITTED, *COUNTED))
    return INTRODUCTION.format(
        rows=len(rows), machines=len({row.row["machine"] for row in rows}), summary="\n".join(summary), values=values,
        places="\n".join(place_lines(data, rows)), cards="\n".join(card_lines(data, rows)),
        worst="\n".join(worst_lines(data, rows)), columns=" | ".join(ENGINES), rule="---|" * (len(ENGINES) + 2),
        dense=len(data["dense_rows"]), expert_launches=EXPERT_LAUNCHES, attention_launches=ATTENTION_LAUNCHES,
        tables="\n\n".join(f"## {TITLES[name]}\n\n{table(data, name, rows)}" for name in TITLES),
    )  # fmt: skip


def value_line(key: str) -> str:
    """A value of all engines."""
    unit = "us" if key.endswith("_us") else UNITS.get(key, "share of the data sheet profile's rate")
    values = [load_engine(name)[key] for name in ENGINES]
    told = [str(value).lower() if isinstance(value, bool) else f"{value:.3g}" for value in values]
    return f"| `{key}` | {' | '.join(told)} | {unit} |"


def place_lines(data: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Errors of each half by where the experts are."""
    lines = []
    for told, phase, mixed in PLACES:
        cells = []
        for name in ("calibrate", "held-out"):
            found = [
                row for row in rows
                if half(data, row.row) == name and row.row["phase"] == phase and is_mixed(data, row.row) == mixed
            ]  # fmt: skip
            machines = len({row.row["machine"] for row in found})
            cells.append(f"{len(found)} of {machines} | {_errors([abs(row.error) for row in found])}")
        lines.append(f"| {told} | {' | '.join(cells)} |")
    return lines


def card_lines(data: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Errors of the held-out prompts, one card and model a line: rows of one page are no independent judges."""
    held = [row for row in rows if half(data, row.row) == "held-out" and row.row["phase"] == PREFILL]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in held:
        where = "uploaded" if is_mixed(data, row.row) else "on the GPU"
        groups.setdefault((card(data, row.row), row.row["model"], where), []).append(row)
    return [
        f"| {gpu} | {model} | {where} | {len(found)} | {median(row.error for row in found):+.0%} "
        f"| {min(row.error for row in found):+.0%} to {max(row.error for row in found):+.0%} |"
        for (gpu, model, where), found in groups.items()
    ]


def worst_lines(data: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """The rows of the held-out half that miss the goal, the furthest first."""
    missed = [row for row in rows if half(data, row.row) == "held-out" and abs(row.error) > GOAL_WORST]
    return [
        f"  - {row.error:+.0%}: {card(data, row.row)}, {row.row['model']}, {row.row['phase']}, "
        f"{row.row['tokens']} a step after {row.row['context']}, {row.row['on_gpu']} MoE layers on the GPU"
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
        for phase, marker in ((DECODE, "o"), (PREFILL, "s")):
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
    for phase in (DECODE, PREFILL):
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
        step = "decode" if row["phase"] == DECODE else f"prefill, {row['tokens']} a step"
        where = f"{row['on_gpu']} MoE layers on the GPU, {step}; {row['settings']}"
        lines.append(
            f"| {known['gpu']}, {known['cpu']} | {row['model']} {row['quant']} | {where} | {row['speed']:.0f} "
            f"| {found.datasheet:.0f} | {found.calibrated:.0f} | {found.error:+.0%} | {source['build']} "
            f"| {source['project']}, {source['page']}, {source['date']} |"
        )
    return "\n".join(lines)


UNITS = {
    "token_passes": "passes", "tile_tokens": "columns", "vector_tokens": "tokens", "tile_by_expert": "or by the step",
    "reads_apart": "or at once",
    "cache_share": "share", "attention_share": "share", "expert_launches": "kernels a layer",
    "attention_launches": "kernels a layer",
}  # fmt: skip
TITLES = {
    "calibrate": "Rows that the parameters are fitted to",
    "held-out": "Rows of machines that were held out",
    OTHER: "Rows of engine versions without calibration rows",
}
INTRODUCTION = """# The simulator against public measurements

Written by `benchmarks/calibration_report.py` from `benchmarks/public_rows.yaml`: {rows} measurements of llama.cpp
that others published, on {machines} machines, and {dense} of dense models. Speeds are tokens/s; those of the
simulator are simulated, with made routing. Error is predicted / public - 1.

A machine, and a card, is in one half only. The machines of the file's first version keep their half, later ones have
that of their card, and new cards fall by the hash of their machine's name. The fit sees the calibrate half alone. What
the simulator models was chosen by the calibrate half and by leaving one card out of it, but not blind: earlier versions
of this page showed the held-out rows, their errors were printed at several steps of the work, and which kernels a
family has, kernels of few tokens, and how narrowly gpt-oss-120b routes came in with both halves in view. Beside it
stands the error of each row where the parameters are
fitted to all rows of the other cards ("one card left out").

Which engine a row is simulated as is decided by its card and the month of its build: `llama_cpp`; `llama_cpp_2025`,
builds before November 2025, which fused fewer kernels; `llama_cpp_rocm`, AMD cards; `llama_cpp_rocm_2025`, of them
builds before August 2026, whose tiles are as wide as the step. AMD decode rows before November 2025, and prompts before
August 2025, are of engine versions without calibration rows: shown, neither fitted nor judged.

"Data sheet alone" is the convention of the shipped profiles: 80 % of the nominal memory and link rates, 50 % of the
tensor rate, each expert launched alone at 8 us, 20 us of synchronisation a layer.

| rows | number | data sheet alone: median / worst error | calibrated | one card left out |
|---|---|---|---|---|
{summary}

The goal is a median of at most 15 % and no row above 35 % on the held-out half. By where the experts are:

| rows | calibrate half, of machines | median / worst error | held-out half, of machines | median / worst error |
|---|---|---|---|---|
{places}

Rows of one page are no independent judges; the held-out prompts by card and model:

| card | model | experts | rows | median error | from, to |
|---|---|---|---|---|---|
{cards}

![Simulated over public speeds of both halves](pictures/calibration.svg)

## What is modelled

| parameter | {columns} | unit |
|{rule}
{values}

- A kernel costs `captured_launch_us` in a captured graph (decode with all experts on an NVIDIA card), else
  `launch_us`. A layer has {attention_launches} kernels of plain attention, {expert_launches} of router and experts, 3
  of a shared expert, 1 that adds; norms of queries and keys take 2 more, latent attention and linear attention 10.
  What remains of a matrix's time is its bytes, by the file's own bits a weight, at `accel_memory`: dense models fix
  that share.
- The CPU reads its experts at `cpu_read`, with 5 us an expert, after `handoff_us` a layer (`windows_handoff_us` where
  Windows ran).
- Keys and values are read at `cache_share`; only the layers that see the whole context read all of it, and as many
  units are multiplied as the query heads have, which may be more than the hidden size.
- Prompts: an expert's tokens are computed in tiles of up to `tile_tokens` columns, as wide as the micro-batch has
  tokens (with `tile_by_expert`: as an expert has on average); an empty column takes as long as a full one. A matrix is
  read, then multiplied (`reads_apart`), and in micro-batches of up to `vector_tokens` each token reads its experts by
  itself: widths of llama.cpp's kernels. The values between matrices cross the memory `token_passes` times, which was
  counted by what such a graph has to do, and not compared with llama.cpp's sources. None of these is fitted. Builds
  that multiply MXFP4 natively on Blackwell cards do so at twice the rate.
- Experts that are not on the GPU are uploaded for micro-batches of 32 tokens and more, those that are used, at
  `link_share`; meanwhile nothing is computed ([simulator.md](simulator.md#prompts)).

{tables}

## What this says, and what it does not

- `hybrimoe plan` uses the calibrated machine where it knows a machine from data sheets only, and gives the range from
  the 10th to the 90th percentile of the held-out rows that are like it: decode with all experts on the GPU, with
  experts on the CPU, prompts with all on the GPU. `hybrimoe simulate` keeps the data sheet's convention, and gives the
  range that this convention has on the same rows, for streamed prompts too. Where none is like it (prompts that the CPU
  computes a part of, shorter or longer prompts than these, several GPUs, a disk), both say so.
- Rows of the held-out half beyond the goal:
{worst}
- Uploads: a page rarely says whether experts lie in page-locked memory (in llama.cpp's issue 25859 that was worth 21 %
  of a prompt's speed). `link_share` is fitted to four rows of two machines; the RTX 3090's rows, which do not say, need
  more of their link than that.
- Few tokens an expert: kernels differ from card to card and were rewritten several times; the model has one width of
  tiles and one rate. What it has no parameter for: state kernels of linear attention, and that Blackwell cards gain
  less over Ada than their data sheets say.
- Old processors, and one with more threads than cores, are slower than their memory's rate by up to two times (RTX
  2080 and RTX 4070 rows of the calibrate half); the model has no parameter for a processor's kernels.
- All rows are of llama.cpp: its kernels, not HybriMoE's. No row is of another engine, of several GPUs, or of a disk.
- Where a page does not name the memory's speed or the GPU, the file says what was assumed. Some pages are known by
  their text only: the index that they were found in does not name the repository.
- `bench ablation` and the tables made with it keep the shipped profiles: they compare policies on a machine that is
  stated."""


if __name__ == "__main__":
    main()
