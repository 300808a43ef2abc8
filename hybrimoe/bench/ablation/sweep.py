"""The sweep behind `hybrimoe bench ablation`: cases, one simulated row each, cached, in several processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe.bench.ablation.spread import in_processes, on_cluster
from hybrimoe.extensions.policies import in_place_of, open_policy
from hybrimoe.machine.facts import environment
from hybrimoe.machine.profiles import open_hardware, open_shape, with_changes
from hybrimoe.tracing.sources import DEFAULT_LOCALITY, DEMO, DEMO_TRACE, open_trace, split
from scheduler.compiled import source_stamp
from scheduler.demand import Phase
from scheduler.lossy import resolve_lossy
from scheduler.machine.profile import ModelShape
from scheduler.simulator.bound import lower_bounds
from scheduler.simulator.run import simulate
from scheduler.simulator.simulator import SimulationConfig, Simulator, check_fit
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import PredictionKind, predictions_for
from scheduler.traces.synthetic import LOCALITIES, generate
from scheduler.traces.trace import PHASE_CODES, Trace

SYNTHETIC = "synthetic"
NAMING_FILES = ("policy", "trace", "hardware", "shape")
"""Fields of a case that may name files."""
#: Sequences of a synthetic trace: the first ones are the profile, the others are simulated.
PROFILE_SEQUENCES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One row to compute. ``trace`` is a file, demo, or synthetic (of ``n_prefill`` + ``n_decode`` tokens).

    ``seed``: another one is another synthetic trace, or begins with another sequence of a recorded one.
    ``lossy``: kind of the lossy policy beside ``policy``, empty without. ``predictions``: routing ahead.
    ``changes``: to the profile, see ``with_changes``. ``variant``: the assumption that is changed, empty for none.
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
    changes: str = ""
    variant: str = ""

    @property
    def key(self) -> str:
        """Name of the row's file: another one as soon as anything that the row depends on has changed.

        That is the case, HybriMoE's own sources, and the contents of trace, profile, shape and policy.
        """
        evidence = [asdict(self), _own_sources(), _content_of_profile(self.hardware), _content_of_shape(self.shape)]
        digests = [_digest(path) for path in self.files]
        text = json.dumps([evidence, digests], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the case reads beside what is in the package: trace, profile, shape, policy."""
        named = [self.trace, self.hardware, self.shape]
        found = [Path(name).expanduser() for name in named if name not in ("", DEMO, SYNTHETIC)]
        own = (DEMO_TRACE,) if self.trace == DEMO else ()
        return (*own, *(path for path in found if path.is_file()), *open_policy(self.policy).files)

    def moved(self, places: Mapping[str, str]) -> Case:
        """The case on a machine where its ``files`` lie in other places: path here -> path there."""

        def there(name: str) -> str:
            return places.get(str(Path(name).expanduser()), name)

        policy = in_place_of(self.policy, places)
        return replace(
            self, policy=policy, trace=there(self.trace), hardware=there(self.hardware), shape=there(self.shape)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a case is simulated on."""

    shape: ModelShape
    source: DemandSource
    frequencies: NDArray[np.float64]
    earlier: DemandSource


@cache
def _inputs(
    shape: str, trace: str, phase: Phase, n_prefill: int, n_decode: int, sequences: int, seed: int, kind: PredictionKind
) -> Inputs:
    if trace != SYNTHETIC:
        found = open_trace(None if trace == DEMO else trace, shape or None)
        calibration, evaluation = split(found.trace)
        evaluation = evaluation.from_sequence(seed)
        if phase == "prefill" and not evaluation.has_phase("prefill"):
            evaluation = evaluation.as_prefill(n_prefill)
        evaluation = _only(evaluation, phase, n_prefill if phase == "prefill" else n_decode, sequences)
        known_shape = found.shape
    else:
        known_shape = open_shape(shape)
        calibration, evaluation = _synthetic(known_shape, n_prefill, n_decode, sequences, seed)
    predictions = predictions_for(evaluation, kind, calibration, seed)
    known = expert_frequencies(calibration)
    return Inputs(known_shape, DemandSource(evaluation, predictions), known, DemandSource(calibration))


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
    config = open_policy(case.policy).simulated(
        cache_ratio=case.cache_ratio, dense_dtype=case.dense_dtype, expert_dtype=case.expert_dtype,
        lossy=resolve_lossy(case.lossy or None),
    )  # fmt: skip
    profile = with_changes(open_hardware(case.hardware), case.changes)
    results = simulate(
        inputs.source.trace, profile, inputs.shape, config, None, inputs.frequencies if case.informed else None, None,
        inputs.source, earlier=inputs.earlier if case.informed else None,
    )  # fmt: skip
    result = next(r for r in results if r.phase == case.phase)
    without_policy = replace(case, policy="static", label="", experiment="")
    predicted = inputs.source.predictions
    return {
        **asdict(case),
        **result.as_dict(),
        "label": case.label or case.policy,
        "routing_ahead": "none" if predicted is None else predicted.kind,
        "bound_ms": _bound_ms(without_policy) if case.experiment == "policies" else None,
        "profile_provenance": profile.provenance,
        "kind": "simulated",
        **environment(),
    }


@cache
def _bound_ms(case: Case) -> float:
    """What no policy can beat in a case."""
    inputs = _inputs(
        case.shape, case.trace, case.phase, case.n_prefill, case.n_decode, case.sequences, case.seed, case.predictions
    )
    config = SimulationConfig(
        policy=case.policy, cache_ratio=case.cache_ratio, dense_dtype=case.dense_dtype, expert_dtype=case.expert_dtype
    )
    profile = with_changes(open_hardware(case.hardware), case.changes)
    bounds = lower_bounds(Simulator(inputs.source.trace, profile, inputs.shape, config, source=inputs.source))
    return bounds[case.phase]


def _keep(row: dict[str, Any], case: Case, folder: Path) -> dict[str, Any]:
    """Writes a row atomically, so that a stop loses only the rows that are being computed."""
    path = folder / f"{case.key}.json"
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


@cache
def _own_sources() -> str:
    """Digest of the sources that a row comes from."""
    here = Path(__file__)
    return source_stamp("scheduler") + _digest(here) + _digest(here.parents[2] / "tracing" / "sources.py")


@cache
def _content_of_profile(name: str) -> dict[str, Any]:
    return open_hardware(name).to_mapping()


@cache
def _content_of_shape(name: str) -> dict[str, Any]:
    return asdict(open_shape(name)) if name else {}


def _digest(path: Path) -> str:
    found = path.stat()
    return _digest_of(path, found.st_mtime_ns, found.st_size)


@cache
def _digest_of(path: Path, _changed_ns: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sweep(
    cases: Sequence[Case],
    folder: Path,
    *,
    jobs: int = 1,
    cluster: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of all cases, in their order. ``jobs`` processes of this machine, or a Ray cluster with ``cluster``.

    Rows already in ``folder`` are not computed again; each is written there when it is done. Raises MissingExtraError
    where joblib or ray are not installed, ClusterError where no cluster answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = {case: case.key for case in cases}
    rows = {key: row for key in keys.values() if (row := _read(folder / f"{key}.json")) is not None}
    missing = sorted((case for case, key in keys.items() if key not in rows), key=_input_order)
    for case, row in _computed(missing, jobs, cluster) if missing else ():
        rows[keys[case]] = _keep(row, case, folder)
        if progress is not None:
            progress(len(rows), len(set(keys.values())))
    return [rows[keys[case]] for case in cases]


def _computed(cases: Sequence[Case], jobs: int, cluster: bool) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with its row, as they are done."""
    if cluster:
        found = on_cluster(_run_moved, cases, [case.files for case in cases])
    elif jobs == 1:
        found = ((index, run_case(case)) for index, case in enumerate(cases))
    else:
        found = in_processes(run_case, cases, jobs)
    for index, row in found:
        yield cases[index], row


def _run_moved(case: Case, places: Mapping[str, str]) -> dict[str, Any]:
    """``run_case`` on a worker of a cluster; the row names the files as they were asked for."""
    return {**run_case(case.moved(places)), **{name: getattr(case, name) for name in NAMING_FILES}}


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


def check_sources(
    traces: Sequence[str], shape: str, policies: Sequence[str], hardware: Sequence[str]
) -> tuple[str, ...]:
    """Opens everything that cases name; what must be said of the traces. Raises what the first bad name raises: a
    TraceError, PolicyError, ..."""
    notes = []
    for name in traces:
        found = open_trace(name, shape or None)
        check_fit(found.trace, found.shape)
        notes += [f"{name}: {note}" for note in found.notes]
    for text in policies:
        open_policy(text)
    for name in hardware:
        open_hardware(name)
    return tuple(notes)
