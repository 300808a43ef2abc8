"""What a trace says about a model: reuse, load, SRP, SCH, predictor quality, and whether offloading suits it.

SRP and SCH: "Not All Models Suit Expert Offloading" (moe-lrc). Cache replay counts an activated (token, layer, expert)
as a hit if its layer's cache holds it before the token; every miss is inserted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.traces.predictions import Predictions, one_hot
from scheduler.traces.trace import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: moe-lrc's window lengths (tokens).
SRP_WINDOWS = (4, 8, 16, 32)
#: Upper edges of the reuse-distance histogram (tokens).
REUSE_BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class SrpResult:
    """Segment routing best performance for windows of ``window`` tokens and the cache share where it is reached."""

    window: int
    srp: float
    cache_share: float


def window_counts(trace: Trace, window: int) -> Ints:
    """n_f for f = 0..window, [layers, experts, window + 1]: windows (stride 1, inside a sequence) with f
    activations."""
    active = one_hot(trace).astype(np.int64)
    counts = np.zeros((trace.n_layers, trace.n_experts, window + 1), np.int64)
    for start, stop in trace.sequence_spans():
        if stop - start < window:
            continue
        total = np.concatenate([np.zeros((1, *active.shape[1:]), np.int64), np.cumsum(active[start:stop], axis=0)])
        sums = total[window:] - total[:-window]
        for f in range(window + 1):
            counts[..., f] += (sums == f).sum(axis=0)
    return counts


def srp_from_counts(counts: Ints) -> tuple[float, float]:
    """(SRP, cache share) of a group whose n_f have been summed, int [window + 1].

    M(a) = sum_{f>=a} f n_f, P(a) = m sum_{f>=a} n_f, A = M(0); SRP = max_a 2 M(a) / (P(a) + A); share = P(a*) / A.
    Ties: the smallest a.
    """
    window = counts.size - 1
    frequency = np.arange(window + 1)
    matched = np.cumsum((frequency * counts)[::-1])[::-1].astype(np.float64)
    predicted = window * np.cumsum(counts[::-1])[::-1].astype(np.float64)
    if matched[0] == 0:
        return 0.0, 0.0
    score = 2.0 * matched / (predicted + matched[0])
    best = int(np.argmax(score))
    return float(score[best]), float(predicted[best] / matched[0])


def srp(trace: Trace, windows: Sequence[int] = SRP_WINDOWS) -> list[SrpResult]:
    """SRP of the entire model (all layers and experts as one group) for each window length that some sequence has."""
    longest = max(stop - start for start, stop in trace.sequence_spans())
    results = []
    for window in windows:
        if window <= longest:
            results.append(SrpResult(window, *srp_from_counts(window_counts(trace, window).sum(axis=(0, 1)))))
    return results


def sch(trace: Trace, capacity: int, window: int) -> float:
    """Segment cache best hit rate: an oracle cache of ``capacity`` experts a layer.

    On insertion into a full cache the expert with the fewest activations in the next ``window`` tokens leaves (ties:
    the least recently used, then the smallest id). All of a token's hits are tested before its experts are inserted;
    the first touch into a free slot counts as a hit. Report it against capacity / top_k.
    """
    hits = total = 0
    active = one_hot(trace).astype(np.int64)
    for start, stop in trace.sequence_spans():
        for layer in range(trace.n_layers):
            found, seen = _sch_layer(active[start:stop, layer], capacity, window)
            hits, total = hits + found, total + seen
    return hits / max(1, total)


def _sch_layer(active: Ints, capacity: int, window: int) -> tuple[int, int]:
    n_tokens, n_experts = active.shape
    total = np.concatenate([np.zeros((1, n_experts), np.int64), np.cumsum(active, axis=0)])
    cached: set[int] = set()
    last_used = np.full(n_experts, -1)
    hits = seen = 0
    for token in range(n_tokens):
        wanted = np.flatnonzero(active[token]).tolist()
        seen += len(wanted)
        missing = [expert for expert in wanted if expert not in cached]
        hits += len(wanted) - len(missing)
        ahead = total[min(n_tokens, token + 1 + window)] - total[token + 1]
        last_used[wanted] = token
        for expert in missing:
            if len(cached) < capacity:
                cached.add(expert)
                hits += 1
                continue
            cached.remove(min(cached, key=lambda e: (int(ahead[e]), int(last_used[e]), e)))
            cached.add(expert)
    return hits, seen


def reuse_distance(trace: Trace, bins: Sequence[int] = REUSE_BINS) -> tuple[Ints, float]:
    """Histogram of tokens between two uses of an expert (same layer and sequence), and the median distance.

    ``histogram[i]`` counts distances of at most ``bins[i]`` and above ``bins[i - 1]``; the last entry those above all.
    """
    active = one_hot(trace) > 0
    distances: list[Ints] = []
    for start, stop in trace.sequence_spans():
        token, key = np.nonzero(active[start:stop].reshape(stop - start, -1))
        order = np.lexsort((token, key))
        token, key = token[order], key[order]
        same = key[1:] == key[:-1]
        distances.append((token[1:] - token[:-1])[same])
    every = np.concatenate(distances) if distances else np.zeros(0, np.int64)
    histogram = np.bincount(np.searchsorted(np.asarray(bins), every), minlength=len(bins) + 1)
    return histogram, float(np.median(every)) if every.size else 0.0


def load_entropy(trace: Trace) -> Floats:
    """Entropy of each layer's expert load over log(experts), float64 [layers]: 1 = perfectly even."""
    share = expert_frequencies(trace)
    share = share / share.sum(axis=-1, keepdims=True)
    logs = np.log(np.where(share > 0, share, 1.0))
    return np.asarray(-(share * logs).sum(-1) / np.log(trace.n_experts))


def expert_frequencies(trace: Trace) -> Floats:
    """Activations of each expert divided by tokens, float64 [layers, experts]."""
    flat = trace.expert_ids.astype(np.int64)
    layer = np.broadcast_to(np.arange(trace.n_layers)[None, :, None], flat.shape)
    present = flat >= 0
    key = layer[present] * trace.n_experts + flat[present]
    counts = np.bincount(key, minlength=trace.n_layers * trace.n_experts)
    return counts.reshape(trace.n_layers, trace.n_experts) / trace.n_tokens


def consecutive_overlap(trace: Trace) -> float:
    """Share of a token's experts that the token before (same sequence) used in the same layer."""
    active = one_hot(trace)
    same = trace.sequence[1:] == trace.sequence[:-1]
    used_again = (active[1:] * active[:-1]).sum(axis=(1, 2))[same].sum()
    return float(used_again / max(1.0, active[1:].sum(axis=(1, 2))[same].sum()))


@dataclass(frozen=True, slots=True)
class PredictorQuality:
    """How well predictions ``ahead`` layers on match: of what was used (recall), of what was predicted (precision)."""

    ahead: int
    recall: float
    precision: float


def predictor_quality(trace: Trace, predictions: Predictions) -> list[PredictorQuality]:
    """Recall and precision by distance, over all tokens and layers that have predictions."""
    active = one_hot(trace)
    results = []
    for ahead in range(1, predictions.horizon + 1):
        if ahead >= trace.n_layers:
            break
        ids = predictions.ids[:, : trace.n_layers - ahead, ahead - 1].astype(np.int64)
        truth = active[:, ahead:]
        right = np.where(ids >= 0, np.take_along_axis(truth, np.maximum(ids, 0), axis=-1), 0.0)
        asked = (ids >= 0).any(axis=-1)
        n_right, n_guessed = right.sum(), float((ids >= 0).sum())
        n_used = float(truth.sum(axis=-1)[asked].sum())
        results.append(PredictorQuality(ahead, n_right / max(1.0, n_used), n_right / max(1.0, n_guessed)))
    return results
