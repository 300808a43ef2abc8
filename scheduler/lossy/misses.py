"""Lossy policies of cache misses: ``skip`` leaves light ones out, ``substitute`` takes a resident expert instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.errors import PolicyError
from scheduler.lossy.base import (
    ABSENT,
    Floats,
    Ids,
    LossyPolicy,
    LossySetting,
    Rewritten,
    Routing,
    renormalised,
    router_order,
    shares,
)
from scheduler.lossy.replace import replaced
from scheduler.setting import choice, flag, number

SIMILARITIES = ("router", "coactivation")


class Skip(LossyPolicy):
    """Adaptive gating (AdapMoE, arXiv 2408.10284, section 4.2), for any top-k: a routed expert that is not resident is
    left out where a^2 * S_l <= threshold.

    a: its routing weight as a share of the token's sum; S_l: ``sensitivity`` of layer l (the source: the sum of the
    Fisher information's diagonal), one number a layer, 1 without; threshold: (1 / 2k)^2 if not given, half of an even
    share. The heaviest expert of a token is never skipped.
    ``misses_only`` False: resident ones, too. ``renormalise``: the others take over the weight.
    """

    name = "skip"

    def __init__(
        self, setting: LossySetting, threshold: float | None = None, sensitivity: Sequence[float] | None = None,
        misses_only: bool = True, renormalise: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(setting)
        self.threshold = None if threshold is None else number("skip", "threshold", threshold, 0.0, float("inf"))
        self.sensitivity = _per_layer(sensitivity, setting.n_layers)
        self.misses_only = flag("skip", "misses_only", misses_only)
        self.renormalise = flag("skip", "renormalise", renormalise)

    def rewrite(self, routing: Routing) -> Rewritten:
        ids, weights = routing.expert_ids, routing.weights
        threshold = (0.5 / ids.shape[1]) ** 2 if self.threshold is None else self.threshold
        light = shares(weights, ids) ** 2 * self.sensitivity[routing.layer] <= threshold
        skip = light & _movable(routing, self.misses_only)
        kept = np.where(skip, np.int32(ABSENT), ids)
        if self.renormalise and skip.any():
            weights = renormalised(weights, ids, weights, kept)
        return Rewritten(kept, weights, skipped=int(skip.sum()))


class Substitute(LossyPolicy):
    """A routed expert that is not resident is replaced by the resident one most like it (BuddyMoE, arXiv 2511.10054).

    Only where its share of the token's weight is at most ``max_share`` (1 / k, an even share, if not given); the
    heaviest expert of a token stays. The stand-in takes over the weight. Likeness of experts i and j: ``router``:
    cosine of their rows of the router's matrix; ``coactivation`` (and where no matrix is known): c_ij / sqrt(c_i c_j),
    c_ij = tokens so far that were routed to both. Likeness below ``min_similarity`` does not count. Without any
    resident the expert stays.
    """

    name = "substitute"
    needs_scores = True

    def __init__(
        self, setting: LossySetting, similarity: str = "router", min_similarity: float = 0.0,
        max_share: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(setting)
        self.similarity = choice("substitute", "similarity", similarity, SIMILARITIES)
        self.min_similarity = number("substitute", "min_similarity", min_similarity, -1.0, 1.0)
        self.max_share = None if max_share is None else number("substitute", "max_share", max_share, 0.0, 1.0)
        self._cosines: dict[int, Floats] = {}
        self._together = np.zeros((setting.n_layers, setting.n_experts, setting.n_experts), np.float32)

    def rewrite(self, routing: Routing) -> Rewritten:
        ids, weights = routing.expert_ids, routing.weights
        likeness = self._likeness(routing.layer, routing.resident.size)
        self._count(routing.layer, ids)
        max_share = 1.0 / ids.shape[1] if self.max_share is None else self.max_share
        wanted = _movable(routing, misses_only=True) & (shares(weights, ids) <= max_share)
        if not wanted.any() or not routing.resident.any():
            return Rewritten(ids, weights)
        new = replaced(ids, weights, wanted, routing.resident, lambda tokens, experts: likeness[experts])
        new = np.where(new < 0, ids, new)
        return Rewritten(new, weights, substituted=int((new != ids).sum()))

    def _likeness(self, layer: int, n_experts: int) -> Floats:
        """float32[E, E]; -inf where two experts are less alike than ``min_similarity``."""
        if layer not in self._cosines and self.similarity == "router":
            matrix = self.setting.router(layer)
            if matrix is not None:
                rows = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
                self._cosines[layer] = np.asarray(rows @ rows.T, np.float32)
        alike = self._cosines.get(layer)
        if alike is None:
            together = self._together[layer, :n_experts, :n_experts]
            own = np.sqrt(np.maximum(np.diagonal(together), 1.0))
            alike = np.asarray(together / (own[:, None] * own[None, :]), np.float32)
        return np.where(alike >= self.min_similarity, alike, np.float32(-np.inf))

    def _count(self, layer: int, ids: Ids) -> None:
        if layer in self._cosines:
            return
        for column in range(ids.shape[1]):
            for other in range(ids.shape[1]):
                both = (ids[:, column] >= 0) & (ids[:, other] >= 0)
                np.add.at(self._together[layer], (ids[both, column], ids[both, other]), np.float32(1.0))


def _movable(routing: Routing, misses_only: bool) -> npt.NDArray[np.bool_]:
    """bool[T, k]: present entries but each token's heaviest one; only those that are not resident if asked."""
    ids = routing.expert_ids
    first = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(first, router_order(routing.weights, ids)[:, :1], True, axis=1)
    movable = (ids >= 0) & ~first
    return movable & ~routing.resident[ids] if misses_only else movable


def _per_layer(values: Sequence[float] | None, n_layers: int) -> npt.NDArray[np.float64]:
    if values is None:
        return np.ones(n_layers)
    if not isinstance(values, (list, tuple)):
        raise PolicyError(f"skip: sensitivity must be one number a layer, found {values!r}")
    checked = [number("skip", "sensitivity", value, 0.0, float("inf")) for value in values]
    if n_layers > 1 and len(checked) != n_layers:
        raise PolicyError(f"skip: sensitivity must be one number a layer ({n_layers}), found {len(checked)}")
    return np.array(checked or [1.0])
