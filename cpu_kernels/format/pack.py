"""Packs an expert into a record and back (layout: `cpu_kernels.format.layout`).

Everything is view, permutation and elementwise torch operations, so `unpack_expert` runs on any device.
"""

import ctypes

import numpy as np
import torch
from torch.nn import functional

from cpu_kernels.errors import LayoutError
from cpu_kernels.format.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    GROUP,
    INTERLEAVE,
    LINES,
    PAD,
    PLANES,
    block_bytes,
    is_quantised,
    padded,
)
from cpu_kernels.format.quantise import dequantise, pack_quantised, pack_words, planes_of
from cpu_kernels.format.spec import ExpertSpec, ExpertWeights

Record = np.ndarray | torch.Tensor


def pack_expert(spec: ExpertSpec, weights: ExpertWeights, out: np.ndarray) -> None:
    """Writes `weights`, from any device, into the record `out` (uint8, C-contiguous, exactly spec.record_bytes).

    float32 and bfloat16 weights are stored without loss; other float dtypes are rounded to the spec's dtype.
    Raises LayoutError for wrong shapes, a wrong buffer, or weights that are not finite.
    """
    weights.check(spec)
    weights = weights.to("cpu")
    record = record_tensor(spec.record_bytes, out)
    first = record[: spec.layout.down_offset]
    if weights.gate is None:
        pack_matrix(weights.up, spec.dtype, "up", first)
    else:
        pack_matrix(weights.gate, spec.dtype, "gate", first, place=0, step=4)
        pack_matrix(weights.up, spec.dtype, "up", first, place=2, step=4)
    pack_matrix(weights.down, spec.dtype, "down", record[spec.layout.down_offset : spec.layout.down_end])
    if spec.has_bias:
        _pack_biases(spec, weights, record)


def unpack_expert(spec: ExpertSpec, record: Record) -> ExpertWeights:
    """The weights of a record on the record's device: bfloat16 for bfloat16 specs, else (dequantised) float32."""
    data = record_tensor(spec.record_bytes, record)
    layout, gated = spec.layout, spec.activation.gated
    rows = 2 * layout.inter_padded if gated else layout.inter_padded
    hidden, inter = layout.hidden_padded, layout.inter_padded
    first = unpack_matrix(data[: layout.down_offset], rows, hidden, spec.dtype)
    down = unpack_matrix(data[layout.down_offset : layout.down_end], hidden, inter, spec.dtype)
    gate, up = deinterleave(first) if gated else (None, first)
    return ExpertWeights(
        up=up[: spec.inter, : spec.hidden],
        down=down[: spec.hidden, : spec.inter],
        gate=None if gate is None else gate[: spec.inter, : spec.hidden],
        gate_bias=_bias(data, layout.gate_bias_offset, spec.inter) if spec.has_bias and gated else None,
        up_bias=_bias(data, layout.up_bias_offset, spec.inter) if spec.has_bias else None,
        down_bias=_bias(data, layout.down_bias_offset, spec.hidden) if spec.has_bias else None,
    )


def record_tensor(n_bytes: int, record: Record) -> torch.Tensor:
    """A torch view of a record; raises LayoutError unless it is contiguous uint8[n_bytes]."""
    if record.dtype not in (torch.uint8, np.uint8) or tuple(record.shape) != (n_bytes,):
        raise LayoutError(f"this record must be uint8[{n_bytes}], found {record.dtype}{list(record.shape)}")
    if isinstance(record, torch.Tensor):
        if not record.is_contiguous():
            raise LayoutError("a record must be contiguous")
        return record
    if not record.flags.c_contiguous:
        raise LayoutError("a record must be contiguous")
    return torch.from_numpy(record if record.flags.writeable else _unlocked(record))


def _unlocked(array: np.ndarray) -> np.ndarray:
    """A view of a read-only array (a memory map) that torch takes without a warning; only read from."""
    pointer = ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, shape=array.shape)


def deinterleave(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up from the rows of the first part of a gated record."""
    parts = both.view(-1, 2, INTERLEAVE, both.shape[1])
    return parts[:, 0].reshape(-1, both.shape[1]), parts[:, 1].reshape(-1, both.shape[1])


def pack_matrix(matrix: torch.Tensor, dtype: str, name: str, out: torch.Tensor, place: int = 0, step: int = 2) -> None:
    """Writes a float matrix [N, K], on any device, into `out`, uint8 of the size that N and K padded to 64 have.

    place and step: first row block and distance from 32 rows to the next, in row blocks of 16 (for interleaving).
    Raises LayoutError, naming the matrix, if a weight is not finite.
    """
    matrix = matrix.detach().cpu()
    if matrix.shape[1] % BLOCK_COLUMNS:
        matrix = functional.pad(matrix, (0, padded(matrix.shape[1]) - matrix.shape[1]))
    if matrix.shape[0] % PAD:
        matrix = functional.pad(matrix, (0, 0, 0, padded(matrix.shape[0]) - matrix.shape[0]))
    if is_quantised(dtype):
        values = matrix.float().contiguous().numpy()
        finite = bool(pack_quantised(values, planes_of(dtype), out.numpy(), block_bytes(dtype), place, step))
    else:
        source = matrix.to(getattr(torch, dtype)).contiguous()
        finite = bool(torch.isfinite(source.abs().amax()))
        pack_words(source.view(torch.int32).numpy(), out.view(torch.int32).numpy(), place, step)
    if not finite:
        raise LayoutError(f"the {name} weights contain NaN or infinity: the checkpoint is damaged")


def unpack_matrix(data: torch.Tensor, rows: int, columns: int, dtype: str) -> torch.Tensor:
    """uint8[matrix_bytes] -> [rows, columns] (padded sizes), bfloat16 or float32."""
    if is_quantised(dtype):
        return dequantise(*unpack_codes(data, rows, columns, dtype), dtype)
    return _words(data, rows, columns, dtype)[0].view(getattr(torch, dtype))


def unpack_codes(data: torch.Tensor, rows: int, columns: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8[matrix_bytes] of a quantised dtype -> unsigned codes uint8 [rows, columns], scales bfloat16
    [rows, columns / 32] (padded sizes); what they mean: `cpu_kernels.format.quantise`."""
    words, blocks = _words(data, rows, columns, dtype)
    tail = blocks[:, :, LINES[dtype] * BLOCK_ROWS :].contiguous().view(torch.bfloat16)
    scales = tail.view(*blocks.shape[:2], -1, BLOCK_ROWS).permute(0, 3, 1, 2).reshape(rows, -1)
    return _codes_of_words(words, dtype), scales


def _words(data: torch.Tensor, rows: int, columns: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The 32-bit words of each row, int32 [rows, words of a row], and all blocks with their scales."""
    blocks = data.view(torch.int32).view(rows // BLOCK_ROWS, columns // BLOCK_COLUMNS, block_bytes(dtype) // 4)
    words = blocks[:, :, : LINES[dtype] * BLOCK_ROWS].reshape(*blocks.shape[:2], LINES[dtype], BLOCK_ROWS)
    return words.permute(0, 3, 1, 2).reshape(rows, -1).contiguous(), blocks


def _codes_of_words(words: torch.Tensor, dtype: str) -> torch.Tensor:
    raw = words.view(torch.uint8)
    if dtype == "int8":
        return raw
    lines = raw.view(raw.shape[0], -1, sum(PLANES[dtype]), 4)  # a group's
    codes, first = torch.zeros((*lines.shape[:2], GROUP), dtype=torch.uint8, device=raw.device), 0
    for plane in PLANES[dtype]:
        part = lines[:, :, first : first + plane].flatten(2)
        fields = torch.cat([part >> shift & (1 << plane) - 1 for shift in range(0, 8, plane)], dim=2)
        codes, first = codes << plane | fields, first + plane
    return codes.view(raw.shape[0], -1)


def _pack_biases(spec: ExpertSpec, weights: ExpertWeights, record: torch.Tensor) -> None:
    layout = spec.layout
    ends = (layout.up_bias_offset, layout.down_bias_offset, layout.record_bytes)
    starts = (layout.gate_bias_offset, layout.up_bias_offset, layout.down_bias_offset)
    for start, end, bias in zip(starts, ends, (weights.gate_bias, weights.up_bias, weights.down_bias), strict=True):
        if bias is None:
            continue
        if not bool(torch.isfinite(bias).all()):
            raise LayoutError("an expert bias contains NaN or infinity")
        part = record[start:end].view(torch.float32)
        part.zero_()
        part[: bias.shape[0]].copy_(bias.detach())


def _bias(data: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    return data[offset : offset + 4 * size].clone().view(torch.float32)
