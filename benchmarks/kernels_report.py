"""Writes docs/kernels-measured.md from runs of `hybrimoe bench kernels` and `bench quality`.

    python benchmarks/kernels_report.py run1.json run2.json ... --avx2 avx2.json --quality quality.json > docs/...

Each run is the output of `--json`; several runs of a shape give medians and the range between runs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

Rows = dict[tuple[str, int, str], list[dict[str, Any]]]
"""(shape, tokens, contender) -> that row of each run."""

INT4_PEERS = ("llama.cpp Q4_0", "onnxruntime int4", "kt-kernel int4")
FBGEMM = "torch int8 dynamic"
INTRODUCTION = """# Expert kernels: measured

Written by `benchmarks/kernels_report.py` from runs of `hybrimoe bench kernels` (benchmarks/kernels.py): {machine},
{threads} threads, virtual machine, shared. {runs} runs; a cell is the median over the runs of the median over a run's
alternating rounds, with the range of the runs behind it. Weights come from memory, inputs are bfloat16 numbers. The
read bandwidth measured in the same rounds moved between {low:.0f} and {high:.0f} GB/s (other load; and probably whether
the host had the virtual cores on one chiplet or on two), so compare rows of one shape and one number of tokens.
llama.cpp is libggml of llama-cpp-python with repacked Q4_0 weights; ONNX Runtime is MatMulNBits at accuracy level 4;
torch int8 is fbgemm with one activation scale a tensor (looser numerics). kt-kernel and IPEX need a torch of their own:
they ran in processes of their own, between those of the others. kt-kernel's threads spin, which on two shared cores is
unfair to it. IPEX runs as this package's backend, which reads each record once more to see whether it changed.
"""


def main() -> None:
    """Print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--avx2", nargs="*", type=Path, default=[], help="runs with HYBRIMOE_ISA=avx2")
    parser.add_argument("--quality", type=Path)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.runs]
    rows = collect(results)
    print(introduction(results, rows))
    print(speed_tables(rows))
    print(goal_table(rows))
    if arguments.avx2:
        paths = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.avx2]
        print(path_table(collect(paths)))
    if arguments.quality:
        print(quality_table(json.loads(arguments.quality.read_text(encoding="utf-8"))["rows"]))


def collect(results: Iterable[dict[str, Any]]) -> Rows:
    """Rows of all runs by what they are about; each says which run it is of."""
    rows: Rows = defaultdict(list)
    for number, result in enumerate(results):
        for row in result["rows"]:
            rows[row["shape"], row["tokens"], row["contender"]].append({**row, "run": number})
    return dict(rows)


def introduction(results: list[dict[str, Any]], rows: Rows) -> str:
    """Machine and conditions."""
    machine, reads = results[0]["machine"], [row["read_gbps"] for found in rows.values() for row in found]
    counts = [len(found) for (_, _, name), found in rows.items() if name == "ours int4"]
    return INTRODUCTION.format(
        machine=f"{machine['cpu']}, {machine['cores']} cores",
        threads=machine["torch_threads"],
        runs=f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}",
        low=min(reads),
        high=max(reads),
    )


def table(rows: Rows, tokens: int, cell: Callable[[list[dict[str, Any]]], str], only: str = "") -> str:
    """Contenders by shapes."""
    shapes = list(dict.fromkeys(shape for shape, _, _ in rows))
    names = list(dict.fromkeys(name for _, n, name in rows if n == tokens and only in name))
    lines = [f"| contender | {' | '.join(shapes)} |", "|---|" + "---|" * len(shapes)]
    for name in names:
        cells = [cell(rows[shape, tokens, name]) if (shape, tokens, name) in rows else "-" for shape in shapes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    if not values:
        return "-"
    middle = format(median(values), form)
    low, high = format(min(values), form), format(max(values), form)
    return middle if low == high else f"{middle} ({low} - {high})"


def speed_tables(rows: Rows) -> str:
    """Milliseconds and bandwidth at one token, GFLOP/s beyond."""
    parts = [
        "## Milliseconds of a layer call, 1 token an expert\n",
        table(rows, 1, lambda found: spread([row["ms"] for row in found], ".2f")),
        "Share of the read bandwidth measured in the same rounds, 1 token (without runs whose read was disturbed: a",
        "share above 100 %):\n",
        table(rows, 1, lambda found: spread([s for row in found if (s := row["bandwidth_share"]) <= 1], ".0%")),
    ]
    for tokens in sorted({n for _, n, _ in rows if n > 1}):
        parts.append(f"## GFLOP/s, {tokens} tokens an expert\n")
        parts.append(table(rows, tokens, lambda found: spread([row["gflops"] for row in found], ".0f")))
    return "\n".join(parts)


def goal_table(rows: Rows) -> str:
    """Ours int4 against the best int4 peer and fbgemm, run by run."""
    shapes = list(dict.fromkeys(shape for shape, _, _ in rows))
    lines = [
        "## int4 against the others\n",
        "Ours int4 relative to the best int4 kernel of the others and, behind the comma, to torch's dynamic int8:\n",
        f"| tokens | {' | '.join(shapes)} |",
        "|---|" + "---|" * len(shapes),
    ]
    counts = sorted({n for _, n, _ in rows})
    for tokens in counts:
        cells = [", ".join(spread(found, ".2f") for found in ratios(rows, shape, tokens)) for shape in shapes]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    lines += ["\nThe least and the largest of the shapes' medians:\n", f"| tokens | {' | '.join(map(str, counts))} |"]
    lines.append("|---|" + "---|" * len(counts))
    for index, label in enumerate(("ours / best int4 peer", "ours / torch int8 (fbgemm)")):
        cells = []
        for tokens in counts:
            medians = [median(r) for shape in shapes if (r := ratios(rows, shape, tokens)[index])]
            cells.append(f"{min(medians):.2f} to {max(medians):.2f}" if medians else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ratios(rows: Rows, shape: str, tokens: int) -> tuple[list[float], list[float]]:
    """How much faster our int4 is than the best int4 kernel of the others, and than fbgemm, in runs that had both."""
    mine = {row["run"]: row["ms"] for row in rows.get((shape, tokens, "ours int4"), [])}
    peers = [rows[shape, tokens, name] for name in INT4_PEERS if (shape, tokens, name) in rows]
    best = min(peers, key=lambda found: median(row["ms"] for row in found), default=[])
    both = (best, rows.get((shape, tokens, FBGEMM), []))
    of_peer, of_fbgemm = ([r["ms"] / mine[r["run"]] for r in found if r["run"] in mine] for found in both)
    return of_peer, of_fbgemm


def path_table(rows: Rows) -> str:
    """Milliseconds of our kernels on the AVX2 path."""
    parts = ["## The AVX2 path on the same machine (HYBRIMOE_ISA=avx2)\n"]
    for tokens in sorted({n for _, n, _ in rows}):
        parts.append(f"Milliseconds of a layer call, {tokens} tokens an expert:\n")
        parts.append(table(rows, tokens, lambda found: spread([row["ms"] for row in found], ".2f"), "ours"))
    return "\n".join(parts)


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Error per dtype."""
    lines = [
        "## Quality (demo model)\n",
        "`hybrimoe bench quality`: error of an expert's output on the model's own inputs (root mean square, relative",
        "to float32 experts), without and with the rounding of activations; perplexity and greedy agreement on the",
        "tokens of the held-out text.\n",
        "| experts | error, weights | error, as run | perplexity | same greedy token | cosine of logits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['dtype']} | {row['weight_error']:.3%} | {row['kernel_error']:.3%} | {row['perplexity']:.3f} "
            f"| {row['greedy_agreement']:.2%} | {row['logit_cosine']:.5f} |"
        )
    lines.append(
        "\nWhere int8 activations are too coarse (outliers inside a group of 32), `bfloat16` and `float32` experts"
    )
    lines.append("do not round activations at all.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
