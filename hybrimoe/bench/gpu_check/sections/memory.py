"""What was planned for the device beside what torch and the driver say that it holds."""

from __future__ import annotations

from typing import Any

import torch

from gpu_kernels.devices import memory_info
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting

TOLERANCE_BYTES = 96 << 20
"""Between the plan and torch's allocator: rounding of its blocks, workspaces of the BLAS."""


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
        dense, slots, reserve = plan.dense, plan.slots, plan.kv + plan.unpack + plan.reserve
        models.forced_logits(generator, ids, ids[:2])
        after = _held(device)
    findings.row(
        "MiB", slots_share=share, n_slots=n_slots, planned_dense=_mib(dense), planned_slots=_mib(slots),
        planned_reserve=_mib(reserve), torch_allocated=_mib(_grown(before, idle, "allocated")),
        torch_reserved=_mib(_grown(before, idle, "reserved")), driver_idle=_mib(_grown(before, idle, "driver")),
        torch_peak_in_prompt=_mib(_grown(before, after, "peak")), driver_after=_mib(_grown(before, after, "driver")),
    )  # fmt: skip
    held = _grown(before, idle, "allocated")
    held = _grown(before, idle, "driver") if held is None else held
    planned = dense + slots
    findings.require(
        held is not None and planned <= held + TOLERANCE_BYTES and held <= planned + TOLERANCE_BYTES,
        f"{share:.0%} slots: {_mib(planned)} MiB are planned for weights and slots, the device holds {_mib(held)} MiB",
    )
    peak = _grown(before, after, "peak")
    if peak is not None:
        findings.require(
            peak <= planned + reserve,
            f"{share:.0%} slots: a prompt takes {_mib(peak)} MiB, {_mib(planned + reserve)} MiB were planned",
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
