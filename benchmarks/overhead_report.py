"""Writes docs/overhead.md from runs of `hybrimoe bench overhead --json`.

    python benchmarks/overhead_report.py run1.json ... --before old1.json ... > docs/overhead.md

`--before`: runs of an earlier version by the same benchmark, in turn with the others on the same machine.
What stands below the tables (REMARKS) was measured by hand.
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

Which number matters to whom:

- On the CPU alone, of a model that is understood, the whole decode step is one compiled call, and none of these
  numbers counts: see [a compiled step](#a-compiled-step). The line "CPU only" is for models of which only the experts
  are known.
- With slots on a device whose steps are captured, "sent by a card": the card waits for `bookkeeping`.
- With slots elsewhere, and in tests, the line of the emulated accelerator.

Kernels and waiting are wall time of the calling thread, everything else is its CPU time, so that what the threads of
an emulated accelerator take away from it (cores, Python's lock) does not count as overhead. The sections are measured
while the real kernels run. What a layer streams through the caches decides much of them: Python's own code and data
come from memory where it has driven them out. On AVX2 the weights of one token pass the caches by
([kernels.md](kernels.md)); here, on AVX-512, they do not. Beyond that it falls with the number of different things that
are called, not with their work. A call's tensors are made just before it, as a model's router makes them.

A cell is the median over {runs} runs, with the range of the runs. `bookkeeping` is the rest of the call: tensors,
grouping by expert, counters, the sum of the experts' rows; reading the clocks is part of it. On the CPU alone all but
the checks of the tensors and the counters is one compiled call, which counts as kernels. Of a layer that a card has
sent, `bookkeeping` is all that the card waits for beside kernels and copies, planning and launching included. `after
the release` is what the host does while the card goes on. The card's own work is left out there, and the calling thread
makes the copies (`link`), which a card's link makes by itself. Other programs use this machine's memory: where the
kernels' range is wide, compare the columns of CPU time and not the shares.
"""


REMARKS = """
## Since the tables

The tables were measured when the benchmark still held the tensors of all calls from its start. Since then they are made
just before each call, outputs are made several at a time, and calls without slots are added up when somebody asks for
the counters. A layer call with slots makes about 47 Python calls in place of 63 (counted by
`tests/hybrimoe/runtime/test_call_budget.py`, small experts, one expert in three calls moves; 33 where nothing moves or
is waited for). What that changes has not been measured on a quiet machine.

## What bounds it

The goals are 60 us of planning, bookkeeping and dispatch for a layer with slots and 15 us without, 30 us that a card
waits for, and 2 % of a decode step; they are not reached where Python runs the step. By hand, on the same machine:

- The same calls with experts so small (intermediate size 64) that nothing leaves the caches: 10 us on the CPU alone, 32
  us that a card waits for and 30 us after the release. The rest is code and data that come from memory again.
- With the emulated accelerator they still take 175 us, so that there the caches are not the bound. Its threads run
  Python as well; what their lock takes was not separated.
- After 24 MB have passed the caches, a new output tensor takes 10 us (0.8 us without), a property of a tensor 2 to 3, a
  compiled function 2 to 3.
- The compiled decision takes 34 to 37 us in a running layer, 17 us where its machine code is in the caches, and 11 us
  where its data is, too.

## A compiled step

On the CPU alone the decode step of a model that is understood is one compiled call. What is around it is counted by the
step and not by the layer: whether anybody has changed a weight or watches a module, the layers of the cache, a copy of
the logits. SmolLM2 cut into experts (`hybrimoe demo smollm2`; 30 layers) on the same machine, median of 35 steps, two
runs in turn: 1.4 ms of a step of 21 ms, which is 46 us a layer; 1.7 to 1.8 ms before each layer's cache was asked for
room without views of its keys and values.

Where those 1.3 to 1.4 ms go, and what a token takes beside the step, was taken apart on that machine, by the least of
180 steps: 0.54 ms for whether the model is as it was read, 0.1 for the layers of the cache, 0.28 for the copy of the
logits and what is around it; beside the step 0.7 for the choice of the token and 0.1 for its text. Since then the
tables of a model's modules are looked through in three fifths of the time (92 us in place of 157, in a model with 1,171
entries, behind a computation that has driven them out of the caches), and the largest of 49,152 logits is found in 8 us
in place of 69. A whole token has not been
measured since.
"""


def main() -> None:
    """Print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--before", nargs="*", type=Path, default=[])
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.runs]
    request, machine = runs[0]["request"], runs[0]["machine"]
    parts = [
        INTRODUCTION.format(
            machine=machine["cpu"], cores=machine["cores"], shape=request["shape"], dtype=request["dtype"],
            slots=request["slots"], runs=len(runs),
        ),
        _table(runs),
    ]  # fmt: skip
    if arguments.before:
        before = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.before]
        parts += ["Before, the same benchmark and stopwatch, in turn:\n", _table(before)]
    print("\n".join(parts) + REMARKS, end="")


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
