"""Writes the tables of docs/long-chats.md from what `hybrimoe bench long-chat --json` measured.

    hybrimoe bench long-chat --shape olmoe-1b-7b --layers 2 --llama-cpp --json > long-chat.json
    python benchmarks/long_chat_report.py long-chat.json

Each file is a table; what stands before the first mark in the document stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "long-chats.md"
MARK = "<!-- written by benchmarks/long_chat_report.py -->\n"
HEAD = """
| first turn | | turn | TTFT ms | of the first | ms a token | tokens reused | from disk |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Replace the tables of the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON documents of `hybrimoe bench long-chat`")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    before = arguments.document.read_text(encoding="utf-8").split(MARK)[0]
    arguments.document.write_text(before + MARK + "\n".join(map(table, results)), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """One measurement as Markdown."""
    machine = result["machine"]
    title = (
        f"\n{result['model']}, {result['layers']} layers ({result['weights']} weights),"
        f" {result['expert_dtype']} experts,"
        f"\non {machine['cpu']}, {machine['cores']} cores; {result['turn_tokens']} new tokens a turn, replies of"
        f" {result['new_tokens']};\nmedians of {result['rounds']} alternating rounds, in brackets the least and the"
        " greatest.\n"
    )
    return title + HEAD + "".join(_lines(result["rows"])) + "\n" + "".join(_tiers(result["rows"]))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        ttft = row["ttft_ms"]
        spread = f" ({ttft['min']:.0f} to {ttft['max']:.0f})" if len(ttft["rounds"]) > 1 else ""
        cells = (
            row["context"], row["contender"], row["turn"], f"{ttft['median']:.0f}{spread}", f"{row['of_first']:.2%}",
            f"{row['tbt_ms']:.1f}", row["reused"], row["from_disk"],
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |\n"


def _tiers(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What each contender keeps after its turns."""
    for row in {(row["context"], row["contender"]): row for row in rows}.values():
        held = ", ".join(f"{place} {n_bytes / 2**20:.0f} MiB" for place, n_bytes in row["tiers"].items())
        yield f"- {row['context']} tokens, {row['contender']}: {held}\n"


if __name__ == "__main__":
    main()
