"""bitsandbytes: nf4 and fp4 in blocks of the flat weight (their scales quantised once more or not), and LLM.int8."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hybrimoe.checkpoint.formats.codes import half_byte_values
from hybrimoe.checkpoint.formats.quantisation import Quantisation
from hybrimoe.checkpoint.formats.source import ROUNDED, DecodedSource, Parts
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError
from hybrimoe.text_files import parse_json

INT8_STEP = 7.874015718698502e-3  # 1 / 127 as the library writes it
ROW_FORMAT = 0  # of `weight_format`: rows as they are, the only one that the library still reads
NESTED = ("nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class BlockState:
    """What the library notes of a 4-bit weight: values of a block, the weight's shape, and of scales that are quantised
    themselves the values of a block and what is added to them."""

    block: int
    shape: tuple[int, ...]
    nested_block: int | None
    nested_offset: float

    @classmethod
    def of(cls, key: str, raw: torch.Tensor) -> BlockState:
        """raw: uint8, the note as JSON. Raises CheckpointError where it is damaged."""
        try:
            note: dict[str, Any] = parse_json(bytes(raw.tolist()))
            block, shape = int(note["blocksize"]), tuple(int(size) for size in note["shape"])
            nested = note.get("nested_blocksize")
            state = cls(block, shape, None if nested is None else int(nested), float(note.get("nested_offset", 0.0)))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{key}: the quant_state that bitsandbytes stored with it is damaged ({error}); fetch the file again"
            ) from error
        if block < 1 or min(shape, default=0) < 1 or (state.nested_block is not None and state.nested_block < 1):
            raise CheckpointError(f"{key}: its quant_state gives blocks of {block} and the shape {list(shape)}")
        return state


def four_bit_source(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    """nf4 or fp4. parts: "weight", "absmax", "quant_map", "nf4" or "fp4" (the note), and of quantised scales
    "nested_absmax" and "nested_quant_map". Raises CheckpointError for parts that do not go together."""
    kind = "nf4" if "nf4" in parts else "fp4"
    state = BlockState.of(key, parts[kind].read())
    n_values = math.prod(state.shape)
    n_blocks, nested = -(-n_values // state.block), state.nested_block is not None
    whole = parts["weight"].nbytes == -(-n_values // 2) and math.prod(parts["absmax"].shape) == n_blocks
    if not whole or nested != all(name in parts for name in NESTED) or math.prod(parts["quant_map"].shape) != 16:
        shapes = ", ".join(f"{part.key} {list(part.shape)}" for part in parts.values())
        raise CheckpointError(
            f"{key}: {shapes} are not {list(state.shape)} values in blocks of {state.block}; fetch the file again"
        )
    values = {name: part for name, part in parts.items() if name != kind}
    storage = Storage(f"bitsandbytes {kind}{' (double quantisation)' if nested else ''}", "int8", ROUNDED)
    return DecodedSource(key, state.shape, values, partial(decode_four_bit, state=state), storage)


def decode_four_bit(parts: Mapping[str, torch.Tensor], *, state: BlockState) -> torch.Tensor:
    """float32 of the weight's shape; the high half of a byte comes first."""
    n_values = math.prod(state.shape)
    packed, table = parts["weight"].flatten().view(torch.uint8), parts["quant_map"].flatten().float()
    values = half_byte_values(packed, table, high_first=True)[:n_values]
    scales = _scales(parts, state).repeat_interleave(state.block)[:n_values]
    return (values * scales).reshape(state.shape)


def _scales(parts: Mapping[str, torch.Tensor], state: BlockState) -> torch.Tensor:
    """float32 [blocks]: the largest magnitude of each block."""
    absmax = parts["absmax"].flatten()
    if state.nested_block is None:
        return absmax.float()
    outer = parts["nested_absmax"].flatten().float().repeat_interleave(state.nested_block)[: absmax.numel()]
    return parts["nested_quant_map"].flatten().float()[absmax.long()] * outer + state.nested_offset


def int8_source(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    """LLM.int8. parts: "weight" int8 [N, K], "SCB" [N], and as the file has it "weight_format"."""
    weight, rows = parts["weight"], parts["SCB"]
    if weight.dtype != torch.int8 or len(weight.shape) != 2 or rows.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{key}: {weight.type_name}{list(weight.shape)} with SCB {list(rows.shape)}; expected int8 and one a row"
        )
    return DecodedSource(key, weight.shape, parts, partial(decode_int8, key=key), Storage("LLM.int8", "int8", ROUNDED))


def decode_int8(parts: Mapping[str, torch.Tensor], *, key: str) -> torch.Tensor:
    """float32 [N, K]. Raises CheckpointError for rows in another order."""
    layout = parts.get("weight_format")
    if layout is not None and int(layout) != ROW_FORMAT:
        raise CheckpointError(f"{key}: its weight_format is {int(layout)}; only rows as they are (0) are read")
    return parts["weight"].float() * parts["SCB"].float()[:, None] * INT8_STEP
