"""Launches the fused kernels for a group of experts: one launch for gate, up and activation, one for down."""

from __future__ import annotations

import math

import torch

from cpu_kernels import ExpertSpec
from cpu_kernels.format.layout import BLOCK_COLUMNS, BLOCK_ROWS, LINES
from gpu_kernels.triton import kernels

DTYPES = {
    "int4": kernels.INT4,
    "int8": kernels.INT8,
    "bfloat16": kernels.BFLOAT16,
    "float32": kernels.FLOAT32,
}
KINDS = {
    "silu": kernels.SILU,
    "gelu": kernels.GELU,
    "gelu_tanh": kernels.GELU_TANH,
    "relu": kernels.RELU,
    "relu2": kernels.RELU2,
    "sigmoid": kernels.SIGMOID,
    "identity": kernels.IDENTITY,
}
MAX_TOKENS = 16
"""Tokens of one expert up to which reading its record takes longer than the arithmetic."""
MAX_BLOCK_TOKENS = 8
"""Tokens that one program takes. From 16 on Triton makes the sum over columns a product on tensor cores, in TF32: with
its 10 bits the results would not be those of float32."""
WORD_BYTES = 4


def supports(spec: ExpertSpec) -> bool:
    """True for every activation in closed form."""
    return spec.activation.kind in KINDS


def block_tokens(n_tokens: list[int]) -> int:
    """Tokens that one program takes of a group whose experts have so many: a power of two."""
    return 1 << (min(max(n_tokens), MAX_BLOCK_TOKENS) - 1).bit_length()


def run_group(
    spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor,
    n_tokens: list[int], hidden: torch.Tensor, weights: torch.Tensor, top_k: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Computes the rows of a group of experts.

    slots uint8 [n_slots, stride]; slot_ids int32 [n]; rows int64 [R]: the group's rows, expert by expert, with offsets
    int32 [n + 1]; n_tokens: rows of each expert; hidden float32 [T, H]; weights float32 [T * top_k]; out float32
    [T * top_k, H], of which exactly the given rows are written.
    """
    layout, act = spec.layout, spec.activation
    words = slots.view(torch.int32)
    block_m = block_tokens(n_tokens)
    tiles = -(-max(n_tokens) // block_m)
    inner = torch.empty((rows.numel(), spec.inter), dtype=torch.float32, device=hidden.device)
    common = {"BLOCK_M": block_m, "LINES": LINES[spec.dtype], "DTYPE": DTYPES[spec.dtype], "HAS_BIAS": spec.has_bias}
    kernels.up_kernel[(layout.inter_padded // BLOCK_ROWS, len(n_tokens), tiles)](
        words, words.stride(0), slot_ids, offsets, rows, hidden, inner,
        spec.hidden, spec.inter, layout.hidden_padded // BLOCK_COLUMNS, top_k,
        layout.gate_bias_offset // WORD_BYTES, layout.up_bias_offset // WORD_BYTES,
        act.alpha, _or_infinite(act.gate_max), _or_infinite(act.act_max), _or_infinite(act.up_limit), act.up_offset,
        KIND=KINDS[act.kind], GATED=act.gated, **common,
    )  # fmt: skip
    kernels.down_kernel[(layout.hidden_padded // BLOCK_ROWS, len(n_tokens), tiles)](
        words, words.stride(0), slot_ids, offsets, rows, inner, weights, out,
        spec.hidden, spec.inter, layout.inter_padded // BLOCK_COLUMNS,
        layout.down_offset // WORD_BYTES, layout.down_bias_offset // WORD_BYTES,
        **common,
    )  # fmt: skip


def _or_infinite(limit: float | None) -> float:
    return math.inf if limit is None else limit
