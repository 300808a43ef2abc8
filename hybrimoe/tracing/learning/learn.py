"""Trains the small nets of the `learned` policies on recorded traces and exports them to ONNX.

The examples are the features that the planner itself computes while it replays a trace, so training and use cannot
drift apart. cache: is the expert used again within NEXT_USE_TOKENS tokens? prefetch: is it active in the next layer?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import ConfigError, ModelError, unknown
from hybrimoe.tracing.learning.onnx_net import OnnxScorer, write_net
from scheduler.cache.learned import CACHE_FEATURES, Learned
from scheduler.machine.costs import CostModel
from scheduler.plan import LayerEnded, TransferEnded
from scheduler.planner.planner import Planner
from scheduler.prefetch.learned import PREFETCH_FEATURES, LearnedPrefetch
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import one_hot, predictions_for
from scheduler.traces.trace import Trace, TraceStep

Floats = NDArray[np.float32]

TARGETS = {"cache": CACHE_FEATURES, "prefetch": PREFETCH_FEATURES}
OTHER_TARGETS = ("routes",)
"""What `trace train` learns elsewhere (`learn_routes`); for its messages."""
NEXT_USE_TOKENS = 4
#: Share of experts in slots during the replay; features hardly depend on it.
REPLAY_SHARE = 0.25
#: Tokens replayed of each trace, and the share of sequences kept for judging.
MAX_TOKENS = 3000
MIN_TOKENS = 16
JUDGE_SHARE = 0.25
HIDDEN_UNITS = 16
BATCH, LEARNING_RATE = 4096, 0.01


def train_predictor(
    traces: Sequence[Trace], target: str, out: Path, *, epochs: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Train, export to ``out``, check the file, and judge it through its runtime on sequences it has not seen.

    Returns plain facts (examples, average precision of net and of the best single feature, runtime). Raises ConfigError
    for an unknown target, ModelError for traces that hold nothing to learn.
    """
    if target not in TARGETS:
        raise ConfigError(unknown("target", target, (*TARGETS, *OTHER_TARGETS)))
    for trace in traces:
        if trace.n_tokens < MIN_TOKENS:
            raise ModelError(
                f"trace {trace.name!r} has {trace.n_tokens} tokens, too short to learn from ({MIN_TOKENS})"
            )
    pairs = [_judge_split(trace) for trace in traces]
    x, y = _examples([train for train, _ in pairs], target)
    x_judge, y_judge = _examples([judge for _, judge in pairs], target)
    if not 0.0 < y.mean() < 1.0 or not 0.0 < y_judge.mean() < 1.0:
        raise ModelError("the traces hold nothing to learn: every example has the same answer")
    weights = fit_net(x, y, epochs=epochs, seed=seed)
    write_net(out, weights, TARGETS[target], target)
    scorer = OnnxScorer(out)
    scores = scorer(x_judge)
    singles = [average_precision(x_judge[:, i], y_judge) for i in range(x.shape[1])]
    return {
        "file": str(out),
        "target": target,
        "examples": len(y),
        "judged_on": len(y_judge),
        "base_rate": float(y_judge.mean()),
        "average_precision": average_precision(scores, y_judge),
        "best_single_feature": max(singles),
        "runtime": scorer.runtime,
    }


def _judge_split(trace: Trace) -> tuple[Trace, Trace]:
    """(training, judging): the last quarter of the sequences, or of the tokens of a single one, is kept apart."""
    sequences = [int(trace.sequence[start]) for start, _ in trace.sequence_spans()]
    if len(sequences) > 1:
        cut = len(sequences) - max(1, round(JUDGE_SHARE * len(sequences)))
        return trace.select_sequences(sequences[:cut]), trace.select_sequences(sequences[cut:])
    cut = round((1.0 - JUDGE_SHARE) * trace.n_tokens)
    return trace.head(cut), trace.tail(trace.n_tokens - cut)


def _examples(traces: Sequence[Trace], target: str) -> tuple[Floats, Floats]:
    found = [pair for trace in traces for pair in replay(trace.head(MAX_TOKENS), target)]
    if not found:
        raise ModelError("the traces are too short to learn from: no decode step has a successor")
    return np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])


def replay(trace: Trace, target: str) -> Iterator[tuple[Floats, Floats]]:
    """(features [E, 4], answers [E]) of each decode token and layer, as the planner's `learned` policies see them."""
    decode = replace(trace, phase=np.ones_like(trace.phase))  # token by token, prompts too
    predictions = predictions_for(decode, "recorded") if trace.predicted_ids is not None else None
    source = DemandSource(decode, predictions)
    n_slots = max(1, round(REPLAY_SHARE * trace.n_layers * trace.n_experts))
    planner = Planner(
        trace.n_layers, trace.n_experts, n_slots, CostModel.uniform(trace.n_layers), "on_demand/learned/learned"
    )
    active = one_hot(decode) > 0
    for step in decode.steps():
        if step.first:
            planner.begin_sequence()
        planner.begin_step(step.phase, step.n_tokens)
        for demand in source.step(step):
            plan = planner.plan_layer(demand)
            example = _example(planner, demand, active, step, decode, target)
            if example is not None:
                yield example
            for transfer in (*plan.transfers, *plan.prefetches):
                planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot))
            planner.on_event(LayerEnded(plan.layer))


def _example(
    planner: Planner, demand: Any, active: NDArray[np.bool_], step: TraceStep, trace: Trace, target: str
) -> tuple[Floats, Floats] | None:
    token, layer = step.start, demand.layer
    if target == "prefetch":
        if layer + 1 >= trace.n_layers:
            return None
        assert isinstance(planner.prefetch, LearnedPrefetch)
        return planner.prefetch.features(demand).astype(np.float32), active[token, layer + 1].astype(np.float32)
    stop = min(token + 1 + NEXT_USE_TOKENS, trace.n_tokens)
    same = trace.sequence[token + 1 : stop] == trace.sequence[token]
    if not same.all() or stop == token + 1:
        return None
    assert isinstance(planner.cache, Learned)
    used_again = np.asarray(active[token + 1 : stop, layer].any(axis=0), np.float32)
    return planner.cache.features(layer).astype(np.float32), used_again


Layers = tuple[Floats, Floats, Floats, Floats]


def fit_net(x: Floats, y: Floats, *, epochs: int, seed: int) -> Layers:
    """(w1 [F, 16], b1, w2 [16, 1], b2) of sigmoid(relu(x w1 + b1) w2 + b2), by Adam on the cross-entropy (torch)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    features, answers = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    w1 = (torch.randn(x.shape[1], HIDDEN_UNITS, generator=generator) * 0.5).requires_grad_()
    w2 = (torch.randn(HIDDEN_UNITS, 1, generator=generator) * 0.25).requires_grad_()
    b1, b2 = torch.zeros(HIDDEN_UNITS, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([w1, b1, w2, b2], lr=LEARNING_RATE)
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(BATCH):
            logits = torch.relu(features[batch] @ w1 + b1) @ w2 + b2
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, answers[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    w1_host, b1_host, w2_host, b2_host = (p.detach().numpy().astype(np.float32) for p in (w1, b1, w2, b2))
    return w1_host, b1_host, w2_host, b2_host


def average_precision(scores: NDArray[Any], answers: Floats) -> float:
    """Mean precision at each positive, best score first; ties are broken by position."""
    order = np.argsort(-np.asarray(scores, np.float64).ravel(), kind="stable")
    right = answers.ravel()[order]
    precision = np.cumsum(right) / np.arange(1, right.size + 1)
    return float((precision * right).sum() / max(1.0, right.sum()))
