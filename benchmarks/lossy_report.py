"""Writes the tables of docs/lossy.md from results of `bench quality --lossy` and `bench ablation`.

hybrimoe bench quality --lossy all --json > quality.json
hybrimoe bench ablation --experiment lossy --out ablation
python benchmarks/lossy_report.py quality.json ablation/summary.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DOC = Path(__file__).resolve().parents[1] / "docs" / "lossy.md"
BEGIN, END = "<!-- lossy:begin (python benchmarks/lossy_report.py) -->", "<!-- lossy:end -->"
WORDS = {"skipped": "skipped", "substituted": "substituted", "lowered": "low", "deferred": "late"}


def main() -> None:
    """Replace what stands between the marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quality", type=Path, nargs="+", help="JSON of `bench quality --lossy`, one or more.")
    parser.add_argument("ablation", type=Path, help="summary.json of `bench ablation`.")
    parser.add_argument("--doc", type=Path, default=DOC)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.quality]
    summary = json.loads(arguments.ablation.read_text(encoding="utf-8"))
    text = arguments.doc.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [quality_section(result) for result in results] + [speed_section(summary["lossy"])]
    arguments.doc.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after, encoding="utf-8")


def quality_section(result: dict[str, Any]) -> str:
    """Measured quality, and what the emulated or real accelerator did."""
    kind, machine = result["rows"][0]["provenance"], result["machine"]
    title = (
        f"Demo model, {result['dtype']} experts, a quarter of them in slots; {result['prefill_tokens']:,} tokens of"
        f" held-out text as prompts and\n{result['decode_tokens']} decoded along it. Quality is measured; hits, KiB and"
        f" tokens/s are {kind} ({machine['cpu']}, {machine['cores']} cores;\nthe model is so small that Python decides"
        " its speed). KL: mean divergence from the lossless next-token distribution, in nats."
    )
    columns = ("policy", "perplexity, prompts", "same greedy token", "perplexity, decoding", "same greedy token", "KL",
               "hits", "KiB a token", "tokens/s", "routed experts changed")  # fmt: skip
    return title + "\n\n" + _table(columns, [_quality_row(row) for row in result["rows"]])


def _quality_row(row: dict[str, Any]) -> tuple[str, ...]:
    changed = ", ".join(f"{row[key]:.0%} {words}" for key, words in WORDS.items() if row.get(key))
    return (
        row["policy"], f"{row['perplexity']:.2f}", f"{row['greedy_agreement']:.1%}", f"{row['decode_perplexity']:.2f}",
        f"{row['decode_greedy_agreement']:.1%}", f"{row['decode_divergence']:.4f}", f"{row['hit_rate']:.0%}",
        f"{row['transfer_kib_per_token']:.0f}", f"{row['tokens_per_s']:.0f}", changed or "-",
    )  # fmt: skip


def speed_section(rows: list[dict[str, Any]]) -> str:
    """Simulated speed on a real model's shape."""
    title = (
        "Simulated decode speed over the lossless run of the same policy: Qwen3-30B-A3B, bfloat16 experts, 25 % cached,"
        " synthetic routing, mean\n(and range) over RTX A6000 + Xeon 5220R, RTX 4090 + Ryzen 9 and a laptop"
        " (`hybrimoe bench ablation --experiment lossy`)."
    )
    cells = [
        (row["lossy"], row["policy"], f"{row['speedup']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
         f"{row['hit_rate']:.0%}", f"{row['changed']:.0%}")
        for row in rows
        if row["lossy"] != "lossless"
    ]  # fmt: skip
    return title + "\n\n" + _table(("lossy", "beside", "speed-up", "hits", "routed experts changed"), sorted(cells))


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
