"""The types of tensors in GGUF files: how many values a block has, and in how many bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorType:
    """One type: its name and number in llama.cpp, values and bytes of a block.

    dtype: torch's name for the values where they stand as they are, without blocks.
    """

    name: str
    code: int
    block_values: int
    block_bytes: int
    dtype: str | None = None

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose last dimension is a whole number of blocks."""
        return math.prod(shape) // self.block_values * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits that a value takes, its share of scales included."""
        return 8 * self.block_bytes / self.block_values


TYPES: dict[int, TensorType] = {
    kind.code: kind
    for kind in (
        TensorType("F32", 0, 1, 4, "float32"),
        TensorType("F16", 1, 1, 2, "float16"),
        TensorType("BF16", 30, 1, 2, "bfloat16"),
        TensorType("I32", 26, 1, 4, "int32"),
        TensorType("Q4_0", 2, 32, 18),
        TensorType("Q4_1", 3, 32, 20),
        TensorType("Q5_0", 6, 32, 22),
        TensorType("Q5_1", 7, 32, 24),
        TensorType("Q8_0", 8, 32, 34),
        TensorType("Q2_K", 10, 256, 84),
        TensorType("Q3_K", 11, 256, 110),
        TensorType("Q4_K", 12, 256, 144),
        TensorType("Q5_K", 13, 256, 176),
        TensorType("Q6_K", 14, 256, 210),
        TensorType("IQ2_XXS", 16, 256, 66),
        TensorType("IQ2_XS", 17, 256, 74),
        TensorType("IQ3_XXS", 18, 256, 98),
        TensorType("IQ1_S", 19, 256, 50),
        TensorType("IQ4_NL", 20, 32, 18),
        TensorType("IQ3_S", 21, 256, 110),
        TensorType("IQ2_S", 22, 256, 82),
        TensorType("IQ4_XS", 23, 256, 136),
        TensorType("IQ1_M", 29, 256, 56),
        TensorType("TQ1_0", 34, 256, 54),
        TensorType("TQ2_0", 35, 256, 66),
        TensorType("MXFP4", 39, 32, 17),
    )
}
"""By their numbers in a file."""
