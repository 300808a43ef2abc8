"""Small compiled pieces of a layer call's bookkeeping. They keep the GIL: they end before it could be handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels.backends.warm import warm_call_ends
from cpu_kernels.jit.primitives import float_from_bits
from scheduler.compiled import keep_on_disk

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]
Ints = npt.NDArray[np.int32]

SOFTMAX, SIGMOID = 0, 1


def _compiled(function: Function) -> Function:
    made = numba.njit(fastmath={"reassoc", "contract", "nsz"})(function)
    keep_on_disk(made, "hybrimoe", "cpu_kernels")
    return cast(Function, made)


@_compiled
def describe_routing(
    expert_ids: Ints, offsets: Ints, rows: Ints, weights: Floats, n_total: int, activations: npt.NDArray[np.float64]
) -> tuple[Ints, Floats]:  # pragma: no cover - compiled
    """(tokens of each active expert int32 [A], gate scores float32 [E]) of a call of `n_total` tokens.

    A score is the expert's routing weight, averaged over the call's tokens; 0 where it is not active. activations
    float64 [E]: each active expert's count rises by 1.
    """
    n_tokens = np.empty(expert_ids.size, np.int32)
    scores = np.zeros(activations.size, np.float32)
    for i in range(expert_ids.size):
        total = np.float32(0.0)
        for j in range(offsets[i], offsets[i + 1]):
            total += weights[rows[j]]
        n_tokens[i] = offsets[i + 1] - offsets[i]
        scores[expert_ids[i]] = total / np.float32(n_total)
        activations[expert_ids[i]] += 1.0
    return n_tokens, scores


@_compiled
def count_hits(
    expert_ids: Ints, first_key: int, slot_of: Integers, state: Integers, resident: int
) -> tuple[int, int]:  # pragma: no cover - compiled
    """(resident, in flight) among the active experts; `resident` is the lowest state whose bytes are there."""
    hits, late = 0, 0
    for i in range(expert_ids.size):
        slot = slot_of[first_key + expert_ids[i]]
        if slot >= 0:
            if state[slot] >= resident:
                hits += 1
            else:
                late += 1
    return hits, late


@_compiled
def predict_token(
    halves: npt.NDArray[np.uint16],
    bias: Floats,
    correction: Floats,
    corrected: npt.NDArray[np.bool_],
    scoring: npt.NDArray[np.int64],
    x: Floats,
    first: int,
    last: int,
    top_k: int,
) -> tuple[Ints, Floats, Floats]:  # pragma: no cover - compiled
    """Routing of one token by the linear gates of the D layers `first` to `last`.

    halves [L, E, H]: weights as bits of bfloat16; bias and correction [L, E], scoring [L], x [H] -> ids int32 [D, k]
    ascending, their gate probabilities float32 [D, k], ones float32 [k]; k = top_k, at most E. The k largest logits are
    chosen, or the k largest of score + correction where there is a correction (`corrected` [L]); ties go to the lower
    id.
    """
    _, n_experts, hidden = halves.shape
    top_k = min(top_k, n_experts)
    ids = np.empty((last - first + 1, top_k), np.int32)
    chosen_probability = np.empty((last - first + 1, top_k), np.float32)
    probability = np.empty(n_experts, np.float32)
    rank = np.empty(n_experts, np.float32)
    for layer in range(first, last + 1):
        own = layer - first
        for expert in range(n_experts):
            row = halves[layer, expert]
            total = np.float32(0.0)
            for column in range(hidden):
                total += float_from_bits(np.int32(np.uint32(row[column]) << np.uint32(16))) * x[column]
            probability[expert] = total + bias[layer, expert]
        rank[:] = probability
        if scoring[layer] == SOFTMAX:
            probability -= probability.max()
            probability[:] = np.exp(probability)
            probability /= probability.sum()
        else:
            probability[:] = np.float32(1.0) / (np.float32(1.0) + np.exp(-probability))
        if corrected[layer]:
            rank[:] = probability + correction[layer]
        scale = np.float32(1.0) / max(probability.sum(), np.float32(1e-20))
        for k in range(top_k):
            best = 0
            for expert in range(1, n_experts):
                if rank[expert] > rank[best]:
                    best = expert
            rank[best] = -np.inf
            place = k
            while place > 0 and ids[own, place - 1] > best:
                ids[own, place] = ids[own, place - 1]
                place -= 1
            ids[own, place] = best
        for k in range(top_k):
            chosen_probability[own, k] = probability[ids[own, k]] * scale
    return ids, chosen_probability, np.ones(top_k, np.float32)


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first token would otherwise wait for."""
    gates = np.zeros((2, 4, 8), np.uint16)
    per_expert = np.zeros((2, 4), np.float32)
    scoring = np.array([SOFTMAX, SIGMOID], np.int64)
    predict_token(gates, per_expert, per_expert, np.ones(2, np.bool_), scoring, np.ones(8, np.float32), 0, 1, 2)
    warm_call_ends()
    nobody, key = np.zeros(1, np.int32), np.zeros(1, np.int64)
    describe_routing(nobody, np.array([0, 1], np.int32), nobody, np.ones(1, np.float32), 1, np.zeros(1))
    count_hits(nobody, 0, key, key, 1)
