"""Launches the fused kernels for a group of experts: gate, up and activation in one launch, down in another, or all in
one (`single`), for one token an expert, where a card was found to be faster so.

Two families, by the tokens of an expert: `few` reads each record once for 1 or 4 tokens, by integer or float sums in
registers; `many` takes tiles of 16, 64 or 128 tokens to tensor cores. A third, small kernel brings a call's input into
the form that both read: rounded to int8 for int8 and int4 experts, in two parts for bfloat16 on tensor cores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from cpu_kernels import ExpertDtype, ExpertSpec
from cpu_kernels.format.layout import BLOCK_COLUMNS, GROUP, LINE_BYTES, is_quantised
from gpu_kernels.triton import few, formats, many, single, tickets
from gpu_kernels.triton.cuts import BLOCK_TOKENS, FEW_TOKENS, Cut, Cuts, capability_of
from gpu_kernels.triton.cuts import candidates as cuts_for
from gpu_kernels.triton.launch import COMPILED_WITH

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
MAX_TOKENS = 64 << 15
"""Of one expert; so many programs of 64 tokens a grid has in its third dimension."""
LARGEST_TILE_COST = 1.3
"""Time of a program for 128 tokens beside that of one for 64 (H200, 64 experts: 607 us for 128 tokens, by two 951)."""
GROUPS = BLOCK_COLUMNS // GROUP
"""Of a block of 64 columns."""
UP_COLUMNS = 32
"""Columns of the intermediate that a program computes: a group of the rounding to int8."""
WORD_BYTES = 4
QUAD = 4
"""Words of 16 bytes: rows of activations begin on such, so that kernels may read as much at once."""


def blocks() -> tuple[int, ...]:
    """Each number of tokens that one program may take."""
    return BLOCK_TOKENS


def candidates(spec: ExpertSpec, block: int, device: torch.device) -> tuple[Cuts, ...]:
    """Cuts that may be the fastest for programs of `block` tokens, the default first."""
    return cuts_for(spec.dtype, block, capability_of(device))


def new_state(device: torch.device) -> torch.Tensor:
    """Counters int32 for kernels of one launch. Calls that get the same ones must follow each other, on one stream or
    with an event between them; each leaves them ready for the next."""
    return torch.zeros(tickets.STATE_WORDS, dtype=torch.int32, device=device)


def supports(spec: ExpertSpec) -> bool:
    """True for every activation in closed form, and the dtypes that have kernels (others are dequantised by torch)."""
    return spec.activation.kind in KINDS and spec.dtype in DTYPES


def block_tokens(n_tokens: list[int]) -> int:
    """Tokens that one program takes of a group whose experts have so many: for more than 64, what takes less time."""
    *smaller, large, largest = BLOCK_TOKENS
    if max(n_tokens) > large:
        tiles = sum(-(-n // large) for n in n_tokens)
        return largest if LARGEST_TILE_COST * sum(-(-n // largest) for n in n_tokens) < tiles else large
    return next((block for block in smaller if block >= max(n_tokens)), large)


def run_group(
    spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor,
    n_tokens: list[int], hidden: torch.Tensor, weights: torch.Tensor, top_k: int, out: torch.Tensor, *,
    cuts: Cuts | None = None, prepared: dict[ExpertSpec, torch.Tensor] | None = None, most: int | None = None,
    state: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Computes the rows of a group of experts.

    slots uint8 [n_slots, stride]; slot_ids int32 [n], negative: an expert that is left out; rows int64 [R]: the group's
    rows, expert by expert, with offsets int32 [n + 1] into them, which may pass over some; n_tokens: rows of each
    expert; hidden float32 [T, H]; weights float32 [T * top_k]; out float32 [T * top_k, H], of which exactly the rows of
    these experts are written, less those left out.
    cuts: of `candidates`, by default the first. prepared: where groups with the same `hidden` keep how the kernels for
    many tokens read it. most: rows that an expert may have, where `n_tokens` are only what is to be expected: so many
    programs are then launched, of which those behind an expert's last row end at once. state: of `new_state`; without
    it cuts for one launch are made several, with the same order of sums.
    """
    layout, device = spec.layout, hidden.device
    words = slots.view(torch.int32)
    block = block_tokens(n_tokens)
    cuts = cuts or candidates(spec, block, device)[0]
    if cuts.single and state is not None and _fits_one_launch(n_tokens, most):
        _run_single(spec, cuts, (slots, slot_ids, offsets, rows), len(n_tokens), hidden, weights, top_k, out, state)
        return
    shared = None if block <= FEW_TOKENS else prepared
    inner = _rows(spec, rows.numel(), layout.inter_padded, device)
    x = None if shared is None else shared.get(spec)
    if x is None:
        x = _activations(spec, block, hidden, cuts.overlap)
        if shared is not None:
            shared[spec] = x
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
    grid = len(n_tokens), -(-(most or max(n_tokens)) // block)
    up_kernel, up_options = up_variant(spec, block, cuts, on_nvidia(device))
    up_kernel[(layout.inter_padded // UP_COLUMNS, *grid)](*up, **up_options)
    down_kernel, down_options = down_variant(spec, block, cuts, on_nvidia(device))
    down_kernel[(layout.hidden_padded // cuts.down.rows, *grid)](*down, **down_options)


def up_variant(spec: ExpertSpec, block: int, cuts: Cuts, nvidia: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel of gate, up and activation for programs of `block` tokens, and what it is compiled for."""
    starts_early = cuts.overlap and needs_preparation(spec, block)  # else what comes before it is another's
    options = _common(spec, block, cuts.up, starts_early)
    options |= {"KIND": KINDS[spec.activation.kind], "GATED": spec.activation.gated}
    if block > FEW_TOKENS:
        return many.up_tile_kernel, options
    return few.up_kernel, options | {"UNITS": cuts.up.units, "OVERLAP": cuts.overlap, "NVIDIA": nvidia}


def down_variant(spec: ExpertSpec, block: int, cuts: Cuts, nvidia: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel of down for programs of `block` tokens, and what it is compiled for."""
    options = _common(spec, block, cuts.down, cuts.overlap) | {"ROWS": cuts.down.rows}
    if block > FEW_TOKENS:
        return many.down_tile_kernel, options
    return few.down_kernel, options | {"UNITS": cuts.down.units, "OVERLAP": cuts.overlap, "NVIDIA": nvidia}


def single_variant(spec: ExpertSpec, cuts: Cuts, nvidia: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel of one launch for one token an expert, and what it is compiled for."""
    options = _common(spec, 1, cuts.up, starts_early=False) | {"UNITS": cuts.up.units, "ROWS": cuts.down.rows}
    options |= {"DOWN_UNITS": cuts.down.units, "KIND": KINDS[spec.activation.kind], "GATED": spec.activation.gated}
    del options["TOKENS"]
    return single.single_kernel, options | {"NVIDIA": nvidia}


def _fits_one_launch(n_tokens: list[int], most: int | None) -> bool:
    """Whether each expert has a row at most, and a counter."""
    return max(n_tokens) == 1 and (most or 1) == 1 and len(n_tokens) <= tickets.MAX_PAIRS.value


def _run_single(
    spec: ExpertSpec, cuts: Cuts, group: tuple[torch.Tensor, ...], n_pairs: int, hidden: torch.Tensor,
    weights: torch.Tensor, top_k: int, out: torch.Tensor, state: torch.Tensor,
) -> None:  # fmt: skip
    """`run_group` in one launch. group: slots, slot ids, offsets and rows."""
    slots, *places = group
    layout, words, given = spec.layout, slots.view(torch.int32), _aligned(spec, hidden)
    n_units, n_parts = layout.inter_padded // UP_COLUMNS, layout.hidden_padded // cuts.down.rows
    quantised = is_quantised(spec.dtype)
    codes = _rows(spec, n_pairs * n_units, layout.hidden_padded, hidden.device) if quantised else given
    inner = _rows(spec, places[-1].numel(), layout.inter_padded, hidden.device)
    kernel, options = single_variant(spec, cuts, on_nvidia(hidden.device))
    kernel[(n_pairs * (n_units + n_parts),)](
        words, words.stride(0) * WORD_BYTES // LINE_BYTES, *places, given, codes, inner, weights, out, state,
        *(rows.stride(0) // QUAD for rows in (given, codes, inner)), spec.hidden, spec.inter,
        layout.hidden_padded // BLOCK_COLUMNS, layout.inter_padded // BLOCK_COLUMNS, top_k, n_pairs,
        layout.gate_bias_offset // WORD_BYTES, layout.up_bias_offset // WORD_BYTES, layout.down_offset // LINE_BYTES,
        layout.down_bias_offset // WORD_BYTES, *_limits(spec), **options,
    )  # fmt: skip


def _common(spec: ExpertSpec, block: int, cut: Cut, starts_early: bool) -> dict[str, Any]:
    options = {"TOKENS": block, "DTYPE": DTYPES[spec.dtype], "HAS_BIAS": spec.has_bias, "num_warps": cut.warps}
    options |= COMPILED_WITH
    return options | ({"launch_pdl": True} if starts_early else {})


def needs_preparation(spec: ExpertSpec, block: int) -> bool:
    """Whether programs of `block` tokens read activations in another form than float32."""
    return is_quantised(spec.dtype) or (spec.dtype == "bfloat16" and block > FEW_TOKENS)


def on_nvidia(device: torch.device) -> bool:
    """Whether the kernels may use NVIDIA's instructions, such as that for products of four bytes; elsewhere (and in
    Triton's interpreter) plain arithmetic gives the same integers."""
    return device.type == "cuda" and torch.version.hip is None


def _activations(spec: ExpertSpec, block: int, hidden: torch.Tensor, overlap: bool) -> torch.Tensor:
    """The input as the kernels read it."""
    layout, quantised = spec.layout, is_quantised(spec.dtype)
    if not needs_preparation(spec, block):
        return _aligned(spec, hidden)
    x = _rows(spec, len(hidden), layout.hidden_padded, hidden.device)
    n_blocks = layout.hidden_padded // BLOCK_COLUMNS
    formats.prepare_kernel[(len(hidden), -(-n_blocks * GROUPS // formats.PREPARED_GROUPS))](
        hidden, x, spec.hidden, n_blocks, x.stride(0) // QUAD,
        QUANTISED=quantised, GROUPS=formats.PREPARED_GROUPS, OVERLAP=overlap, num_warps=4, **COMPILED_WITH,
    )  # fmt: skip
    return x


def _aligned(spec: ExpertSpec, hidden: torch.Tensor) -> torch.Tensor:
    """The input with rows that begin at multiples of 16 bytes, zeros behind their last column."""
    if spec.hidden % QUAD or hidden.data_ptr() % (QUAD * WORD_BYTES):
        hidden = functional.pad(hidden, (0, -spec.hidden % QUAD + QUAD))  # a copy in any case
    return hidden


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
