# ruff: noqa: ANN001, ANN201 - what Triton compiles has no Python types
# mypy: ignore-errors
"""A layer's output from its experts' rows, by one launch: those of the device and those that the host has sent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_kernels.triton.launch import COMPILED_WITH

BLOCK_COLUMNS = 512
"""Of a token's output, which one program adds up."""
WARPS = 4


@triton.jit
def combine_kernel(
    rows_ptr, host_rows_ptr, source_ptr, out_ptr, n_columns,
    TOP_K: tl.constexpr, HAS_HOST_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Arguments as in `combine`."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(TOP_K):
        row = token * TOP_K + j
        if HAS_HOST_ROWS:
            source = tl.load(source_ptr + row)
            here = tl.load(rows_ptr + row.to(tl.int64) * n_columns + columns, mask=inside & (source < 0), other=0.0)
            sent = source.to(tl.int64) * n_columns + columns
            total += here + tl.load(host_rows_ptr + sent, mask=inside & (source >= 0), other=0.0)
        else:
            total += tl.load(rows_ptr + row.to(tl.int64) * n_columns + columns, mask=inside, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * n_columns + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    rows: torch.Tensor, host_rows: torch.Tensor | None, source: torch.Tensor | None, top_k: int, dtype: torch.dtype
) -> torch.Tensor:
    """[T, H] in `dtype`: each token's rows added in float32, in top-k order.

    rows float32 [T * top_k, H]; host_rows float32 [n, H], of which row source[r] stands in the place of row r, where
    source, int32 [T * top_k], is not negative. Both may be page-locked memory of the host, which the device then reads
    over the link. None for both: all are in `rows`.
    """
    n_rows, n_columns = rows.shape
    out = torch.empty((n_rows // top_k, n_columns), dtype=dtype, device=rows.device)
    grid = n_rows // top_k, triton.cdiv(n_columns, BLOCK_COLUMNS)
    given = rows if host_rows is None else host_rows, rows if source is None else source
    combine_kernel[grid](
        rows, *given, out, n_columns, TOP_K=top_k, HAS_HOST_ROWS=source is not None, BLOCK=BLOCK_COLUMNS,
        num_warps=WARPS, **COMPILED_WITH,
    )  # fmt: skip
    return out
