"""Runs the sections: each in a process of its own, within a time limit, its result kept whatever comes after."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpu_kernels.host.threads import physical_cores
from hybrimoe.bench.gpu_check import report
from hybrimoe.bench.gpu_check.card import kind_of_figures, labels
from hybrimoe.bench.gpu_check.child import Child, Ended, as_they_end, python_child
from hybrimoe.bench.gpu_check.sections import SECTIONS, Section
from hybrimoe.bench.gpu_check.setting import QUICK_BELOW_MINUTES, Setting, setting_for

WORKER = "hybrimoe.bench.gpu_check.worker"
CORES_FOR_SIDE_BY_SIDE = 8
"""With fewer, sections that could run beside each other run one by one."""
LEAST_S = 5.0
"""A section that has less time is not begun."""

UNFINISHED = "it wrote no result"

Told = Callable[[dict[str, Any]], None]


def check(
    accelerator: str, minutes: float, folder: Path, told: Told, *, sections: Sequence[Section] = SECTIONS
) -> dict[str, Any]:  # fmt: skip
    """The whole report as plain data; written into `folder` after each section, whose result `told` is given."""
    kind = kind_of_figures(accelerator)
    setting = setting_for(accelerator, kind, minutes)
    result: dict[str, Any] = {
        "title": "HybriMoE acceptance check of an accelerator",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "minutes": minutes,
        "complete": False,
        "ok": False,
        **labels(accelerator),
        "sections": [],
    }
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)

    order = [section.name for section in sections]

    def ended(done: dict[str, Any]) -> None:
        result["sections"] = sorted([*result["sections"], done], key=lambda section: order.index(section["name"]))
        result["seconds"] = round(time.monotonic() - started, 1)
        report.write(result, folder)
        told(done)

    for batch, limit_s in _batches(sections, started + 60.0 * minutes, quick=minutes < QUICK_BELOW_MINUTES):
        for done in _run(batch, replace(setting, limit_s=limit_s), folder):
            ended(done)
    result["complete"] = True
    result["ok"] = all(section["status"] != "failed" for section in result["sections"])
    report.write(result, folder)
    return result


def _batches(sections: Sequence[Section], until: float, *, quick: bool) -> Iterator[tuple[list[Section], float]]:
    """What runs at the same time, with its time limit in s: of the time that is left when it begins, the part that it
    has in the plan of what is left. So time that a section did not use goes to those after it."""
    left = _grouped(sections)
    while left:
        planned = [max(section.quick_seconds if quick else section.seconds for section in batch) for batch in left]
        yield left[0], max(0.0, until - time.monotonic()) * planned[0] / sum(planned)
        left = left[1:]


def _grouped(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections that need not be alone, together, where there are cores for them; then each of the others."""
    if (os.cpu_count() or 1) < CORES_FOR_SIDE_BY_SIDE:
        return [[section] for section in sections]
    together = [section for section in sections if not section.alone]
    return ([together] if together else []) + [[section] for section in sections if section.alone]


def _run(batch: Sequence[Section], setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """Results of sections that run at the same time, as they come."""
    labels_of = [
        {"name": section.name, "title": section.title, "kind": setting.kind, "limit_s": round(setting.limit_s, 1)}
        for section in batch
    ]
    if setting.limit_s < LEAST_S:
        nothing = _empty("skipped", "no time was left for it: give it --minutes") | {"seconds": 0.0, "log": ""}
        yield from (base | nothing for base in labels_of)
        return
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    results = [logs / f"{section.name}.json" for section in batch]
    setting_file = logs / f"{batch[0].name}.setting.json"
    setting_file.write_text(setting.to_json(), encoding="utf-8")
    children = []
    for section, result_file in zip(batch, results, strict=True):
        result_file.unlink(missing_ok=True)
        argv = python_child("-m", WORKER, section.module_name, str(setting_file), str(result_file))
        log = logs / f"{section.name}.log"
        children.append(Child(argv, setting.limit_s, log, extra=_cores_of(batch)))
    for index, ended in as_they_end(children):
        yield labels_of[index] | _judged(ended, results[index]) | {"seconds": round(ended.seconds, 1)}


def _cores_of(batch: Sequence[Section]) -> dict[str, str]:
    """Environment of sections that run side by side: each has its part of the cores."""
    if len(batch) == 1:
        return {}
    threads = str(max(1, physical_cores() // len(batch)))
    return {"HYBRIMOE_THREADS": threads, "OMP_NUM_THREADS": threads}


def _judged(ended: Ended, result_file: Path) -> dict[str, Any]:
    """What the section wrote, corrected by how its process ended."""
    result = _empty("failed", UNFINISHED)
    if result_file.exists():
        result |= json.loads(result_file.read_text(encoding="utf-8"))
    log = ended.output
    if ended.why:
        when = "before it was done" if result["why"] == UNFINISHED else "after its last result"
        result["status"] = "failed"
        result["problems"] = [*result["problems"], f"{ended.why}, {when}"]
        result["why"] = "; ".join(result["problems"])
        log = f"{log}\n{ended.threads}".strip()
    return result | {"log": log}


def _empty(status: str, why: str) -> dict[str, Any]:
    return {"status": status, "why": why, "tables": {}, "remarks": [], "problems": []}
