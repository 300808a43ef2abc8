"""The device's memory taken by somebody else, then a prompt: it is computed with fewer slots, or refused clearly."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gpu_kernels.devices import memory_info
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.errors import HybriMoEError

LEAST_COSINE = 0.999
LEFT_FREE_BYTES = 8 << 20
SHARE = 0.5


def run(setting: Setting, findings: Findings) -> None:
    """A long prompt before, while and after the memory is taken."""
    if setting.emulated:
        raise SkippedError("the emulated device has no memory of its own")
    ids = models.prompt(setting, setting.long_prompt_tokens)
    with models.opened(setting, setting.accelerator, "int4", policy="static", share=SHARE) as generator:
        session = generator.model.hybrimoe.session
        device = session.accelerators[0].device
        wanted = models.forced_logits(generator, ids, [])
        slots = session.n_slots
        taken = _take(device)
        free_bytes, _ = memory_info(device)
        told, found = _reply(generator, ids)
        findings.row(
            "a prompt while the memory is taken", taken_mib=sum(piece.numel() for piece in taken) >> 20,
            free_mib=free_bytes >> 20, told=told, slots_before=slots, slots_after=session.n_slots,
            cosine=None if found is None else round(models.cosine(found[0], wanted[0]), 6),
        )  # fmt: skip
        if found is not None:
            findings.require(models.cosine(found[0], wanted[0]) >= LEAST_COSINE, "the reply went on with wrong numbers")
        taken.clear()
        _give_back(device)
        after = models.forced_logits(generator, ids, ids[:2])
        worst = models.cosine(after[0], wanted[0])
        findings.row("the same prompt afterwards", slots=session.n_slots, cosine=round(worst, 6))
        findings.require(worst >= LEAST_COSINE, f"afterwards logits have cosine {worst:.5f}")


def _take(device: torch.device) -> list[torch.Tensor]:
    """Nearly all memory of the device that is free: by pieces, until no more is given."""
    _give_back(device)
    taken: list[torch.Tensor] = []
    size = memory_info(device)[0] - LEFT_FREE_BYTES
    while size > LEFT_FREE_BYTES:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
        else:
            size = min(size, memory_info(device)[0] - LEFT_FREE_BYTES)
    return taken


def _give_back(device: torch.device) -> None:
    """Blocks that torch keeps without using them."""
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def _reply(generator: Any, ids: list[int]) -> tuple[str, Any]:
    """What was told, and the logits or None. Any error but a clear one of ours or of torch's memory goes through."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = models.forced_logits(generator, ids, [])
        except (HybriMoEError, torch.OutOfMemoryError) as error:
            return f"{type(error).__name__}: {error}"[:400], None
    told = "; ".join(sorted({str(item.message) for item in warned}))
    return told or "nothing: there was room", found
