"""Synthetic routing with stated locality.

Expert e of layer l gets the logit b[l, e] + w[l, e] . x_t + Gumbel noise, and the top-k win. b is the expert's
popularity (normal, ``popularity``); w is a random direction of unit length in ``dim`` dimensions; x_t is what the
token is about, shared by all layers: a topic that drifts (first-order autoregressive, ``topic`` strong, ``memory`` of
it kept from token to token) plus the token itself (independent, ``token`` strong). Topic makes experts recur from
token to token; topic and token together make the routing of one layer tell about the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import PolicyError, SchedulerError, did_you_mean
from scheduler.traces.analysis import consecutive_overlap, load_entropy
from scheduler.traces.analysis_cache import layer_hit_rate
from scheduler.traces.predictions import NOISY_RECALL, TransitionPredictor, noisy, one_hot
from scheduler.traces.trace import Trace

Floats = NDArray[np.float64]
#: Tokens routed at once (deepseek-v3: 58 x 256 float64 logits a token are 119 kB).
PER_BLOCK: Final = 256


@dataclass(frozen=True, slots=True)
class Locality:
    """Strengths (in units of the Gumbel noise) and memory of the model above."""

    popularity: float
    topic: float
    memory: float
    token: float
    dim: int = 8

    def __post_init__(self) -> None:
        if min(self.popularity, self.topic, self.token) < 0.0 or not 0.0 <= self.memory < 1.0 or self.dim < 1:
            raise SchedulerError(f"locality needs strengths >= 0, memory in [0, 1) and dim >= 1, found {self}")


#: Fitted with ``benchmarks/fit_locality.py`` (differential evolution on :func:`statistics`, seed 0) to the first 8
#: layers of published routing: 1,000 tokens of openai/gpt-oss-20b (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting)
#: and 299 tokens of allenai/OLMoE-1B-7B-0125 (sqliteai/warp), both Apache-2.0. The last three have no published
#: routing: they are fitted to the hit rates at 25 % cached that the HybriMoE paper reports (PUBLISHED_HITS).
LOCALITIES: Final[Mapping[str, Locality]] = {
    "gpt-oss-20b": Locality(popularity=2.991, topic=4.341, memory=0.691, token=1.274),
    "olmoe-1b-7b": Locality(popularity=1.874, topic=3.38, memory=0.637, token=0.498),
    "qwen2-57b-a14b": Locality(popularity=1.499, topic=0.016, memory=0.682, token=1.719),
    "deepseek-v2-lite": Locality(popularity=1.344, topic=0.432, memory=0.608, token=1.479),
    "mixtral-8x7b": Locality(popularity=0.456, topic=0.89, memory=0.693, token=1.626),
}


#: :func:`statistics` of the real traces that the localities were fitted to, in the order of its fields.
FITTED_TO: Final[Mapping[str, tuple[float, ...]]] = {
    "gpt-oss-20b": (0.484, 0.647, 0.875, 0.861, 0.595),
    "olmoe-1b-7b": (0.438, 0.599, 0.789, 0.913, 0.509),
}

#: LRU and MRS hit rates at 25 % cached (arXiv 2504.05897). With two slots and top-2, Mixtral's MRS cannot differ from
#: LRU where every miss is inserted, so only its LRU figure is fitted.
PUBLISHED_HITS: Final[Mapping[str, tuple[float, float]]] = {
    "qwen2-57b-a14b": (0.450, 0.528),
    "deepseek-v2-lite": (0.477, 0.527),
    "mixtral-8x7b": (0.302, 0.362),
}


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """What the generator is fitted to and tested against."""

    overlap: float
    lru_25: float
    lru_50: float
    entropy: float
    next_layer_recall: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


def statistics(trace: Trace) -> TraceStatistics:
    """Overlap of neighbouring tokens, LRU hit rates at 25 and 50 %, load entropy, recall of the transition predictor.

    The predictor is fitted on the first half of the tokens and judged on the second.
    """
    quarter, half = max(1, trace.n_experts // 4), max(1, trace.n_experts // 2)
    return TraceStatistics(
        overlap=consecutive_overlap(trace),
        lru_25=layer_hit_rate(trace, "lru", quarter),
        lru_50=layer_hit_rate(trace, "lru", half),
        entropy=float(load_entropy(trace).mean()),
        next_layer_recall=_next_layer_recall(trace),
    )


def _next_layer_recall(trace: Trace) -> float:
    middle = trace.n_tokens // 2
    first, second = trace.head(middle), trace.tail(trace.n_tokens - middle)
    predictions = TransitionPredictor(horizon=1).fit(first).predict(second)
    ids = predictions.ids[:, :-1, 0].astype(np.int64)
    return float(np.take_along_axis(one_hot(second)[:, 1:], np.maximum(ids, 0), axis=-1).mean())


def generate(
    n_layers: int,
    n_experts: int,
    top_k: int,
    n_tokens: int = 512,
    n_sequences: int = 1,
    n_prefill: int = 0,
    locality: Locality | str = "gpt-oss-20b",
    recall: tuple[float, ...] | None = NOISY_RECALL,
    seed: int = 0,
) -> Trace:
    """A trace of ``n_sequences`` sequences of ``n_tokens`` tokens each, the first ``n_prefill`` of each as prefill.

    ``locality`` is a :class:`Locality` or the name of a fitted one. ``recall`` gives gate predictions of that recall
    1, 2, ... layers ahead (None: no predictions). Equal arguments give equal traces.
    """
    _check_sizes(n_layers, n_experts, top_k, n_tokens, n_sequences, n_prefill)
    model = locality_named(locality) if isinstance(locality, str) else locality
    rng = np.random.default_rng(seed)
    popularity = rng.normal(0.0, model.popularity, (n_layers, n_experts))
    direction = rng.normal(size=(n_layers, n_experts, model.dim))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    about = np.concatenate([_about(model, n_tokens, rng) for _ in range(n_sequences)])
    ids, weights = _route(popularity, direction, about, top_k, rng)
    phase = np.tile((np.arange(n_tokens) >= n_prefill).astype(np.uint8), n_sequences)
    label = locality if isinstance(locality, str) else "custom"
    trace = Trace(
        expert_ids=ids,
        sequence=np.repeat(np.arange(n_sequences, dtype=np.int32), n_tokens),
        phase=phase,
        meta={
            "model": "synthetic",
            "locality": label,
            "num_layers": n_layers,
            "num_experts": n_experts,
            "top_k": top_k,
            "source": f"scheduler.traces.synthetic, seed {seed}, {model}",
            "licence": "Apache-2.0",
        },
        expert_weights=weights,
        name=f"synthetic-{label}",
    )
    return trace if recall is None or n_layers < 2 else trace.with_predictions(noisy(trace, recall, seed=seed).ids)


def locality_named(name: str) -> Locality:
    """A fitted locality; unknown names raise with the nearest one."""
    if name not in LOCALITIES:
        raise PolicyError(f"unknown locality {name!r}{did_you_mean(name, LOCALITIES)}")
    return LOCALITIES[name]


def _check_sizes(n_layers: int, n_experts: int, top_k: int, n_tokens: int, n_sequences: int, n_prefill: int) -> None:
    if min(n_layers, n_experts, top_k, n_tokens, n_sequences) < 1 or top_k > n_experts:
        raise SchedulerError(f"cannot make {n_layers} layers of {n_experts} experts, top-{top_k}, {n_tokens} tokens")
    if not 0 <= n_prefill <= n_tokens:
        raise SchedulerError(f"prefill must have 0..{n_tokens} tokens, found {n_prefill}")


def _about(model: Locality, n_tokens: int, rng: np.random.Generator) -> Floats:
    """x_t of one sequence, [tokens, dim]; the topic starts in its stationary distribution."""
    drift = rng.normal(size=(n_tokens, model.dim))
    topic = np.empty_like(drift)
    topic[0] = drift[0]
    fresh = np.sqrt(1.0 - model.memory**2)
    for t in range(1, n_tokens):
        topic[t] = model.memory * topic[t - 1] + fresh * drift[t]
    return model.topic * topic + model.token * rng.normal(size=(n_tokens, model.dim))


def _route(
    popularity: Floats, direction: Floats, about: Floats, top_k: int, rng: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
    """Top-k ids in descending order of logit and their softmax weights; tokens in blocks to bound memory."""
    ids, weights = [], []
    for block in np.array_split(about, max(1, len(about) // PER_BLOCK)):
        logits = (
            popularity
            + np.einsum("td,led->tle", block, direction, optimize=True)
            + rng.gumbel(size=(len(block), *popularity.shape))
        )
        best = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
        chosen = np.take_along_axis(logits, best, axis=-1)
        share = np.exp(chosen - chosen[..., :1])
        ids.append(best.astype(np.int16))
        weights.append((share / share.sum(-1, keepdims=True)).astype(np.float16))
    return np.concatenate(ids), np.concatenate(weights)
