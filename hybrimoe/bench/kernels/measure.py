"""Runs the contest of `bench kernels`: parity first, then alternating rounds, the read bandwidth measured in each."""

from __future__ import annotations

import csv
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cpu_kernels.engine.bandwidth import ReadBandwidth
from hybrimoe.bench import rounds as harness
from hybrimoe.bench.kernels import peers as kernel_peers
from hybrimoe.bench.kernels.setting import SHAPES, Call, Setting, Shape
from hybrimoe.errors import HybriMoEError
from hybrimoe.machine.facts import machine

POOL_BYTES = 200 << 20  # weight sets together exceed this: several times the last-level cache
ROUND_SECONDS = 0.12  # of calls of one contender in a round, three calls at least
# Allowed |y - float32| / |float32| (Frobenius norms) against unquantised weights; a contender above it is not timed.
PARITY = {4.5: 0.16, 5: 0.16, 8: 0.08, 8.5: 0.03, 16: 0.02, 32: 1e-4}  # 8: one activation scale a tensor
PARITY_TOKENS = 2


class ParityError(HybriMoEError):
    """A contender's result is wrong; timing it would mean nothing."""


@dataclass(frozen=True)
class Contender:
    """A library at a storage format."""

    name: str
    bits: float  # a weight, as stored
    make: Callable[[Setting], Callable[[int], Call]]
    needs: str | None = None  # module that must be installed


CONTENDERS = (
    Contender("ours int4", 4.5, kernel_peers.ours("int4")),
    Contender("ours int8", 8.5, kernel_peers.ours("int8")),
    Contender("ours bfloat16", 16, kernel_peers.ours("bfloat16")),
    Contender("ours float32", 32, kernel_peers.ours("float32")),
    Contender("llama.cpp Q4_0", 4.5, kernel_peers.llama_cpp("q4_0"), "llama_cpp"),
    Contender("llama.cpp Q8_0", 8.5, kernel_peers.llama_cpp("q8_0"), "llama_cpp"),
    Contender("onnxruntime int4", 5, kernel_peers.onnxruntime_int4, "onnxruntime"),
    Contender("kt-kernel int4", 4.5, kernel_peers.kt_kernel("int4"), "kt_kernel"),
    Contender("kt-kernel bfloat16", 16, kernel_peers.kt_kernel("bfloat16"), "kt_kernel"),
    Contender("ipex bfloat16", 16, kernel_peers.ours("bfloat16", "ipex"), "intel_extension_for_pytorch"),
    Contender("ipex float32", 32, kernel_peers.ours("float32", "ipex"), "intel_extension_for_pytorch"),
    Contender("torch int8 dynamic", 8, kernel_peers.torch_int8),
    Contender("torch bfloat16", 16, kernel_peers.torch_float(torch.bfloat16)),
    Contender("torch float32", 32, kernel_peers.torch_float(torch.float32)),
)


@dataclass(frozen=True)
class Request:
    """What to measure."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    contenders: tuple[str, ...]  # parts of names; empty = all that are installed
    rounds: int


def run(request: Request, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All rows, machine, and notes."""
    shapes = [shape for shape in SHAPES if not request.shapes or shape.name in request.shapes]
    if not shapes:
        raise HybriMoEError(f"unknown shape; expected {', '.join(shape.name for shape in SHAPES)}")
    contenders, notes = _chosen(request.contenders)
    busy = harness.busy_warning()
    rows = []
    for shape in shapes:
        rows += _contest(shape, contenders, request, progress)
    return {"machine": machine(), "notes": [*notes, *([busy] if busy else [])], "rows": rows}


def _chosen(parts: Sequence[str]) -> tuple[list[Contender], list[str]]:
    named = [c for c in CONTENDERS if not parts or any(part in c.name for part in parts)]
    if not named:
        raise HybriMoEError(f"no contender matches; there are {', '.join(c.name for c in CONTENDERS)}")
    missing = [c for c in named if c.needs and find_spec(c.needs) is None]
    return [c for c in named if c not in missing], [
        f"{c.name} is left out: {c.needs} is not installed" for c in missing
    ]


def _contest(
    shape: Shape, contenders: list[Contender], request: Request, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One shape: contenders are made once, then measured for each M in turn."""
    setting = Setting(shape, POOL_BYTES)
    made = {}
    for contender in contenders:
        progress(f"{shape.name}: preparing {contender.name}")
        made[contender.name] = contender.make(setting)
        _check_parity(contender, made[contender.name], setting)
    bandwidth = ReadBandwidth()
    bandwidth.measure()
    rows = []
    for n_tokens in request.tokens:
        progress(f"{shape.name}: {n_tokens} tokens an expert")
        calls: dict[str, Call] = {name: make(n_tokens) for name, make in made.items()}
        subjects: dict[str, Callable[[], float]] = {name: _timed(call) for name, call in calls.items()}
        subjects["read"] = bandwidth.measure
        values = harness.alternate(subjects, lambda subject: subject(), request.rounds)
        rows += [_row(shape, n_tokens, c, values[c.name], values["read"]) for c in contenders]
    made.clear()
    gc.collect()
    return rows


def _check_parity(contender: Contender, make: Callable[[int], Call], setting: Setting) -> None:
    result = make(PARITY_TOKENS)(0)
    expected = setting.expected(setting.x(PARITY_TOKENS))
    error = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
    if not error <= PARITY[contender.bits]:
        raise ParityError(f"{contender.name} is off by {error:.2%} on {setting.shape.name}: not timed")


def _timed(call: Call) -> Callable[[], float]:
    """Median milliseconds of the calls of a round."""
    state = {"number": 0}

    def measure() -> float:
        times: list[float] = []
        until = time.perf_counter() + ROUND_SECONDS
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            call(state["number"])
            times.append(1e3 * (time.perf_counter() - start))
            state["number"] += 1
        return median(times)

    return measure


def _row(shape: Shape, n_tokens: int, contender: Contender, ms: list[float], read: list[float]) -> dict[str, Any]:
    gbps = [shape.weights * contender.bits / 8 / (value * 1e6) for value in ms]
    middle = median(ms)
    return {
        "shape": shape.name,
        "tokens": n_tokens,
        "contender": contender.name,
        "ms": middle,
        "ms_min": min(ms),
        "ms_max": max(ms),
        "gflops": shape.flops(n_tokens) / middle / 1e6,
        "gbps": median(gbps),
        "read_gbps": median(read),
        "bandwidth_share": median(g / r for g, r in zip(gbps, read, strict=True)),
    }


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Throughput over tokens, one panel a shape (matplotlib)."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(4.2 * len(shapes), 3.6), layout="constrained")
    for axis, shape in zip(np.atleast_1d(figure.subplots(1, len(shapes))), shapes, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if row["shape"] == shape and row["contender"] == name]
            style = "-" if name.startswith("ours") else "--"
            axis.loglog([row["tokens"] for row in mine], [row["gflops"] for row in mine], style, marker=".", label=name)
        axis.set(title=shape, xlabel="tokens an expert", ylabel="GFLOP/s")
    axis.legend(fontsize=6)
    figure.suptitle(f"measured, {result['machine']['cpu']}, {result['machine']['cores']} cores")
    figure.savefig(path, dpi=150)
