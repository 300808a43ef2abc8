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
- On an NVIDIA card with policy `ours`, "a token without Python": all layers of a token are one compiled call
  ([how a decode step runs](config.md#cpustep)), and the card waits for `bookkeeping`.
- With slots and another policy on a device whose steps are captured, "sent by a card": likewise.
- With slots elsewhere, and in tests, the line of the emulated accelerator.

Kernels and waiting are wall time of the calling thread, everything else is its CPU time, so that what the threads of
an emulated accelerator take away from it (cores, Python's lock) does not count as overhead. The sections are measured
while the real kernels run. Python's own code and data have to be found in memory again after them
([what bounds it](#what-bounds-it)), so that the time falls with the number of different things that are called, not
with their work. A call's tensors are made just before it, as a model's router makes them.

A cell is the median over {runs} runs, with the range of the runs. `bookkeeping` is the rest of the call: tensors,
grouping by expert, counters, the sum of the experts' rows; reading the clocks is part of it. On the CPU alone all but
the checks of the tensors and the counters is one compiled call, which counts as kernels. Of a layer that a card has
sent, `bookkeeping` is all that the card waits for beside kernels and copies, planning and launching included. `after
the release` is what the host does while the card goes on. The card's own work is left out there, and the calling thread
makes the copies (`link`), which a card's link makes by itself. Other programs use this machine's memory: where the
kernels' range is wide, compare the columns of CPU time and not the shares.
"""


REMARKS = """
## A token without Python

In the last line of the table one compiled call runs all layers of a token: launches, copies and questions are calls of
functions that stand for the driver's and do next to nothing, so that what a card's driver takes itself is left out. On
an H200 ([latencies](gpu-measured.md), another machine) a graph took 2.6 to 2.8 us of the host to launch, an event 0.3
to query and 0.7 to have a stream wait for: the two launches of a layer and its queries come to 6 us and more.

The call's times are read within it, and its sections are medians over all layers of all tokens. What Python does once a
token comes on top: 31 us to hand the session's state to the call, 22 to take it back, and 8 to see whether it may run
(medians of 100 tokens, 16 layers, the machine of the table), which is 1 to 2 us a layer of a large model. Compiling it
takes 15 s once on a machine.

## On an Intel machine

Two runs on an Intel Xeon (Granite Rapids class, 2 cores, virtual, shared; other programs used cores and memory), before
a token could be one compiled call: 37 us of overhead on the CPU alone, 223 with `ours` on the emulated accelerator, 410
with `hybrimoe`; sent by a card, 67 us that the card waits for and 34 after the release with `ours`, 235 and 3 with
`hybrimoe`. What stands below was measured there.

## Huge pages

Some seconds after a model with large experts has started, Python's own memory is moved onto huge pages
(`hybrimoe/machine/interpreter.py`; Linux 6.1 and later), which the benchmark waits for. What it gains differs between
runs, and why was not found out. In one process each, before and after the move, four rounds while the machine was
slower than in the tables: a layer with slots took 424 to 446 us before and 275 to 306 after (planning, bookkeeping
and dispatch), one that a card waits for 112 to 130 and 87 to 98, what comes after its release 94 to 118 and 52 to 63,
on the CPU alone 45 to 50 and 37 to 41. A process that moved nothing did not get faster. The move takes 0.6 s of
processor time for 200 MiB here, ten seconds after the start, which it would slow down. It is done page by page, with
rests of nine times as long: all at once it took 4.6 s beside a long prompt over HTTP (one layer of OLMoE's shape, 2
cores, alone), in which parts of 0.15 s took 0.6; with rests it took 51 s, and no part in them more than 0.31 (one run
each, the second on a slower machine: median part 0.25 s in place of 0.19).

## What bounds it

The goals are 60 us of planning, bookkeeping and dispatch for a layer with slots and 15 us without, 30 us that a card
waits for, and 2 % of a decode step. On the machine of the table 15 and 30 us are reached (13; 21 by Python, 10 by one
compiled call), 60 where one compiled call runs the token (11, and 134 on the emulated accelerator). The share of a step
on a card hangs on the card's own work, which is left out here. On the Intel machine none is reached where Python runs
the step. By hand, there:

- What costs is to find things again in memory. Decisions of a running layer were replayed in compiled code, 120 in
  turn, with what changes between them written back and nothing else: what lies between two of them can be chosen. One
  took 10 us after nothing, and after 64 or 512 KiB of other data had been read; 33 after 2 MiB, 36 to 49 after 4 MiB
  and more. The L2 of a core has 2 MiB here, and a line that is not in it takes 55 ns out of 8 MiB and 180 to 230 out
  of 64 MiB: the 35 us are some 200 of them, one after another. It is not one thing: taken out of the caches by
  themselves, the decision's arrays made it 26 us, its machine code 19 to 34, the C library and its mathematics 21,
  the stack 15.
- It is not the translation of addresses: 13 us after 4,000 other pages of 4 KiB, and with all of its arrays in one
  piece on one huge page 43 in place of 44 after 24 MiB. Nor is it mispredicted branches (13), other code of 1 MiB
  (17) or products with AVX-512 (14) right before it.
- Small arrays on the stack, in place of the allocator's, make the decision 32 to 35 us in place of 45 after 24 MiB
  when it is replayed, 7.8 in place of 10.5 after nothing. By the benchmark, four runs of each in turn with nothing
  beside them, a card then waits for 71, 72, 75 and 91 us in place of 71, 77, 79 and 83, and with slots on the
  emulated accelerator the sums were 263, 275, 296 and 296 in place of 242, 246, 289 and 298: it was left out.
- Policy `hybrimoe`, sent by a card, took 292 and 270 us in two of these runs, and 278 and 283 in a version from
  before plans were flat arrays.
- Smaller machine code (LLVM's optsize, minsize) took longer, 48 and 55 us in place of 44; logarithms and exponentials
  in vectors, without the C library, took as long. Reading all of the decision's arrays and code ahead takes 50 to 64
  us and gives back 5 to 13.
- Weights cannot pass the caches by on Intel as they do on Zen ([kernels.md](kernels.md)): one core reads 18 to 22
  GB/s into L2 and 5 to 9 as read once (prefetchnta, 0.5 to 8 KiB ahead), after which the decision takes 22 to 43 us.
- The caches are a third of it. With experts so small that next to nothing streams, a layer with slots took 174 us in
  place of 284, one that a card waits for 56 in place of 82, on the CPU alone 33 in place of 53 (one run each, beside
  other programs): the rest is Python, the stopwatch and the change of threads.
- The decision uses what the forecast has learnt from this very layer, so that nothing of it can wait for the release.
- What plans have pinned, copies under way, events of slots and counters are flat arrays since, which the decision
  writes itself. By clocks around functions, beside other programs: the end of a copy takes 6 us in place of 16,
  taking over a decision 5 to 9 in place of 13, counting none of its own in place of 6. What a card waits for did not
  get faster by it. Adding to one number of a NumPy array from Python takes 4 us after kernels, so times are kept in a
  list and added up when somebody asks.
- In the same way, of a layer with slots: the check of the router's tensors takes 6, an output 4, letting go of a call
  7, the second piece of work that waits for a copy 13. The rest is in functions of 1 to 5 us each.
- Of the 36 us on the CPU alone 8 to 9 are the stopwatch and a call that does nothing but run the kernel.

A layer call with slots makes about 44 Python calls (counted by `tests/hybrimoe/runtime/test_call_budget.py`, small
experts, one expert in five calls moves), one that a card has sent 18 until its release and 40 in all.

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
