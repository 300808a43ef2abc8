"""Writes docs/kernels-measured.md and the summary in docs/kernels.md from runs of `bench kernels` and `bench quality`.

    python benchmarks/kernels_report.py run1.json run2.json ... --avx2 avx2.json ... --quality quality.json
    python benchmarks/kernels_report.py --amx with1.json ... --without-amx without1.json ...
    python benchmarks/kernels_report.py       # writes both anew from docs/kernels-measured.json, which keeps the runs

Each run is the output of `--json`; several runs of a shape give medians and the range between runs. The second adds
bfloat16 experts on a machine with AMX: runs with `--only bfloat16`, those without AMX with `HYBRIMOE_ISA=avx512bf16`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
Rows = dict[tuple[str, int, str], list[Row]]
"""(shape, tokens, contender) -> that row of each run."""

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- kernels:begin (python benchmarks/kernels_report.py) -->", "<!-- kernels:end -->"
KEPT = ("shape", "tokens", "contender", "ms", "gflops", "bandwidth_share", "read_gbps")  # of a row
INT4_PEERS = ("llama.cpp Q4_0", "onnxruntime int4", "kt-kernel int4")
FBGEMM = "torch int8 dynamic"
MAX_SHARE = 1.2  # of the read rate: above it the read was disturbed
RATIO_GOALS = ((1, 0, 1.3), (4, 0, 1.8), (16, 0, 1.8), (64, 0, 1.5), (256, 0, 1.5), (64, 1, 1.0), (256, 1, 1.0))
"""(tokens, 0: against the best int4 peer, 1: against fbgemm, at least)."""
SHARE_GOALS = (("ours int4", 0.75), ("ours int8", 0.8), ("ours bfloat16", 0.8))
INTRODUCTION = """# Expert kernels: measured

Written by `benchmarks/kernels_report.py` from runs of `hybrimoe bench kernels`: {machine},
{threads} threads, virtual machine, shared. {runs} runs; a cell is the median over the runs of the median over a run's
alternating rounds, with the range of the runs behind it. Weights come from memory, inputs are bfloat16 numbers. The
read bandwidth measured in the same rounds moved between {low:.0f} and {high:.0f} GB/s (other load; and probably whether
the host had the virtual cores on one chiplet or on two), so compare rows of one shape and one number of tokens.
llama.cpp is libggml of llama-cpp-python with repacked Q4_0 weights; ONNX Runtime is MatMulNBits at accuracy level 4;
torch int8 is fbgemm with one activation scale a tensor (looser numerics). kt-kernel and IPEX need a torch of their own:
they ran in processes of their own, between those of the others. IPEX runs as this package's backend, which reads each
record once more to see whether it changed.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep the runs, if any are given, and write the documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--avx2", nargs="*", type=Path, default=[], help="runs with HYBRIMOE_ISA=avx2")
    parser.add_argument("--quality", type=Path)
    parser.add_argument("--amx", nargs="*", type=Path, default=[], help="runs on a machine with AMX")
    parser.add_argument(
        "--without-amx", nargs="*", type=Path, default=[], help="runs with HYBRIMOE_ISA=avx512bf16 there"
    )
    parser.add_argument("--folder", type=Path, default=ROOT, help="with docs/")
    given = parser.parse_args(arguments)
    kept = given.folder / "docs" / "kernels-measured.json"
    data = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if given.runs:
        data |= measured(given.runs, given.avx2, given.quality)
    if given.amx:
        data["amx"] = measured_amx(given.amx, given.without_amx)
    kept.write_text(stored(data), encoding="utf-8")
    (given.folder / "docs" / "kernels-measured.md").write_text(document(data), encoding="utf-8")
    page = given.folder / "docs" / "kernels.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), data), encoding="utf-8")


def measured(runs: Sequence[Path], avx2: Sequence[Path], quality: Path | None) -> dict[str, Any]:
    """What the documents need of runs."""
    results, narrow = ([json.loads(path.read_text(encoding="utf-8")) for path in paths] for paths in (runs, avx2))
    return {
        "machine": results[0]["machine"],
        "columns": KEPT,
        "runs": [kept_rows(result) for result in results],
        "avx2": [kept_rows(result) for result in narrow],
        "quality": json.loads(quality.read_text(encoding="utf-8"))["rows"] if quality else [],
    }


def measured_amx(tiles: Sequence[Path], vectors: Sequence[Path]) -> dict[str, Any]:
    """What the documents need of runs on a machine with AMX."""
    with_amx, without = ([json.loads(path.read_text(encoding="utf-8")) for path in paths] for paths in (tiles, vectors))
    for results, paths, isa in ((with_amx, tiles, "amx"), (without, vectors, "avx512bf16")):
        for result, path in zip(results, paths, strict=True):
            if (found := result["machine"]["isa"]) != isa:
                raise SystemExit(f"{path} is of {found}, expected {isa}: set HYBRIMOE_ISA for its run")
    return {
        "machine": with_amx[0]["machine"],
        "columns": KEPT,
        "with": [kept_rows(result) for result in with_amx],
        "without": [kept_rows(result) for result in without],
    }


def stored(data: dict[str, Any]) -> str:
    """JSON, a row a line."""
    return json.dumps(data).replace("[[", "[\n[").replace("], [", "],\n[") + "\n"


def kept_rows(result: dict[str, Any]) -> list[list[Any]]:
    """The rows of a run, with four significant digits."""
    values = [[row[name] for name in KEPT] for row in result["rows"]]
    return [[float(f"{v:.4g}") if isinstance(v, float) else v for v in row] for row in values]


def document(data: dict[str, Any]) -> str:
    """docs/kernels-measured.md."""
    rows = collect(data, "runs")
    parts = [introduction(data["machine"], rows), goals(rows), speed_tables(rows), ratio_table(rows)]
    if data["avx2"]:
        parts.append(path_table(collect(data, "avx2")))
    if "amx" in data:
        parts.append(amx_table(data["amx"]))
    if data["quality"]:
        parts.append(quality_table(data["quality"]))
    return "\n".join(parts) + "\n"


def with_table(page: str, data: dict[str, Any]) -> str:
    """docs/kernels.md with the table between its marks."""
    rows = collect(data, "runs")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    shares = [f"{name} {share_range(rows, name)}" for name in (*(n for n, _ in SHARE_GOALS), "llama.cpp Q4_0")]
    text = f"Share of the measured read bandwidth at one token:\n{', '.join(shares)}."
    return f"{before}{BEGIN}\n{summary(rows)}\n{text}\n{END}{after}"


def collect(data: dict[str, Any], runs: str) -> Rows:
    """Rows of all runs by what they are about; each says which run it is of."""
    rows: Rows = defaultdict(list)
    for number, run in enumerate(data[runs]):
        for values in run:
            row = dict(zip(data["columns"], values, strict=True))
            rows[row["shape"], row["tokens"], row["contender"]].append({**row, "run": number})
    return dict(rows)


def introduction(machine: dict[str, Any], rows: Rows) -> str:
    """Machine and conditions."""
    reads = [row["read_gbps"] for found in rows.values() for row in found]
    counts = [len(found) for (_, _, name), found in rows.items() if name == "ours int4"]
    return INTRODUCTION.format(
        machine=f"{machine['cpu']}, {machine['cores']} cores",
        threads=machine["torch_threads"],
        runs=f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}",
        low=min(reads),
        high=max(reads),
    )


def shapes_of(rows: Rows) -> list[str]:
    """Shapes in the order in which they were measured."""
    return list(dict.fromkeys(shape for shape, _, _ in rows))


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join([f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)]) + "\n"


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    if not values:
        return "-"
    middle, low, high = (format(f(values), form) for f in (median, min, max))
    return middle if low == high else f"{middle} ({low} - {high})"


def shares(found: Iterable[Row]) -> list[float]:
    """Shares of the read bandwidth, of the runs whose read was not disturbed."""
    return [share for row in found if (share := row["bandwidth_share"]) <= MAX_SHARE]


def share_range(rows: Rows, contender: str) -> str:
    """The least and the largest of the shapes' medians at one token."""
    medians = [median(s) for shape in shapes_of(rows) if (s := shares(rows.get((shape, 1, contender), [])))]
    return f"{min(medians):.0%} to {max(medians):.0%}" if medians else "-"


def goals(rows: Rows) -> str:
    """Each goal, what every shape reached, and where it is missed."""
    shapes, lines = shapes_of(rows), []
    for tokens, which, least in RATIO_GOALS:
        name = f"int4 / {('best int4 peer', 'fbgemm')[which]}, {tokens} token{'s' * (tokens > 1)}"
        lines.append(goal_line(name, [ratios(rows, shape, tokens)[which] for shape in shapes], least, ".2f", shapes))
    for contender, least in SHARE_GOALS:
        values = [shares(rows.get((shape, 1, contender), [])) for shape in shapes]
        lines.append(goal_line(f"{contender}, share of read bandwidth, 1 token", values, least, ".0%", shapes))
    return "## Goals\n\n" + markdown(["goal", "at least", *shapes, ""], lines)


def goal_line(
    name: str, values: Sequence[list[float]], least: float, form: str, shapes: Sequence[str]
) -> Sequence[str]:
    """A line of the table of goals."""
    missed = [shape for shape, found in zip(shapes, values, strict=True) if found and median(found) < least]
    unknown = [shape for shape, found in zip(shapes, values, strict=True) if not found]
    parts = [f"{word}: {', '.join(names)}" for word, names in (("missed", missed), ("not measured", unknown)) if names]
    return [name, format(least, form), *(spread(found, form) for found in values), "; ".join(parts) or "met"]


def table(rows: Rows, tokens: int, cell: Callable[[list[Row]], str], only: str = "") -> str:
    """Contenders by shapes."""
    shapes = shapes_of(rows)
    names = list(dict.fromkeys(name for _, n, name in rows if n == tokens and only in name))
    lines = [[name, *(cell(rows.get((shape, tokens, name), [])) for shape in shapes)] for name in names]
    return markdown(["contender", *shapes], lines)


def speed_tables(rows: Rows) -> str:
    """Milliseconds and bandwidth at one token, GFLOP/s beyond."""
    parts = [
        "## Milliseconds of a layer call, 1 token an expert\n",
        table(rows, 1, lambda found: spread([row["ms"] for row in found], ".2f")),
        "Share of the read bandwidth measured in the same rounds by a plain loop, 1 token (the kernels ask for lines",
        f"ahead and may pass it; without runs whose read was disturbed: a share above {MAX_SHARE:.0%}):\n",
        table(rows, 1, lambda found: spread(shares(found), ".0%")),
    ]
    for tokens in sorted({n for _, n, _ in rows if n > 1}):
        parts.append(f"## GFLOP/s, {tokens} tokens an expert\n")
        parts.append(table(rows, tokens, lambda found: spread([row["gflops"] for row in found], ".0f")))
    return "\n".join(parts)


def ratio_table(rows: Rows) -> str:
    """Ours int4 against the best int4 peer and fbgemm, run by run."""
    shapes = shapes_of(rows)
    lines = []
    for tokens in sorted({n for _, n, _ in rows}):
        cells = [", ".join(spread(found, ".2f") for found in ratios(rows, shape, tokens)) for shape in shapes]
        lines.append([str(tokens), *cells])
    return (
        "## int4 against the others\n\n"
        "Ours int4 relative to the best int4 kernel of the others and, behind the comma, to torch's dynamic int8:\n\n"
        + markdown(["tokens", *shapes], lines)
        + "\nThe least and the largest of the shapes' medians:\n\n"
        + summary(rows)
    )


def summary(rows: Rows) -> str:
    """The least and the largest of the shapes' medians, by tokens."""
    counts, lines = sorted({n for _, n, _ in rows}), []
    for index, label in enumerate(("ours / best int4 peer", "ours / torch int8 (fbgemm)")):
        cells = []
        for tokens in counts:
            medians = [median(r) for shape in shapes_of(rows) if (r := ratios(rows, shape, tokens)[index])]
            cells.append(f"{min(medians):.2f} to {max(medians):.2f}" if medians else "-")
        lines.append([label, *cells])
    return markdown(["tokens an expert", *map(str, counts)], lines)


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


def amx_table(data: dict[str, Any]) -> str:
    """Milliseconds of bfloat16 experts with and without AMX, and of torch's."""
    tiles, vectors, machine = collect(data, "with"), collect(data, "without"), data["machine"]
    heads = ("shape", "tokens an expert", "ours", "ours without AMX", "torch", "without / with AMX", "torch / ours")
    lines = []
    for shape, tokens in dict.fromkeys((shape, tokens) for shape, tokens, _ in tiles):
        found = (tiles, "ours bfloat16"), (vectors, "ours bfloat16"), (tiles, "torch bfloat16")
        times = [[row["ms"] for row in rows.get((shape, tokens, name), [])] for rows, name in found]
        ratios = [f"{median(other) / median(times[0]):.2f}" if other else "-" for other in times[1:]]
        lines.append([shape, str(tokens), *(spread(values, ".2f") for values in times), *ratios])
    return (
        "## bfloat16 experts on AMX\n\n"
        f"On another machine: {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, virtual\n"
        "machine. Milliseconds of a layer call; medians over the runs, ratios of these medians. Without AMX:\n"
        "HYBRIMOE_ISA=avx512bf16. torch's bfloat16 is oneDNN, which has AMX as well, and rounds what down sees.\n\n"
        + markdown(heads, lines)
    )


def quality_table(rows: list[Row]) -> str:
    """Error per dtype."""
    names = ("experts", "error, weights", "error, as run", "perplexity", "same greedy token", "cosine of logits")
    keys = (("weight_error", ".3%"), ("kernel_error", ".3%"), ("perplexity", ".3f"), ("greedy_agreement", ".2%"),
            ("logit_cosine", ".5f"))  # fmt: skip
    lines = [[row["dtype"], *(format(row[key], form) for key, form in keys)] for row in rows]
    return (
        "## Quality (demo model)\n\n"
        "`hybrimoe bench quality`: error of an expert's output on the model's own inputs (root mean square, relative\n"
        "to float32 experts), without and with the rounding of activations; perplexity and greedy agreement on the\n"
        "tokens of the held-out text.\n\n"
        + markdown(names, lines)
        + "\nWhere int8 activations are too coarse (outliers inside a group of 32), `bfloat16` and `float32` experts\n"
        "do not round activations at all."
    )


if __name__ == "__main__":
    main()
