"""The project's own kernels for decode steps on a card, beside those of experts: attention over a cache, RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class AttendsBuffers(Protocol):
    """Attention of one new token a sequence over whole buffers; see `gpu_kernels.triton.attention.decode_attention`."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None,
        n_past: torch.Tensor, first: int, scale: float, /,
    ) -> torch.Tensor: ...  # fmt: skip


class NormsRows(Protocol):
    """RMSNorm; see `gpu_kernels.triton.norms.rms_norm`."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, round_first: bool, /
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class StepKernels:
    """What a step on a card may use in place of torch's operators; None: torch's."""

    attention: AttendsBuffers | None = None
    norm: NormsRows | None = None


def load_step_kernels(device: torch.device) -> StepKernels:
    """The kernels for a device; none on the host, and where Triton is not installed or cannot be imported."""
    if device.type == "cpu":
        return StepKernels()
    try:
        from gpu_kernels.triton.attention import decode_attention
        from gpu_kernels.triton.norms import rms_norm
    except (ImportError, AttributeError, RuntimeError):  # a broken installation of Triton raises either
        return StepKernels()
    return StepKernels(decode_attention, rms_norm)


def takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernel can compute a call: one query a sequence, rows contiguous, a boolean mask for all heads."""
    if query.shape[2] != 1 or query.dtype not in DTYPES or not query.dtype == keys.dtype == values.dtype:
        return False
    if keys.stride(-1) != 1 or values.stride(-1) != 1 or query.shape[1] % keys.shape[1]:
        return False
    if mask is None:
        return True
    shapes = [(n, 1, 1, keys.shape[2]) for n in (1, query.shape[0])]
    return mask.dtype == torch.bool and tuple(mask.shape) in shapes and mask.stride(-1) == 1
