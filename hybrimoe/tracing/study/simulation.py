"""Runs a request of `hybrimoe simulate`: every policy at every cache ratio on one trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from hybrimoe.config.scheduler import lossy_option, lossy_settings
from hybrimoe.errors import ConfigError, did_you_mean
from hybrimoe.extensions.policies import NamedPolicy, open_policy
from hybrimoe.machine.profiles import open_hardware, with_accelerators
from hybrimoe.tracing.learning.onnx_net import OnnxScorer
from hybrimoe.tracing.sources import open_trace, split
from hybrimoe.tracing.study.public import Range, Setting, datasheet_residuals, speed_range
from scheduler.demand import Phase
from scheduler.lossy import Lossy, resolve_lossy
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.planner.policies import resolve_policy
from scheduler.simulator.bound import lower_bounds
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import PhaseResult, SimulationConfig, Simulator, check_fit, slots_for
from scheduler.streaming import Streaming
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import PredictionKind, predictions_for
from scheduler.traces.trace import PHASE_CODES, Trace


@dataclass(frozen=True, slots=True)
class SimulationRequest:
    """What a command line asks for; names are resolved by :func:`run_simulations`.

    ``stream``: prompt steps of at least so many tokens are streamed, 0 none; None: as the policy's preset has it.
    ``prefill_chunk``: a prompt in steps of so many tokens, one after another; None: as one step, layer by layer.
    """

    trace: str | None
    hardware: str
    model_shape: str | None
    policies: tuple[str, ...]
    cache_ratios: tuple[float, ...]
    lossy: tuple[str, ...] = ()
    phase: str | None = None
    expert_dtype: str = "int4"
    dense_dtype: str = "int8"
    predictions: str = "auto"
    lookahead: int = 3
    max_tokens: int = 2000
    host_ratio: float = 1.0
    disk_blind: bool = False
    accelerators: int | None = None
    shared_link: bool = False
    stream: int | None = None
    stream_ahead: bool = False
    prefill_chunk: int | None = None
    seed: int = 0
    cache_model: Path | None = None
    prefetch_model: Path | None = None
    bound: bool = False


Bounds = dict[tuple[float, Phase], float]
"""(cache ratio, phase) -> ms a step that no policy can beat."""


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """Results in request order, with what was assumed. ``ranges``: of each, the tokens/s to expect by public
    measurements, None where none is near. ``bounds``: empty where none was asked for."""

    results: list[PhaseResult]
    ranges: list[Range | None]
    bounds: Bounds
    hardware: str
    model_shape: str
    trace: str
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """One line for tables."""
        return f"{self.model_shape} on {self.hardware}, trace {self.trace} (simulated)"

    def rows(self) -> list[dict[str, Any]]:
        """One plain mapping per policy, cache ratio and phase."""
        where = {"hardware": self.hardware, "model_shape": self.model_shape, "trace": self.trace, "kind": "simulated"}
        return [
            {
                **result.as_dict(),
                **where,
                "tokens_per_s": result.tokens_per_s,
                "tokens_per_s_range": known,
                "prompt_tokens": result.step_tokens if result.phase == "prefill" else None,
                **({"bound_ms": self.bounds[result.cache_ratio, result.phase]} if self.bounds else {}),
            }
            for result, known in zip(self.results, self.ranges, strict=True)
        ]


def run_simulations(request: SimulationRequest) -> SimulationReport:
    """Simulate every policy at every ratio. Names and settings are checked before anything runs."""
    phase = _phase(request.phase)
    kind = _kind(request.predictions)
    variants = (None, *[resolve_lossy(lossy_settings(lossy_option(text))) for text in request.lossy])
    _check_prompts(request)
    configs = [
        _config(request, policy, ratio, lossy)
        for ratio in request.cache_ratios
        for policy in request.policies
        for lossy in variants
    ]
    profile = with_accelerators(open_hardware(request.hardware), request.accelerators, request.shared_link)
    _check_bound(request, profile)
    found = open_trace(request.trace, request.model_shape, seed=request.seed)
    check_fit(found.trace, found.shape)
    calibration, evaluation = split(found.trace)
    if phase is not None:
        evaluation.require_phase(phase)
    evaluation, cut = _cut(evaluation, request.max_tokens, phase)
    predictions = predictions_for(evaluation, kind, calibration, request.seed)
    source = DemandSource(evaluation, predictions)
    known, earlier = expert_frequencies(calibration), DemandSource(calibration)
    scorer, prefetch_scorer = _scorer(request.cache_model), _scorer(request.prefetch_model)
    steps = list(evaluation.steps(phase, request.prefill_chunk))
    results, ranges, bounds = [], [], Bounds()
    for config in configs:
        setting = _setting(profile, found.shape, config)
        for result in simulate(
            evaluation,
            profile,
            found.shape,
            config,
            None,
            known,
            phase,
            source,
            scorer,
            prefetch_scorer,
            steps,
            earlier,
        ):
            results.append(result)
            ranges.append(_range(setting, result))
    if request.bound:
        for config in {config.cache_ratio: config for config in configs}.values():
            plain = replace(config, policy="static", params={}, streaming=_widest(configs))
            made = Simulator(evaluation, profile, found.shape, plain, source=source, steps=steps)
            bounds |= {(config.cache_ratio, of_phase): ms for of_phase, ms in lower_bounds(made).items()}
    told = "none" if predictions is None else predictions.kind
    notes = (
        *found.notes, *cut, f"{evaluation.n_tokens} of {found.trace.n_tokens} tokens; routing ahead: {told}",
        *_prompt_notes(request, results, configs), _range_note(profile, ranges),
    )  # fmt: skip
    return SimulationReport(results, ranges, bounds, profile.name, found.shape.name, found.trace.name, notes)


def _widest(configs: list[SimulationConfig]) -> Streaming | None:
    """The way of streaming prompts that has a buffer beside the slots, if any policy streams."""
    return next((config.streaming for config in configs if config.streaming is not None), None)


def _check_bound(request: SimulationRequest, profile: HardwareProfile) -> None:
    if request.bound and (request.lossy or profile.accel.count > 1):
        raise ConfigError("--bound is of one accelerator and of lossless policies: leave --lossy or the others out")


def _setting(profile: HardwareProfile, shape: ModelShape, config: SimulationConfig) -> Setting:
    mixed = slots_for(config, shape) < shape.n_layers * shape.n_experts
    return Setting(profile, mixed, config.streaming is not None, config.host_ratio == 1.0, config.lossy is None)


def _range(setting: Setting, result: PhaseResult) -> Range | None:
    return speed_range(datasheet_residuals(), setting, result.phase, result.tokens_per_s, result.step_tokens)


def _range_note(profile: HardwareProfile, ranges: list[Range | None]) -> str:
    """What the ranges are, or why there is none."""
    if profile.provenance != "datasheet":
        return (
            f"profile {profile.name} is {profile.provenance}: no range, public measurements are of data sheet machines"
        )
    told = f"simulated by the data sheets of {profile.name}"
    if not any(ranges):
        return (
            f"{told}; no public measurement is near, so nothing is known of how far off that is (docs/calibration.md)"
        )
    return (
        f"{told}; ranges: 10th to 90th percentile of public measurements of llama.cpp around that (docs/calibration.md)"
    )


def _prompt_notes(
    request: SimulationRequest, results: list[PhaseResult], configs: list[SimulationConfig]
) -> Iterator[str]:
    """How long prompts are, and how they are computed."""
    prompts = next((result for result in results if result.phase == "prefill"), None)
    if prompts is None:
        return
    how = "each as one step" if request.prefill_chunk is None else f"in chunks of {request.prefill_chunk}"
    yield f"prompts of {prompts.step_tokens:.0f} tokens in the mean, {how}"
    streamed = sorted({config.label or config.policy for config in configs if config.streaming is not None})
    if streamed:
        yield f"prompts are streamed past the slots with {', '.join(streamed)}"


def _check_prompts(request: SimulationRequest) -> None:
    for name, value, least in (("--stream", request.stream, 0), ("--prefill-chunk", request.prefill_chunk, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, found {value}")
    if request.stream == 0 and request.stream_ahead:
        raise ConfigError("--stream 0 streams no prompts, so --stream-ahead has nothing to do; leave one of them out")


def _streaming(request: SimulationRequest, policy: NamedPolicy, lossy: Lossy | None) -> Streaming | None:
    """As asked; else as the preset has it, where that can be."""
    own = resolve_policy(policy.name, **policy.params).streaming
    if request.stream is not None:
        return Streaming(request.stream, request.stream_ahead) if request.stream else None
    if request.stream_ahead:
        return Streaming(ahead=True) if own is None else Streaming(own.min_tokens, True)
    return own if request.host_ratio == 1.0 and lossy is None else None


def _config(request: SimulationRequest, policy: str, ratio: float, lossy: Lossy | None) -> SimulationConfig:
    named = open_policy(policy)
    return named.simulated(
        streaming=_streaming(request, named, lossy),
        cache_ratio=ratio,
        expert_dtype=request.expert_dtype,
        dense_dtype=request.dense_dtype,
        lookahead=request.lookahead,
        host_ratio=request.host_ratio,
        disk_blind=request.disk_blind,
        lossy=lossy,
    )


def _scorer(path: Path | None) -> OnnxScorer | None:
    return None if path is None else OnnxScorer(path)


def _phase(name: str | None) -> Phase | None:
    if name is None:
        return None
    if name not in get_args(Phase):
        raise ConfigError(f"unknown phase {name!r}{did_you_mean(name, get_args(Phase))}; use prefill or decode")
    return cast(Phase, name)


def _kind(name: str) -> PredictionKind:
    if name not in get_args(PredictionKind):
        known = get_args(PredictionKind)
        raise ConfigError(f"unknown predictions {name!r}{did_you_mean(name, known)}; use one of {', '.join(known)}")
    return cast(PredictionKind, name)


def _cut(trace: Trace, max_tokens: int, phase: Phase | None) -> tuple[Trace, tuple[str, ...]]:
    """The first `max_tokens` tokens (0: all), of `phase` where one is given, and what must be said of that."""
    if max_tokens < 0:
        raise ConfigError(f"--max-tokens must be at least 0 (all), found {max_tokens}")
    counted = np.ones(trace.n_tokens, bool) if phase is None else trace.phase == PHASE_CODES[phase]
    if max_tokens == 0 or max_tokens >= counted.sum():
        return trace, ()
    part = trace.head(int(np.flatnonzero(counted)[max_tokens - 1]) + 1)
    lost = [name for name in get_args(Phase) if phase is None and trace.has_phase(name) and not part.has_phase(name)]
    return part, tuple(f"the first {max_tokens} tokens have no {name}; --max-tokens 0 takes all" for name in lost)
