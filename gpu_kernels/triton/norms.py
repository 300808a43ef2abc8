# ruff: noqa: ANN001 - what Triton compiles has no Python types
# mypy: ignore-errors
"""RMSNorm in one launch, where transformers' takes seven."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_kernels.triton.launch import COMPILED_WITH


@triton.jit
def rms_kernel(
    x_ptr, weight_ptr, out_ptr, size, eps, offset, PADDED: tl.constexpr, ROUND_FIRST: tl.constexpr
) -> None:  # fmt: skip
    """One row: out = x / sqrt(mean(x * x) + eps) * (weight + offset)."""
    columns = tl.arange(0, PADDED)
    inside = columns < size
    at = tl.program_id(0).to(tl.int64) * size + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    if ROUND_FIRST:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, round_first: bool) -> torch.Tensor:
    """Of x [..., D] with weight [D]: of x's shape and dtype. round_first: to that dtype, before the weight."""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    rms_kernel[(x.numel() // size,)](
        x, weight, out, size, eps, offset, PADDED=triton.next_power_of_2(size), ROUND_FIRST=round_first,
        num_warps=4 if size <= 4096 else 8, **COMPILED_WITH,
    )  # fmt: skip
    return out
