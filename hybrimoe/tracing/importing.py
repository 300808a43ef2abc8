"""Routing that other programs recorded, as a trace: llama.cpp's `moe-trace`, responses of vLLM and SGLang, arrays,
MoE-Infinity's collections.

- `.csv`, of llama.cpp: `layer,expert`, a row for each expert that a token is sent to, step by step and layer by
  layer. Steps of many tokens are prompts; one that follows a reply begins a sequence, and so does a header.
- `.json`, `.jsonl`: responses with `routed_experts` in base64, an .npy file from vLLM, bare integers from SGLang. A
  response is a sequence; its usage says how long the prompt is.
- `.npy`: integers [tokens, layers, k], ids as vLLM's `RequestOutput` has them; one sequence.
- `.npy`: floats [sequences, layers, experts], a trace collection of MoE-Infinity: how many tokens of each sequence an
  expert got. Tokens with these counts are drawn; their order is not what was recorded, and the trace says so.

None of them has routing weights or forecasts. What is taken for granted is checked: sizes against the model's shape,
steps through all layers, distinct experts.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe.text_files import read_text
from scheduler.machine.profile import ModelShape
from scheduler.traces.trace import DRAWN, Trace, TraceError

CSV_HEADER = "layer,expert"
ABSENT, PREFILL, DECODE = -1, 0, 1
WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    "int32": np.dtype("<i4"), "uint16": np.dtype("<u2"), "uint8": np.dtype("u1")
}  # fmt: skip
"""SGLang's encodings of ids, by the name that newer versions send along."""
KEY = "routed_experts"

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Imported:
    """One sequence: ids [tokens, layers, k], and how many of the tokens are its prompt's; ``drawn``: which token has
    which experts was not recorded."""

    ids: Ids
    n_prompt: int
    drawn: bool = False


def import_traces(files: Sequence[Path], shape: ModelShape, *, prompt_tokens: int, licence: str) -> Trace:
    """One trace of all sequences in `files`, in their order; formats go by the name's ending, see the module.

    shape: of the model that was recorded. prompt_tokens: of each .npy file. Raises TraceError for a file that cannot be
    read, in another format, or of another model.
    """
    readers = {".csv": _llama_cpp, ".json": _responses, ".jsonl": _responses, ".npy": _array}
    sequences: list[Imported] = []
    for file in files:
        reader = readers.get(file.suffix.lower())
        if reader is None:
            raise TraceError(f"{file}: expected {', '.join(readers)}, found {file.suffix or 'a name without ending'!r}")
        sequences += reader(file, shape, prompt_tokens)
    if not sequences:
        raise TraceError(f"no sequence in {', '.join(map(str, files))}")
    ids = np.concatenate([one.ids for one in sequences])
    phase = [np.where(np.arange(len(one.ids)) < one.n_prompt, PREFILL, DECODE) for one in sequences]
    drawn = {"order": DRAWN} if any(one.drawn for one in sequences) else {}
    meta = {
        **drawn,
        "model": shape.name, "num_layers": shape.n_layers, "num_experts": shape.n_experts, "top_k": shape.top_k,
        "source": f"hybrimoe trace import {' '.join(file.name for file in files)}", "licence": licence,
    }  # fmt: skip
    return Trace(
        expert_ids=ids.astype(np.int16),
        sequence=np.repeat(np.arange(len(sequences), dtype=np.int32), [len(one.ids) for one in sequences]),
        phase=np.concatenate(phase).astype(np.uint8),
        meta=meta,
        name=files[0].stem,
    )


def _llama_cpp(file: Path, shape: ModelShape, _: int) -> Iterator[Imported]:
    """Sequences of a CSV file of llama.cpp's `moe-trace`; several files may have been joined."""
    lines = _text(file).split("\n")
    headers = [at for at, line in enumerate(lines) if line.strip() == CSV_HEADER]
    if not headers or headers[0] != 0:
        raise TraceError(f"{file}: expected the header {CSV_HEADER!r} in line 1, found {lines[0][:40]!r}")
    for begin, end in zip(headers, [*headers[1:], len(lines)], strict=True):
        yield from _recording(file, _rows(file, lines, begin + 1, end), begin + 1, shape)


def _rows(file: Path, lines: list[str], begin: int, end: int) -> Ids:
    """The rows in lines begin..end as [rows, 2]; empty lines at the end do not count."""
    while end > begin and not lines[end - 1].strip():
        end -= 1
    try:
        cells = ",".join(lines[begin:end]).split(",") if end > begin else []
        return np.array(cells, dtype=np.int64).reshape(end - begin, 2)
    except ValueError as error:
        bad = next(at for at in range(begin, end) if not _is_row(lines[at]))
        raise TraceError(f"{file}, line {bad + 1}: expected two integers, found {lines[bad]!r}") from error


def _is_row(line: str) -> bool:
    cells = line.split(",")
    return len(cells) == 2 and all(cell.strip().lstrip("-").isdigit() for cell in cells)


def _recording(file: Path, rows: Ids, first_line: int, shape: ModelShape) -> Iterator[Imported]:
    """Cuts the rows of one recording into steps, and these into sequences."""
    if not len(rows):
        return
    layers, inverse = np.unique(rows[:, 0], return_inverse=True)
    if len(layers) != shape.n_layers:
        raise TraceError(f"{file}: {len(layers)} layers have experts, {shape.name} has {shape.n_layers}")
    cuts = np.flatnonzero(np.diff(inverse)) + 1  # where the next layer's rows begin
    runs = np.split(np.arange(len(rows)), cuts)
    done: list[Ids] = []
    n_prompt = 0
    for at in range(0, len(runs), shape.n_layers):
        step = runs[at : at + shape.n_layers]
        found = [int(inverse[run[0]]) for run in step]
        if found != list(range(len(step))):
            line = first_line + int(step[0][0]) + 1
            names = ", ".join(str(layers[layer]) for layer in found[:8])
            raise TraceError(f"{file}, line {line}: expected a step through all layers in order, found {names}, ...")
        if len(step) < shape.n_layers:
            break  # the recording ended within a step
        ids = _step(file, rows, step, first_line, shape)
        if len(ids) > 1 and n_prompt < sum(map(len, done)):  # another prompt after a reply
            yield Imported(np.concatenate(done), n_prompt)
            done, n_prompt = [], 0
        done.append(ids)
        n_prompt += len(ids) if len(ids) > 1 else 0
    if done:
        yield Imported(np.concatenate(done), n_prompt)


def _step(file: Path, rows: Ids, step: Sequence[NDArray[np.int64]], first_line: int, shape: ModelShape) -> Ids:
    """[tokens, layers, k] of one step. llama.cpp computes the last layer of a prompt only for the tokens whose logits
    are wanted, the last ones; the others have no experts there."""
    n_tokens = max(len(run) for run in step) // shape.top_k
    ids = np.full((n_tokens, len(step), shape.top_k), ABSENT, np.int64)
    for layer, run in enumerate(step):
        if len(run) % shape.top_k:
            line = first_line + int(run[0]) + 1
            raise TraceError(f"{file}, line {line}: {len(run)} experts of a layer are no multiple of top-{shape.top_k}")
        chosen = rows[run, 1].reshape(-1, shape.top_k)
        ids[n_tokens - len(chosen) :, layer] = chosen
    _require_distinct(file, ids)
    return ids


def _responses(file: Path, shape: ModelShape, _: int) -> Iterator[Imported]:
    """Sequences of responses of vLLM or SGLang: one JSON value (an object or a list), or one object a line."""
    text = _text(file)
    parts = [line for line in text.splitlines() if line.strip()] if file.suffix.lower() == ".jsonl" else [text]
    try:
        values = [json.loads(part) for part in parts]
    except json.JSONDecodeError as error:
        raise TraceError(f"{file}: no JSON: {error}") from error
    found = [one for value in values for one in _with_routing(value, None)]
    if not found:
        raise TraceError(
            f"{file}: no response in it has {KEY!r}; start the server with --enable-return-routed-experts, and ask"
            " SGLang for return_routed_experts"
        )
    for holder, n_prompt in found:
        if n_prompt is None:
            raise TraceError(f"{file}: a response does not say its prompt_tokens (in usage, or in meta_info)")
        ids = _of_layers(file, _decoded(file, holder, shape), shape)
        yield Imported(ids, min(n_prompt, len(ids)))


def _with_routing(value: Any, n_prompt: int | None) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Objects with routing anywhere in a response, each with the prompt's tokens that the nearest object around it
    tells."""
    if isinstance(value, dict):
        usage = value.get("usage")
        told = (usage if isinstance(usage, dict) else value).get("prompt_tokens")
        n_prompt = told if isinstance(told, int) else n_prompt
        if isinstance(value.get(KEY), str):
            yield value, n_prompt
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _with_routing(inner, n_prompt)


def _decoded(file: Path, holder: dict[str, Any], shape: ModelShape) -> Ids:
    """[tokens, layers, k] from base64: an .npy file, or integers whose layers and k are the model's."""
    try:
        data = base64.b64decode(holder[KEY], validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceError(f"{file}: {KEY} is no base64: {error}") from error
    if data.startswith(b"\x93NUMPY"):
        return _loaded(file, io.BytesIO(data))
    name = holder.get(f"{KEY}_dtype", "int32")
    if name not in WIRE_DTYPES:
        raise TraceError(f"{file}: {KEY}_dtype must be one of {', '.join(WIRE_DTYPES)}, found {name!r}")
    width = WIRE_DTYPES[name].itemsize * shape.top_k
    n_rows, rest = divmod(len(data), width)
    if rest:
        raise TraceError(f"{file}: {len(data)} bytes of {KEY} are no multiple of {width} (top-{shape.top_k} of {name})")
    rows: Ids = np.frombuffer(data, WIRE_DTYPES[name]).reshape(n_rows, shape.top_k).astype(np.int64)
    return rows.reshape(-1, _n_recorded_layers(file, rows, shape), shape.top_k)


def _n_recorded_layers(file: Path, rows: Ids, shape: ModelShape) -> int:
    """How many layers a token has in bare integers: those with experts, or all of the model with the dense ones."""
    every = shape.n_layers + shape.n_dense_layers
    if len(rows) % every == 0 and _dense_layers(rows.reshape(-1, every, shape.top_k)).sum() == shape.n_dense_layers:
        return every
    if len(rows) % shape.n_layers:
        raise TraceError(
            f"{file}: {len(rows)} rows of {KEY} are no multiple of the {shape.n_layers} layers of {shape.name}"
        )
    return shape.n_layers


def _array(file: Path, shape: ModelShape, prompt_tokens: int) -> Iterator[Imported]:
    """The one sequence of an .npy file, or those of a collection."""
    try:
        with file.open("rb") as handle:
            array = _numbers(file, handle)
    except OSError as error:
        raise TraceError(f"{file} cannot be read: {error.strerror}") from error
    if array.dtype.kind == "f" and array.ndim == 3:
        yield from _collection(file, array, shape, prompt_tokens)
        return
    ids = _of_layers(file, _as_ids(file, array), shape)
    yield Imported(ids, min(prompt_tokens, len(ids)))


def _collection(file: Path, counts: NDArray[Any], shape: ModelShape, prompt_tokens: int) -> Iterator[Imported]:
    """Sequences with a collection's counts [sequences, layers, experts]; places that were never filled are zeros."""
    if counts.shape[1:] != (shape.n_layers, shape.n_experts):
        raise TraceError(
            f"{file}: counts of {counts.shape[1]} layers with {counts.shape[2]} experts; {shape.name} has"
            f" {shape.n_layers} with {shape.n_experts}"
        )
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts != np.floor(counts)).any():
        raise TraceError(f"{file}: expected how many tokens each expert got, found numbers that are no counts")
    for at, of_sequence in enumerate(counts.astype(np.int64)):
        totals = of_sequence.sum(axis=1)
        n_tokens, rest = divmod(int(totals[0]), shape.top_k)
        if not totals.any():
            continue
        if rest or (totals != totals[0]).any() or of_sequence.max() > n_tokens:
            raise TraceError(
                f"{file}: sequence {at} has {totals.min()} to {totals.max()} choices a layer, and up to"
                f" {of_sequence.max()} of one expert; tokens that choose {shape.top_k} experts in each layer have a"
                " multiple of that, the same in every layer, and no expert twice"
            )
        random = np.random.default_rng(at)
        layers = [_drawn(one, n_tokens, shape.top_k, random) for one in of_sequence]
        yield Imported(np.stack(layers, axis=1), min(prompt_tokens, n_tokens), drawn=True)


def _drawn(counts: Ids, n_tokens: int, top_k: int, random: np.random.Generator) -> Ids:
    """[tokens, k]: tokens with distinct experts, each expert as often as its count."""
    experts = random.permutation(len(counts))
    chosen = np.repeat(experts, counts[experts])  # in a row: one of at most n_tokens meets every token once
    ids: Ids = chosen.reshape(top_k, n_tokens).T[random.permutation(n_tokens)]
    return ids


def _loaded(file: Path, handle: Any) -> Ids:
    return _as_ids(file, _numbers(file, handle))


def _numbers(file: Path, handle: Any) -> NDArray[Any]:
    try:
        return np.asarray(np.load(handle, allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise TraceError(f"{file}: damaged, or no .npy array: {error}") from error


def _as_ids(file: Path, array: NDArray[Any]) -> Ids:
    if array.dtype.kind not in "iu" or array.ndim != 3:
        raise TraceError(
            f"{file}: expected integers [tokens, layers, k] or a collection's counts, floats [sequences, layers,"
            f" experts], found {array.dtype} {list(array.shape)}"
        )
    ids: Ids = array.astype(np.int64)
    return ids


def _of_layers(file: Path, ids: Ids, shape: ModelShape) -> Ids:
    """The layers that have experts; engines leave the rows of dense layers as they were allocated."""
    if ids.shape[1] > shape.n_layers:
        ids = ids[:, ~_dense_layers(ids)]
    if ids.shape[1:] != (shape.n_layers, shape.top_k):
        raise TraceError(
            f"{file}: {ids.shape[1]} layers with experts, top-{ids.shape[2]}; {shape.name} has {shape.n_layers} and"
            f" top-{shape.top_k}"
        )
    _require_distinct(file, ids)
    return ids


def _dense_layers(ids: Ids) -> NDArray[np.bool_]:
    """[layers]: whether all rows of a layer are one number repeated, which no routing to two experts or more is."""
    same: NDArray[np.bool_] = (ids == ids[:1, :, :1]).all(axis=(0, 2)) & (ids.shape[2] > 1)
    return same


def _require_distinct(file: Path, ids: Ids) -> None:
    chosen = np.sort(ids, axis=-1)
    twice = (chosen[..., 1:] == chosen[..., :-1]) & (chosen[..., 1:] != ABSENT)
    if twice.any():
        token, layer = (int(at[0]) for at in np.nonzero(twice.any(axis=-1)))
        raise TraceError(
            f"{file}: token {token} of a step has an expert twice in layer {layer}: {ids[token, layer].tolist()}; is"
            f" top_k of the model's shape ({ids.shape[-1]}) that of the recorded model?"
        )


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} cannot be read as text: {error}") from error
