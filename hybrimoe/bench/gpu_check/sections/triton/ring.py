# ruff: noqa: ANN001, ANN202 - what Triton compiles has no Python types
"""A kernel that writes a word, to be seen by the host."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from gpu_kernels.triton.launch import COMPILED_WITH


@triton.jit(do_not_specialize=["value"])
def _ring_kernel(word_ptr, value):  # type: ignore[no-untyped-def]
    tl.store(word_ptr, value)


def ring(word: Any, value: int) -> None:
    """Writes `value` to `word`, int32 [1] in page-locked memory, on the current stream."""
    _ring_kernel[(1,)](word, value, **COMPILED_WITH)
