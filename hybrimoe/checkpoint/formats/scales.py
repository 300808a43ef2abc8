"""How the scales of a quantised checkpoint lie over its weights: one for all, an expert, a row, a column, or a block.

Blocks start at the first row and column; the last ones of a matrix may be partial. Their size is what the checkpoint
states; where it states none it is told from the shapes of all weights and scales together, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrimoe.checkpoint.formats.quantisation import FP8, FP8_DEFAULT_BLOCK, Quantisation
from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.errors import CheckpointError

MX_GROUP = 32  # OCP MX v1.0: columns that share one power of two
E8M0_DTYPES = (torch.float8_e8m0fnu, torch.uint8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *E8M0_DTYPES)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Scales over a weight [..., N, K]: `shape` has the weight's number of dimensions, each 1 or a number of scales;
    along the last two dimensions a scale is for `block` rows and columns."""

    shape: Shape
    block: tuple[int, int]

    def over(self, scales: torch.Tensor, weight: Shape) -> torch.Tensor:
        """`scales` (of the whole weight, or of the one expert that `weight` is) as factors that broadcast over it."""
        lead = (1,) * (len(weight) - 2) if scales.numel() != math.prod(self.shape) else self.shape[:-2]
        factors = decoded(scales).reshape(*lead, *self.shape[-2:])
        for axis, block in zip((-2, -1), self.block, strict=True):
            if block > 1 and factors.shape[axis] > 1:
                factors = factors.repeat_interleave(block, dim=axis).narrow(axis, 0, weight[axis])
        return factors


def decoded(scales: torch.Tensor) -> torch.Tensor:
    """float32 scales; a byte s means 2 ** (s - 127), and 255 NaN (OCP MX v1.0, e8m0)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def viewed(weight: StoredTensor, scales: StoredTensor) -> Shape:
    """The shape of `scales` with one size for each dimension of `weight`. Raises CheckpointError where none fits."""
    if scales.dtype not in SCALE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SCALE_DTYPES)
        raise CheckpointError(f"{scales.key}: scales of {scales.dtype}; readable are {known}")
    size, given = weight.shape, scales.shape
    if math.prod(given) == 1:
        return (1,) * len(size)
    if len(given) == len(size) >= 2 and given[:-2] in (size[:-2], (1,) * len(size[:-2])):
        return given
    if len(size) == 2 and given == size[:1]:
        return (*given, 1)
    if len(size) == 3 and given in (size[:1], (size[0], 1)):
        return (size[0], 1, 1)
    if len(size) == 3 and given == size[:2]:
        return (*given, 1)
    raise CheckpointError(
        f"{scales.key} {list(given)} does not fit {weight.key} {list(size)}: expected one scale in all, one an expert,"
        " one a row, or one a block"
    )


def grid_of(
    weight: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None, quantisation: Quantisation
) -> ScaleGrid:
    """How `scales` lie over `weight`, in blocks of `block`. Raises CheckpointError where they do not fit."""
    shape = viewed(weight, scales)
    found = _without_blocks(weight, scales, shape)
    if found is None and block is not None and shape[-2:] == _counts(weight.shape, block):
        found = block
    if found is not None:
        return ScaleGrid(shape, found)
    rows, columns = block or (0, 0)
    stated = f"blocks of {rows} x {columns} ({quantisation.where})" if block else "blocks of any size"
    raise CheckpointError(
        f"{scales.key} {list(scales.shape)} does not fit {weight.key} {list(weight.shape)} in {stated};"
        " the checkpoint does not match its config.json"
    )


def block_size(
    pairs: Sequence[tuple[StoredTensor, StoredTensor]], quantisation: Quantisation
) -> tuple[int, int] | None:
    """Rows and columns of a block: as stated, else told from all (weight, scales) together; None without any blocks.

    Raises CheckpointError where several sizes would fit.
    """
    if quantisation.block is not None:
        return quantisation.block
    shapes = [(weight, viewed(weight, scales)) for weight, scales in pairs]
    blocked = [
        (weight.shape[-2:], shape[-2:], weight.key)
        for (weight, shape), (_, scales) in zip(shapes, pairs, strict=True)
        if _without_blocks(weight, scales, shape) is None
    ]
    if not blocked:
        return None
    if quantisation.method == FP8 and all(n == _counts(size, FP8_DEFAULT_BLOCK) for size, n, _ in blocked):
        return FP8_DEFAULT_BLOCK
    rows, columns = (_told([(size[axis], n[axis]) for size, n, _ in blocked]) for axis in (0, 1))
    if rows is not None and columns is not None:
        return rows, columns
    (size, n, key), more = blocked[0], len(blocked) - 1
    raise CheckpointError(
        f"{key} {list(size)} has a grid of {list(n)} scales (and {more} more weights have such), and the size of a"
        f" block cannot be told from that; expected {quantisation.where} to state it:"
        ' "quantization_config": {"quant_method": "fp8", "weight_block_size": [rows, columns]}'
    )


def _without_blocks(weight: StoredTensor, scales: StoredTensor, shape: Shape) -> tuple[int, int] | None:
    """Rows and columns a scale where no block size is needed: one in all, one a row or column, one an MX group."""
    if len(weight.shape) < 2:
        return (1, 1) if math.prod(shape) == 1 else None
    rows, columns = weight.shape[-2:]
    if scales.dtype in E8M0_DTYPES and shape[-2:] == (rows, columns // MX_GROUP) and columns % MX_GROUP == 0:
        return 1, MX_GROUP
    whole = {(1, 1): (rows, columns), (rows, 1): (1, columns), (1, columns): (rows, 1)}
    return whole.get((shape[-2], shape[-1]))


def _counts(size: Shape, block: tuple[int, int]) -> Shape:
    """Blocks along the last two dimensions."""
    return tuple(-(-n // length) for n, length in zip(size[-2:], block, strict=True))


def _told(axis: Sequence[tuple[int, int]]) -> int | None:
    """The block length along one axis of all weights, from (entries, blocks); None where it cannot be told.

    All lengths between two bounds give these numbers of blocks. Of them, what a quantiser chooses is a power of two
    or divides every weight evenly; exactly one such length, or one length at all, is an answer.
    """
    shortest = max(-(-size // n) for size, n in axis)
    longest = min((-(-size // (n - 1)) - 1 for size, n in axis if n > 1), default=shortest)
    fitting = range(shortest, longest + 1)
    chosen = [
        length for length in fitting if length.bit_count() == 1 or all(size % length == 0 for size, n in axis if n > 1)
    ]
    return next(iter(chosen or fitting)) if len(chosen or fitting) == 1 else None
