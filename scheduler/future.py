"""Recorded routing as the oracles see it (``belady``, ``perfect``): for tests, bounds and ablation only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from scheduler.errors import DemandError

NEVER = np.int32(2**30)
"""Step index of an expert that is not used again."""


class Future:
    """``next_use`` int32[n_steps + 1, n_layers, n_experts]: first step >= the row at which the expert is active.

    Built from one array [n_tokens, n_layers, top_k] of expert ids (-1 absent) a step, in planner order.
    """

    def __init__(self, steps: Iterable[npt.NDArray[np.integer]], n_layers: int, n_experts: int) -> None:
        rows: Sequence[npt.NDArray[np.integer]] = [np.asarray(step) for step in steps]
        self.n_layers, self.n_experts = n_layers, n_experts
        self.next_use = np.full((len(rows) + 1, n_layers, n_experts), NEVER, np.int32)
        self.n_tokens = np.zeros((len(rows), n_layers, n_experts), np.int32)
        for i, row in enumerate(rows):
            self._count(i, row)
        for i in range(len(rows) - 1, -1, -1):
            self.next_use[i] = np.where(self.n_tokens[i] > 0, i, self.next_use[i + 1])

    def layers(self, first: int, n_layers: int) -> Future:
        """The same steps as seen by a model of these layers only."""
        part = Future.__new__(Future)
        part.n_layers, part.n_experts = n_layers, self.n_experts
        part.next_use = self.next_use[:, first : first + n_layers]
        part.n_tokens = self.n_tokens[:, first : first + n_layers]
        return part

    def _count(self, step: int, ids: npt.NDArray[np.integer]) -> None:
        if ids.ndim != 3 or ids.shape[1] != self.n_layers:
            raise DemandError(f"future step {step}: expected [tokens, {self.n_layers}, top_k], found {ids.shape}")
        if ids.size and (int(ids.max()) >= self.n_experts or int(ids.min()) < -1):
            raise DemandError(f"future step {step}: expert ids must lie in -1..{self.n_experts - 1}")
        _, layers, _ = np.nonzero(ids >= 0)
        np.add.at(self.n_tokens[step], (layers, ids[ids >= 0].astype(np.int64)), 1)

    def __len__(self) -> int:
        return len(self.n_tokens)

    def active(self, step: int, layer: int) -> npt.NDArray[np.int64]:
        """Experts active at (step, layer), ascending; empty after the end."""
        if step >= len(self.n_tokens):
            return np.empty(0, np.int64)
        return np.flatnonzero(self.n_tokens[step, layer])

    def times(self, step: int, layer: int) -> npt.NDArray[np.float64]:
        """float64[n_layers, n_experts]: next use after (step, layer) in layers from the start of the sequence."""
        here = self.next_use[min(step, len(self.n_tokens))]
        after = self.next_use[min(step + 1, len(self.n_tokens))]
        steps = np.concatenate((after[: layer + 1], here[layer + 1 :])).astype(np.float64)
        return steps * self.n_layers + np.arange(self.n_layers)[:, None]
