"""Launches the fused kernels for a group of experts: gate, up and activation in one launch, down in another.

Two families, by the tokens of an expert: `few` reads each record once for 1 or 4 tokens, by integer or float sums in
registers; `many` takes tiles of 16 or 64 tokens to tensor cores. A third, small kernel brings a call's input into the
form that both read: rounded to int8 for int8 and int4 experts, in two parts for bfloat16 on tensor cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from cpu_kernels import ExpertDtype, ExpertSpec
from cpu_kernels.format.layout import BLOCK_COLUMNS, GROUP, LINE_BYTES, is_quantised
from gpu_kernels.triton import few, formats, many

DTYPES: dict[ExpertDtype, int] = {
    "int4": formats.INT4,
    "int8": formats.INT8,
    "bfloat16": formats.BFLOAT16,
    "float32": formats.FLOAT32,
}
KINDS = {
    "silu": formats.SILU,
    "gelu": formats.GELU,
    "gelu_tanh": formats.GELU_TANH,
    "relu": formats.RELU,
    "relu2": formats.RELU2,
    "sigmoid": formats.SIGMOID,
    "identity": formats.IDENTITY,
}
BLOCK_TOKENS = (1, 4, 16, 64)
"""Tokens that one program takes: the kernels are compiled once for each, and more tokens take several programs."""
FEW_TOKENS = 4
"""Up to so many tokens, multiplying them one by one takes no longer than reading the record."""
MAX_TOKENS = BLOCK_TOKENS[-1] << 15
"""Of one expert; so many programs a grid has in its third dimension."""
GROUPS = BLOCK_COLUMNS // GROUP
"""Of a block of 64 columns."""
UP_COLUMNS = 32
"""Columns of the intermediate that a program computes: a group of the rounding to int8."""
WORD_BYTES = 4
QUAD = 4
"""Words of 16 bytes: rows of activations begin on such, so that kernels may read as much at once."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel for few tokens is cut: groups (int8, int4) or times 4 lines (floats) that a program takes at once,
    warps of a program, and, of down, rows."""

    units: int
    warps: int
    rows: int = 32


UP = {1: Tuning(32, 8), 4: Tuning(32, 8)}
DOWN = {1: Tuning(32, 4), 4: Tuning(32, 4)}
TILE_WARPS = 4
"""More would split the columns of a sum between them, and exchange it at each step."""
DOWN_TILE_ROWS = 64


def supports(spec: ExpertSpec) -> bool:
    """True for every activation in closed form."""
    return spec.activation.kind in KINDS


def block_tokens(n_tokens: list[int]) -> int:
    """Tokens that one program takes of a group whose experts have so many."""
    return next((block for block in BLOCK_TOKENS if block >= max(n_tokens)), BLOCK_TOKENS[-1])


def run_group(
    spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor,
    n_tokens: list[int], hidden: torch.Tensor, weights: torch.Tensor, top_k: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Computes the rows of a group of experts.

    slots uint8 [n_slots, stride]; slot_ids int32 [n], negative: an expert that is left out; rows int64 [R]: the group's
    rows, expert by expert, with offsets int32 [n + 1]; n_tokens: rows of each expert; hidden float32 [T, H]; weights
    float32 [T * top_k]; out float32 [T * top_k, H], of which exactly the given rows are written, less those left out.
    """
    layout = spec.layout
    words = slots.view(torch.int32)
    block = block_tokens(n_tokens)
    x, inner = _activations(spec, block, hidden, rows.numel())
    grid = len(n_tokens), -(-max(n_tokens) // block)
    group = words, words.stride(0) * WORD_BYTES // LINE_BYTES, slot_ids, offsets, rows
    up = [
        *group, x, inner, x.stride(0) // QUAD, inner.stride(0) // QUAD, spec.hidden, spec.inter,
        layout.hidden_padded // BLOCK_COLUMNS, layout.inter_padded // BLOCK_COLUMNS, top_k,
        layout.gate_bias_offset // WORD_BYTES, layout.up_bias_offset // WORD_BYTES, *_limits(spec),
    ]  # fmt: skip
    down = [
        *group, inner, weights, out, inner.stride(0) // QUAD, layout.inter_padded, spec.hidden,
        layout.inter_padded // BLOCK_COLUMNS, layout.down_offset // LINE_BYTES, layout.down_bias_offset // WORD_BYTES,
    ]  # fmt: skip
    up_kernel, up_options = up_variant(spec, block, has_dp4a(hidden.device))
    up_kernel[(layout.inter_padded // UP_COLUMNS, *grid)](*up, **up_options)
    down_kernel, down_options = down_variant(spec, block, has_dp4a(hidden.device))
    down_kernel[(layout.hidden_padded // down_options["ROWS"], *grid)](*down, **down_options)


def up_variant(spec: ExpertSpec, block: int, dp4a: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel of gate, up and activation for programs of `block` tokens, and what it is compiled for."""
    kind = {"KIND": KINDS[spec.activation.kind], "GATED": spec.activation.gated}
    if block > FEW_TOKENS:
        return many.up_tile_kernel, _common(spec, block) | kind | {"num_warps": TILE_WARPS}
    cut = UP[block]
    options = {"UNITS": cut.units, "DP4A": dp4a, "num_warps": cut.warps}
    return few.up_kernel, _common(spec, block) | kind | options


def down_variant(spec: ExpertSpec, block: int, dp4a: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel of down for programs of `block` tokens, and what it is compiled for."""
    if block > FEW_TOKENS:
        options = {"ROWS": DOWN_TILE_ROWS, "num_warps": TILE_WARPS}
        return many.down_tile_kernel, _common(spec, block) | options
    cut = DOWN[block]
    options = {"UNITS": cut.units, "ROWS": cut.rows, "DP4A": dp4a, "num_warps": cut.warps}
    return few.down_kernel, _common(spec, block) | options


def _common(spec: ExpertSpec, block: int) -> dict[str, Any]:
    return {"TOKENS": block, "DTYPE": DTYPES[spec.dtype], "HAS_BIAS": spec.has_bias}


def has_dp4a(device: torch.device) -> bool:
    """Whether the kernels may use NVIDIA's instruction for products of four bytes; elsewhere (and in Triton's
    interpreter) plain arithmetic gives the same integers."""
    return device.type == "cuda" and torch.version.hip is None


def _activations(spec: ExpertSpec, block: int, hidden: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The input as the kernels read it, and memory for the intermediate of n_rows rows."""
    layout, quantised = spec.layout, is_quantised(spec.dtype)
    inner = _rows(spec, n_rows, layout.inter_padded, hidden.device)
    if not quantised and (spec.dtype == "float32" or block <= FEW_TOKENS):
        if spec.hidden % QUAD or hidden.data_ptr() % (QUAD * WORD_BYTES):
            hidden = functional.pad(hidden, (0, -spec.hidden % QUAD + QUAD))  # a copy in any case
        return hidden, inner
    x = _rows(spec, len(hidden), layout.hidden_padded, hidden.device)
    n_blocks = layout.hidden_padded // BLOCK_COLUMNS
    formats.prepare_kernel[(len(hidden), -(-n_blocks * GROUPS // formats.PREPARED_GROUPS))](
        hidden, x, spec.hidden, n_blocks, x.stride(0) // QUAD,
        QUANTISED=quantised, GROUPS=formats.PREPARED_GROUPS, num_warps=4,
    )  # fmt: skip
    return x, inner


def _rows(spec: ExpertSpec, n_rows: int, n_columns: int, device: torch.device) -> torch.Tensor:
    """Memory for rows of activations of n_columns, a multiple of 64."""
    if not is_quantised(spec.dtype):
        return torch.empty((n_rows, n_columns), dtype=torch.float32, device=device)
    n_words = n_columns // WORD_BYTES + n_columns // GROUP
    return torch.empty((n_rows, -(-n_words // QUAD) * QUAD), dtype=torch.int32, device=device)


def _limits(spec: ExpertSpec) -> list[float]:
    """Alpha, limits and offset of the activation; limits that do not apply are infinite."""
    act = spec.activation
    limits = [math.inf if limit is None else limit for limit in (act.gate_max, act.act_max, act.up_limit)]
    return [act.alpha, *limits, act.up_offset]
