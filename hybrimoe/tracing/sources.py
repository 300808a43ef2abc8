"""Traces by name: a file, ``demo`` (shipped with the package), or ``synthetic``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import ConfigError
from hybrimoe.machine.profiles import open_shape
from scheduler.machine.profile import ModelShape
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.synthetic import LOCALITIES, generate
from scheduler.traces.trace import DRAWN, Trace

DEMO, SYNTHETIC = "demo", "synthetic"
DEMO_MODEL = Path(str(files("hybrimoe"))) / "demo" / "model"
DEMO_TRACE = Path(str(files("hybrimoe"))) / "tracing" / "data" / "demo.npz"

#: A synthetic trace's sequences: a prompt and a reply.
SYNTHETIC_PREFILL, SYNTHETIC_DECODE, SYNTHETIC_SEQUENCES = 128, 128, 4
#: Shapes whose routing was published in the form of hit rates or traces have a locality of their own.
DEFAULT_LOCALITY = "olmoe-1b-7b"
#: Share of a trace's sequences (or tokens, where it has one sequence) that profiles are taken from.
CALIBRATION_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class TraceInput:
    """A trace with the shape of its model, and what was decided for the user (``notes``)."""

    trace: Trace
    shape: ModelShape
    notes: tuple[str, ...] = ()


def open_trace(
    source: str | None, shape: str | None, *, seed: int = 0, sequences: int = SYNTHETIC_SEQUENCES
) -> TraceInput:
    """Trace and shape from what a command line gives.

    No source: the demo trace, or a synthetic one where a shape is given that the demo model does not have. No shape:
    that of the demo model, of the trace's model where a shipped shape has its sizes, else the trace's sizes must be
    given.
    """
    if source == SYNTHETIC or (source is None and shape is not None and not _is_demo_shape(open_shape(shape))):
        found = open_shape(shape if shape is not None else DEMO_MODEL)
        return TraceInput(_synthetic(found, seed, sequences), found, ("trace: synthetic routing of this shape",))
    trace = load_trace(source or DEMO)
    scores = _scores_of(trace)
    if shape is not None:
        return TraceInput(trace, open_shape(shape), scores)
    found, note = _shape_of(trace)
    return TraceInput(trace, found, (note, *scores))


def _scores_of(trace: Trace) -> tuple[str, ...]:
    """What must be said where policies see less than they do at run time."""
    drawn = (
        ("the tokens were drawn from counts of whole sequences: how often each expert is used was recorded, which"
         " experts follow each other was not, so that only policies that go by use can be compared",)
        if trace.meta.get("order") == DRAWN
        else ()
    )  # fmt: skip
    return (*drawn, *_weights_of(trace))


def _weights_of(trace: Trace) -> tuple[str, ...]:
    """That policies which weigh experts by the gate have no weights."""
    if trace.expert_weights is None and trace.gate_scores is None:
        return (
            "the trace has no routing weights: policies that read the gates' scores (mrs of hybrimoe, hobbit, learned, "
            "lossy ones) take all routed experts of a token as equal; `trace record` keeps weights",
        )
    return ()


def load_trace(source: str) -> Trace:
    """A trace by file or the name ``demo``."""
    return Trace.load(DEMO_TRACE if source == DEMO else Path(source).expanduser())


def _synthetic(shape: ModelShape, seed: int, sequences: int) -> Trace:
    locality = shape.name if shape.name in LOCALITIES else DEFAULT_LOCALITY
    length = SYNTHETIC_PREFILL + SYNTHETIC_DECODE
    return generate(
        shape.n_layers,
        shape.n_experts,
        shape.top_k,
        length,
        sequences,
        n_prefill=SYNTHETIC_PREFILL,
        locality=locality,
        seed=seed,
    )


def _is_demo_shape(shape: ModelShape) -> bool:
    demo = open_shape(DEMO_MODEL)
    return (shape.n_layers, shape.n_experts, shape.top_k) == (demo.n_layers, demo.n_experts, demo.top_k)


def _shape_of(trace: Trace) -> tuple[ModelShape, str]:
    """The shape that goes with a trace: the demo model's, or the shipped one whose name the trace's model ends with."""
    if trace.meta["model"] == DEMO:
        return replace(open_shape(DEMO_MODEL), name="demo"), "model shape: the demo model"
    from yaml_rules.shapes import shape_names

    model = str(trace.meta["model"]).lower()
    if (Path(trace.meta["model"]) / "config.json").is_file():
        return open_shape(trace.meta["model"]), f"model shape: that of {trace.meta['model']}"
    for name in shape_names():
        if name in model:
            return open_shape(name), f"model shape: {name} (from the trace's model {trace.meta['model']})"
    raise ConfigError(
        f"the trace's model {trace.meta['model']!r} has no shipped shape; give --model-shape with a name "
        f"({', '.join(shape_names())}) or its config.json"
    )


def split(trace: Trace, share: float = CALIBRATION_SHARE) -> tuple[Trace, Trace]:
    """(calibration, evaluation): the first sequences for profiles and predictors, the others to be simulated.

    A trace of one sequence is cut by tokens; one too short to be cut (fewer than 8 tokens) serves as both.
    """
    sequences = [int(trace.sequence[start]) for start, _ in trace.sequence_spans()]
    if len(sequences) > 1:
        cut = min(len(sequences) - 1, max(1, round(share * len(sequences))))
        return trace.select_sequences(sequences[:cut]), trace.select_sequences(sequences[cut:])
    cut = round(share * trace.n_tokens)
    if trace.n_tokens < 8:
        return trace, trace
    return trace.head(cut), trace.tail(trace.n_tokens - cut)


def frequencies(traces: Iterable[Trace]) -> NDArray[np.float64]:
    """Mean use of each expert over traces of one model, float64 [layers, experts]."""
    return np.asarray(np.mean([expert_frequencies(trace) for trace in traces], axis=0))
