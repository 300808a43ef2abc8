"""What ``ours`` reaches on sequences that no constant was tuned on: decode speed and hit rates, all simulated.

    python benchmarks/heldout.py TRACE.npz ...       # simulates (minutes); writes docs/heldout.json and docs/heldout.md
    python benchmarks/heldout.py --tables            # writes the page's tables anew from docs/heldout.json

The first half of the sequences is for tuning (its first half also the warm-up's profile and what the transition
predictor learns from), the second half is held out; of a trace of a single sequence, the same shares of its tokens.
``tests/hybrimoe/bench/test_heldout.py`` checks that the page is that of docs/heldout.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrimoe.bench.ablation.cases import EVERY_HARDWARE
from hybrimoe.bench.ablation.summary import bound_share
from hybrimoe.bench.ablation.sweep import environment
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.tracing.sources import open_trace
from scheduler.machine.profile import ModelShape
from scheduler.simulator.bound import lower_bounds
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.analysis_pool import cache_hit_rate
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import predictions_for
from scheduler.traces.trace import PHASE_CODES, Trace

ROOT = Path(__file__).resolve().parents[1]
JSON_FILE, PAGE = ROOT / "docs" / "heldout.json", ROOT / "docs" / "heldout.md"
BEGIN, END = "<!-- heldout:begin (python benchmarks/heldout.py) -->", "<!-- heldout:end -->"
POLICIES = ("static", "freetoken", "hybrimoe", "ours", "oracle")
CLAIRVOYANT = (("oracle", 12), ("value/perfect/belady", 3), ("value/perfect/belady", 12))
"""Schedules that know what is coming, beside ``oracle`` as it is: policy, and layers that it brings experts ahead."""
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
    """(profile, held out): the first quarter and the last half of the sequences; of a single one, of its tokens."""
    if len(trace.sequence_spans()) == 1:
        return trace.head(trace.n_tokens // 4), trace.tail(trace.n_tokens - trace.n_tokens // 2)
    sequences = [int(trace.sequence[start]) for start, _ in trace.sequence_spans()]
    n = len(sequences)
    return trace.select_sequences(sequences[: n // 4]), trace.select_sequences(sequences[n // 2 :])


def measure(path: str, tokens: int = TOKENS) -> dict[str, Any]:
    """Rows of every machine, share and policy on the first ``tokens`` held-out tokens (all, where there are fewer); hit
    rates on all of them."""
    found = open_trace(path, None)
    profile, held = parts(found.trace)
    head = held.head(tokens)
    return {
        "trace": Path(path).name,
        "model": found.trace.meta["model"],
        "tokens": int((head.phase == PHASE_CODES["decode"]).sum()),
        "held_out_tokens": held.n_tokens,
        "decode": decode(profile, head, found.shape),
        "hits": [
            {"cache": name, "share": share, "hit_rate": cache_hit_rate(held, cache, share, **params)}
            for name, (cache, params) in HIT_RATES.items()
            for share in SHARES
        ],
    }


def decode(profile: Trace, held: Trace, shape: ModelShape) -> list[dict[str, Any]]:
    """One row a machine, share and policy; ``bound_ms``: what no policy can beat, ``best_ms``: the fastest schedule
    found, of those of CLAIRVOYANT and these."""
    source = DemandSource(held, predictions_for(held, "auto", profile, 0))
    known, earlier = expert_frequencies(profile), DemandSource(profile)
    rows = []
    for hardware in EVERY_HARDWARE:
        machine = open_hardware(hardware)
        for share in SHARES:
            static = SimulationConfig(policy="static", cache_ratio=share)
            bound = lower_bounds(Simulator(held, machine, shape, static, phase="decode", source=source))["decode"]
            tried = [SimulationConfig(policy=policy, cache_ratio=share) for policy in POLICIES]
            tried += [SimulationConfig(policy=p, cache_ratio=share, lookahead=layers) for p, layers in CLAIRVOYANT]
            found = []
            for config in tried:
                (result,) = simulate(held, machine, shape, config, None, known, "decode", source, earlier=earlier)
                found.append(result.as_dict())
            best = min(row["latency_ms"] for row in found)
            kept = ("policy", "latency_ms", "hit_rate", "transfers", "prefetches", "prefetch_precision")
            for row in found[: len(POLICIES)]:
                own = {name: row[name] for name in kept}
                rows.append({"hardware": hardware, "share": share, **own, "bound_ms": bound, "best_ms": best})
    return rows


def table(data: Mapping[str, Any]) -> str:
    """The part of the page between the markers: a table a trace."""
    return "\n".join(part for trace in data["traces"] for part in (*speed_lines(trace), "", *hit_lines(trace), ""))


def speed_lines(trace: Mapping[str, Any]) -> list[str]:
    """``ours`` on each machine."""
    rows = trace["decode"]
    lines = [
        f"Simulated, decode, {trace['tokens']:,} tokens of a real {trace['model'].split('/')[-1]} trace that were not",
        "used for tuning; `ours` as a speed-up at 25 % / 50 % of the experts cached:",
        "",
        "| machine (datasheet profile) | over static | over FreeToken | of the way to the best schedule |"
        " to the bound | best schedule to the bound | prefetches right |",
        "|---|---|---|---|---|---|---|",
    ]
    for hardware in ORDER:
        groups = [_group(rows, hardware, share) for share in SHARES]
        own = [group["ours"] for group in groups]
        cells = (
            " / ".join(f"{group['static']['latency_ms'] / group['ours']['latency_ms']:.2f}" for group in groups),
            " / ".join(f"{group['freetoken']['latency_ms'] / group['ours']['latency_ms']:.2f}" for group in groups),
            _percents(_way(group["ours"], group["static"], "best_ms") for group in groups),
            _percents(bound_share(group, "ours") for group in groups),
            _percents(_way_of_best(group["static"]) for group in groups),
            _percents(row["prefetch_precision"] if row["prefetches"] else None for row in own),
        )
        lines.append(f"| {NAMES[hardware]} | {' | '.join(cells)} |")
    return lines


def _way(row: Mapping[str, Any], static: Mapping[str, Any], goal: str) -> float | None:
    """Share of the way from static to ``goal``, a time of the row; None where nothing is to be gained."""
    gain = static["latency_ms"] - row[goal]
    return None if gain <= 0.0 else float((static["latency_ms"] - row["latency_ms"]) / gain)


def _way_of_best(static: Mapping[str, Any]) -> float | None:
    """Share of the way from static to the bound that the best schedule goes."""
    return _way({"latency_ms": static["best_ms"], "bound_ms": static["bound_ms"]}, static, "bound_ms")


def _percents(shares: Iterable[float | None]) -> str:
    return " / ".join("-" if share is None else f"{share:.0%}".replace("%", " %") for share in shares)


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
    parser.add_argument("trace", nargs="*", help="routing traces (.npz, or demo); without any only with --tables")
    parser.add_argument("--tables", action="store_true", help="write the table from docs/heldout.json")
    arguments = parser.parse_args()
    if arguments.tables == bool(arguments.trace):
        parser.error("give traces, or --tables")
    if arguments.tables:
        data = json.loads(JSON_FILE.read_text(encoding="utf-8"))
    else:
        traces = [measure(path) for path in arguments.trace]
        data = {"kind": "simulated", "environment": environment(), "traces": traces}
    JSON_FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(data)), encoding="utf-8")


if __name__ == "__main__":
    main()
