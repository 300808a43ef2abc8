"""What was planned for the device beside what torch and the driver say that it holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from gpu_kernels.devices import memory_info
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting

TOLERANCE_BYTES = 32 << 20
"""Between the plan and torch's allocator: rounding of its blocks."""


def run(setting: Setting, findings: Findings) -> None:
    """A model at each share, idle and after a long prompt."""
    if setting.emulated:
        raise SkippedError("the emulated device has no memory of its own")
    ids = models.prompt(setting, setting.long_prompt_tokens)
    for share in dict.fromkeys((setting.shares[0], setting.shares[-1])):
        if findings.time_for(f"{share:.0%} slots"):
            _at(setting, findings, share, ids)


def _at(setting: Setting, findings: Findings, share: float, ids: list[int]) -> None:
    device = torch.device(setting.accelerator)
    before = _held(device)
    with models.opened(setting, setting.accelerator, "int4", share=share, dense_dtype="auto") as generator:
        session = generator.model.hybrimoe.session
        idle = _held(device)
        n_slots, plan = session.accelerators[0].n_slots, session.planned_memory()[0]
        models.forced_logits(generator, ids, ids[:2])
        after = _held(device)
        step = generator.model.hybrimoe.step
        graphs = getattr(step, "graph_bytes", 0)
    findings.row("MiB planned", slots_share=share, **{name: _mib(each) for name, each in asdict(plan).items()})
    findings.row(
        "MiB", slots_share=share, n_slots=n_slots, planned=_mib(plan.total), graphs=_mib(graphs),
        torch_allocated=_mib(_grown(before, idle, "allocated")), torch_reserved=_mib(_grown(before, idle, "reserved")),
        driver_idle=_mib(_grown(before, idle, "driver")), torch_peak_in_prompt=_mib(_grown(before, after, "peak")),
        driver_after=_mib(_grown(before, after, "driver")),
    )  # fmt: skip
    held = _grown(before, idle, "allocated")
    held = _grown(before, idle, "driver") if held is None else held
    least, most = plan.dense + plan.slots, plan.held
    findings.require(
        held is not None and least <= held + TOLERANCE_BYTES and held <= most + TOLERANCE_BYTES,
        f"{share:.0%} slots: {_mib(least)} MiB are planned for weights and slots, {_mib(most)} with workspaces and"
        f" recorded steps, the device holds {_mib(held)} MiB",
    )
    findings.require(
        graphs <= plan.graphs,
        f"{share:.0%} slots: recorded steps take {_mib(graphs)} MiB, {_mib(plan.graphs)} were planned",
    )
    peak = _grown(before, after, "peak")
    if peak is not None:
        findings.require(
            peak <= plan.total,
            f"{share:.0%} slots: a prompt takes {_mib(peak)} MiB, {_mib(plan.total)} MiB were planned",
        )


def _held(device: torch.device) -> dict[str, int]:
    """Bytes by who says so: torch's allocator where it tells, and the driver."""
    module: Any = torch.get_device_module(device)
    free, total = memory_info(device)
    held = {"driver": total - free}
    asked = {"allocated": "memory_allocated", "reserved": "memory_reserved", "peak": "max_memory_allocated"}
    for name, function in asked.items():
        if hasattr(module, function):
            held[name] = int(getattr(module, function)(device))
    if "peak" in held and hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)
    return held


def _grown(before: dict[str, int], after: dict[str, int], name: str) -> int | None:
    """By how many bytes; a peak is counted from what was allocated."""
    first = "allocated" if name == "peak" else name
    return after[name] - before[first] if name in after else None


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else round(n_bytes / 2**20, 1)
