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
OWN, PEER = "hybrimoe", "llama.cpp"
HEAD = """
| context | | turn | TTFT ms | of the first | ms a token | tokens reused | from disk |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Replace the tables of the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON documents of `hybrimoe bench long-chat`")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--cpu", metavar="TEXT", help="what the CPU is, where the system does not tell")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    before = arguments.document.read_text(encoding="utf-8").split(MARK)[0]
    tables = "\n".join(table(result, arguments.cpu) for result in results)
    arguments.document.write_text(before + MARK + tables, encoding="utf-8")


def table(result: dict[str, Any], cpu: str | None = None) -> str:
    """One measurement as Markdown. cpu: in place of the name that the CPU gave itself."""
    machine = result["machine"]
    layers = f"{result['layers']} layer{'' if result['layers'] == 1 else 's'}"
    rounds = "one round"
    if result["rounds"] > 1:
        rounds = f"medians of {result['rounds']} alternating rounds, in brackets the least and the greatest"
    title = (
        f"\n{result['model']}, {layers} ({result['weights']} weights), {result['expert_dtype']} experts,"
        f"\non {cpu or machine['cpu']}, {machine['cores']} cores; {result['turn_tokens']} new tokens a turn, replies of"
        f" {result['new_tokens']};\n{rounds}.\n"
    )
    rows = result["rows"]
    return title + HEAD + "".join(_lines(rows)) + "\n" + "".join(_compared(rows)) + "".join(_tiers(rows))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        ttft = row["ttft_ms"]
        spread = f" ({ttft['min']:.0f} to {ttft['max']:.0f})" if len(ttft["rounds"]) > 1 else ""
        cells = (
            row["context"], row["contender"], row["turn"], f"{ttft['median']:.0f}{spread}", f"{row['of_first']:.2%}",
            f"{row['tbt_ms']:.1f}", row["reused"], row["from_disk"],
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |\n"


def _compared(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Of each context that llama.cpp was measured at, how many times its time to the first token is ours."""
    ms = {(row["context"], row["contender"], row["turn"]): row["ttft_ms"]["median"] for row in rows}
    for context in dict.fromkeys(row["context"] for row in rows):
        turns = [turn for at, who, turn in ms if at == context and who == PEER]
        if turns:
            times = ", ".join(f"{turn}: {ms[context, PEER, turn] / ms[context, OWN, turn]:.2f}" for turn in turns)
            yield f"- {context} tokens, {PEER}'s time to the first token over {OWN}'s: {times}\n"


def _tiers(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What each contender keeps after its turns."""
    for row in {(row["context"], row["contender"]): row for row in rows}.values():
        held = ", ".join(f"{place} {n_bytes / 2**20:.0f} MiB" for place, n_bytes in row["tiers"].items())
        yield f"- {row['context']} tokens, {row['contender']}: {held}\n"


if __name__ == "__main__":
    main()
