"""compressed-tensors: whole numbers (packed or a byte each) and fp4, as llm-compressor writes them.

`weight_packed` int32 holds codes of a few bits along the rows, `weight_packed` uint8 two fp4 values a byte; `weight`
int8 is a code a byte. Scales are one a row, or one a group of columns; fp8 weights are read elsewhere (`dequantise`).
Also NVFP4 as ModelOpt writes it, which differs in names, and in that its global scale multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from hybrimoe.checkpoint.formats.codes import FP4_PER_BYTE, WORD_BITS, fp4_values, n_words, unpack
from hybrimoe.checkpoint.formats.quantisation import Quantisation
from hybrimoe.checkpoint.formats.scales import E8M0_DTYPES, decoded
from hybrimoe.checkpoint.formats.source import COLUMN_GROUPS, ROUNDED, DecodedSource, Parts, scaled, storage_of_groups
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError

Tensors = Mapping[str, torch.Tensor]


def packed_source(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    """pack-quantized, or fp4 packed in bytes. parts: "packed", "scale", and as the file has them "shape",
    "zero_point", "g_idx", "global_scale". Raises CheckpointError for shapes that do not go together."""
    if parts["packed"].dtype == torch.uint8:
        return fp4_source(key, parts, quantisation)
    *lead, rows, words = parts["packed"].shape
    columns, bits = _size(key, parts, quantisation)
    if words != n_words(columns, bits) or parts["scale"].shape[-2] not in (1, rows):
        raise _misfit(key, parts, f"rows of {columns} codes of {bits} bits")
    _check_groups(key, columns, parts)
    decode = partial(decode_packed, bits=bits, columns=columns)
    storage = _storage(f"compressed-tensors int{bits}", bits, columns, parts)
    return DecodedSource(key, (*lead, rows, columns), _without_shape(parts), decode, storage)


def _size(key: str, parts: Parts, quantisation: Quantisation) -> tuple[int, int]:
    """(columns, bits of a code): as the file's own note of the shape says, of which config.json gives the bits."""
    words = parts["packed"].shape[-1]
    group = quantisation.group_of(key)
    if "shape" in parts:
        columns = int(parts["shape"].read()[-1])
    elif group is not None and group.bits:
        columns = words * WORD_BITS // group.bits
    else:
        raise CheckpointError(f"{key}: neither the file nor config.json says how many bits its codes have")
    if columns < 1:
        raise _misfit(key, parts, "a weight of the shape that the file notes")
    bits = group.bits if group is not None and group.bits else words * WORD_BITS // columns
    if not 1 <= bits <= 8:
        raise _misfit(key, parts, f"rows of {columns} codes of 1 to 8 bits")
    return columns, bits


def decode_packed(parts: Tensors, *, bits: int, columns: int) -> torch.Tensor:
    """float32 [..., N, columns]."""
    codes = unpack(parts["packed"], bits, columns).float() - 2 ** (bits - 1)
    zeros, groups = parts.get("zero_point"), _groups(parts)
    if zeros is not None and zeros.dtype == torch.int32:  # packed down the rows
        by_group = unpack(zeros.transpose(-1, -2).contiguous(), bits, codes.shape[-2]).transpose(-1, -2)
        zeros = by_group.float() - 2 ** (bits - 1)
    return _scaled(codes, parts["scale"], zeros, groups)


def int8_source(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    """int-quantized: a code a byte. parts: "weight", "scale", and as the file has them "zero_point", "g_idx"."""
    *_, rows, columns = parts["weight"].shape
    scale = parts["scale"]
    if len(scale.shape) > 1 and scale.shape[-2] not in (1, rows):
        raise _misfit(key, parts, "whole numbers with a scale in all, a row, or a group of columns")
    _check_groups(key, columns, parts)
    storage = _storage("compressed-tensors int8", 8, columns, parts)
    return DecodedSource(key, parts["weight"].shape, parts, decode_int8, storage)


def decode_int8(parts: Tensors) -> torch.Tensor:
    """float32 [..., N, K]."""
    scale = parts["scale"]
    if scale.dim() < 2:  # one in all, or one a row
        scale = scale.reshape(-1, 1)
    return _scaled(parts["weight"].float(), scale, parts.get("zero_point"), _groups(parts))


def fp4_source(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    """fp4: "packed" uint8 [..., N, K / 2], "scale" a power of two per 32 columns (MXFP4) or float8 per 16 (NVFP4), with
    "global_scale" that the others are divided by (compressed-tensors) or "factor" that multiplies them (ModelOpt)."""
    *lead, rows, n_bytes = parts["packed"].shape
    columns, n_groups = n_bytes * FP4_PER_BYTE, parts["scale"].shape[-1]
    if parts["scale"].shape[:-1] != (*lead, rows) or columns % n_groups:
        raise _misfit(key, parts, "fp4 with a scale a group of columns")
    name = "MXFP4" if parts["scale"].dtype in E8M0_DTYPES else "NVFP4"
    remark = "nothing changes" if name == "MXFP4" else ROUNDED
    storage = Storage(name, "int8", remark)
    return DecodedSource(key, (*lead, rows, columns), _without_shape(parts), decode_fp4, storage)


def decode_fp4(parts: Tensors) -> torch.Tensor:
    """float32 [..., N, K]."""
    values, scale = fp4_values(parts["packed"]), decoded(parts["scale"])
    if (divisor := parts.get("global_scale")) is not None:
        scale = scale / divisor.float().reshape(-1, *(1,) * (scale.dim() - 1))
    if (factor := parts.get("factor")) is not None:
        scale = scale * factor.float().reshape(-1, *(1,) * (scale.dim() - 1))
    return scaled(values, scale)


def _check_groups(key: str, columns: int, parts: Parts) -> None:
    scale = parts["scale"].shape
    if COLUMN_GROUPS in parts:
        fits = parts[COLUMN_GROUPS].shape == (columns,)
    else:
        fits = len(scale) < 2 or columns % scale[-1] == 0
    if not fits:
        raise _misfit(key, parts, f"{columns} columns in groups of one size")


def _without_shape(parts: Parts) -> Parts:
    return {name: part for name, part in parts.items() if name != "shape"}


def _groups(parts: Tensors) -> torch.Tensor | None:
    """The group of each column; None where they follow each other (or the file says -1: no order of its own)."""
    groups = parts.get(COLUMN_GROUPS)
    return None if groups is None or bool((groups < 0).any()) else groups


def _scaled(
    codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, groups: torch.Tensor | None
) -> torch.Tensor:
    if zeros is not None:
        zeros = zeros.float() if zeros.dim() > 1 else zeros.float().reshape(-1, 1)
    return scaled(codes, scale.float(), zeros, groups)


def _storage(name: str, bits: int, columns: int, parts: Parts) -> Storage:
    scale, symmetric = parts["scale"].shape, "zero_point" not in parts
    n_groups = scale[-1] if len(scale) > 1 else 1
    return storage_of_groups(name, bits, columns, n_groups, symmetric=symmetric, ordered=COLUMN_GROUPS in parts)


def _misfit(key: str, parts: Parts, what: str) -> CheckpointError:
    shapes = ", ".join(f"{part.key.rpartition('.')[2]} {part.type_name}{list(part.shape)}" for part in parts.values())
    return CheckpointError(f"{key}: {shapes} are not {what}; the checkpoint does not match its config.json")
