"""Putting other experts in the place of routed ones: the shared step of substitution and of kept sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from scheduler.lossy.base import ABSENT, Floats, Ids, router_order

Preference = Callable[[npt.NDArray[np.intp], Ids], npt.NDArray[np.floating]]
"""(tokens [n], experts to replace [n]) -> float [n, E]: how well each expert stands in; -inf: never."""


def replaced(
    expert_ids: Ids, weights: Floats, wanted: npt.NDArray[np.bool_], allowed: npt.NDArray[np.bool_],
    preference: Preference,
) -> Ids:  # fmt: skip
    """expert_ids [T, k] with the ``wanted`` entries replaced by the most preferred allowed expert of all.

    Heavier entries choose first (in the router's order); an expert that the token has already is not taken again.
    Ties: the lower id. Where nothing is left the entry becomes absent.
    """
    ids = expert_ids.copy()
    n_tokens, n_experts = len(ids), allowed.size
    taken = np.zeros((n_tokens, n_experts + 1), np.bool_)
    np.put_along_axis(taken, np.where(ids >= 0, ids, n_experts), True, axis=1)
    order = router_order(weights, expert_ids)
    for rank in range(ids.shape[1]):
        columns = order[:, rank]
        tokens = np.flatnonzero(wanted[np.arange(n_tokens), columns])
        if not tokens.size:
            continue
        at = columns[tokens]
        free = allowed[None, :] & ~taken[tokens, :n_experts]
        value = np.where(free, preference(tokens, ids[tokens, at]), -np.inf)
        best = value.argmax(axis=1)
        found = np.isfinite(value[np.arange(tokens.size), best])
        chosen = np.where(found, best, ABSENT).astype(np.int32)
        ids[tokens, at] = chosen
        taken[tokens[found], chosen[found]] = True
    return ids
