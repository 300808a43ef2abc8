"""Quantised checkpoints seen as plain ones: each quantised tensor and its scales become one source that is dequantised
when it is read, whole or an expert's slice at a time, so that everything after it sees floating point weights only.

Here: fp8 (float8 weights with a scale for all, an expert, a row, or a block; DeepSeek-V3 and others), fp4 in bytes (two
values a byte, a power of two per 32; DeepSeek-V4's experts) and mxfp4 (the same as `_blocks` and `_scales`; gpt-oss).
All others stand in a table (`formats.table`). A scale is always what its weight is multiplied by, whatever its name
says of an inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.formats.codes import FP4_PER_BYTE, fp4_values
from hybrimoe.checkpoint.formats.quantisation import Quantisation, check_tensor_names
from hybrimoe.checkpoint.formats.scales import E8M0_DTYPES, MX_GROUP, ScaleGrid, block_size, decoded, grid_of
from hybrimoe.checkpoint.formats.table import decoded_sources
from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.checkpoint.stored import Storage, Stored
from hybrimoe.errors import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTE_DTYPES = (torch.int8, torch.uint8)
SCALE_SUFFIXES = ("_scale_inv", "_scale")  # after a parameter's own name: weight_scale_inv, gate_up_proj_scale, ...
SCALE_NAMES = ("scale", "scale_inv", "qscale_weight")  # in the place of `weight`: wq_a.scale (DeepSeek-V4), ...
MXFP4_STORAGE = Storage("MXFP4", "int8", "nothing changes")
BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"


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

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The tensors of the files that it is made from."""

    @property
    def storage(self) -> Storage:
        """How its values lie in them."""

    def read(self) -> torch.Tensor:
        """The whole tensor."""

    def read_slice(self, index: int) -> torch.Tensor:
        """[1, ...]: one entry of the first dimension."""


@dataclass(frozen=True, slots=True)
class ScaledSource:
    """A float8 weight [..., N, K], or fp4 in bytes [..., N, K / 2], times its scales; read as float32 [..., N, K]."""

    weight: StoredTensor
    scales: StoredTensor
    grid: ScaleGrid

    @property
    def key(self) -> str:
        return self.weight.key

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, columns = self.weight.shape
        return (*lead, columns * FP4_PER_BYTE) if self.weight.dtype in BYTE_DTYPES else self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.weight, self.scales

    @property
    def storage(self) -> Storage:
        if self.weight.dtype in BYTE_DTYPES:
            return MXFP4_STORAGE
        return Storage(f"fp8 ({self.weight.type_name.removeprefix('F8_').lower()})", "int8", "rounded again")

    def read(self) -> torch.Tensor:
        return self._scaled(self.weight.read(), self.scales.read())

    def read_slice(self, index: int) -> torch.Tensor:
        an_expert_each = len(self.shape) > 2 and self.grid.shape[0] == self.shape[0]
        scales = self.scales.read_slice(index) if an_expert_each and self.scales.shape else self.scales.read()
        return self._scaled(self.weight.read_slice(index), scales)

    def _scaled(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        values = fp4_values(weight) if weight.dtype in BYTE_DTYPES else weight.float()
        return values.mul_(self.grid.over(scales, tuple(values.shape)))


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

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.blocks, self.scales

    @property
    def storage(self) -> Storage:
        return MXFP4_STORAGE

    def read(self) -> torch.Tensor:
        return scale_mxfp4(self.blocks.read(), self.scales.read())

    def read_slice(self, index: int) -> torch.Tensor:
        return scale_mxfp4(self.blocks.read_slice(index), self.scales.read_slice(index))


def dequantised(tensors: Mapping[str, StoredTensor], quantisation: Quantisation) -> dict[str, Source]:
    """The checkpoint's tensors with quantised ones joined to their scales.

    Raises UnsupportedCheckpointError for a quantisation that is not read, CheckpointError for a weight without scales,
    scales that do not fit, and blocks whose size is not stated and cannot be told.
    """
    check_tensor_names(tensors)
    mxfp4 = _mxfp4_sources(tensors)
    decoded_ones, used = decoded_sources(tensors, quantisation)
    used |= {stored.key for source in mxfp4 for stored in (source.blocks, source.scales)}
    pairs = _scaled_pairs({key: tensor for key, tensor in tensors.items() if key not in used})
    fp4 = [(weight, scales) for weight, scales in pairs if weight.dtype in BYTE_DTYPES]
    fp8 = [(weight, scales) for weight, scales in pairs if weight.dtype in FP8_DTYPES]
    block = block_size(fp8, quantisation)
    scaled = [ScaledSource(weight, scales, grid_of(weight, scales, block, quantisation)) for weight, scales in fp8]
    scaled += [ScaledSource(weight, scales, _fp4_grid(weight, scales)) for weight, scales in fp4]
    used |= {stored.key for source in scaled for stored in (source.weight, source.scales)}
    joined: list[Source] = [*mxfp4, *scaled]
    plain = {key: tensor for key, tensor in tensors.items() if key not in used}
    return {source.key: source for source in joined} | decoded_ones | plain


def scale_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 [E, R, G, 16] and uint8 [E, R, G] to bfloat16 [E, 32 G, R]."""
    values = fp4_values(blocks) * decoded(scales)[..., None]
    return values.flatten(-2).to(torch.bfloat16).transpose(1, 2)


def _mxfp4_sources(tensors: Mapping[str, StoredTensor]) -> list[Mxfp4Source]:
    sources = []
    for key, blocks in tensors.items():
        if key.endswith(BLOCKS_SUFFIX) and blocks.dtype == torch.uint8 and len(blocks.shape) == 4:
            name = key.removesuffix(BLOCKS_SUFFIX)
            if name + SCALES_SUFFIX not in tensors:
                raise _without_scales(key, [name + SCALES_SUFFIX])
            sources.append(Mxfp4Source(name, blocks, tensors[name + SCALES_SUFFIX]))
    return sources


def _scaled_pairs(tensors: Mapping[str, StoredTensor]) -> list[tuple[StoredTensor, StoredTensor]]:
    """(weight, scales) of every float8 tensor, and of bytes that have scales."""
    pairs = []
    for key, tensor in tensors.items():
        if tensor.dtype not in (*FP8_DTYPES, *BYTE_DTYPES):
            continue
        names = _scale_names(key)
        scales = next((tensors[name] for name in names if name in tensors), None)
        if scales is not None:
            pairs.append((tensor, scales))
        elif tensor.dtype in FP8_DTYPES:
            raise _without_scales(key, names)
    return pairs


def _scale_names(key: str) -> list[str]:
    """What the scales of weight `key` may be called."""
    stem, _, last = key.rpartition(".")
    in_its_place = [f"{stem}.{name}" for name in SCALE_NAMES] if last == "weight" else []
    return [key + suffix for suffix in SCALE_SUFFIXES] + in_its_place


def _fp4_grid(weight: StoredTensor, scales: StoredTensor) -> ScaleGrid:
    """Groups of 32 values along a row. Raises UnsupportedCheckpointError for bytes that are no fp4."""
    *lead, n_bytes = weight.shape
    groups, rest = divmod(n_bytes * FP4_PER_BYTE, MX_GROUP)
    if len(lead) and scales.dtype in E8M0_DTYPES and not rest and scales.shape == (*lead, groups):
        return ScaleGrid(scales.shape, (1, MX_GROUP))
    raise UnsupportedCheckpointError(
        f"{weight.key} is {weight.dtype} {list(weight.shape)} with scales {scales.dtype} {list(scales.shape)}; of"
        f" weights in bytes only fp4 with one power of two (float8_e8m0fnu) per {MX_GROUP} values is read; use the"
        " unquantised checkpoint"
    )


def _without_scales(key: str, names: list[str]) -> CheckpointError:
    return CheckpointError(f"{key} is quantised and its scales are missing: expected {' or '.join(names)}")
