"""Small compiled pieces of a layer call's bookkeeping. They keep the GIL: they end before it could be handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.backends.warm import warm_call_ends
from cpu_kernels.engine.routed import FLOATS, NO_PLACE, read_call
from cpu_kernels.jit.primitives import float_from_bits
from scheduler.balancing.problem import ACCEL, CPU
from scheduler.compiled import keep_on_disk, once_for_all_values
from scheduler.planner.decide import SLOT, new_plan
from scheduler.slots import RESIDENT

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]
Ints = npt.NDArray[np.int32]

Keys = npt.NDArray[np.int64]

SOFTMAX, SIGMOID = 0, 1
HIT, ON_ITS_WAY = 0, 1
"""Places of `found` in `describe_routing`."""


def with_gil(function: Function) -> Function:
    """Compiles a function that is over before another thread could be given the interpreter's lock, and keeps it."""
    made = once_for_all_values(numba.njit(fastmath={"reassoc", "contract", "nsz"})(function))
    keep_on_disk(made, "hybrimoe", "cpu_kernels", "scheduler")
    return cast(Function, made)


def without_gil(function: Function) -> Function:
    """Compiles a function that waits, and lets other threads have the interpreter's lock meanwhile."""
    made = numba.njit(nogil=True, error_model="numpy")(function)
    keep_on_disk(made, "hybrimoe", "cpu_kernels", "gpu_kernels", "scheduler")
    return cast(Function, made)


@with_gil
def describe_routing(
    expert_ids: Ints, offsets: Ints, rows: Ints, weights: Floats, n_total: int,
    routing_counts: npt.NDArray[np.float64], n_tokens: Ints, scores: Floats, first_key: int, slot_of: Keys, state: Keys,
    found: Keys,
) -> None:  # fmt: skip
    """Fills tokens of each active expert, n_tokens int32 [A or more], gate scores float32 [E], and found int64 [2].

    A score is the expert's routing weight, averaged over the call's `n_total` tokens; 0 where it is not active.
    routing_counts float64 [E]: each active expert's count rises by 1. found: active experts whose bytes are in a slot,
    and those on their way; slot_of (from first_key on) and state are a slot table's, empty where nothing has a slot.
    """
    scores[:] = np.float32(0.0)
    found[:] = 0
    for i in range(expert_ids.size):
        total = np.float32(0.0)
        for j in range(offsets[i], offsets[i + 1]):
            total += weights[rows[j]]
        n_tokens[i] = offsets[i + 1] - offsets[i]
        scores[expert_ids[i]] = total / np.float32(n_total)
        routing_counts[expert_ids[i]] += 1.0
        if state.size:
            slot = slot_of[first_key + expert_ids[i]]
            if slot >= 0:
                found[HIT if state[slot] >= RESIDENT else ON_ITS_WAY] += 1


@with_gil
def read_and_describe(
    index: int, weights: int, weights_kind: int, n_tokens: int, top_k: int, hidden: int, hidden_kind: int,
    host_hidden: Floats, routing: Floats, counts: Ints, expert_ids: Ints, offsets: Ints, rows: Ints,
    routing_counts: npt.NDArray[np.float64], tokens: Ints, scores: Floats, first_key: int, slot_of: Keys, state: Keys,
    found: Keys,
) -> int:  # fmt: skip
    """`read_call`, and `describe_routing` of what it read. Returns the number of active experts, or REFUSED."""
    n_active = read_call(
        index, weights, weights_kind, n_tokens, top_k, hidden, hidden_kind, host_hidden, routing, counts, expert_ids,
        offsets, rows,
    )  # fmt: skip
    if n_active > 0:
        describe_routing(
            expert_ids[:n_active], offsets, rows, routing, n_tokens, routing_counts, tokens, scores, first_key, slot_of,
            state, found,
        )  # fmt: skip
    return n_active


@with_gil
def place_pairs(plan: Keys, n_cpu: int, n_accel: int, offsets: Ints, rows: Ints, slots: Ints, source: Ints) -> None:
    """Writes a plan into an exchange (`gpu_kernels.exchange`): slots and source int32 [R] of each (token, expert) pair.

    plan int64 [5, A + 1]: `PlanView.rows`, with so many experts on the CPU and on the accelerator; offsets and rows:
    of the call's `Dispatch`.
    """
    slots[:], source[:] = NO_PLACE, source.size
    for at in range(n_cpu):
        position = plan[CPU, at]
        for i in range(offsets[position], offsets[position + 1]):
            source[rows[i]] = rows[i]
    for at in range(n_accel):
        position = plan[ACCEL, at]
        for i in range(offsets[position], offsets[position + 1]):
            source[rows[i]], slots[rows[i]] = NO_PLACE, plan[SLOT, position]


@with_gil
def count_hits(expert_ids: Ints, first_key: int, slot_of: Keys, state: Keys) -> tuple[int, int]:
    """(resident, in flight) among the active experts; arrays as for `describe_routing`."""
    hits, late = 0, 0
    for i in range(expert_ids.size):
        slot = slot_of[first_key + expert_ids[i]]
        if slot >= 0:
            if state[slot] >= RESIDENT:
                hits += 1
            else:
                late += 1
    return hits, late


@with_gil
def predict_token(
    halves: npt.NDArray[np.uint16],
    bias: Floats,
    correction: Floats,
    corrected: npt.NDArray[np.bool_],
    scoring: npt.NDArray[np.int64],
    x: Floats,
    first: int,
    ids: Ints,
    chosen_probability: Floats,
) -> None:
    """Routing of one token by the linear gates of the D layers from `first` on.

    halves [L, E, H]: weights as bits of bfloat16; bias and correction [L, E], scoring [L], x [H]. Fills ids int32
    [D, k], ascending, and their gate probabilities, chosen_probability float32 [D, k]; k is at most E. The k largest
    logits are chosen, or the k largest of score + correction where there is a correction (`corrected` [L]); ties go to
    the lower id.
    """
    _, n_experts, hidden = halves.shape
    n_layers, top_k = ids.shape
    probability = np.empty(n_experts, np.float32)
    rank = np.empty(n_experts, np.float32)
    for layer in range(first, first + n_layers):
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


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first token would otherwise wait for."""
    gates = np.zeros((2, 4, 8), np.uint16)
    per_expert = np.zeros((2, 4), np.float32)
    scoring = np.array([SOFTMAX, SIGMOID], np.int64)
    ids, scores = np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)
    predict_token(gates, per_expert, per_expert, np.ones(2, np.bool_), scoring, np.ones(8, np.float32), 0, ids, scores)
    warm_call_ends()
    nobody, key, none, found = (
        np.zeros(1, np.int32),
        np.zeros(1, np.int64),
        np.zeros(1, np.float32),
        np.zeros(2, np.int64),
    )
    ends, uses = np.array([0, 1], np.int32), np.zeros(1)
    described = uses, nobody.copy(), none.copy(), 0, key, key, found
    describe_routing(nobody, ends, nobody, none, 1, *described)
    read_and_describe(
        key.ctypes.data, none.ctypes.data, FLOATS[torch.float32], 1, 1, none.ctypes.data, FLOATS[torch.float32],
        none.reshape(1, 1).copy(), none.copy(), nobody.copy(), nobody.copy(), ends.copy(), nobody.copy(), *described,
    )  # fmt: skip
    count_hits(nobody, 0, key, key)
    place_pairs(new_plan(1), 1, 0, ends, nobody, nobody.copy(), nobody.copy())
