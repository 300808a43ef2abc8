"""Run by test_combine.py with TRITON_INTERPRET=1: the kernel that adds up rows against torch, bit for bit."""

from __future__ import annotations

import sys

import torch
from interpreting import mend_the_interpreter

from gpu_kernels.triton.combine import BLOCK_COLUMNS, combine


def check(n_tokens: int, top_k: int, n_columns: int, n_sent: int, dtype: torch.dtype) -> None:
    """`n_sent` of the rows come from the host; what lies in their place on the device must not be read."""
    generator = torch.Generator().manual_seed(0)
    n_rows = n_tokens * top_k
    every = torch.randn(n_rows, n_columns, generator=generator)
    rows, host_rows, source = every.clone(), None, None
    if n_sent:
        chosen = torch.randperm(n_rows, generator=generator)[:n_sent]
        host_rows, source = every[chosen], torch.full((n_rows,), -1, dtype=torch.int32)
        source[chosen] = torch.arange(n_sent, dtype=torch.int32)
        rows[chosen] = float("nan")
    expected = torch.zeros(n_tokens, n_columns)
    for j in range(top_k):
        expected += every.view(n_tokens, top_k, -1)[:, j]
    found = combine(rows, host_rows, source, top_k, dtype)
    if not torch.equal(found, expected.to(dtype)):
        sys.exit(f"{n_tokens} tokens, top {top_k}, {n_columns} columns, {n_sent} sent, {dtype}: differs")
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    mend_the_interpreter()
    check(1, 8, 2 * BLOCK_COLUMNS, 5, torch.bfloat16)
    check(1, 8, BLOCK_COLUMNS, 8, torch.float32)
    check(3, 2, 80, 0, torch.float32)
    check(5, 1, BLOCK_COLUMNS + 7, 2, torch.bfloat16)
