"""Writes docs/ablation.md from a finished `hybrimoe bench ablation`.

    python benchmarks/ablation_report.py ablation/ > docs/ablation.md

Everything in it is simulated. The tables are those of the command; the last one lists each trace, machine and share.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path

from hybrimoe.bench.ablation.summary import bound_share, markdown, oracle_share, tables

Row = dict[str, str]
INTRODUCTION = """# Ablation: simulated

Written by `benchmarks/ablation_report.py` from a full `hybrimoe bench ablation` at commit {commit} ({rows} rows,
hybrimoe {version}). Traces of the last tables: {traces}. A file's first quarter of sequences is the warm-up's profile,
the sequences that follow are simulated.

In Table III each technique stands alone on the baseline. The balance is the one of the paper's published code, which
differs from the one of its text; the rows named "text" have that one. Assumed where the paper is silent: what
scheduling or prefetching alone brings serves the layer that it was brought for and does not join the static set; a
cache alone is filled by the idle link with what the CPU computed; gates ahead have a recall of 0.85, 0.75 and 0.65. The
table after it changes one assumption at a time.

Prefetching does next to nothing in a prompt here: nearly every expert is needed, so none may leave for another (letting
those that few tokens need leave for those that many need: 77 copies instead of 3, and 0.1 % slower).

`oracle` is a policy that knows the next layers and the next use of every expert; another could be faster. The bound is
a time that none can beat (`scheduler/simulator/bound.py`), and that perhaps none reaches.
"""
COLUMNS = ("machine", "cached", "static ms", "FreeToken ms", "paper ms", "ours ms", "oracle ms", "bound ms",
           "ours / static", "ours / FreeToken", "way to the oracle", "way to the bound", "prefetch right")  # fmt: skip


def main() -> None:
    """Print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = [row for row in rows if row["experiment"] == "policies"]
    names = sorted({Path(row["trace"]).stem for row in settings})
    print(
        INTRODUCTION.format(
            commit=rows[0]["commit"][:7], rows=len(rows), version=rows[0]["hybrimoe"], traces=", ".join(names)
        )
    )
    for title, columns, cells in tables(summary):
        print(f"## {title}\n\n{markdown(columns, cells)}\n")
    for name in names:
        mine = [row for row in settings if Path(row["trace"]).stem == name]
        print(f"## {name}: decode by machine and share cached\n\n{markdown(COLUMNS, by_setting(mine))}\n")


def by_setting(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each machine and share."""
    groups: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["hardware"], float(row["cache_ratio"])), {})[row["policy"]] = row
    return [_line(machine, share, group) for (machine, share), group in sorted(groups.items())]


def _line(machine: str, share: float, group: dict[str, Row]) -> list[str]:
    ms = {policy: float(row["latency_ms"]) for policy, row in group.items()}
    ours = group["ours"]
    bound = float(ours["bound_ms"])
    plain = {policy: {"latency_ms": value, "bound_ms": bound} for policy, value in ms.items()}
    ways = ["-" if way is None else f"{way:.0%}" for way in (oracle_share(plain, "ours"), bound_share(plain, "ours"))]
    right = f"{float(ours['prefetch_precision']):.0%}" if int(ours["prefetches"]) else "-"
    times = [f"{ms[policy]:.1f}" for policy in ("static", "freetoken", "hybrimoe", "ours", "oracle")]
    times.append(f"{bound:.1f}")
    gains = [f"{ms[policy] / ms['ours']:.2f}" for policy in ("static", "freetoken")]
    return [machine, f"{share:.0%}", *times, *gains, *ways, right]


if __name__ == "__main__":
    main()
