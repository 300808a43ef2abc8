"""The fused kernels in GB/s of the records that they read, beside what the device's memory gives a copy and a sum."""

from __future__ import annotations

import importlib.util

import torch

from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections.timing import device_us, require_cuda
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.bench.kernels.card import CARD_DTYPES, CARD_SHAPES, kernel_rates, read_gbps
from hybrimoe.bench.kernels.measure import ParityError

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
    for shape in CARD_SHAPES[: setting.kernel_shapes]:
        for dtype in CARD_DTYPES:
            if not findings.time_for(f"{shape.name} {dtype}"):
                continue
            try:
                rates = kernel_rates(device, [shape], [dtype], tokens)
            except ParityError as error:
                findings.problem(f"{shape.name}: {error}")
                continue
            for rate in rates:
                findings.row(
                    "fused kernels", shape=rate.shape, dtype=rate.dtype, experts=rate.experts, tokens_each=rate.tokens,
                    us=round(rate.us, 1), gbps=round(rate.gbps), of_read_rate=f"{rate.read_share:.0%}",
                )  # fmt: skip


def _copy_gbps(device: torch.device) -> float:
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED_BYTES / device_us(lambda: target.copy_(source)) / 1e3
