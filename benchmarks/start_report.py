"""Measures first and later starts of a model in a shipped shape: the table of docs/start.md for another machine.

    python benchmarks/start_report.py --shape olmoe-1b-7b --layers 8 --folder /tmp/start

Random weights are written as a checkpoint into the folder (0.9 GB a layer for OLMoE), once. Each start is a process of
its own, and the checkpoint is in the page cache; compiled kernels are kept from a start before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

MIB = 1 << 20
DISTINCT = 4  # experts that are really drawn; the others are copies, which cost the same to read
WEIGHT_SCALE = 0.02
ALLOWED_SHARE, ALLOWED_MIB = 1.15, 400  # of the weights' bytes, and on top: the goal for resident memory

START = """
import json, sys, time
import hybrimoe.checkpoint.loading, hybrimoe.injection.inject, hybrimoe.injection.injection
begun = time.monotonic()
done = []
model = hybrimoe.load(sys.argv[1], config=json.loads(sys.argv[2]), progress=lambda *call: done.append(call[2]))
loaded = time.monotonic()
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
dense = model.hybrimoe.dense
n_bytes = model.hybrimoe.session.store.nbytes + (0 if dense is None else dense.nbytes)
tensors = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()] if not t.is_meta}
print(json.dumps({
    "load_s": loaded - begun, "weights_mib": (n_bytes + sum(tensors.values())) / 2**20,
    "peak_mib": int(status["VmHWM"].split()[0]) / 1024, "final_mib": int(status["VmRSS"].split()[0]) / 1024,
    "did": sorted(set(done)),
}))
"""

HEAD = """{shape}, {layers} layers, random weights, on {machine}, {cores} cores; medians of {rounds} later starts.
A start is a process, imports included. Goal: {share} times the weights and {mib} MiB.

| experts, dense | first start | next start | its load | weights | peak, first | peak, next | resident, next | goal |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["int4,int8"], help="experts' and dense dtype, by a comma")
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.shape}-{arguments.layers}"
    if not (folder / "config.json").exists():
        write_checkpoint(folder, arguments.shape, arguments.layers)
    lines = [_row(folder, dtypes, arguments.rounds) for dtypes in arguments.dtypes]
    head = HEAD.format(
        shape=arguments.shape, layers=arguments.layers, machine=_cpu(), cores=torch.get_num_threads(),
        rounds=arguments.rounds, share=ALLOWED_SHARE, mib=ALLOWED_MIB,
    )  # fmt: skip
    print(head + "\n".join(lines))


def write_checkpoint(folder: Path, shape: str, layers: int) -> None:
    """Random bfloat16 weights of `shape` with so many layers, a file for each layer, by transformers' own names."""
    from hybrimoe.bench.model.sources import RandomSource
    from hybrimoe.checkpoint.meta import meta_model

    folder.mkdir(parents=True, exist_ok=True)
    config = RandomSource(shape, layers).config
    tensors = meta_model(config).state_dict()
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(_by_layer(tensors)):
        name = f"model-{number:05d}.safetensors"
        drawn = {key: _random(tensors[key].shape) for key in keys}
        save_file(drawn, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)


def _by_layer(keys: Any) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split(".")[2] if ".layers." in key else "", []).append(key)
    yield from groups.values()


def _random(shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) == 2:
        return (torch.randn(shape) * WEIGHT_SCALE).to(torch.bfloat16)
    drawn = (torch.randn(DISTINCT, *shape[1:]) * WEIGHT_SCALE).to(torch.bfloat16)
    return drawn[torch.arange(shape[0]) % DISTINCT]


def _row(folder: Path, dtypes: str, rounds: int) -> str:
    experts, dense = dtypes.split(",")
    config = {"cpu": {"expert_dtype": experts, "dense_dtype": dense}, "accelerator": "none"}
    for file in folder.glob("*.hybrimoe"):
        file.unlink()
    first, later = _start(folder, config), [_start(folder, config) for _ in range(rounds)]
    allowed = ALLOWED_SHARE * first["weights_mib"] + ALLOWED_MIB
    next_s = median(run["wall_s"] for run in later)
    load_s = median(run["load_s"] for run in later)
    peak, final = (median(run[name] for run in later) for name in ("peak_mib", "final_mib"))
    return (
        f"| {experts}, {dense} | {first['wall_s']:.1f} s | {next_s:.1f} s | {load_s:.1f} s"
        f" | {first['weights_mib']:.0f} MiB | {first['peak_mib']:.0f} MiB | {peak:.0f} MiB"
        f" | {final:.0f} MiB | {allowed:.0f} MiB |"
    )


def _start(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One start in a process of its own; its figures also go to stderr."""
    begun = time.monotonic()
    command = [sys.executable, "-c", START, str(folder), json.dumps(config)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["wall_s"] = time.monotonic() - begun
    print(json.dumps(found), file=sys.stderr)
    return found


def _cpu() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else "an unknown CPU"


if __name__ == "__main__":
    main()
