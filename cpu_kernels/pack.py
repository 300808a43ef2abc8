"""Packs an expert into a record and back (layout: `cpu_kernels.layout`).

Everything is view, permutation and elementwise torch operations, so `unpack_expert` runs on any device.
"""

import ctypes

import numpy as np
import torch

from cpu_kernels.errors import LayoutError
from cpu_kernels.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    GROUP,
    INTERLEAVE,
    LINES,
    block_bytes,
    is_quantised,
    matrix_bytes,
    padded,
)
from cpu_kernels.quantise import dequantise, quantise
from cpu_kernels.spec import ExpertSpec, ExpertWeights

Record = np.ndarray | torch.Tensor


def pack_expert(spec: ExpertSpec, weights: ExpertWeights, out: np.ndarray) -> None:
    """Writes `weights` into the record `out` (uint8, C-contiguous, exactly spec.record_bytes).

    float32 and bfloat16 weights are stored without loss; other float dtypes are rounded to the spec's dtype.
    Raises LayoutError for wrong shapes, a wrong buffer, or weights that are not finite.
    """
    weights.check(spec)
    record = _record_tensor(spec, out)
    first = weights.up if weights.gate is None else _interleave(weights.gate, weights.up)
    down_offset = spec.layout.down_offset
    record[:down_offset].copy_(_pack_matrix(first, spec.dtype, "gate/up" if spec.activation.gated else "up"))
    end = down_offset + matrix_bytes(spec.hidden, spec.inter, spec.dtype)
    record[down_offset:end].copy_(_pack_matrix(weights.down, spec.dtype, "down"))
    if spec.has_bias:
        _pack_biases(spec, weights, record)


def unpack_expert(spec: ExpertSpec, record: Record) -> ExpertWeights:
    """The weights of a record on the record's device: bfloat16 for bfloat16 specs, else (dequantised) float32."""
    data = _record_tensor(spec, record)
    layout, gated = spec.layout, spec.activation.gated
    rows = 2 * layout.inter_padded if gated else layout.inter_padded
    first = _unpack_matrix(data[: layout.down_offset], rows, layout.hidden_padded, spec.dtype)
    end = layout.down_offset + matrix_bytes(spec.hidden, spec.inter, spec.dtype)
    down = _unpack_matrix(data[layout.down_offset : end], layout.hidden_padded, layout.inter_padded, spec.dtype)
    gate, up = _deinterleave(first) if gated else (None, first)
    return ExpertWeights(
        up=up[: spec.inter, : spec.hidden],
        down=down[: spec.hidden, : spec.inter],
        gate=None if gate is None else gate[: spec.inter, : spec.hidden],
        gate_bias=_bias(data, layout.gate_bias_offset, spec.inter) if spec.has_bias and gated else None,
        up_bias=_bias(data, layout.up_bias_offset, spec.inter) if spec.has_bias else None,
        down_bias=_bias(data, layout.down_bias_offset, spec.hidden) if spec.has_bias else None,
    )


def _record_tensor(spec: ExpertSpec, record: Record) -> torch.Tensor:
    dtype_ok = record.dtype in (torch.uint8, np.uint8)
    if not dtype_ok or tuple(record.shape) != (spec.record_bytes,):
        raise LayoutError(
            f"a record of {spec.hidden} x {spec.inter} {spec.dtype} is uint8[{spec.record_bytes}], "
            f"found {record.dtype}{list(record.shape)}"
        )
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


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[I, H] x 2 -> [2 * padded(I), H]: 32 rows of gate, 32 rows of up, and so on."""
    both = torch.stack([_pad_rows(gate), _pad_rows(up)])
    return both.view(2, -1, INTERLEAVE, gate.shape[1]).transpose(0, 1).reshape(-1, gate.shape[1])


def _deinterleave(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = both.view(-1, 2, INTERLEAVE, both.shape[1])
    return parts[:, 0].reshape(-1, both.shape[1]), parts[:, 1].reshape(-1, both.shape[1])


def _pad_rows(matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, padded(matrix.shape[0]) - matrix.shape[0]))


def _pack_matrix(matrix: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """[N, K] float -> uint8[matrix_bytes]."""
    rows, columns = matrix.shape
    matrix = torch.nn.functional.pad(matrix.detach(), (0, padded(columns) - columns, 0, padded(rows) - rows))
    if not bool(torch.isfinite(matrix.sum(dtype=torch.float64))):
        raise LayoutError(f"the {name} weights contain NaN or infinity; the checkpoint is damaged or was overflowed")
    scales = None
    if is_quantised(dtype):
        codes, scales = quantise(matrix.float(), dtype)
        words = _words_of_codes(codes, dtype)
    else:
        words = matrix.to(getattr(torch, dtype)).contiguous().view(torch.int32)
    return _blocks(words.view(torch.int32), scales, LINES[dtype]).view(torch.uint8).flatten()


def _blocks(words: torch.Tensor, scales: torch.Tensor | None, lines: int) -> torch.Tensor:
    """int32 words [N, K / 64 * lines] (and bfloat16 scales [N, K / 32]) -> int32 [N / 16, K / 64, words of a block]."""
    row_blocks = words.shape[0] // BLOCK_ROWS
    parts = [words.view(row_blocks, BLOCK_ROWS, -1, lines).permute(0, 2, 3, 1).flatten(2)]
    if scales is not None:
        grouped = scales.view(row_blocks, BLOCK_ROWS, -1, BLOCK_COLUMNS // GROUP).permute(0, 2, 3, 1)
        parts.append(grouped.flatten(2).contiguous().view(torch.int32))
    return torch.cat(parts, dim=2) if scales is not None else parts[0].contiguous()


def _words_of_codes(codes: torch.Tensor, dtype: str) -> torch.Tensor:
    """Unsigned codes uint8 [N, K] -> int32 words [N, K / 64 * lines]."""
    if dtype == "int8":
        return codes.view(torch.int32)
    halves = codes.view(codes.shape[0], -1, 2, GROUP // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).contiguous().view(codes.shape[0], -1).view(torch.int32)


def _unpack_matrix(data: torch.Tensor, rows: int, columns: int, dtype: str) -> torch.Tensor:
    """uint8[matrix_bytes] -> [rows, columns] (padded sizes), bfloat16 or float32."""
    lines = LINES[dtype]
    blocks = data.view(torch.int32).view(rows // BLOCK_ROWS, columns // BLOCK_COLUMNS, block_bytes(dtype) // 4)
    words = blocks[:, :, : lines * BLOCK_ROWS].reshape(*blocks.shape[:2], lines, BLOCK_ROWS)
    words = words.permute(0, 3, 1, 2).reshape(rows, -1).contiguous()
    if not is_quantised(dtype):
        return words.view(getattr(torch, dtype))
    tail = blocks[:, :, lines * BLOCK_ROWS :].contiguous().view(torch.bfloat16)
    scales = tail.view(*blocks.shape[:2], -1, BLOCK_ROWS).permute(0, 3, 1, 2).reshape(rows, -1)
    return dequantise(_codes_of_words(words, dtype), scales, dtype)


def _codes_of_words(words: torch.Tensor, dtype: str) -> torch.Tensor:
    raw = words.view(torch.uint8)
    if dtype == "int8":
        return raw
    grouped = raw.view(raw.shape[0], -1, GROUP // 2)
    return torch.cat([grouped & 15, grouped >> 4], dim=2).view(raw.shape[0], -1)


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
