"""MoE-Infinity's expert activation matrices (arXiv 2401.14361), shared by its cache and its prefetch policy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand

EPSILON = 1e-8
"""Added to every probability, so that experts never seen still order by layer."""


class ActivationMatrices:
    """The running sequence's matrix float64[n_layers, n_experts] of token counts, and those of past sequences.

    At most ``capacity`` past matrices are kept; a full collection drops its oldest.
    """

    def __init__(self, n_layers: int, n_experts: int, capacity: int) -> None:
        self.current = np.zeros((n_layers, n_experts))
        self.past = np.zeros((0, n_layers, n_experts))
        self.capacity = capacity

    def begin_sequence(self) -> None:
        """Files the finished sequence's matrix (normalised by row) and starts an empty one."""
        if self.current.any():
            self.past = np.concatenate((self.past, _by_row(self.current)[None]))[-self.capacity :]
            self.current = np.zeros_like(self.current)

    def add(self, demand: Demand) -> None:
        """Counts a layer's tokens."""
        self.current[demand.layer, demand.expert_ids] += demand.n_tokens

    def nearest(self) -> npt.NDArray[np.float64] | None:
        """The past matrix with the highest mean cosine over the rows seen so far (ties: oldest), or None."""
        seen = self.current.any(axis=1)
        if not len(self.past) or not seen.any():
            return None
        now = _unit(self.current[seen])
        cosines = np.einsum("le,ple->pl", now, _unit(self.past[:, seen]))
        return np.asarray(self.past[int(cosines.mean(axis=1).argmax())], np.float64)


def _by_row(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(matrix / np.maximum(matrix.sum(axis=-1, keepdims=True), 1e-300), np.float64)


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-300), np.float64)
