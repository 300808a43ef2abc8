"""Recorded routing: the .npz trace format, its validation, and its steps.

Arrays: ``expert_ids`` int16 [tokens, layers, top_k] (``-1`` absent), ``expert_weights`` float16 of the same shape
(optional), ``sequence`` int32 [tokens], ``phase`` uint8 [tokens] (0 prefill, 1 decode), ``meta`` JSON text, optional
``predicted_ids`` int16 [tokens, layers, horizon, p]: the routing that the gates of layers l + 1, l + 2, ... gave from
layer l's hidden state, best first; optional ``embeddings`` float16 [tokens, hidden]: the model's input embeddings of
the tokens, which predictors of routes learn from; optional ``gate_scores`` float16 [tokens, layers, num_experts]: the
gate's probabilities of all experts, routed or not, which scores such as HybriMoE's MRS are defined on; optional
``token_ids`` int32 [tokens]: the tokens themselves, by the model's tokenizer; optional ``hidden`` float16 [tokens,
layers, width]: the hidden state that each layer's router saw, or random projections of it.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import Phase
from scheduler.errors import SchedulerError

PHASE_CODES: dict[Phase, int] = {"prefill": 0, "decode": 1}
REQUIRED_ARRAYS = ("expert_ids", "sequence", "phase", "meta")
OPTIONAL_ARRAYS: Mapping[str, type[np.generic]] = {
    "expert_weights": np.float16, "predicted_ids": np.int16, "embeddings": np.float16, "gate_scores": np.float16,
    "token_ids": np.int32, "hidden": np.float16,
}  # fmt: skip
REQUIRED_META = ("model", "num_layers", "num_experts", "top_k")
DRAWN = "drawn"
"""Value of the optional meta key ``order``: only how often each expert was used was recorded, not by which token."""


class TraceError(SchedulerError):
    """A trace file or its arrays cannot be used; the message says what was expected and found."""


@dataclass(frozen=True, slots=True)
class TraceStep:
    """Tokens ``start:stop`` of the trace that are computed together; ``position`` tokens of the sequence precede
    them. ``n_sequences``: a step of a batch has as many tokens of each of them."""

    sequence: int
    phase: Phase
    start: int
    stop: int
    position: int
    first: bool = False  # first step of its sequence
    n_sequences: int = 1

    @property
    def n_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Routing of one model over some sequences; see the module's docstring for shapes and dtypes."""

    expert_ids: NDArray[np.int16]
    sequence: NDArray[np.int32]
    phase: NDArray[np.uint8]
    meta: Mapping[str, Any]
    expert_weights: NDArray[np.float16] | None = None
    predicted_ids: NDArray[np.int16] | None = None
    embeddings: NDArray[np.float16] | None = None
    gate_scores: NDArray[np.float16] | None = None
    token_ids: NDArray[np.int32] | None = None
    hidden: NDArray[np.float16] | None = None
    name: str = field(default="trace")

    def __post_init__(self) -> None:
        _check(self)

    @property
    def n_tokens(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def n_layers(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    @property
    def n_experts(self) -> int:
        return int(self.meta["num_experts"])

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read and validate a trace; raises :class:`TraceError` for anything else."""
        path = Path(path)
        arrays = _read_arrays(path)
        missing = [name for name in REQUIRED_ARRAYS if name not in arrays]
        if missing:
            raise TraceError(f"{path} is no routing trace: arrays {missing} are missing, found {sorted(arrays)}")
        return cls(
            expert_ids=_as_dtype(arrays["expert_ids"], np.int16, "expert_ids", path),
            sequence=_as_dtype(arrays["sequence"], np.int32, "sequence", path),
            phase=_as_dtype(arrays["phase"], np.uint8, "phase", path),
            meta=_read_meta(arrays["meta"], path),
            name=path.stem,
            **{
                name: _as_dtype(arrays[name], dtype, name, path)
                for name, dtype in OPTIONAL_ARRAYS.items()
                if name in arrays
            },
        )

    def save(self, path: str | Path) -> None:
        """Write atomically (a temporary file beside ``path``, then a rename)."""
        path = Path(path)
        arrays: dict[str, NDArray[Any]] = {
            "expert_ids": self.expert_ids,
            "sequence": self.sequence,
            "phase": self.phase,
            "meta": np.array(json.dumps(dict(self.meta), sort_keys=True)),
            **self._optional(),
        }
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as handle:
                np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _optional(self) -> dict[str, Any]:
        """The optional arrays that this trace has."""
        found = {name: getattr(self, name) for name in OPTIONAL_ARRAYS}
        return {name: array for name, array in found.items() if array is not None}

    def has_phase(self, phase: Phase) -> bool:
        return bool((self.phase == PHASE_CODES[phase]).any())

    def require_phase(self, phase: Phase) -> None:
        """Raise :class:`TraceError` when the trace has no token of ``phase``."""
        if not self.has_phase(phase):
            other = "decode" if phase == "prefill" else "prefill"
            raise TraceError(f"trace {self.name!r} has no {phase} tokens, only {other}; choose --phase {other}")

    def steps(self, phase: Phase | None = None, prefill_chunk: int | None = None) -> Iterator[TraceStep]:
        """Steps in order: each prefill as one step (or chunks of ``prefill_chunk`` tokens), each decode token as
        one."""
        if phase is not None:
            self.require_phase(phase)
        for start, stop in self.sequence_spans():
            first = True
            for step in self._sequence_steps(start, stop, prefill_chunk):
                if phase is None or step.phase == phase:
                    yield replace(step, first=first)
                    first = False

    def _sequence_steps(self, start: int, stop: int, prefill_chunk: int | None) -> Iterator[TraceStep]:
        sequence = int(self.sequence[start])
        n_prefill = int((self.phase[start:stop] == PHASE_CODES["prefill"]).sum())
        chunk = prefill_chunk or max(1, n_prefill)
        for begin in range(start, start + n_prefill, chunk):
            yield TraceStep(sequence, "prefill", begin, min(begin + chunk, start + n_prefill), begin - start)
        for token in range(start + n_prefill, stop):
            yield TraceStep(sequence, "decode", token, token + 1, token - start)

    def sequence_spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each sequence in file order."""
        cuts = np.flatnonzero(np.diff(self.sequence)) + 1
        edges = [0, *cuts.tolist(), self.n_tokens]
        return list(pairwise(edges))

    def head(self, n_tokens: int) -> "Trace":
        """The first ``n_tokens`` tokens."""
        return self._take(np.arange(min(n_tokens, self.n_tokens)))

    def tail(self, n_tokens: int) -> "Trace":
        """The last ``n_tokens`` tokens."""
        return self._take(np.arange(max(0, self.n_tokens - n_tokens), self.n_tokens))

    def with_predictions(self, predicted_ids: NDArray[np.int16]) -> "Trace":
        """The same routing with these predictions."""
        return replace(self, predicted_ids=predicted_ids)

    def select_sequences(self, sequences: "list[int] | NDArray[np.int32]") -> "Trace":
        """Only these sequences, in file order; used to keep tuning and evaluation apart."""
        return self._take(np.flatnonzero(np.isin(self.sequence, np.asarray(sequences))))

    def from_sequence(self, first: int) -> "Trace":
        """The same sequences in turn, beginning with the ``first``-th (modulo their number)."""
        starts = [start for start, _ in self.sequence_spans()]
        return self._take(np.roll(np.arange(self.n_tokens), -starts[first % len(starts)]))

    def as_prefill(self, n_tokens: int) -> "Trace":
        """Cut the token stream into prompts of exactly ``n_tokens``: routing recorded token by token, used as prefill.

        Neighbouring sequences are joined where one is shorter than a prompt. The remainder is dropped.
        """
        n_prompts = self.n_tokens // n_tokens
        if n_prompts < 1:
            raise TraceError(f"trace {self.name!r} has {self.n_tokens} tokens, fewer than one prompt of {n_tokens}")
        taken = self._take(np.arange(n_prompts * n_tokens))
        return replace(
            taken,
            sequence=np.repeat(np.arange(n_prompts, dtype=np.int32), n_tokens),
            phase=np.zeros(n_prompts * n_tokens, dtype=np.uint8),
        )

    def reordered(self, index: NDArray[np.intp], sequence: NDArray[np.int32], phase: NDArray[np.uint8]) -> "Trace":
        """Tokens ``index`` of this trace in that order, as other sequences and phases."""
        return self._take(index, sequence=sequence, phase=phase)

    def _take(
        self, index: NDArray[np.intp], sequence: NDArray[np.int32] | None = None, phase: NDArray[np.uint8] | None = None
    ) -> "Trace":
        return replace(
            self,
            expert_ids=self.expert_ids[index],
            sequence=self.sequence[index] if sequence is None else sequence,
            phase=self.phase[index] if phase is None else phase,
            **{name: array[index] for name, array in self._optional().items()},
        )


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise TraceError(f"no trace at {path}: expected a .npz file")
    if not zipfile.is_zipfile(path):  # numpy would speak of pickled data
        raise TraceError(f"{path} is damaged or no .npz trace (an archive with {REQUIRED_ARRAYS}); record it again")
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError, zipfile.LargeZipFile) as error:
        raise TraceError(f"{path} is damaged or no .npz trace ({error}); record it again") from error
    except Exception as error:  # zlib.error and struct.error from a damaged archive have no common root
        raise TraceError(f"{path} is damaged ({type(error).__name__}: {error}); record it again") from error


def _read_meta(array: NDArray[Any], path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(str(array[()]))
    except json.JSONDecodeError as error:
        raise TraceError(f"{path}: meta must be JSON text ({error})") from error
    if not isinstance(meta, dict):
        raise TraceError(f"{path}: meta must be a JSON object, found {type(meta).__name__}")
    return meta


def _as_dtype(array: NDArray[Any], dtype: type, name: str, path: Path) -> NDArray[Any]:
    """Convert within the same kind (int32 ids are fine, floats as ids are not) and refuse what does not fit."""
    wanted = np.dtype(dtype)
    if (array.dtype.kind in "iu") != (wanted.kind in "iu") or array.dtype.kind not in "iuf":
        raise TraceError(f"{path}: {name} must be {wanted}, found {array.dtype}")
    converted = array.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(converted, array):
        raise TraceError(f"{path}: {name} holds values that do not fit {wanted}")
    return converted


def _check(trace: Trace) -> None:
    _check_meta(trace)
    _check_shapes(trace)
    n_experts = trace.n_experts
    _check_ids(trace.expert_ids, n_experts, f"trace {trace.name!r}: expert_ids")
    if trace.predicted_ids is not None:
        _check_ids(trace.predicted_ids, n_experts, f"trace {trace.name!r}: predicted_ids")
    named = {name: getattr(trace, name) for name in ("expert_weights", "embeddings", "gate_scores", "hidden")}
    for name, values in named.items():
        if values is not None and not np.isfinite(values).all():
            raise TraceError(f"trace {trace.name!r}: {name} hold NaN or infinite values")
    if not np.isin(trace.phase, (0, 1)).all():
        raise TraceError(
            f"trace {trace.name!r}: phase must be 0 (prefill) or 1 (decode), found {int(trace.phase.max())}"
        )
    _check_order(trace)


def _check_meta(trace: Trace) -> None:
    missing = [key for key in REQUIRED_META if key not in trace.meta]
    if missing:
        raise TraceError(f"trace {trace.name!r}: meta lacks {missing}; it has {sorted(trace.meta)}")
    for key in REQUIRED_META[1:]:
        value = trace.meta[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TraceError(f"trace {trace.name!r}: meta {key} must be a positive integer, found {value!r}")


def _check_shapes(trace: Trace) -> None:
    ids, where = trace.expert_ids, f"trace {trace.name!r}"
    expected = (trace.meta["num_layers"], trace.meta["top_k"])
    if ids.ndim != 3 or ids.shape[1:] != expected:
        raise TraceError(f"{where}: expert_ids must be [tokens, {expected[0]}, {expected[1]}], found {list(ids.shape)}")
    n_tokens = ids.shape[0]
    if n_tokens == 0:
        raise TraceError(f"{where} is empty: it has no token")
    for name, array in (("sequence", trace.sequence), ("phase", trace.phase)):
        if array.shape != (n_tokens,):
            raise TraceError(f"{where}: {name} must have {n_tokens} entries, found shape {list(array.shape)}")
    weights, predicted = trace.expert_weights, trace.predicted_ids
    if weights is not None and weights.shape != ids.shape:
        raise TraceError(f"{where}: expert_weights must be {list(ids.shape)}, found {list(weights.shape)}")
    if predicted is not None and (predicted.ndim != 4 or predicted.shape[:2] != ids.shape[:2]):
        wanted = f"[{n_tokens}, {ids.shape[1]}, horizon, p]"
        raise TraceError(f"{where}: predicted_ids must be {wanted}, found {list(predicted.shape)}")
    wanted_scores = (*ids.shape[:2], trace.n_experts)
    if trace.gate_scores is not None and trace.gate_scores.shape != wanted_scores:
        raise TraceError(f"{where}: gate_scores must be {list(wanted_scores)}, found {list(trace.gate_scores.shape)}")
    if trace.embeddings is not None and (trace.embeddings.ndim != 2 or len(trace.embeddings) != n_tokens):
        raise TraceError(f"{where}: embeddings must be [{n_tokens}, hidden], found {list(trace.embeddings.shape)}")
    if trace.hidden is not None and (trace.hidden.ndim != 3 or trace.hidden.shape[:2] != ids.shape[:2]):
        raise TraceError(
            f"{where}: hidden must be [{n_tokens}, {ids.shape[1]}, width], found {list(trace.hidden.shape)}"
        )
    if trace.token_ids is not None and trace.token_ids.shape != (n_tokens,):
        raise TraceError(f"{where}: token_ids must have {n_tokens} entries, found {list(trace.token_ids.shape)}")


def _check_ids(ids: NDArray[np.int16], n_experts: int, what: str) -> None:
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < -1 or high >= n_experts:
        raise TraceError(f"{what} must lie in -1..{n_experts - 1}, found {low}..{high}")


def _check_order(trace: Trace) -> None:
    runs = [int(trace.sequence[start]) for start, _ in trace.sequence_spans()]
    if len(set(runs)) != len(runs):
        raise TraceError(f"trace {trace.name!r}: the tokens of a sequence must be contiguous; a sequence id returns")
    same = trace.sequence[1:] == trace.sequence[:-1]
    if (same & (trace.phase[1:] < trace.phase[:-1])).any():
        raise TraceError(f"trace {trace.name!r}: prefill tokens follow decode tokens inside a sequence")
