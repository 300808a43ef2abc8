"""Everything that `hybrimoe trace analyze` says about a trace, as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from hybrimoe.tracing.sources import split
from scheduler.cache import CACHE_POLICIES
from scheduler.traces.analysis import (
    REUSE_BINS,
    consecutive_overlap,
    load_entropy,
    predictor_quality,
    reuse_distance,
    sch,
    srp,
)
from scheduler.traces.analysis_cache import LAYER_POLICIES, hit_rate_curve
from scheduler.traces.analysis_pool import cache_hit_rate
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import TransitionPredictor, by_token, recorded
from scheduler.traces.trace import Trace

SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)
POOL_SHARES = (0.125, 0.25, 0.5)
#: Oracle cache sizes in units of top-k, and the tokens that the oracle looks ahead.
SCH_FACTORS = (1, 2, 3, 4)
SCH_WINDOW = 16
#: Tokens for the slower analyses (SCH and the planner's policies).
SLOW_TOKENS = 400
#: Above / below these hit rates of the oracle cache at twice top-k a model suits offloading well / badly.
SUITS_WELL, SUITS_BADLY = 0.7, 0.5
#: Hit rate of MRS that is called enough when slots are recommended.
ENOUGH_HITS = 0.8


def analyse(trace: Trace, *, slow_tokens: int = SLOW_TOKENS) -> dict[str, Any]:
    """Tables of a trace; every entry is JSON-ready. ``slow_tokens`` bounds SCH and the replay of pool policies."""
    part = trace.head(slow_tokens)
    distances, median = reuse_distance(trace)
    report: dict[str, Any] = {
        "model": trace.meta["model"],
        "source": trace.meta.get("source", ""),
        "tokens": trace.n_tokens,
        "prefill_tokens": int((trace.phase == 0).sum()),
        "sequences": len(trace.sequence_spans()),
        "layers": trace.n_layers,
        "experts": trace.n_experts,
        "top_k": trace.top_k,
        "overlap": consecutive_overlap(trace),
        "load_entropy": load_entropy(trace).tolist(),
        "reuse": {
            "bins": [f"<= {edge}" for edge in REUSE_BINS] + ["more"],
            "counts": distances.tolist(),
            "median": median,
        },
        "layer_curves": {"shares": list(SHARES), **{p: hit_rate_curve(trace, p, SHARES) for p in LAYER_POLICIES}},
        "pool_curves": pool_curves(part),
        "srp": [asdict(result) for result in srp(trace)],
        "sch": [
            {"factor": f, "hit_rate": sch(part, min(f * trace.top_k, trace.n_experts), SCH_WINDOW)} for f in SCH_FACTORS
        ],
        "predictors": predictors(trace),
    }
    return {**report, "verdict": verdict(trace, report)}


def pool_curves(trace: Trace) -> dict[str, Any]:
    """Hit rates of every cache policy of the planner at a few shares."""
    source = DemandSource(trace)
    curves = {cache: [cache_hit_rate(trace, cache, share, source) for share in POOL_SHARES] for cache in CACHE_POLICIES}
    return {"shares": list(POOL_SHARES), **curves}


def predictors(trace: Trace) -> dict[str, list[dict[str, float]]]:
    """Recall and precision by distance: recorded gates and the token's routing before where the trace has them, and the
    transition predictor.

    The latter learns from the first quarter and is judged on the rest.
    """
    found: dict[str, list[dict[str, float]]] = {}
    if trace.predicted_ids is not None:
        found["gates"] = [asdict(q) for q in predictor_quality(trace, recorded(trace))]
    if trace.token_ids is not None and trace.n_layers > 1:
        found["token"] = [asdict(q) for q in predictor_quality(trace, by_token(trace))]
    if trace.n_layers > 1:
        calibration, rest = split(trace)
        rest = rest.head(4 * SLOW_TOKENS)
        learned = TransitionPredictor().fit(calibration).predict(rest)
        found["transition"] = [asdict(q) for q in predictor_quality(rest, learned)]
    return found


def verdict(trace: Trace, report: dict[str, Any]) -> dict[str, Any]:
    """Whether the model suits offloading, and the smallest share of slots that MRS turns into enough hits."""
    at_twice = next(row["hit_rate"] for row in report["sch"] if row["factor"] == 2)
    judgement = "well" if at_twice >= SUITS_WELL else "badly" if at_twice < SUITS_BADLY else "fairly"
    curve = report["layer_curves"]
    fine = np.interp(np.linspace(SHARES[0], SHARES[-1], 100), SHARES, curve["mrs"])
    enough = np.flatnonzero(fine >= ENOUGH_HITS)
    share = float(np.linspace(SHARES[0], SHARES[-1], 100)[enough[0]]) if enough.size else 1.0
    slots = max(1, round(share * trace.n_experts))
    text = (
        f"This model suits offloading {judgement}: an oracle cache of twice top-k ({2 * trace.top_k} of "
        f"{trace.n_experts} experts a layer) hits {at_twice:.0%}. About {slots} slots a layer "
        f"({slots * trace.n_layers} in all, {share:.0%}) give MRS {ENOUGH_HITS:.0%} hits."
    )
    return {"suits": judgement, "slots_per_layer": slots, "share": share, "sch_at_twice_top_k": at_twice, "text": text}
