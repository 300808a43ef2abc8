"""Groupings of a trace's sequences side by side: distinct experts by count, time by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrimoe.errors import ConfigError
from hybrimoe.extensions.policies import open_policy
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.tracing.sources import open_trace
from scheduler.batching import (
    LightningPlan,
    Request,
    Roofline,
    Workload,
    batched,
    counted_distinct,
    expected_distinct,
    make_batches,
    plan_lightning,
    route_vectors,
)
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.simulator.simulator import Simulator, check_fit
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.trace import Trace


@dataclass(frozen=True, slots=True)
class BatchingRequest:
    """What a command line asks for."""

    trace: str | None
    hardware: str
    model_shape: str | None
    policy: str
    cache_ratio: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    sequences: int
    seed: int


@dataclass(frozen=True, slots=True)
class BatchingRow:
    """One grouping. Distinct experts are those of one layer in one decode step, mean over full steps."""

    grouping: str
    batch: int
    batches: int
    expected_distinct: float
    counted_distinct: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    hit_rate: float
    transfers: int


@dataclass(frozen=True, slots=True)
class BatchingReport:
    """All groupings of one trace, and MoE-Lightning's plan."""

    rows: list[BatchingRow]
    plan: LightningPlan
    notes: tuple[str, ...]
    title: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "simulated", "title": self.title, "notes": self.notes, "plan": asdict(self.plan),
                "rows": [asdict(row) for row in self.rows]}  # fmt: skip


def compare(request: BatchingRequest) -> BatchingReport:
    """Simulates every grouping. Names and settings are checked before anything runs.

    Each sequence gives its first ``prompt_tokens`` tokens as prompt and the next ``new_tokens`` as reply; shorter ones
    are left out. Raises ConfigError where fewer than two are long enough.
    """
    open_policy(request.policy)
    profile = open_hardware(request.hardware)
    found = open_trace(request.trace, request.model_shape, seed=request.seed, sequences=request.sequences)
    check_fit(found.trace, found.shape)
    trace = _long_enough(found.trace, request.prompt_tokens + request.new_tokens)
    n_sequences = len(trace.sequence_spans())
    roofline = Roofline(profile, found.shape, cached_share=request.cache_ratio, frequencies=expert_frequencies(trace))
    plan = plan_lightning(roofline, Workload(n_sequences, request.prompt_tokens, request.new_tokens))
    rows = [
        _row(name, groups, trace, profile, found.shape, request)
        for name, groups in _groupings(trace, request, plan.batch).items()
    ]
    told = f"{n_sequences} of {len(found.trace.sequence_spans())} sequences are long enough"
    title = f"{found.shape.name} on {profile.name}, trace {found.trace.name}, {request.policy} (simulated)"
    return BatchingReport(rows, plan, (*found.notes, told), title)


def _long_enough(trace: Trace, n_tokens: int) -> Trace:
    longer = [int(trace.sequence[start]) for start, stop in trace.sequence_spans() if stop - start >= n_tokens]
    if len(longer) < 2:
        raise ConfigError(
            f"{len(longer)} sequences of trace {trace.name!r} have {n_tokens} tokens: lower --prompt-tokens or"
            " --new-tokens, or take a trace with longer sequences"
        )
    return trace.select_sequences(longer)


def _groupings(trace: Trace, request: BatchingRequest, planned: int) -> dict[str, list[list[int]]]:
    prompt, end = request.prompt_tokens, request.prompt_tokens + request.new_tokens
    requests = [Request(prompt, request.new_tokens)] * len(trace.sequence_spans())
    size, seed = request.batch_size, request.seed
    return {
        "one by one": make_batches(requests, "none", 1),
        "none": make_batches(requests, "none", size),
        "expertflow": make_batches(requests, "expertflow", size, route_vectors(trace, 0, prompt), seed),
        "replies known": make_batches(requests, "expertflow", size, route_vectors(trace, prompt, end), seed),
        "moe-lightning": make_batches(requests, "moe-lightning", planned),
    }


def _row(
    name: str, groups: Sequence[Sequence[int]], trace: Trace, profile: HardwareProfile, shape: ModelShape,
    request: BatchingRequest,
) -> BatchingRow:  # fmt: skip
    prompt, end = request.prompt_tokens, request.prompt_tokens + request.new_tokens
    made, steps = batched(trace, groups, prompt, request.new_tokens)
    config = open_policy(request.policy).simulated(cache_ratio=request.cache_ratio)
    prefill, decode = Simulator(made, profile, shape, config, steps=steps).run()
    cut = batched(trace, [[at] for group in groups for at in group], prompt, request.new_tokens)[0]
    places = iter(range(len(trace.sequence_spans())))
    in_cut = [[next(places) for _ in group] for group in groups]  # the cut trace has the sequences in groups' order
    return BatchingRow(
        name, max(len(group) for group in groups), len(groups),
        expected_distinct(route_vectors(cut, prompt, end), in_cut), counted_distinct(cut, in_cut, prompt),
        decode.tokens / (decode.latency_ms * decode.steps) * 1e3,
        prefill.tokens / (prefill.latency_ms * prefill.steps) * 1e3, decode.hit_rate, decode.transfers,
    )  # fmt: skip
