"""Trains ExpertFlow's predictor: from the embeddings of a prompt's tokens to the routes of its reply.

ExpertFlow (arXiv 2410.17954) predicts the routing path of every token with a small transformer; this one predicts what
its grouping needs, the share of a reply's tokens that goes to each expert of each layer, from the mean embedding of the
prompt by one hidden layer. Examples are windows of recorded sequences, so that a sequence gives many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import ModelError
from hybrimoe.tracing.learning.onnx_net import OnnxNet, write_net
from scheduler.batching import counted_distinct, make_batches, route_vectors
from scheduler.batching.routes import activation_counts
from scheduler.batching.service import Request
from scheduler.traces.trace import PHASE_CODES, Trace

Floats = NDArray[np.float32]

TARGET = "routes"
LEAST_PROMPT, LEAST_REPLY, REPLY = 8, 8, 32
"""Tokens of an example's prompt at least, of its reply at least, and at most."""
STRIDE = 4
"""Tokens from one example of a sequence to the next."""
JUDGE_EVERY = 4
HIDDEN_UNITS = 64
BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 3e-3, 1e-2
LEAST_SHARE = 1e-3
"""Shares are kept this far from 0 and 1 where their logit starts the output's bias."""
JUDGED_BATCH = 8
"""Prompts at once in the grouping that judges."""


def train_routes(traces: Sequence[Trace], target: str, out: Path, *, epochs: int = 8, seed: int = 0) -> dict[str, Any]:
    """Train, export to ``out``, check the file, and judge it through its runtime on every fourth sequence.

    Returns plain facts: examples, correlation with the reply's routes (beside that of the prompt's own routes), and
    distinct experts of a layer and step for batches grouped by each. Raises ModelError for traces without embeddings,
    of different models, or with too few or too short sequences.
    """
    _check(traces)
    kept = [_split(trace) for trace in traces]
    x, y = _examples(trace for trace, _ in kept)
    weights = _fit(x, y, epochs=epochs, seed=seed)
    first = traces[0]
    facts = {"model": first.meta["model"], "n_layers": first.n_layers, "n_experts": first.n_experts}
    write_net(out, weights, ("mean_embedding",), target, facts)
    net = OnnxNet(out)
    return {
        "file": str(out), "target": target, "examples": len(y), **_judge(net, [judge for _, judge in kept], seed),
        "runtime": net.runtime,
    }  # fmt: skip


def _check(traces: Sequence[Trace]) -> None:
    for trace in traces:
        if trace.embeddings is None:
            raise ModelError(
                f"trace {trace.name!r} has no embeddings to learn from: record it with hybrimoe trace record"
                " --embeddings"
            )
    shapes = {(t.n_layers, t.n_experts, t.embeddings.shape[1]) for t in traces if t.embeddings is not None}
    if len(shapes) > 1:
        raise ModelError(f"the traces are of different models: (layers, experts, hidden) are {sorted(shapes)}")


def _split(trace: Trace) -> tuple[Trace, Trace]:
    """(training, judging): every fourth sequence is kept apart. Raises ModelError for fewer than four."""
    sequences = [int(trace.sequence[start]) for start, _ in trace.sequence_spans()]
    judged = sequences[JUDGE_EVERY - 1 :: JUDGE_EVERY]
    if not judged:
        raise ModelError(f"trace {trace.name!r} has {len(sequences)} sequences: routes need at least {JUDGE_EVERY}")
    return trace.select_sequences(sorted(set(sequences) - set(judged))), trace.select_sequences(judged)


def _examples(traces: Iterable[Trace]) -> tuple[Floats, Floats]:
    """Mean embeddings [n, H] of windows as long as the sequence's prompt, and routes [n, L * E] of what follows."""
    xs, ys = [], []
    for trace in traces:
        assert trace.embeddings is not None
        for start, stop in trace.sequence_spans():
            prompt = max(_prompt_tokens(trace, start, stop), LEAST_PROMPT)
            for at in range(start + LEAST_PROMPT, stop - LEAST_REPLY + 1, STRIDE):
                xs.append(trace.embeddings[max(start, at - prompt) : at].astype(np.float32).mean(axis=0))
                ids = trace.expert_ids[at : min(at + REPLY, stop)]
                ys.append((activation_counts(ids, trace.n_experts) / len(ids)).ravel())
    if not xs:
        raise ModelError(f"the sequences are too short to learn routes from: {LEAST_PROMPT + LEAST_REPLY} tokens each")
    return np.array(xs, np.float32), np.array(ys, np.float32)


def _prompt_tokens(trace: Trace, start: int, stop: int) -> int:
    return int((trace.phase[start:stop] == PHASE_CODES["prefill"]).sum())


def _fit(x: Floats, y: Floats, *, epochs: int, seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """(w1 [H, 64], b1, w2 [64, L * E], b2) of sigmoid(relu(x w1 + b1) w2 + b2), by AdamW on the cross-entropy (torch).

    Features are standardised for the training; the weights that are returned take them as they are.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    mean, scale = x.mean(axis=0), x.std(axis=0) + np.float32(1e-6)
    features, answers = torch.from_numpy((x - mean) / scale), torch.from_numpy(y)
    base = torch.logit(answers.mean(dim=0).clamp(LEAST_SHARE, 1.0 - LEAST_SHARE))
    w1 = (torch.randn(x.shape[1], HIDDEN_UNITS, generator=generator) / x.shape[1] ** 0.5).requires_grad_()
    w2 = (torch.randn(HIDDEN_UNITS, y.shape[1], generator=generator) / HIDDEN_UNITS**0.5 * 0.1).requires_grad_()
    b1, b2 = torch.zeros(HIDDEN_UNITS, requires_grad=True), base.clone().requires_grad_()
    optimiser = torch.optim.AdamW([w1, b1, w2, b2], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(BATCH):
            logits = torch.relu(features[batch] @ w1 + b1) @ w2 + b2
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, answers[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    host = [parameter.detach().numpy().astype(np.float32) for parameter in (w1, b1, w2, b2)]
    folded = host[0] / scale[:, None]
    return folded, host[1] - mean @ folded, host[2], host[3]


def _judge(net: OnnxNet, traces: Sequence[Trace], seed: int) -> dict[str, Any]:
    """Prompts of the judged sequences against their replies."""
    found = [_judged(net, trace) for trace in traces]
    prompts, predicted, replies = (np.concatenate([part[at] for part in found]) for at in range(3))
    usual = replies.mean(axis=0)

    def alike(routes: NDArray[Any]) -> float:
        return float(np.corrcoef((routes - usual).ravel(), (replies - usual).ravel())[0, 1])

    facts: dict[str, Any] = {"judged_on": len(replies)}
    if len(replies) > 1:
        facts |= {"correlation": alike(predicted), "correlation_of_the_prompts_routes": alike(prompts)}
    largest = int(np.argmax([len(part[0]) for part in found]))
    return facts | _distinct(traces[largest], found[largest], seed)


def _judged(net: OnnxNet, trace: Trace) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Routes [sequences, L, E] of the prompts as recorded, of the replies as predicted, and of the replies."""
    assert trace.embeddings is not None
    spans, shape = trace.sequence_spans(), (-1, trace.n_layers, trace.n_experts)
    lengths = [max(_prompt_tokens(trace, *span), 1) for span in spans]
    prompts_of = [trace.embeddings[start : start + n] for (start, _), n in zip(spans, lengths, strict=True)]
    means = [rows.astype(np.float32).mean(axis=0) for rows in prompts_of]
    one_by_one = [trace.select_sequences([int(trace.sequence[start])]) for start, _ in spans]
    prompts = [route_vectors(one, 0, n)[0] for one, n in zip(one_by_one, lengths, strict=True)]
    replies = [route_vectors(one, n)[0] for one, n in zip(one_by_one, lengths, strict=True)]
    return np.array(prompts), net.run(np.array(means, np.float32)).reshape(shape), np.array(replies)


def _distinct(trace: Trace, routes: tuple[NDArray[Any], ...], seed: int) -> dict[str, Any]:
    """Distinct experts of a layer and decode step, counted: in file order, and grouped by each kind of routes."""
    requests = [Request(1, 1)] * len(trace.sequence_spans())
    if len(requests) < 2 * JUDGED_BATCH:
        return {}
    first = max(_prompt_tokens(trace, *span) for span in trace.sequence_spans())
    groupings = {"distinct_in_order": make_batches(requests, "none", JUDGED_BATCH)}
    for name, known in zip(("by_the_prompts_routes", "by_prediction", "replies_known"), routes, strict=True):
        groupings[f"distinct_{name}"] = make_batches(requests, "expertflow", JUDGED_BATCH, known, seed)
    return {name: counted_distinct(trace, groups, first) for name, groups in groupings.items()}
