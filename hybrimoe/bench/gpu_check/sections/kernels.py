"""The fused kernels in GB/s of the records that they read, beside what the device's memory gives a copy and a sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from cpu_kernels import Activation, ExpertSpec, ExpertWeights, reference_ffn, relative_error, tolerance, unpack_expert
from cpu_kernels.format.pack import pack_expert
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections.timing import device_us, graph_of, require_cuda
from hybrimoe.bench.gpu_check.setting import Setting
from yaml_rules import shapes
from yaml_rules.located import read_yaml

POOL_BYTES = 1 << 30
"""Of slots, so that a launch finds none of its records in the device's cache."""
DISTINCT = 2
GROUPS = 8
"""Different groups of experts, one after the other in one graph."""
TOKENS = (1, 2, 4, 8, 16)
QUICK_TOKENS = (1, 4)
SHORT_S = 40.0
"""With less time, fewer numbers of tokens."""


def run(setting: Setting, findings: Findings) -> None:
    """Each shape, dtype and number of tokens."""
    device = require_cuda(setting)
    try:
        from gpu_kernels.triton import fused
    except ImportError as error:
        raise SkippedError(f"the fused kernels need Triton: {error}") from error
    peak_gbps = _memory_rates(findings, device)
    tokens = TOKENS if setting.limit_s > SHORT_S else QUICK_TOKENS
    for shape in setting.kernel_shapes:
        config = read_yaml(shapes.FOLDER / f"{shape}.yaml").data["config"]
        hidden, top_k = int(config["hidden_size"]), int(config["num_experts_per_tok"])
        inter = int(config.get("moe_intermediate_size", config["intermediate_size"]))
        for dtype in ("int4", "int8", "bfloat16"):
            spec = ExpertSpec(hidden, inter, dtype, Activation("silu"))
            _shape(findings, fused, device, f"{shape} {dtype}", spec, top_k, tokens, peak_gbps)


def _memory_rates(findings: Findings, device: torch.device) -> float:
    """GB/s of reading, by a sum over more than the device's cache; a copy's beside it."""
    source = torch.zeros(POOL_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / device_us(lambda: target.copy_(source)) / 1e3
    read = source.nbytes / device_us(lambda: torch.sum(source)) / 1e3
    findings.row("device memory", what="copy (bytes read and written)", gbps=round(copy))
    findings.row("device memory", what="sum (bytes read)", gbps=round(read))
    return max(copy, read)


def _shape(
    findings: Findings, fused: Any, device: torch.device, what: str, spec: ExpertSpec, top_k: int,
    tokens: tuple[int, ...], peak_gbps: float,
) -> None:  # fmt: skip
    slots, weights = _slots(spec, device)
    for active in sorted({max(1, top_k // 4), top_k}):
        for n_tokens in tokens:
            launches, error = _group(fused, spec, slots, weights, active, n_tokens, device)
            try:
                us = device_us(graph_of(launches).replay) / GROUPS
            except RuntimeError as failed:
                findings.problem(f"{what}, {active} experts of {n_tokens} tokens: {failed}")
                return
            gbps = active * spec.record_bytes / us / 1e3
            findings.row(
                "fused kernels", what=what, experts=active, tokens_each=n_tokens, us=round(us, 1), gbps=round(gbps),
                of_memory_rate=f"{gbps / peak_gbps:.0%}", relative_error=float(f"{error:.1e}"),
            )  # fmt: skip
            findings.require(
                error <= tolerance(spec), f"{what}, {active} experts of {n_tokens} tokens: relative error {error:.1e}"
            )


def _slots(spec: ExpertSpec, device: torch.device) -> tuple[torch.Tensor, list[ExpertWeights]]:
    """uint8 [n_slots, stride] of packed experts, and the DISTINCT experts that they repeat, as the records say."""
    generator = torch.Generator().manual_seed(0)
    stride = -(-spec.record_bytes // 256) * 256
    records, weights = [], []
    for _ in range(DISTINCT):
        record = np.zeros(stride, np.uint8)
        expert = ExpertWeights(
            up=torch.randn(spec.inter, spec.hidden, generator=generator) * 0.02,
            down=torch.randn(spec.hidden, spec.inter, generator=generator) * 0.02,
            gate=torch.randn(spec.inter, spec.hidden, generator=generator) * 0.02,
        )
        pack_expert(spec, expert, record[: spec.record_bytes])
        weights.append(unpack_expert(spec, record[: spec.record_bytes]))
        records.append(torch.from_numpy(record))
    n_slots = max(2 * DISTINCT, POOL_BYTES // stride)
    pool = torch.stack(records).to(device)
    return pool[torch.arange(n_slots, device=device) % DISTINCT], weights


def _group(
    fused: Any, spec: ExpertSpec, slots: torch.Tensor, weights: list[ExpertWeights], active: int, n_tokens: int,
    device: torch.device,
) -> tuple[Any, float]:  # fmt: skip
    """What launches GROUPS groups of `active` experts with `n_tokens` rows each, and the first one's relative error."""
    rng = np.random.default_rng(0)
    n_rows = active * n_tokens
    rows = torch.arange(n_rows, device=device, dtype=torch.int64)
    offsets = torch.arange(active + 1, device=device, dtype=torch.int32) * n_tokens
    hidden = torch.randn(n_rows, spec.hidden, device=device, generator=torch.Generator(device).manual_seed(0))
    scale = torch.ones(n_rows, device=device)
    out = torch.empty(n_rows, spec.hidden, device=device)
    chosen = [rng.choice(len(slots), min(active, len(slots)), replace=False).astype(np.int32) for _ in range(GROUPS)]
    ids = [torch.from_numpy(slot_ids).to(device) for slot_ids in chosen]

    def launch(number: int) -> None:
        fused.run_group(spec, slots, ids[number], offsets, rows, [n_tokens] * active, hidden, scale, 1, out)

    launch(0)
    inputs = hidden.cpu().view(active, n_tokens, -1)
    wanted = [reference_ffn(spec, weights[slot % DISTINCT], inputs[at]) for at, slot in enumerate(chosen[0].tolist())]
    error = float(relative_error(out.cpu(), torch.cat(wanted)))
    return partial(_each, launch), error


def _each(launch: Callable[[int], None]) -> None:
    for number in range(GROUPS):
        launch(number)
