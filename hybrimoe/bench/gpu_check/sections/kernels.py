"""The fused kernels in GB/s of the records that they read, beside what the device's memory gives a copy and a sum."""

from __future__ import annotations

import importlib.util
from itertools import product

import torch

from cpu_kernels import ExpertDtype
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections.timing import device_us, require_cuda
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.bench.kernels.card import (
    CARD_DTYPES,
    CARD_SHAPES,
    cut_rates,
    kernel_rates,
    one_token_cuts,
    read_gbps,
)
from hybrimoe.bench.kernels.setting import Shape

TOKENS = (1, 2, 4, 8, 16, 64)
QUICK_TOKENS = (1, 4, 16)
SHORT_S = 40.0
"""With less time, fewer numbers of tokens."""
COPIED_BYTES = 1 << 30


def run(setting: Setting, findings: Findings) -> None:
    """Each shape, dtype and number of tokens."""
    device = require_cuda(setting)
    if importlib.util.find_spec("triton") is None:
        raise SkippedError("the fused kernels need Triton, which is not installed: pip install 'hybrimoe[gpu]'")
    findings.row("device memory", what="sum (bytes read)", gbps=round(read_gbps(device)))
    findings.row("device memory", what="copy (bytes read and written)", gbps=round(_copy_gbps(device)))
    tokens = TOKENS if setting.limit_s > SHORT_S else QUICK_TOKENS
    for shape, dtype in product(CARD_SHAPES[: setting.kernel_shapes], CARD_DTYPES):
        for n_tokens in tokens:
            if findings.time_for(f"{shape.name} {dtype}, {n_tokens} tokens"):
                with findings.part(f"{shape.name} {dtype}, {n_tokens} tokens"):
                    _rates(findings, device, shape, dtype, n_tokens)
        cuts_of_one_token(findings, device, shape, dtype)


def cuts_of_one_token(findings: Findings, device: torch.device, shape: Shape, dtype: ExpertDtype) -> None:
    """Each way to compute one token an expert that the card may choose from: in several launches, or in one."""
    for cuts in one_token_cuts(device, shape, dtype):
        what = f"{shape.name} {dtype}, {cuts.label}"
        if findings.time_for(what):
            with findings.part(what):
                for rate in cut_rates(device, shape, dtype, cuts):
                    findings.row(
                        "one token an expert", shape=rate.shape, dtype=rate.dtype, experts=rate.experts, cut=rate.cut,
                        us=round(rate.us, 1), of_read_rate=f"{rate.read_share:.0%}",
                    )  # fmt: skip


def _rates(findings: Findings, device: torch.device, shape: Shape, dtype: ExpertDtype, n_tokens: int) -> None:
    for rate in kernel_rates(device, [shape], [dtype], [n_tokens]):
        findings.row(
            "fused kernels", shape=rate.shape, dtype=rate.dtype, experts=rate.experts, tokens_each=rate.tokens,
            us=round(rate.us, 1), gbps=round(rate.gbps), of_read_rate=f"{rate.read_share:.0%}",
        )  # fmt: skip


def _copy_gbps(device: torch.device) -> float:
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED_BYTES / device_us(lambda: target.copy_(source)) / 1e3
