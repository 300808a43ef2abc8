"""Writes the tables of docs/lossy.md from results of `bench quality --lossy` and `bench ablation`.

hybrimoe bench quality --lossy all --json > quality.json
hybrimoe bench ablation --experiment lossy --out ablation
python benchmarks/lossy_report.py --quality quality.json --ablation ablation/summary.json

Either may be left out: what it gave stays as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DOC = Path(__file__).resolve().parents[1] / "docs" / "lossy.md"
BEGIN, END = "<!-- lossy-{name}:begin (python benchmarks/lossy_report.py) -->", "<!-- lossy-{name}:end -->"
WORDS = {"skipped": "skipped", "substituted": "substituted", "lowered": "low", "deferred": "late"}


def main() -> None:
    """Replace what stands between the marks of each section that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, nargs="+", help="JSON of `bench quality --lossy`, one or more.")
    parser.add_argument("--ablation", type=Path, help="summary.json of `bench ablation`.")
    parser.add_argument("--doc", type=Path, default=DOC)
    arguments = parser.parse_args()
    if not arguments.quality and not arguments.ablation:
        parser.error("expected --quality, --ablation, or both")
    text = arguments.doc.read_text(encoding="utf-8")
    if arguments.quality:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.quality]
        text = with_section(text, "quality", "\n\n".join(quality_section(result) for result in results))
    if arguments.ablation:
        summary = json.loads(arguments.ablation.read_text(encoding="utf-8"))
        text = with_section(text, "speed", speed_section(summary["lossy"]))
    arguments.doc.write_text(text, encoding="utf-8")


def with_section(text: str, name: str, section: str) -> str:
    """The document with ``section`` between the marks of ``name``."""
    begin, end = BEGIN.format(name=name), END.format(name=name)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{section}\n{end}{after}"


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
        "Simulated decode speed over the lossless run of the same policy and dtype: Qwen3-30B-A3B, 25 % of the experts"
        " cached, synthetic\nrouting, mean (and range) over RTX A6000 + Xeon 5220R, RTX 4090 + Ryzen 9 and a laptop"
        " (`hybrimoe bench ablation --experiment lossy`).\nMiB a token: what crosses the link, lossless / lossy."
    )
    lossless = {_of(row): row["mib_per_token"] for row in rows if row["lossy"] == "lossless"}
    cells = [
        (row["lossy"], row["expert_dtype"], row["policy"],
         f"{row['speedup']:.2f} ({row['least']:.2f} to {row['most']:.2f})", f"{row['hit_rate']:.0%}",
         f"{lossless[_of(row)]:.0f} / {row['mib_per_token']:.0f}", f"{row['changed']:.0%}")
        for row in rows
        if row["lossy"] != "lossless"
    ]  # fmt: skip
    columns = ("lossy", "experts", "beside", "speed-up", "hits", "MiB a token", "routed experts changed")
    return title + "\n\n" + _table(columns, sorted(cells))


def _of(row: dict[str, Any]) -> tuple[str, str]:
    """What a lossless run is compared with."""
    return row["policy"], row["expert_dtype"]


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
