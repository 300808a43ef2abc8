"""Every part of a policy beside the others, on recorded traces: docs/policies.json and docs/policies.md.

    python benchmarks/policies_report.py TRACE.npz ...       # simulates (minutes); the demo trace is always among them
    python benchmarks/policies_report.py TRACE.npz ... --only expert_maps   # the other recorded rows stay
    python benchmarks/policies_report.py --tables            # writes the page anew from docs/policies.json

Caches alone: hit rate where every miss is brought in. Balances: decode step with an LRU cache and no prefetch.
Prefetches: decode step with the balance and cache of `ours`. The second half of a trace's sequences is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrimoe.machine.facts import environment
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.tracing.sources import DEMO, TraceInput, open_trace
from scheduler.balancing import BALANCE_POLICIES
from scheduler.cache import CACHE_POLICIES
from scheduler.prefetch import PREFETCH_POLICIES
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.analysis_pool import cache_hit_rate
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import predictions_for

ROOT = Path(__file__).resolve().parents[1]
JSON_FILE, PAGE = ROOT / "docs" / "policies.json", ROOT / "docs" / "policies.md"
SHARES = (0.25, 0.5)
MACHINES = ("rtx4090-ryzen9", "laptop")
TOKENS = 64
CLAIRVOYANT = ("belady", "perfect")
"""Bounds: they know the future, so no policy that runs is compared with them."""
NOT_ALONE = ("fixed",)
"""A cache that never changes: it has no hit rate of its own."""

TIMED = {
    "balance": "Balances: ms a decode step, with an LRU cache and no prefetch",
    "prefetch": "Prefetches: ms a decode step, with the balance and cache of `ours`",
}
WHAT = {
    "value": "ours: one value for admission, eviction and prefetch, from an online forecast",
    "belady": "bound: evicts what is needed last (Belady 1966)",
    "perfect": "bound: knows the next layers' routing",
    "lru": "least recently used; FreeToken (arXiv 2608.16157), AdapMoE (arXiv 2408.10284)",
    "lfu": "least frequently used; Fiddler (arXiv 2402.07033), KTransformers' static set",
    "mrs": "HybriMoE (arXiv 2504.05897): minus recent score",
    "hobbit": "HOBBIT (arXiv 2411.01433): recency, frequency and layer distance",
    "activation_matrix": "MoE-Infinity (arXiv 2401.14361): activation matrix of the sequence",
    "shallow_first": "llama.cpp's --n-cpu-moe: the first layers stay",
    "arc": "Fate (arXiv 2502.12224): adaptive replacement",
    "learned": "FlashMoE's scorer: a net trained by `hybrimoe trace train`; here with its weights set by hand",
    "fixed": "never changes: Table III of HybriMoE, KTransformers",
    "none": "nothing is brought ahead",
    "impact": "HybriMoE: by the simulated gain of having an expert",
    "gate_topk": "AdapMoE, HOBBIT, Fate: what the gates of later layers choose",
    "expert_maps": "FineMoE (arXiv 2502.05370): the earlier step whose gates were most alike so far",
    "history": "experts used lately in the layers ahead",
    "misses": "Table III: what the CPU computed is brought in by the idle link",
    "optimal": "exact minimum of the makespan",
    "hybrimoe": "HybriMoE: greedy, with stealing",
    "hybrimoe_released": "HybriMoE's published code: the lane that ends an expert first takes it",
    "static": "KTransformers: residents on the accelerator, the rest on the CPU",
    "on_demand": "every miss is transferred",
    "layers": "llama.cpp: whole layers",
    "fiddler": "Fiddler: transfer or compute, expert by expert",
    "monde": "MoNDE (arXiv 2405.18832): the hottest are transferred",
    "bandwidth": "FreeToken: split by the bandwidths",
    "cpu_only": "no accelerator",
    "accel_only": "no CPU experts",
}


def measure(paths: Sequence[str], tokens: int = TOKENS, only: str = "") -> dict[str, Any]:
    """Rows of every cache, balance and prefetch on each trace; ``only``: of those of this name."""
    rows: list[dict[str, Any]] = []
    for path in (DEMO, *paths):
        found = open_trace(path, None)
        name = "demo" if path == DEMO else Path(path).name.split(".")[0]
        rows += [{"trace": name, **row} for row in measured(found, tokens, only)]
    return {"kind": "simulated", "tokens": tokens, "environment": environment(), "rows": rows}


def measured(found: TraceInput, tokens: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Rows of one trace: the second half of its sequences, with the first half as the profile."""
    sequences = [int(found.trace.sequence[start]) for start, _ in found.trace.sequence_spans()]
    half = len(sequences) // 2
    profile = found.trace.select_sequences(sequences[:half]) if half else found.trace
    held = (found.trace.select_sequences(sequences[half:]) if half else found.trace).head(tokens)
    for share in SHARES:
        for cache in CACHE_POLICIES:
            if cache not in NOT_ALONE and only in ("", cache):
                yield {"part": "cache", "name": cache, "share": share, "hit_rate": cache_hit_rate(held, cache, share)}
    source = DemandSource(held, predictions_for(held, "auto", profile, 0))
    known, earlier = expert_frequencies(profile), DemandSource(profile)
    policies = [("balance", name, f"{name}/none/lru") for name in BALANCE_POLICIES]
    policies += [("prefetch", name, f"value/{name}/value") for name in PREFETCH_POLICIES]
    for part, name, policy in policies:
        if only not in ("", name):
            continue
        for hardware in MACHINES:
            for share in SHARES:
                config = SimulationConfig(policy=policy, cache_ratio=share)
                machine = open_hardware(hardware)
                results = simulate(held, machine, found.shape, config, None, known, None, source, earlier=earlier)
                result = next(row for row in results if row.phase == "decode").as_dict()
                yield {"part": part, "name": name, "share": share, "hardware": hardware,
                       "latency_ms": result["latency_ms"]}  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """docs/policies.md."""
    lines = [
        "# Policies, part by part",
        "",
        f"Written by `benchmarks/policies_report.py`; simulated, the first {data['tokens']} tokens of sequences that",
        "are not the profile's. A policy is balance/prefetch/cache; each part is compared here with the others in its",
        "place. A part stays in the product if it is the best of a column (bold) or if a published system, a preset or",
        "a table of the paper is made of it; others belong into a file of your own",
        "([CONTRIBUTING.md](../CONTRIBUTING.md#add-a-policy-to-hybrimoe)). Bounds know the future and win no column.",
    ]
    columns = sorted({(row["trace"], row["share"]) for row in data["rows"]})
    hits = {
        (row["name"], (row["trace"], row["share"])): row["hit_rate"] for row in data["rows"] if row["part"] == "cache"
    }
    lines += ["", "## Caches alone: hit rate, every miss brought in", ""]
    lines += _table(hits, columns, [f"{trace}, {share:.0%}" for trace, share in columns], "{:.1%}", best=max)
    for part, title in TIMED.items():
        for hardware in MACHINES:
            times = {
                (row["name"], (row["trace"], row["share"])): row["latency_ms"]
                for row in data["rows"]
                if row["part"] == part and row["hardware"] == hardware
            }
            lines += ["", f"## {title}: {hardware}", ""]
            lines += _table(times, columns, [f"{trace}, {share:.0%}" for trace, share in columns], "{:.2f}", best=min)
    return "\n".join(lines) + "\n"


def _table(values: dict[Any, float], keys: Sequence[Any], heads: Sequence[str], form: str, best: Any) -> list[str]:
    names = list(dict.fromkeys(name for name, _ in values))
    online = [name for name in names if name not in CLAIRVOYANT]
    winners = {key: form.format(best(values[name, key] for name in online)) for key in keys}
    lines = [f"| | {' | '.join(heads)} | what it is |", f"|---|{'---|' * len(heads)}---|"]
    for name in names:
        cells = [form.format(values[name, key]) for key in keys]
        shown = [f"**{c}**" if c == winners[k] and name in online else c for c, k in zip(cells, keys, strict=True)]
        lines.append(f"| `{name}` | {' | '.join(shown)} | {WHAT[name]} |")
    return lines


def main() -> None:
    """Measures, or reads what was measured, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--tables", action="store_true", help="only write the page anew")
    parser.add_argument("--only", default="", metavar="NAME", help="measure parts of this name; the other rows stay")
    given = parser.parse_args()
    if given.tables:
        data = json.loads(JSON_FILE.read_text(encoding="utf-8"))
    else:
        data = measure(given.traces, given.tokens, given.only)
        if given.only:
            known = json.loads(JSON_FILE.read_text(encoding="utf-8"))
            data = {**known, "rows": [r for r in known["rows"] if r["name"] != given.only] + data["rows"]}
        JSON_FILE.write_text(json.dumps(data).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()
