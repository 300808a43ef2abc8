"""Writes docs/overhead.md from runs of `hybrimoe bench overhead --json`.

    python benchmarks/overhead_report.py run1.json run2.json ... --before old1.json old2.json > docs/overhead.md

`--before`: runs of an earlier version by the same benchmark, in turn with the others on the same machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

INTRODUCTION = """# Overhead of a layer call

Written by `benchmarks/overhead_report.py` from runs of `hybrimoe bench overhead`: {machine},
{cores} cores, virtual machine, shared; one MoE layer of {shape}, {dtype}, one token, {slots:.0%} of the experts with a
slot. Measured; accelerators are emulated by host threads.

Kernels and waiting are wall time of the calling thread, everything else is its CPU time, so that what the threads of
an emulated accelerator take away from it (cores, Python's lock) does not count as overhead. The sections are measured
while the real kernels run. What a layer streams through the caches decides much of them: Python's own code and data
come from memory where it has driven them out. On AVX2 the weights of one token pass the caches by
([kernels.md](kernels.md)), which halved what Python takes without slots. What the threads of an emulated accelerator
and the copies of slots stream still drives it out. Beyond that it falls with the number of different things that are
called, not with their work.
The goals are 60 us of planning, bookkeeping and dispatch for a layer with slots and 15 us without, 30 us that a card
waits for, and 2 % of a decode step; they are not reached where Python runs the step. The shares here are of the MoE
layer's call alone. Other programs use this machine's memory: where the kernels' range is wide, compare the columns of
CPU time and not the shares.

A cell is the median over {runs} runs, with the range of the runs. `bookkeeping` is the rest of the call: tensors,
grouping by expert, counters, the sum of the experts' rows; reading the clocks is part of it, about a microsecond for
each section. On the CPU alone all but the checks of the tensors and the counters is one compiled call, which counts as
kernels. Of a layer that a card has sent, `bookkeeping` is all that the card waits for beside kernels and copies,
planning and launching included. `after the release` is what the host does while the card goes on. The card's own work
is left out there, and the calling thread makes the copies (`link`), which a card's link makes by itself.
"""


def main() -> None:
    """Print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--before", nargs="*", type=Path, default=[])
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.runs]
    before = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.before]
    request, machine = runs[0]["request"], runs[0]["machine"]
    parts = [
        INTRODUCTION.format(
            machine=machine["cpu"], cores=machine["cores"], shape=request["shape"], dtype=request["dtype"],
            slots=request["slots"], runs=len(runs),
        ),
        _table(runs),
    ]  # fmt: skip
    if before:
        parts += [
            "Before weights passed the caches by, whole calls were written on sheets, and prefetches were decided with"
            " the choice (the same benchmark and stopwatch, in turn):\n"
        ]
        parts += [_table(before)]
    print("\n".join(parts), end="")


def _table(runs: list[dict[str, Any]]) -> str:
    """Medians and ranges of the runs, one line a contender, in us."""
    sections = list(runs[0]["contenders"][0]["sections_us"])
    head = ["what runs", "layer us", *sections, "overhead us", "share"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for index, row in enumerate(runs[0]["contenders"]):
        same = [run["contenders"][index] for run in runs]
        cells = [row["name"], _cell([item["layer_us"]["median"] for item in same])]
        cells += [_cell([item["sections_us"][name]["median"] for item in same]) for name in sections]
        cells.append(_cell([item["overhead_us"]["median"] for item in same]))
        cells.append(f"{median(item['share'] for item in same):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    middle = f"{median(values):.0f}"
    return middle if max(values) < 0.5 else f"{middle} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
