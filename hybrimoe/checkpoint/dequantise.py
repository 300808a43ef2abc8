"""Quantised checkpoints seen as plain ones: each quantised tensor and its scales become one source that is dequantised
when it is read, whole or an expert's slice at a time, so that everything after it sees floating point weights only.

Formats: fp8 (float8 weights with `_scale_inv` or `_scale`, per tensor or per block; DeepSeek-V3 and others) and mxfp4
(`_blocks` of two fp4 values a byte with `_scales` of one power of two per 32 values; gpt-oss).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.errors import CheckpointError

READABLE_METHODS = ("fp8", "mxfp4")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = ("_scale_inv", "_scale")
UNUSED_SUFFIXES = (".input_scale", ".activation_scale")  # of activations; weights alone are kept
BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)  # OCP MX v1.0, e2m1
E8M0_BIAS = 127  # OCP MX v1.0: a scale byte s means 2 ** (s - 127)


class Source(Protocol):
    """A tensor of the checkpoint as the model's mapping sees it."""

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what `read` gives."""

    def read(self) -> torch.Tensor:
        """The whole tensor."""

    def read_slice(self, index: int) -> torch.Tensor:
        """[1, ...]: one entry of the first dimension."""


@dataclass(frozen=True, slots=True)
class Fp8Source:
    """float8 weight [..., N, K] times its scale: one value, or one per block of the last two dimensions."""

    weight: StoredTensor
    scale: StoredTensor

    @property
    def key(self) -> str:
        return self.weight.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self) -> torch.Tensor:
        return scale_fp8(self.weight.read(), self.scale.read())

    def read_slice(self, index: int) -> torch.Tensor:
        per_entry = len(self.scale.shape) == len(self.shape) and self.scale.shape[0] == self.shape[0]
        return scale_fp8(
            self.weight.read_slice(index), self.scale.read_slice(index) if per_entry else self.scale.read()
        )


@dataclass(frozen=True, slots=True)
class Mxfp4Source:
    """Blocks uint8 [E, R, G, 16] and scales uint8 [E, R, G], read as bfloat16 [E, 32 G, R] (transformers' layout)."""

    key: str
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, half = self.blocks.shape
        return experts, groups * half * 2, rows

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def read(self) -> torch.Tensor:
        return scale_mxfp4(self.blocks.read(), self.scales.read())

    def read_slice(self, index: int) -> torch.Tensor:
        return scale_mxfp4(self.blocks.read_slice(index), self.scales.read_slice(index))


def dequantised(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Source]:
    """The checkpoint's tensors with quantised ones joined to their scales.

    Raises UnsupportedCheckpointError for a quantisation that is not read, CheckpointError for a weight without scales.
    """
    _check_method(config)
    sources: dict[str, Source] = {}
    used: set[str] = set()
    for key, tensor in tensors.items():
        if key.endswith(BLOCKS_SUFFIX) and tensor.dtype == torch.uint8 and len(tensor.shape) == 4:
            scales = _partner(tensors, key, key.removesuffix(BLOCKS_SUFFIX), (SCALES_SUFFIX,))
            name = key.removesuffix(BLOCKS_SUFFIX)
            sources[name] = Mxfp4Source(name, tensor, scales)
            used |= {key, scales.key}
        elif tensor.dtype in FP8_DTYPES:
            scale = _partner(tensors, key, key, SCALE_SUFFIXES)
            sources[key] = Fp8Source(tensor, scale)
            used |= {key, scale.key}
    if used:
        used |= {key for key in tensors if key.endswith(UNUSED_SUFFIXES)}
    return sources | {key: tensor for key, tensor in tensors.items() if key not in used}


def scale_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8 [..., N, K] and a scale of one element or [..., ceil(N / n), ceil(K / k)] to float32 [..., N, K]."""
    values, factor = weight.float(), scale.float()
    if factor.numel() == 1:
        return values * factor.reshape(())
    if factor.dim() == 1:
        return values * factor[:, None]
    for axis in (-2, -1):
        block = -(-weight.shape[axis] // factor.shape[axis])
        factor = factor.repeat_interleave(block, dim=axis).narrow(axis, 0, weight.shape[axis])
    return values.mul_(factor)


def scale_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 [E, R, G, 16] and uint8 [E, R, G] to bfloat16 [E, 32 G, R]; the low half of a byte comes first."""
    table = torch.tensor(FP4_VALUES, dtype=torch.float32)
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1).flatten(-2)
    values = torch.ldexp(values, scales.int()[..., None] - E8M0_BIAS)
    return values.flatten(-2).to(torch.bfloat16).transpose(1, 2)


def _check_method(config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    if method is not None and method not in READABLE_METHODS:
        raise UnsupportedCheckpointError(
            f"the checkpoint is quantised with {method}; readable are {', '.join(READABLE_METHODS)} and unquantised"
            " weights. Use the unquantised checkpoint: hybrimoe quantises experts itself (expert_dtype: int4)"
        )


def _partner(tensors: Mapping[str, StoredTensor], key: str, stem: str, suffixes: tuple[str, ...]) -> StoredTensor:
    for suffix in suffixes:
        if stem + suffix in tensors:
            return tensors[stem + suffix]
    expected = " or ".join(stem + suffix for suffix in suffixes)
    raise CheckpointError(f"{key} is quantised and its scales are missing: expected {expected}")
