"""Route vectors of sequences, and how many distinct experts a micro-batch of them touches.

A route vector is p[l, e]: activations of expert e in layer l divided by the sequence's tokens, that is the share of
its tokens that go there (ExpertFlow's routing path, arXiv 2410.17954, averaged over the tokens of a sequence).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import SchedulerError
from scheduler.traces.trace import Trace, TraceStep

Floats = NDArray[np.float64]


def route_vectors(trace: Trace, first: int = 0, last: int | None = None) -> Floats:
    """Route vectors of a trace's sequences from their tokens ``first:last``, float64 [sequences, layers, experts].

    A sequence without tokens there has an all-zero route.
    """
    spans = trace.sequence_spans()
    routes = np.zeros((len(spans), trace.n_layers, trace.n_experts))
    for at, (start, stop) in enumerate(spans):
        ids = trace.expert_ids[start:stop][first:last]
        if len(ids):
            routes[at] = activation_counts(ids, trace.n_experts) / len(ids)
    return routes


def activation_counts(expert_ids: NDArray[np.integer], n_experts: int) -> Floats:
    """Activations of each expert, float64 [layers, experts], from ids [tokens, layers, top_k] (-1 absent)."""
    n_layers = expert_ids.shape[1]
    ids = expert_ids.astype(np.int64)
    keys = (np.arange(n_layers)[None, :, None] * n_experts + ids)[ids >= 0]
    counts = np.bincount(keys, minlength=n_layers * n_experts)
    return counts.reshape(n_layers, n_experts).astype(np.float64)


def expected_distinct(routes: Floats, groups: Sequence[Sequence[int]]) -> float:
    """Expected distinct experts of one layer in one decode step of a group, mean over layers and groups.

    Each sequence s of group G sends its token to expert e with probability p_s[l, e], independently of the others:
    E = sum_e (1 - prod_{s in G} (1 - p_s[l, e])).
    """
    if not groups or not all(groups):
        raise SchedulerError("expected at least one group, and no empty one")
    missed = [np.prod(1.0 - np.clip(routes[list(group)], 0.0, 1.0), axis=0) for group in groups]
    return float(np.mean([(1.0 - part).sum(axis=-1).mean() for part in missed]))


def counted_distinct(trace: Trace, groups: Sequence[Sequence[int]], first: int = 0) -> float:
    """Distinct experts of one layer in one step, counted: step t of a group is the t-th token of each of its sequences.

    Only full steps count, from ``first`` to the end of the group's shortest sequence: fewer tokens touch fewer experts
    whatever the grouping. Mean over layers and steps; NaN where no group has a full step.
    """
    spans = trace.sequence_spans()
    total, n_steps = 0.0, 0
    for group in groups:
        starts = np.array([spans[at][0] for at in group])
        for t in range(first, min(spans[at][1] - spans[at][0] for at in group)):
            active = activation_counts(trace.expert_ids[starts + t], trace.n_experts) > 0
            total += float(active.sum(axis=-1).mean())
            n_steps += 1
    return total / n_steps if n_steps else float("nan")


def batched(trace: Trace, groups: Sequence[Sequence[int]], n_prompt: int, n_new: int) -> tuple[Trace, list[TraceStep]]:
    """The trace as groups of sequences would run it: each group's prompts in one step, then one token of each a step.

    Every sequence gives its first ``n_prompt`` tokens as prompt and the next ``n_new`` as reply, so that all groupings
    do the same work. The result is for ``Simulator(..., steps=...)``: a group is one sequence of the new trace. Raises
    SchedulerError for groups that are empty, repeat a sequence, or have one that is too short.
    """
    spans = trace.sequence_spans()
    members = [at for group in groups for at in group]
    if sorted(set(members)) != sorted(members) or not all(groups) or not members:
        raise SchedulerError("groups must not be empty, and hold a sequence at most once")
    if n_prompt < 0 or n_new < 0 or n_prompt + n_new < 1:
        raise SchedulerError(f"expected a prompt or a reply of at least one token, found {n_prompt} and {n_new}")
    short = min(members, key=lambda at: spans[at][1] - spans[at][0])
    if spans[short][1] - spans[short][0] < n_prompt + n_new:
        raise SchedulerError(
            f"sequence {short} of trace {trace.name!r} has {spans[short][1] - spans[short][0]} tokens, fewer than"
            f" {n_prompt} of a prompt and {n_new} of a reply"
        )
    order: list[int] = []
    steps: list[TraceStep] = []
    for number, group in enumerate(groups):
        starts = [spans[at][0] for at in group]
        begin, first = len(order), True
        if n_prompt:
            order += [start + t for start in starts for t in range(n_prompt)]
            steps.append(TraceStep(number, "prefill", begin, len(order), 0, True, len(group)))
            first = False
        for t in range(n_prompt, n_prompt + n_new):
            order += [start + t for start in starts]
            steps.append(TraceStep(number, "decode", len(order) - len(group), len(order), t, first, len(group)))
            first = False
    lengths = [len(group) for group in groups]
    phases = [np.repeat(np.array([0, 1], np.uint8), [n * n_prompt, n * n_new]) for n in lengths]
    sequence = np.repeat(np.arange(len(groups)), [n * (n_prompt + n_new) for n in lengths])
    return trace.reordered(np.array(order), sequence.astype(np.int32), np.concatenate(phases)), steps
