"""Writes the table of model families: `python tests/families/write_report.py` (about two minutes).

Runs every tiny family in every placement, and writes docs/families.json (results), docs/families.md (the whole table)
and the short table between the markers in README.md. The tests check that all three fit the installed transformers.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from family_check import PLACEMENTS, compare, describe, plain_outputs
from seeing_models import FAMILIES_THAT_SEE
from tiny_families import ENCODER_DECODER, FAMILIES, FOREIGN, NOT_CAUSAL, WRAPPED, tiny_model
from transformers import PreTrainedModel

import hybrimoe
from hybrimoe.experts.layout import FOREIGN_EXPERTS
from hybrimoe.step.build import capture_step

ROOT = Path(__file__).resolve().parents[2]
JSON_FILE, TABLE_FILE, README = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md", ROOT / "README.md"
BEGIN, END = "<!-- families:begin (python tests/families/write_report.py) -->", "<!-- families:end -->"
TOLERANCE = 1e-4
REFUSED_BY_CARDS = {"phimoe": "makes its rotary embedding on the host in each step, which an H200 did not record"}
"""What graphs that run on the host do not show."""
WRAPPER = "ForConditionalGeneration"
"""In the class names of models that wrap a language model."""


def measure(family: str) -> dict[str, Any]:
    """One family's row: what its experts are, and its largest deviation in each placement."""
    model = tiny_model(family)
    plain = plain_outputs(model)
    results = {placement: compare(model, plain, placement) for placement in PLACEMENTS}
    works = all(
        max(r.prefill_error, r.decode_error) <= TOLERANCE and r.same_tokens and r.restored for r in results.values()
    )
    errors = {name: float(f"{max(r.prefill_error, r.decode_error):.0e}") for name, r in results.items()}
    ways = decode_step(results["cpu"].ways) | captured_step(family, model)
    return describe(family) | {"works": works, "max_logit_error": errors} | ways


def decode_step(ways: Mapping[str, str]) -> dict[str, str]:
    """How the decode steps of a model run on the CPU, from the way of each layer, and why not compiled."""
    compiled = [way for way in ways.values() if way == "compiled"]
    if len(compiled) == len(ways):
        return {"decode_step": "compiled"}
    mixed = [way for way in ways.values() if "compiled;" in way or way == "compiled"]
    if not mixed:
        return {"decode_step": "transformers", "why": next(iter(ways.values())).removeprefix("transformers: ")}
    return {"decode_step": f"in pieces: {len(compiled)} of {len(ways)} layers, {len(mixed) - len(compiled)} in part"}


def captured_step(family: str, model: PreTrainedModel) -> dict[str, str]:
    """Whether the decode steps of a model are captured on a card, told by graphs that run on the host, and why not."""
    from tests.fake_device.graphs import NotedGraphs  # `main` has put it on the path

    if family in REFUSED_BY_CARDS:
        return {"on_a_card": "transformers", "why_not": REFUSED_BY_CARDS[family]}
    injection = hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=4, expert_dtype="float32")
    try:
        way = injection.way = capture_step(model, injection.session, torch.device("cpu"), NotedGraphs())
        reason = str(way.reason)
        return {"on_a_card": "captured"} if way.step else {"on_a_card": "transformers", "why_not": reason}
    finally:
        injection.restore()


def report() -> dict[str, Any]:
    """All rows, with the version of transformers they hold for."""
    return {
        "transformers": transformers.__version__,
        "tolerance": TOLERANCE,
        "families": {family: measure(family) for family in sorted(FAMILIES)},
        "not_supported": not_supported(),
    }


def not_supported() -> dict[str, str]:
    """Families that do not work, with the reason."""
    classes = {family: class_name for family, (_, class_name) in FOREIGN.items()} | ENCODER_DECODER
    foreign = {family: FOREIGN_EXPERTS[class_name] for family, class_name in classes.items()}
    return dict(sorted((NOT_CAUSAL | foreign).items()))


def long_table(data: Mapping[str, Any]) -> str:
    """docs/families.md."""
    lines = [
        "# Model families",
        "",
        f"Every causal-LM family of transformers {data['transformers']} whose experts carry",
        "`@use_experts_implementation`, and Llama-4, LongCat-Flash and Step-3.7 which do not: built tiny with random",
        "float32 weights and compared with plain transformers:",
        "the largest deviation of a logit, over a prompt and six tokens generated with a KV cache (allowed:",
        f"{data['tolerance']:g}); the same greedy tokens; and bit-exact equality after `restore()`. Placements: all",
        "experts on the CPU, all on the (emulated) accelerator, and mixed. Decode step: how a token is computed where",
        "all experts are on the CPU, compiled as a whole, in pieces, or by the forward of transformers. On a card:",
        "captured in its graphs (tested on a fake one, whose graphs run on the host), or by transformers.",
        "Written by `python tests/families/write_report.py`; `make test` checks it.",
        "",
        "| family | model | experts | gate | stored | CPU | accelerator | mixed | decode step | on a card |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, row in data["families"].items():
        cells = [f"{row['max_logit_error'][placement]:.0e}" for placement in ("cpu", "accelerator", "mixed")]
        cells = cells if row["works"] else [f"{cell} (fails)" for cell in cells]
        cells += [row["decode_step"], row["on_a_card"]]
        names = (f"`{row['model_class']}`", f"`{row['experts_class']}`", row["gate"], row["form"])
        lines.append(
            f"| {family} | {' | '.join(name.replace('|', chr(92) + '|') for name in names)} | {' | '.join(cells)} |"
        )
    in_table = {family for family, row in data["families"].items() if WRAPPER in row["model_class"]}
    lines += [
        "",
        "Models that take images or sound, too: the language model inside is found, and text through the whole model",
        f"is that of plain transformers, for {', '.join(sorted(in_table | set(WRAPPED)))}.",
        "Images in commands and server ([images.md](images.md)), prompts in one piece and in parts, give what plain",
        f"transformers gives for {', '.join(sorted(FAMILIES_THAT_SEE))}; in the others they go the same way, untested.",
        "A model whose folder has no image processor is loaded as a model of text.",
    ]
    lines += ["", "Decode steps by the forward of transformers, with the reason:", "", "| family | why |", "|---|---|"]
    lines += [f"| {family} | {row['why']} |" for family, row in data["families"].items() if "why" in row]
    lines += ["", "On a card by the forward of transformers, with the reason:", "", "| family | why |", "|---|---|"]
    lines += [f"| {family} | {row['why_not']} |" for family, row in data["families"].items() if "why_not" in row]
    lines += ["", "Not supported, with the reason:", "", "| family | why |", "|---|---|"]
    lines += [f"| {family} | {reason} |" for family, reason in data["not_supported"].items()]
    return "\n".join(lines) + "\n"


def short_table(data: Mapping[str, Any]) -> str:
    """The part of the README between the markers."""
    works = [family for family, row in data["families"].items() if row["works"]]
    fails = [family for family, row in data["families"].items() if not row["works"]]
    steps = Counter(row["decode_step"].partition(":")[0] for row in data["families"].values())
    captured = sum(row["on_a_card"] == "captured" for row in data["families"].values())
    worst = max(max(row["max_logit_error"].values()) for row in data["families"].values())
    lines = [
        f"{len(works)} families of transformers {data['transformers']} run, {steps['compiled']} of them with decode",
        f"steps compiled as a whole on the CPU, {steps['in pieces']} in pieces, and {captured} captured in graphs",
        f"of a card (counted on a fake one); the largest deviation of a logit from plain transformers is {worst:.0e}",
        "in float32. Not supported:",
        f"{', '.join(data['not_supported'])}.",
        "Each family, with what was compared, or the reason why not: [docs/families.md](docs/families.md).",
    ]
    if fails:
        lines.append(f"Failing: {', '.join(fails)}.")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """`readme` with `table` between its markers. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no markers {BEGIN} and {END}")
    return f"{before}{begin}\n{table}{end}{after}"


def main() -> None:
    """Measures and writes all three files; `--tables` writes the tables anew from the recorded results."""
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    recorded = sys.argv[1:] == ["--tables"]
    write(json.loads(JSON_FILE.read_text(encoding="utf-8")) if recorded else report())


def write(data: Mapping[str, Any]) -> None:
    """Writes the three files from a run's results."""
    JSON_FILE.parent.mkdir(exist_ok=True)
    JSON_FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    TABLE_FILE.write_text(long_table(data), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), short_table(data)), encoding="utf-8")


if __name__ == "__main__":
    main()
