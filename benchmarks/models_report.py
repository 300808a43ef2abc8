"""Whole models beside llama.cpp and plain transformers: runs `hybrimoe bench`, writes docs/models-measured.md and a
block of README.md.

    python benchmarks/models_report.py --measure  # half an hour on 2 cores; needs llama-cpp-python and the extra bench
    HYBRIMOE_ISA=avx2 python benchmarks/models_report.py --measure  # the same with this CPU as an older one
    python benchmarks/models_report.py --measure --only decode --only "16 layers"  # some of the tables
    python benchmarks/models_report.py            # writes the pages anew from docs/models-measured.json

The file holds the runs of several machines; what is measured takes the place of what the same CPU gave with the same
instruction set. Tables that are not measured stay as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cpu_kernels.format.layout import record_layout

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- models:begin (python benchmarks/models_report.py) -->", "<!-- models:end -->"
SHAPE, LAYERS = "olmoe-1b-7b", 8
DENSE = ("int8", "int4")
STORED = [
    *(word for dtype in ("bfloat16", "int8", "int4") for word in ("--kv-dtype", dtype)),
    *(word for dtype in ("f16", "q8_0") for word in ("--llama-kv", dtype)),
]
QWEN3_NEXT = ("--shape", "qwen3-next-80b-a3b", "--layers", "4")
"""Three layers with the gated delta rule and one with attention: what its 48 layers are made of."""
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "decode": (("decode", "--prompt-tokens", "32", "--new-tokens", "24", "--rounds", "5"), DENSE),
    "prefill": (("prefill", "--prompt-tokens", "512", "--rounds", "3", "--no-plain"), DENSE),
    "decode 8k": (
        ("decode", "--prompt-tokens", "8000", "--new-tokens", "24", "--rounds", "5", "--no-plain", *STORED),
        ("int8",),
    ),
    "16 layers": (
        ("decode", "--prompt-tokens", "32", "--new-tokens", "24", "--rounds", "5", "--no-plain", "--layers", "16"),
        ("int8",),
    ),
    "16 layers, prefill": (
        ("prefill", "--prompt-tokens", "512", "--rounds", "3", "--no-plain", "--layers", "16"),
        ("int8",),
    ),
    "Qwen3-Next": (
        ("decode", "--prompt-tokens", "32", "--new-tokens", "24", "--rounds", "5", "--no-plain", *QWEN3_NEXT),
        DENSE,
    ),
    "Qwen3-Next, prefill": (
        ("prefill", "--prompt-tokens", "512", "--rounds", "3", "--no-plain", *QWEN3_NEXT),
        DENSE,
    ),
}
"""Kind -> the command's words, and dtypes of the dense layers. Plain transformers decodes beside the first one."""
OURS = "as configured"
"""How names of our rows begin; behind a comma they say how keys and values are stored, where several are measured."""
BESIDE = {"llama.cpp": "bfloat16", "llama.cpp, q8_0 keys and values": "int8", "llama.cpp, q4_0 keys and values": "int4"}
"""Which of ours a peer is compared with: the one that stores keys and values in as many bits."""
AT_ONCE = (1, 2, 4, 8)
GROWTH: dict[str, tuple[str, ...]] = {
    **{f"{layers} layers, context 32": ("--layers", str(layers)) for layers in (2, 4, 16)},
    **{
        f"4 layers, {experts} experts, {active} for a token": (
            *("--layers", "4", "--experts", str(experts), "--active", str(active)),
        )
        for experts, active in ((16, 8), (256, 8), (64, 2), (64, 16))
    },
    **{f"{LAYERS} layers, context {n:,}": ("--layers", str(LAYERS), "--prompt-tokens", str(n)) for n in (1000, 4000)},
    **{f"2 layers, context {n:,}": ("--layers", "2", "--prompt-tokens", str(n)) for n in (16000, 32000, 64000)},
}
"""Ours alone: how a step's time grows. Long contexts with few layers, for the sake of their prompts."""
TITLES = {
    "decode": "Decode, tokens/s (prompt of 32 tokens)",
    "prefill": "Prefill of 512 tokens, tokens/s",
    "decode 8k": "Decode at a context of 8,000 tokens, tokens/s",
    "16 layers": "16 layers: decode, tokens/s (prompt of 32 tokens)",
    "16 layers, prefill": "16 layers: prefill of 512 tokens, tokens/s",
    "Qwen3-Next": "Qwen3-Next-80B-A3B's shape, 4 layers: decode, tokens/s (prompt of 32 tokens)",
    "Qwen3-Next, prefill": "Qwen3-Next-80B-A3B's shape, 4 layers: prefill of 512 tokens, tokens/s",
}
AT_ONCE_NOTE = """Replies share the dense layers, and few experts: random routing sends 4 tokens, each to 8 of 64
experts, to 26.5 different ones (64 * (1 - (7/8)^4)). The last column is what a step would give that reads its weights,
counted, as fast as that of one reply does. With more layers it is less, because the output layer is read once: with
16, 4 replies get 1.76 times the tokens of one (counted).
"""
"""What bounds several replies at once."""
INTRODUCTION = f"""# Whole models: measured

Written by `benchmarks/models_report.py` from runs of `hybrimoe bench decode` and `bench prefill` on virtual
machines, shared, with as many threads as cores for everybody; experts on the CPU alone. Random weights in the shape
of {SHAPE} with {LAYERS} layers where nothing else is said, the same for all: llama.cpp (llama-cpp-python) reads
them as Q4_0 with an output layer of Q8_0, transformers as bfloat16; ours has int4 experts, and dense layers as
named. A cell is the median of alternating rounds, its range behind it. *Of the read rate*: the weights that a token
visits by the time of its step, as a share of what this machine reads with as many threads; keys and values are not
counted. Where nothing else is said, ours stores keys and values as bfloat16 and llama.cpp as f16; one that stores
them in fewer bits, which llama.cpp does with flash attention, is compared with ours in as many. *Cosine*: of the
logits after the prompt, to those of plain transformers. *MiB*: by how much the process grew, for all that the
contender holds (none where the system meanwhile took pages back that another contender had mapped).
`HYBRIMOE_ISA` makes ours take an older instruction set; the others take what the CPU has.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, if asked to, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run the benchmarks here, and keep what they say")
    parser.add_argument("--only", action="append", choices=[*RUNS, "growth"], help="measure this; may be repeated")
    parser.add_argument("--about", default="", help="a sentence on the machine or the programs, shown with its tables")
    parser.add_argument("--folder", type=Path, default=ROOT, help="with docs/ and README.md")
    given = parser.parse_args(arguments)
    kept = given.folder / "docs" / "models-measured.json"
    machines: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))["machines"]
    if given.measure:
        new = measured(given.only or [*RUNS, "growth"])
        places = [place for place, old in enumerate(machines) if title(old) == title(new)] or [len(machines)]
        machines[places[0] : places[0] + 1] = [joined(*machines[places[0] : places[0] + 1], new, about=given.about)]
        kept.write_text(json.dumps({"machines": machines}, indent=1) + "\n", encoding="utf-8")
    (given.folder / "docs" / "models-measured.md").write_text(document(machines), encoding="utf-8")
    readme = given.folder / "README.md"
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), summary(machines)), encoding="utf-8")


def measured(kinds: Sequence[str]) -> dict[str, Any]:
    """The results of runs of these kinds, by kind and dtype of the dense layers, and of "growth" by name."""
    compared: dict[str, dict[str, Any]] = {}
    for kind in (kind for kind in RUNS if kind in kinds):
        words, dtypes = RUNS[kind]
        compared[kind] = {}
        for dense in dtypes:
            plain = ("--no-plain",) if dense != DENSE[0] and "--no-plain" not in words else ()
            layers = () if "--layers" in words else ("--layers", str(LAYERS))
            compared[kind][dense] = run(dense, *words, *plain, *layers, "--llama-cpp")
    if "growth" not in kinds:
        return {"compared": compared, "growth": {}, "at_once": {}}
    grown = {
        name: run("int8", "decode", "--new-tokens", "32", "--rounds", "5", "--no-plain", *words)
        for name, words in GROWTH.items()
    }
    replies = [word for n in AT_ONCE for word in ("--replies", str(n))]
    at_once = run("int8", "parallel", "--new-tokens", "32", "--rounds", "5", *replies, "--layers", str(LAYERS))
    return {"compared": compared, "growth": grown, "at_once": at_once}


def joined(*runs: dict[str, Any], about: str) -> dict[str, Any]:
    """Runs of one machine, the later ones in place of the earlier ones."""
    known = [run["about"] for run in runs if run.get("about")]
    compared = {kind: results for run in runs for kind, results in run["compared"].items()}
    grown = [run for run in runs if run["growth"]] or [{"growth": {}}]
    return {
        "compared": {kind: compared[kind] for kind in RUNS if kind in compared},
        "growth": grown[-1]["growth"],
        "at_once": grown[-1].get("at_once", {}),
        "about": about or " ".join(known[-1:]),
    }


def run(dense: str, *words: str) -> dict[str, Any]:
    """What one `hybrimoe bench ... --json` prints."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "deploy.yaml"
        config.write_text(f"accelerator: none\ncpu: {{expert_dtype: int4, dense_dtype: {dense}}}\n", encoding="utf-8")
        shape = () if "--shape" in words else ("--shape", SHAPE)
        command = [sys.executable, "-m", "hybrimoe", "bench", *words, *shape, "--config", str(config)]
        print(" ".join(command[3:-2]), file=sys.stderr)
        done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def title(data: dict[str, Any]) -> str:
    """A machine in a line, with the instruction set that ours took."""
    ran = [*(run for runs in data["compared"].values() for run in runs.values()), *data["growth"].values()]
    machine = ran[0]["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"


def document(machines: Sequence[dict[str, Any]]) -> str:
    """docs/models-measured.md."""
    parts = [INTRODUCTION]
    for data in machines:
        parts.append(f"## {title(data)}\n")
        if data.get("about"):
            parts.append(f"{data['about']}\n")
        parts += [f"### {TITLES[kind]}\n\n{table(results)}" for kind, results in data["compared"].items()]
        if data["growth"]:
            parts.append(f"### How a step grows\n\n{growth_table(data)}")
        if data.get("at_once"):
            parts.append(f"### How a step of several replies grows\n\n{at_once_table(data)}")
    return "\n".join(parts)


def table(results: dict[str, Any]) -> str:
    """One run a dtype: ours, then its peers with what ours is to them."""
    lines = ["| | tokens/s | ours to it | of the read rate | cosine | MiB |", "|---|---|---|---|---|---|"]
    for dense, result in results.items():
        for row in result["results"]:
            speed, is_ours = row["tokens_per_s"], row["name"].startswith(OURS)
            label = row["name"].replace(OURS, f"ours, dense {dense}") if is_ours else f"{row['name']} beside it"
            cells = (
                f"{speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f})",
                "" if is_ours else f"{ratio(ours_beside(result, row['name']), row):.2f} x",
                "" if row["of_read_rate"] is None else f"{row['of_read_rate']:.0%}",
                "" if row["logits_cosine"] is None else f"{row['logits_cosine']:.4f}",
                "-" if row["resident_mib"] <= 0 else f"{row['resident_mib']:.0f}",
            )
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ours_beside(result: dict[str, Any], peer: str = "") -> dict[str, Any]:
    """Our row that a peer of this name is compared with: the first one where there is no other reason."""
    ours = [row for row in result["results"] if row["name"].startswith(OURS)]
    fitting = f"{OURS}, {BESIDE.get(peer)} keys and values"
    return next((row for row in ours if row["name"] == fitting), ours[0])


def ratio(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the medians."""
    return float(ours["tokens_per_s"]["median"] / other["tokens_per_s"]["median"])


def growth_table(data: dict[str, Any]) -> str:
    """Milliseconds of a step of ours, dense layers int8."""
    beside = {f"{LAYERS} layers, context 32": "decode", f"{LAYERS} layers, context 8,000": "decode 8k"}
    usual, far = (
        {name: data["compared"][kind]["int8"]} if kind in data["compared"] else {} for name, kind in beside.items()
    )
    lines = ["| | ms a step | of the read rate |", "|---|---|---|"]
    for name, result in {**usual, **data["growth"], **far}.items():
        row = ours_beside(result)
        lines.append(f"| {name} | {1000 / row['tokens_per_s']['median']:.1f} | {row['of_read_rate']:.0%} |")
    return "\n".join(lines) + "\n"


def at_once_table(data: dict[str, Any]) -> str:
    """Milliseconds of a step of several replies, dense layers int8, and what reading the weights allows."""
    lines = [
        f"| replies at once, {LAYERS} layers | ms a step | tokens/s of all | experts a layer | MB of weights"
        " | tokens/s at the rate of one reply |",
        "|---|---|---|---|---|---|",
    ]
    rows, read = data["at_once"]["rows"], bytes_at_once(data)
    for row, n_bytes in zip(rows, read, strict=True):
        speed = row["tokens_per_s"]["median"]
        cells = ["-"] * 3
        if n_bytes is not None:
            bound = row["replies"] * rows[0]["tokens_per_s"]["median"] * read[0] / n_bytes
            cells = [f"{row['experts']:.1f}", f"{n_bytes / 1e6:.0f}", f"{bound:.1f} ({speed / bound:.0%} measured)"]
        lines.append(f"| {row['replies']} | {row['step_ms']:.1f} | {speed:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{AT_ONCE_NOTE}"


def bytes_at_once(data: dict[str, Any]) -> list[Any]:
    """Bytes of weights that a step of so many replies reads: those of one reply, and the records of further experts.
    None where the experts were not counted."""
    config = yaml.safe_load((ROOT / "yaml_rules" / "shapes" / f"{SHAPE}.yaml").read_text(encoding="utf-8"))["config"]
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    record = record_layout(hidden, inter, data["at_once"]["expert_dtype"], gated=True, has_bias=False).record_bytes
    of_one, first = ours_beside(data["compared"]["decode"]["int8"])["step_bytes"], data["at_once"]["rows"][0]["experts"]
    return [
        None if row["experts"] is None else of_one + LAYERS * (row["experts"] - first) * record
        for row in data["at_once"]["rows"]
    ]


def summary(machines: Sequence[dict[str, Any]]) -> str:
    """README's lines."""
    lines = [
        f"Measured on the CPU alone, the same weights in the shape of {SHAPE} with {LAYERS} layers where nothing else",
        "is said ([docs/models-measured.md](docs/models-measured.md)):",
        "",
        "| tokens/s | ours, dense int8 | ours, dense int4 | llama.cpp Q4_0 | transformers bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for data in machines:
        lines.append(f"| **{title(data)}** | | | | |")
        for kind, results in data["compared"].items():
            first = {row["name"]: row for row in results[DENSE[0]]["results"]}
            ours = [ours_beside(results[dense]) if dense in results else None for dense in DENSE]
            peers = [first.get(name) for name in ("llama.cpp", "transformers")]
            cells = ["-" if row is None else f"{row['tokens_per_s']['median']:.1f}" for row in (*ours, *peers)]
            lines.append(f"| {TITLES[kind].replace(', tokens/s', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """The page with the block between its marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    main()
