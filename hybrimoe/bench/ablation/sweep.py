"""The sweep behind `hybrimoe bench ablation`: cases, one simulated row each, cached, in several processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import MissingExtraError
from hybrimoe.machine.facts import environment
from hybrimoe.machine.profiles import open_hardware, open_shape
from hybrimoe.tracing.sources import DEFAULT_LOCALITY, DEMO, load_trace, open_trace, split
from scheduler.demand import Phase
from scheduler.lossy import resolve_lossy
from scheduler.machine.profile import ModelShape
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import PredictionKind, predictions_for
from scheduler.traces.synthetic import LOCALITIES, generate
from scheduler.traces.trace import PHASE_CODES, Trace

#: Bump when the meaning of a row changes: cached rows of another version are not used.
ROW_VERSION = 4
SYNTHETIC = "synthetic"
#: Sequences of a synthetic trace: the first ones are the profile, the others are simulated.
PROFILE_SEQUENCES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One row to compute. ``trace`` is a file, demo, or synthetic (of ``n_prefill`` + ``n_decode`` tokens).

    ``lossy``: kind of the lossy policy beside ``policy``, empty without. ``predictions``: routing ahead.
    """

    experiment: str
    policy: str
    hardware: str
    shape: str
    trace: str
    cache_ratio: float
    phase: Phase
    n_prefill: int = 0
    n_decode: int = 0
    sequences: int = 1
    informed: bool = True
    label: str = ""
    dense_dtype: str = "int8"
    expert_dtype: str = "int4"
    seed: int = 0
    lossy: str = ""
    predictions: PredictionKind = "auto"

    @property
    def key(self) -> str:
        """Name of the row's cache file."""
        text = json.dumps([ROW_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a case is simulated on."""

    shape: ModelShape
    source: DemandSource
    frequencies: NDArray[np.float64]


@cache
def _inputs(
    shape: str, trace: str, phase: Phase, n_prefill: int, n_decode: int, sequences: int, seed: int, kind: PredictionKind
) -> Inputs:
    if trace != SYNTHETIC:
        found = open_trace(None if trace == DEMO else trace, shape or None)
        calibration, evaluation = split(found.trace)
        if phase == "prefill" and not evaluation.has_phase("prefill"):
            evaluation = evaluation.as_prefill(n_prefill)
        evaluation = _only(evaluation, phase, n_prefill if phase == "prefill" else n_decode, sequences)
        known_shape = found.shape
    else:
        known_shape = open_shape(shape)
        calibration, evaluation = _synthetic(known_shape, n_prefill, n_decode, sequences, seed)
    predictions = predictions_for(evaluation, kind, calibration, seed)
    return Inputs(known_shape, DemandSource(evaluation, predictions), expert_frequencies(calibration))


def _synthetic(shape: ModelShape, n_prefill: int, n_decode: int, sequences: int, seed: int) -> tuple[Trace, Trace]:
    locality = shape.name if shape.name in LOCALITIES else DEFAULT_LOCALITY
    length = n_prefill + n_decode
    made = generate(
        shape.n_layers, shape.n_experts, shape.top_k, length, sequences + PROFILE_SEQUENCES,
        n_prefill=n_prefill, locality=locality, seed=seed,
    )  # fmt: skip
    first = list(range(PROFILE_SEQUENCES))
    return made.select_sequences(first), made.select_sequences(
        list(range(PROFILE_SEQUENCES, PROFILE_SEQUENCES + sequences))
    )


def _only(trace: Trace, phase: Phase, n_tokens: int, sequences: int) -> Trace:
    """The first sequences; for decode, the tokens up to the ``n_tokens``-th decode token."""
    trace.require_phase(phase)
    if phase == "decode":
        decoded = np.cumsum(trace.phase == PHASE_CODES["decode"])
        return trace.head(int(np.searchsorted(decoded, n_tokens)) + 1) if n_tokens else trace
    return trace.select_sequences([int(trace.sequence[start]) for start, _ in trace.sequence_spans()][:sequences])


def run_case(case: Case) -> dict[str, Any]:
    """Simulate one row. Plain data: the case, the result, and where it was computed."""
    inputs = _inputs(
        case.shape, case.trace, case.phase, case.n_prefill, case.n_decode, case.sequences, case.seed, case.predictions
    )
    config = SimulationConfig(
        policy=case.policy, cache_ratio=case.cache_ratio, dense_dtype=case.dense_dtype, expert_dtype=case.expert_dtype,
        lossy=resolve_lossy(case.lossy or None),
    )  # fmt: skip
    profile = open_hardware(case.hardware)
    results = simulate(
        inputs.source.trace, profile, inputs.shape, config, None, inputs.frequencies if case.informed else None, None,
        inputs.source,
    )  # fmt: skip
    result = next(r for r in results if r.phase == case.phase)
    predicted = inputs.source.predictions
    return {
        **asdict(case),
        **result.as_dict(),
        "label": case.label or case.policy,
        "routing_ahead": "none" if predicted is None else predicted.kind,
        "profile_provenance": profile.provenance,
        "kind": "simulated",
        **environment(),
    }


def cached_row(case: Case, folder: Path) -> dict[str, Any]:
    """The row of a case: from its file, else computed and written (atomically, so a stop loses only this row)."""
    path = folder / f"{case.key}.json"
    known = _read(path)
    if known is not None:
        return known
    row = run_case(case)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(row), encoding="utf-8")
    partial.replace(path)
    return row


def _read(path: Path) -> dict[str, Any] | None:
    """A finished row; None where there is none, or where the file is not one (it is then computed again)."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "latency_ms" in row else None


def sweep(
    cases: Sequence[Case],
    folder: Path,
    *,
    jobs: int = 1,
    cluster: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of all cases, in their order. ``jobs`` processes by joblib, or a Ray cluster with ``cluster``.

    Rows already in ``folder`` are not computed again. Raises MissingExtraError where joblib or ray are not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(cases, key=_input_order)
    if jobs == 1 and not cluster:
        found: Iterable[dict[str, Any]] = (cached_row(case, folder) for case in ordered)
        rows = dict(zip([case.key for case in ordered], _counted(found, len(ordered), progress), strict=True))
    else:
        found = _in_parallel(ordered, folder, jobs, cluster)
        rows = dict(zip([case.key for case in ordered], _counted(found, len(ordered), progress), strict=True))
    return [rows[case.key] for case in cases]


def _input_order(case: Case) -> tuple[Any, ...]:
    """Cases on the same inputs follow each other, so that a process prepares them once."""
    return (
        case.shape,
        case.trace,
        case.phase,
        case.n_prefill,
        case.n_decode,
        case.cache_ratio,
        case.hardware,
        case.policy,
    )


def _counted(
    rows: Iterable[dict[str, Any]], total: int, progress: Callable[[int, int], None] | None
) -> Iterable[dict[str, Any]]:
    for done, row in enumerate(rows, start=1):
        if progress is not None:
            progress(done, total)
        yield row


def _in_parallel(cases: Sequence[Case], folder: Path, jobs: int, cluster: bool) -> Iterable[dict[str, Any]]:
    try:
        import joblib
    except ImportError as error:
        raise MissingExtraError("bench", "joblib runs the sweep in several processes") from error
    backend = "loky"
    if cluster:
        try:
            from ray.util.joblib import register_ray
        except ImportError as error:
            raise MissingExtraError("cluster", "--cluster needs ray: pip install ray") from error
        register_ray()
        backend = "ray"
    with joblib.parallel_config(backend=backend, n_jobs=jobs):
        run = joblib.Parallel(return_as="list" if cluster else "generator")
        yield from run(joblib.delayed(cached_row)(case, folder) for case in cases)


def trace_names(extra: Sequence[str]) -> list[str]:
    """demo and the given files, each checked by loading it."""
    for name in extra:
        load_trace(name)
    return [DEMO, *extra]
