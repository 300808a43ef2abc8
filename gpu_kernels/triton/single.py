# ruff: noqa: ANN001, ANN201 - what Triton compiles has no Python types
# mypy: ignore-errors
"""The kernels for one token an expert (`few`) in one launch: programs of down wait for those of up.

Three launches, each with first loads that nothing overlaps, take as long as small experts do. Here a program of up
rounds its input itself, and one of down has its first weights on their way while it waits. Which program does what, and
why waiting ends, `tickets` tells. Sums have the order of `few` with the same cut, so results have the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.triton.few import down_columns, token_row, up_columns
from gpu_kernels.triton.formats import ANY_CALL, record_of
from gpu_kernels.triton.tickets import counter_of, take_ticket, tell


@triton.jit(**ANY_CALL)
def single_kernel(
    slots_ptr, slot_lines, slot_ids_ptr, offsets_ptr, rows_ptr, given_ptr, codes_ptr, inner_ptr, weights_ptr, out_ptr,
    state_ptr, given_quads, x_quads, inner_quads, n_columns, n_rows, n_blocks, inner_blocks, top_k, n_pairs,
    gate_bias_word, up_bias_word, down_line, down_bias_word, alpha, gate_max, act_max, up_limit, up_offset,
    UNITS: tl.constexpr, DOWN_UNITS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """A pair is an expert with the one row that it has. Tickets: first 32 columns of the intermediate each, pair by
    pair (`up_columns`), then ROWS columns of the result each, pair by pair (`down_columns`).

    given_ptr float32 [T, given_quads * 4]: the input, of n_columns columns, zeros behind them. codes_ptr: of int8 and
    int4 experts, a row of activations for each program of up.
    """
    n_units, n_parts = 2 * inner_blocks, n_blocks * 64 // ROWS
    n_up = n_pairs * n_units
    ticket, counts_ptr = take_ticket(state_ptr, n_up + n_pairs * n_parts)
    is_up = ticket < n_up
    number = tl.where(is_up, ticket, ticket - n_up)
    each = tl.where(is_up, n_units, n_parts)
    pair = number // each
    place = number - pair * each
    record_ptr = record_of(slots_ptr, slot_lines, slot_ids_ptr, pair)
    at, end = tl.load(offsets_ptr + pair), tl.load(offsets_ptr + pair + 1)
    if (at < end) & (tl.load(slot_ids_ptr + pair) >= 0):
        if is_up:
            given = token_row(given_ptr, given_quads, rows_ptr, at, end, top_k)
            if DTYPE < 2:
                x = codes_ptr + ticket.to(tl.int64) * (x_quads * 4)
            else:
                x = given
            up_columns(
                record_ptr, place, at, end, x, x, x, x, inner_ptr, inner_quads, n_columns, n_rows, n_blocks,
                inner_blocks, gate_bias_word, up_bias_word, alpha, gate_max, act_max, up_limit, up_offset,
                given, given_quads, 1, UNITS, DTYPE, KIND, GATED, HAS_BIAS, 2 if DTYPE < 2 else 0, NVIDIA,
            )  # fmt: skip
            tell(counter_of(counts_ptr, pair))
        else:
            down_columns(
                record_ptr, place, at, end, inner_ptr, inner_quads, rows_ptr, weights_ptr, out_ptr,
                inner_blocks * 64, n_columns, inner_blocks, down_line, down_bias_word, counter_of(counts_ptr, pair),
                n_units, 1, DOWN_UNITS, ROWS, DTYPE, HAS_BIAS, 3, NVIDIA,
            )  # fmt: skip
