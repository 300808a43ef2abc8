"""Writes weights as the quantised formats lay them out, the slow and obvious way, and says which values they stand for.

Layouts: GPTQ (AutoGPTQ, GPTQModel), AWQ's gemm (llm-awq, AutoAWQ), compressed-tensors, ModelOpt's NVFP4, bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
BNB_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output feature at each place of a word


@dataclass(frozen=True)
class Written:
    """A layer: its tensors by the ends of their names (after the layer's path), and the weight float32 [N, K]."""

    tensors: dict[str, torch.Tensor]
    values: torch.Tensor


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [R, n] as int32 [R, words]: each row one long number, the first code in its lowest bits."""
    n_words, rows = -(-codes.shape[1] * bits // 32), []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * n_words, "little"), np.int32))
    return torch.from_numpy(np.stack(rows))


def whole(weight: torch.Tensor, low: int, high: int, group: int, *, symmetric: bool, dtype: torch.dtype) -> Any:
    """(codes, zeros, scales) of groups of columns: values are (codes - zeros) x scales; codes [N, K] low to high."""
    grouped = weight.unflatten(1, (-1, group))
    if symmetric:
        scales = grouped.abs().amax(2) / ((high - low) / 2)
        zeros = torch.full_like(scales, (low + high + 1) // 2)
    else:
        scales = (grouped.amax(2) - grouped.amin(2)) / (high - low)
        zeros = (low - grouped.amin(2) / scales).round().clamp(low, high)
    scales = scales.to(dtype)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(low, high)
    values = (codes - zeros[..., None]) * scales.float()[..., None]
    return codes.flatten(1).int(), zeros.int(), scales, values.flatten(1)


def gptq(
    weight: torch.Tensor, *, bits: int, group: int = 32, symmetric: bool = True, act_order: bool = False, shift: int = 1
) -> Written:
    """shift: what the file's zero points are less than the true ones. act_order: groups of columns far apart."""
    columns = weight.shape[1]
    group = columns if group < 0 else group
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if act_order else torch.arange(columns)
    codes, zeros, scales, values = whole(
        weight[:, order], 0, 2**bits - 1, group, symmetric=symmetric, dtype=torch.float16
    )
    back = order.argsort()
    tensors = {
        ".qweight": words(codes[:, back], bits).T.contiguous(),
        ".qzeros": words(((zeros - shift) % 2**bits).T, bits),
        ".scales": scales.T.contiguous(),
        ".g_idx": (torch.arange(columns) // group)[back].int(),
    }
    return Written(tensors, values[:, back])


def awq(weight: torch.Tensor, *, group: int = 32) -> Written:
    codes, zeros, scales, values = whole(weight, 0, 15, group, symmetric=False, dtype=torch.float16)

    def packed(numbers: torch.Tensor) -> torch.Tensor:
        return words(numbers.unflatten(1, (-1, 8))[..., list(AWQ_PLACES)].flatten(1), 4)

    tensors = {".qweight": packed(codes.T), ".qzeros": packed(zeros.T), ".scales": scales.T.contiguous()}
    return Written(tensors, values)


def pack_quantized(
    weight: torch.Tensor, *, bits: int, group: int = 32, symmetric: bool = True, act_order: bool = False
) -> Written:
    rows, columns = weight.shape
    half, group = 2 ** (bits - 1), columns if group < 0 else group
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if act_order else torch.arange(columns)
    codes, zeros, scales, values = whole(
        weight[:, order], -half, half - 1, group, symmetric=symmetric, dtype=torch.bfloat16
    )
    back = order.argsort()
    tensors = {
        ".weight_packed": words(codes[:, back] + half, bits),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = words((zeros + half).T, bits).T.contiguous()
    if act_order:
        tensors[".weight_g_idx"] = (torch.arange(columns) // group)[back].int()
    return Written(tensors, values[:, back])


def int_quantized(weight: torch.Tensor, *, symmetric: bool = True) -> Written:
    codes, zeros, scales, values = whole(weight, -128, 127, weight.shape[1], symmetric=symmetric, dtype=torch.float32)
    tensors = {".weight": codes.to(torch.int8), ".weight_scale": scales}
    return Written(tensors if symmetric else tensors | {".weight_zero_point": zeros.to(torch.int8)}, values)


def float_quantized(weight: torch.Tensor, *, group: int = -1) -> Written:
    grouped = weight.unflatten(1, (-1, weight.shape[1] if group < 0 else group))
    scales = (grouped.abs().amax(2) / 448).to(torch.bfloat16)
    codes = (grouped / scales.float()[..., None]).to(torch.float8_e4m3fn)
    values = codes.float() * scales.float()[..., None]
    return Written({".weight": codes.flatten(1), ".weight_scale": scales}, values.flatten(1))


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - table).abs().argmin(-1)


def _fp4(weight: torch.Tensor, group: int, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [N, K / 2], low half first; float32 values before scales [N, K / group, group])."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    codes = _nearest(weight.unflatten(1, (-1, group)) / scales[..., None], table)
    flat = codes.flatten(1).to(torch.uint8)
    return flat[:, 0::2] | flat[:, 1::2] << 4, table[codes]


def nvfp4(weight: torch.Tensor, *, modelopt: bool = False) -> Written:
    """A float8 scale per 16 columns and a global one, which divides, or (ModelOpt) multiplies."""
    largest = weight.unflatten(1, (-1, 16)).abs().amax(2) / 6
    outer = 448 / largest.max()
    if modelopt:
        outer = 1 / outer
    scales = (largest / outer if modelopt else largest * outer).to(torch.float8_e4m3fn)
    true = scales.float() * outer if modelopt else scales.float() / outer
    packed, values = _fp4(weight, 16, true)
    names = (".weight", ".weight_scale_2") if modelopt else (".weight_packed", ".weight_global_scale")
    tensors = {names[0]: packed, ".weight_scale": scales, names[1]: outer if modelopt else outer.reshape(1)}
    return Written(tensors, (values * true[..., None]).flatten(1))


def mxfp4(weight: torch.Tensor) -> Written:
    exponents = (weight.unflatten(1, (-1, 32)).abs().amax(2) / 6).log2().ceil()
    packed, values = _fp4(weight, 32, torch.exp2(exponents))
    tensors = {".weight_packed": packed, ".weight_scale": (exponents + 127).to(torch.uint8)}
    return Written(tensors, (values * torch.exp2(exponents)[..., None]).flatten(1))


def bitsandbytes(weight: torch.Tensor, *, kind: str = "nf4", nested: bool = False, block: int = 64) -> Written:
    table = torch.tensor(NF4 if kind == "nf4" else [*BNB_FP4, *(-value for value in BNB_FP4)])
    blocks = weight.flatten().unflatten(0, (-1, block))
    absmax = blocks.abs().amax(1)
    note: dict[str, Any] = {
        "quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(weight.shape)
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    if nested:
        code, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        outer = (absmax - offset).unflatten(0, (-1, min(256, len(absmax)))).abs().amax(1)
        wide = outer.repeat_interleave(min(256, len(absmax)))
        inner = _nearest((absmax - offset) / wide, code).to(torch.uint8)
        absmax = code[inner.long()] * wide + offset
        note |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors = {".weight.nested_absmax": outer, ".weight.nested_quant_map": code}
    codes = _nearest(blocks / absmax[:, None], table)
    flat = codes.flatten().to(torch.uint8)
    stored = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    tensors |= {
        ".weight": (flat[0::2] << 4 | flat[1::2])[:, None],
        ".weight.absmax": inner if nested else absmax,
        ".weight.quant_map": table,
        f".weight.quant_state.bitsandbytes__{kind}": stored,
    }
    return Written(tensors, (table[codes] * absmax[:, None]).reshape(weight.shape))


def llm_int8(weight: torch.Tensor) -> Written:
    rows = weight.abs().amax(1)
    codes = (weight * 127 / rows[:, None]).round().to(torch.int8)
    tensors = {".weight": codes, ".SCB": rows, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Written(tensors, codes.float() * rows[:, None] * 7.874015718698502e-3)


def compressed(name: str, bits: int, kind: str = "int", **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head", "re:.*gate"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A format: how a weight is written, what config.json says, and which records suit its experts."""

    write: Callable[[torch.Tensor], Written]
    config: dict[str, Any]
    suits: str
    name: str


def _gptq(name: str, suits: str, *, layout: str | None = None, **options: Any) -> Case:
    config = {
        "quant_method": "gptq", "bits": options["bits"], "group_size": options.get("group", 32),
        "desc_act": options.get("act_order", False), "sym": options.get("symmetric", True),
    }  # fmt: skip
    return Case(
        partial(gptq, **options), config | ({} if layout is None else {"checkpoint_format": layout}), suits, name
    )


def _packed(name: str, suits: str, **options: Any) -> Case:
    strategy = {"strategy": "channel"} if options.get("group") == -1 else {"strategy": "group", "group_size": 32}
    config = compressed("pack-quantized", options["bits"], symmetric=options.get("symmetric", True), **strategy)
    return Case(partial(pack_quantized, **options), config, suits, name)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES: dict[str, Case] = {
    "gptq-4": _gptq("GPTQ int4, groups of 32, symmetric", "int4", bits=4),
    "gptq-4-wide": _gptq("GPTQ int4, groups of 64, symmetric", "int4", bits=4, group=64),
    "gptq-4-zeros": _gptq("GPTQ int4, groups of 32, zero points", "int8", bits=4, symmetric=False),
    "gptq-4-act-order": _gptq("GPTQ int4, groups of 32, symmetric, act-order", "int8", bits=4, act_order=True),
    "gptq-4-v2": _gptq(
        "GPTQ int4, groups of 32, zero points", "int8", bits=4, symmetric=False, shift=0, layout="gptq_v2"
    ),
    "gptq-3": _gptq("GPTQ int3, groups of 32, symmetric", "int3", bits=3, layout="gptq"),
    "gptq-2": _gptq("GPTQ int2, groups of 32, symmetric", "int2", bits=2),
    "gptq-8-row": _gptq("GPTQ int8, a scale a row, symmetric", "int8", bits=8, group=-1),
    "awq": Case(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, "int8",
        "AWQ int4, groups of 32, zero points",
    ),
    "packed-4": _packed("compressed-tensors int4, groups of 32, symmetric", "int4", bits=4),
    "packed-4-row": _packed("compressed-tensors int4, a scale a row, symmetric", "int4", bits=4, group=-1),
    "packed-4-zeros": _packed("compressed-tensors int4, groups of 32, zero points", "int8", bits=4, symmetric=False),
    "packed-4-act-order": _packed(
        "compressed-tensors int4, groups of 32, symmetric, act-order", "int8", bits=4, act_order=True
    ),
    "packed-2": _packed("compressed-tensors int2, groups of 32, symmetric", "int2", bits=2),
    "packed-3": _packed("compressed-tensors int3, groups of 64, symmetric", "int3", bits=3, group=64),
    "packed-5-row": _packed("compressed-tensors int5, a scale a row, symmetric", "int5", bits=5, group=-1),
    "packed-6": _packed("compressed-tensors int6, groups of 32, symmetric", "int6", bits=6),
    "packed-6-narrow": _packed("compressed-tensors int6, groups of 16, symmetric", "int8", bits=6, group=16),
    "packed-7": _packed("compressed-tensors int7, groups of 32, symmetric", "int8", bits=7),
    "packed-8-row": _packed("compressed-tensors int8, a scale a row, symmetric", "int8", bits=8, group=-1),
    "int8": Case(
        int_quantized, compressed("int-quantized", 8, strategy="channel"), "int8",
        "compressed-tensors int8, a scale a row, symmetric",
    ),
    "int8-zeros": Case(
        partial(int_quantized, symmetric=False), compressed("int-quantized", 8, strategy="channel", symmetric=False),
        "int8", "compressed-tensors int8, a scale a row, zero points",
    ),
    "float8": Case(
        float_quantized, compressed("float-quantized", 8, "float", strategy="channel"), "int8", "fp8 (e4m3)"
    ),
    "float8-groups": Case(
        partial(float_quantized, group=32),
        compressed("float-quantized", 8, "float", strategy="group", group_size=32), "int8", "fp8 (e4m3)",
    ),
    "nvfp4": Case(nvfp4, compressed("nvfp4-pack-quantized", 4, "float", group_size=16), "int8", "NVFP4"),
    "mxfp4": Case(mxfp4, compressed("mxfp4-pack-quantized", 4, "float", group_size=32), "int8", "MXFP4"),
    "nvfp4-modelopt": Case(
        partial(nvfp4, modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "int8", "NVFP4"
    ),
    "nf4": Case(bitsandbytes, BNB, "int8", "bitsandbytes nf4"),
    "nf4-double": Case(partial(bitsandbytes, nested=True), BNB, "int8", "bitsandbytes nf4 (double quantisation)"),
    "fp4": Case(partial(bitsandbytes, kind="fp4"), BNB, "int8", "bitsandbytes fp4"),
    "llm-int8": Case(llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", "LLM.int8"),
}  # fmt: skip
