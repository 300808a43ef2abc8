"""Group quantisation of weights: int8 and int4, symmetric, one bfloat16 scale per row and 32 columns.

Scales are bfloat16, not float16: the same 16 bits, but no underflow for small weights, a conversion that is one shift on
every CPU, and checkpoints that are int4 with bfloat16 scales already (Kimi K2) fit without loss. Codes are rounded
against the stored (rounded) scale, so the scale's own rounding adds no error.
"""

import torch

from cpu_kernels.layout import GROUP

INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7
OFFSET = {"int8": 128, "int4": 8}  # stored code = q + OFFSET: unsigned, as vpdpbusd wants its first operand
INT4_DIVISORS = (-8.0, -7.25, 7.25)  # candidates for (extreme value) / scale; the one with the least error wins


def quantise(matrix: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K], K a multiple of 32 -> unsigned codes uint8 [N, K] and scales bfloat16 [N, K / 32]."""
    groups = matrix.view(matrix.shape[0], -1, GROUP)
    codes, scales = _int8(groups) if dtype == "int8" else _int4(groups)
    return (codes + OFFSET[dtype]).to(torch.uint8).view(matrix.shape), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """The inverse: codes uint8 [N, K], scales bfloat16 [N, K / 32] -> float32 [N, K]."""
    groups = codes.view(codes.shape[0], -1, GROUP).float() - OFFSET[dtype]
    return (groups * scales.float().unsqueeze(2)).view(codes.shape)


def _int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (groups.abs().amax(dim=2) / INT8_MAX).to(torch.bfloat16)
    return _round(groups, scales, -INT8_MAX, INT8_MAX), scales


def _int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The code range is -8..7, so the extreme value of a group takes -8 unless 7 on both sides fits better."""
    position = groups.abs().argmax(dim=2, keepdim=True)
    extreme = groups.gather(2, position).squeeze(2)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for divisor in INT4_DIVISORS:
        scales = (extreme / divisor).to(torch.bfloat16)
        codes = _round(groups, scales, INT4_MIN, INT4_MAX)
        error = (codes * scales.float().unsqueeze(2) - groups).square_().sum(dim=2)
        if best is None:
            best = codes, scales, error
            continue
        better = error < best[2]
        best = (
            torch.where(better.unsqueeze(2), codes, best[0]),
            torch.where(better, scales, best[1]),
            torch.where(better, error, best[2]),
        )
    assert best is not None
    return best[0], best[1]


def _round(groups: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    wide = scales.float()
    inverse = torch.where(wide == 0, torch.zeros_like(wide), 1.0 / wide)
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(wide))
    return (groups * inverse.unsqueeze(2)).round_().clamp_(low, high)
