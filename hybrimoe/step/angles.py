"""The angles of rotary embeddings: a table of those that depend on the position only, asked anew for the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybrimoe.step.reading.attention import angles_at
from hybrimoe.step.trace import Call

BLOCK_POSITIONS = 1024
"""Positions by which a table grows."""
CHANGING = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose angles depend on the longest position of a call as well."""


@dataclass(slots=True)
class Angles:
    """cos and sin of one rotary module. `doubled`: it gives each value twice."""

    source: Call
    doubled: bool
    _cos: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _sin: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    changes: bool = False
    """Whether the angles of a position depend on the others of its call."""

    def __post_init__(self) -> None:
        kinds: Any = getattr(self.source.module, "rope_type", "default")
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        self.changes = any(str(name) in CHANGING for name in names)

    def write(self, positions: list[int], cos: np.ndarray, sin: np.ndarray) -> None:
        """Fills the first rows of cos and sin float32 [MAX_ROWS, angles] with those of the positions."""
        if self.changes:
            rows = angles_at(self.source, torch.tensor([positions]), self.doubled)
            cos[: len(positions)], sin[: len(positions)] = rows
            return
        last = max(positions)
        if last >= len(self._cos):
            self._extend(last)
        for row, position in enumerate(positions):
            cos[row], sin[row] = self._cos[position], self._sin[position]

    def _extend(self, last: int) -> None:
        first, stop = len(self._cos), (last // BLOCK_POSITIONS + 1) * BLOCK_POSITIONS
        cos, sin = angles_at(self.source, torch.arange(first, stop)[None], self.doubled)
        known = (self._cos, self._sin) if first else (cos[:0], sin[:0])
        self._cos, self._sin = np.concatenate([known[0], cos]), np.concatenate([known[1], sin])
