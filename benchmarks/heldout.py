"""What ``ours`` reaches on sequences that no constant was tuned on: decode speed and hit rates, all simulated.

    python benchmarks/heldout.py TRACE.npz           # simulates (minutes); writes docs/heldout.json and docs/heldout.md
    python benchmarks/heldout.py --tables            # writes the page's table anew from docs/heldout.json

The first half of the sequences is for tuning (its first half also the warm-up's profile and what the transition
predictor learns from), the second half is held out. ``tests/hybrimoe/bench/test_heldout.py`` checks that the page
is that of docs/heldout.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe.bench.ablation.cases import EVERY_HARDWARE
from hybrimoe.bench.ablation.summary import oracle_share
from hybrimoe.bench.ablation.sweep import environment
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.tracing.sources import open_trace
from scheduler.machine.profile import ModelShape
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.analysis_pool import cache_hit_rate
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import predictions_for
from scheduler.traces.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
JSON_FILE, PAGE = ROOT / "docs" / "heldout.json", ROOT / "docs" / "heldout.md"
BEGIN, END = "<!-- heldout:begin (python benchmarks/heldout.py) -->", "<!-- heldout:end -->"
POLICIES = ("static", "freetoken", "hybrimoe", "ours", "oracle")
SHARES = (0.25, 0.5)
TOKENS = 1000
HIT_RATES: dict[str, tuple[str, dict[str, Any]]] = {
    "lru, one pool": ("lru", {"scope": "pool"}),
    "lru, slots a layer": ("lru", {}),
    "value": ("value", {}),
    "belady": ("belady", {}),
}
NAMES = {"a6000-xeon5220r": "RTX A6000 + Xeon 5220R", "rtx4090-ryzen9": "RTX 4090 + Ryzen 9", "h100": "H100",
         "rtx5090-xeon": "RTX 5090 + 2 x Xeon", "laptop": "laptop"}  # fmt: skip
ORDER = ("a6000-xeon5220r", "rtx4090-ryzen9", "h100", "rtx5090-xeon", "laptop")


def parts(trace: Trace) -> tuple[Trace, Trace]:
    """(profile, held out): the first quarter and the last half of the sequences."""
    sequences = [int(trace.sequence[start]) for start, _ in trace.sequence_spans()]
    n = len(sequences)
    return trace.select_sequences(sequences[: n // 4]), trace.select_sequences(sequences[n // 2 :])


def measure(path: str, tokens: int = TOKENS) -> dict[str, Any]:
    """Rows of every machine, share and policy on the first ``tokens`` held-out tokens; hit rates on all of them."""
    found = open_trace(path, None)
    profile, held = parts(found.trace)
    return {
        "kind": "simulated",
        "trace": Path(path).name,
        "model": found.trace.meta["model"],
        "tokens": tokens,
        "held_out_tokens": held.n_tokens,
        "environment": environment(),
        "decode": decode(profile, held.head(tokens), found.shape),
        "hits": [
            {"cache": name, "share": share, "hit_rate": cache_hit_rate(held, cache, share, **params)}
            for name, (cache, params) in HIT_RATES.items()
            for share in SHARES
        ],
    }


def decode(profile: Trace, held: Trace, shape: ModelShape) -> list[dict[str, Any]]:
    """One row a machine, share and policy."""
    source = DemandSource(held, predictions_for(held, "auto", profile, 0))
    known, earlier = expert_frequencies(profile), DemandSource(profile)
    rows = []
    for hardware in EVERY_HARDWARE:
        for share in SHARES:
            for policy in POLICIES:
                config = SimulationConfig(policy=policy, cache_ratio=share)
                machine = open_hardware(hardware)
                result = simulate(held, machine, shape, config, None, known, None, source, earlier=earlier)[0]
                kept = ("policy", "latency_ms", "hit_rate", "transfers", "prefetches", "prefetch_precision")
                row = {name: value for name, value in result.as_dict().items() if name in kept}
                rows.append({"hardware": hardware, "share": share, **row})
    return rows


def table(data: Mapping[str, Any]) -> str:
    """The part of the page between the markers."""
    rows = data["decode"]
    lines = [
        f"Simulated, decode, {data['tokens']:,} tokens of sequences of a real {data['model'].split('/')[-1]} trace",
        "that were not used for tuning; `ours` as a speed-up at 25 % / 50 % of the experts cached:",
        "",
        "| machine (datasheet profile) | over static | over FreeToken | of the way from static to the oracle |"
        " prefetches right |",
        "|---|---|---|---|---|",
    ]
    for hardware in ORDER:
        groups = [_group(rows, hardware, share) for share in SHARES]
        ways = [oracle_share(group, "ours") for group in groups]
        cells = (
            " / ".join(f"{group['static']['latency_ms'] / group['ours']['latency_ms']:.2f}" for group in groups),
            " / ".join(f"{group['freetoken']['latency_ms'] / group['ours']['latency_ms']:.2f}" for group in groups),
            " / ".join("-" if way is None else f"{way:.0%}".replace("%", " %") for way in ways),
            " / ".join(f"{group['ours']['prefetch_precision']:.0%}".replace("%", " %") for group in groups),
        )
        lines.append(f"| {NAMES[hardware]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *hit_lines(data), ""])


def hit_lines(data: Mapping[str, Any]) -> list[str]:
    """Hit rates of the cache alone, every miss brought in, over all held-out tokens."""
    rates = {(row["cache"], row["share"]): row["hit_rate"] for row in data["hits"]}

    def both(cache: str) -> str:
        return " / ".join(f"{rates[cache, share]:.1%}".replace("%", " %") for share in SHARES)

    def way(lru: str) -> str:
        shares = [(rates["value", s] - rates[lru, s]) / (rates["belady", s] - rates[lru, s]) for s in SHARES]
        return " / ".join(f"{share:.0%}".replace("%", " %") for share in shares)

    return [
        f"Hit rate of its cache alone, each miss brought in, {data['held_out_tokens']:,} held-out tokens, 25 % / 50 %:",
        f"{both('value')}; LRU over one pool {both('lru, one pool')}, with slots a layer {both('lru, slots a layer')},",
        f"Belady {both('belady')}: {way('lru, one pool')} of the way from the first LRU,",
        f"{way('lru, slots a layer')} from the second.",
    ]


def _group(rows: list[dict[str, Any]], hardware: str, share: float) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in rows if row["hardware"] == hardware and row["share"] == share}


def with_table(readme: str, text: str) -> str:
    """``readme`` with ``text`` between its markers. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/heldout.md has no markers {BEGIN} and {END}")
    return f"{before}{begin}\n{text}{end}{after}"


def main() -> None:
    """Simulates, or takes the recorded results, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", help="routing trace (.npz); without it only with --tables")
    parser.add_argument("--tables", action="store_true", help="write the table from docs/heldout.json")
    arguments = parser.parse_args()
    if arguments.tables == (arguments.trace is not None):
        parser.error("give a trace, or --tables")
    data = json.loads(JSON_FILE.read_text(encoding="utf-8")) if arguments.tables else measure(arguments.trace)
    JSON_FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(data)), encoding="utf-8")


if __name__ == "__main__":
    main()
