"""What is measured by `bench kernels`: shapes of a layer, and what all contenders share for one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

Call = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A layer: sizes of an expert and experts per call."""

    name: str
    hidden: int
    inter: int
    k: int

    @property
    def weights(self) -> int:
        """Weights that a call reads."""
        return 3 * self.hidden * self.inter * self.k

    def flops(self, n_tokens: int) -> int:
        """Operations of a call in which each expert gets n_tokens."""
        return 2 * self.weights * n_tokens


SHAPES = (
    Shape("v2-lite", 2048, 1408, 6),
    Shape("qwen3-30b", 2048, 768, 8),
    Shape("mixtral", 4096, 14336, 2),
    Shape("qwen2-57b", 3584, 2560, 8),
)


class Setting:
    """What contenders share for a shape: one random expert, inputs, and the number of weight sets."""

    def __init__(self, shape: Shape, pool_bytes: int) -> None:
        self.shape = shape
        self.pool_bytes = pool_bytes
        generator = torch.Generator().manual_seed(0)
        size = (shape.inter, shape.hidden)
        self.gate, self.up = (torch.randn(size, generator=generator).mul_(0.02) for _ in range(2))
        self.down = torch.randn(shape.hidden, shape.inter, generator=generator).mul_(0.02)

    def n_sets(self, bits_per_weight: float) -> int:
        """Sets that together exceed the pool, two at least unless one alone is far larger than any cache."""
        set_bytes = self.shape.weights * bits_per_weight / 8
        return max(1 if set_bytes > 2 * self.pool_bytes else 2, -(-self.pool_bytes // int(set_bytes)))

    def x(self, n_tokens: int) -> torch.Tensor:
        """Inputs float32 [M, H] with values that are bfloat16, as those of a bfloat16 model."""
        x = torch.randn(n_tokens, self.shape.hidden, generator=torch.Generator().manual_seed(1))
        return x.bfloat16().float()

    def expected(self, x: torch.Tensor) -> np.ndarray:
        """Mean of the k (equal) experts in float32."""
        inner = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        result: np.ndarray = functional.linear(inner, self.down).numpy()
        return result
