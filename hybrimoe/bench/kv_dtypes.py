"""The measurement behind `hybrimoe bench kv`: what storing keys and values in fewer bits costs and brings.

One model reads caches of all dtypes: their errors on a text that it decodes as given, the time of a step over contexts
of random keys and values, and what a token takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from cpu_kernels.step.kv_rows import load_tokens, store_tokens
from cpu_kernels.step.program import MAX_LOGITS
from cpu_kernels.step.stored import KIND_OF, row_bytes
from hybrimoe.bench import rounds as harness
from hybrimoe.bench.model.sources import CheckpointSource, RandomSource
from hybrimoe.bench.quality.text import WINDOW, compare, text_windows
from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.generation.growing import GrowingLayer, growing_cache
from hybrimoe.generation.kv_memory import keeps_every_token
from hybrimoe.generation.stored import ROW_DTYPES, StoredLayer
from hybrimoe.machine.facts import machine
from hybrimoe.step.step import Step

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig

Progress = Callable[[int, int, str], None]

PROMPT_TOKENS = 256
"""Of each window of text: computed as a prompt; the others are decoded as the text has them."""
ASKED_TOKENS = 64
"""Last queries of a window whose attention is compared."""
FILLED_TOKENS = 1024
"""Of random keys and values, which are written again and again."""
STEPS_A_ROUND = 4
SEED = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One command line of `bench kv`. model: None is the demo; or a shape with so many layers, whose random weights
    have no text. dtypes: beside the model's own."""

    model: str | None
    shape: str | None
    layers: int | None
    deployment: DeployConfig
    dtypes: tuple[str, ...]
    contexts: tuple[int, ...]
    text: Path | None
    windows: int
    rounds: int


def measure(request: Request, progress: Progress) -> dict[str, Any]:
    """A row for each dtype, the model's own first. Raises ConfigError for a model without a compiled step."""
    longest = max(request.contexts)
    source: Any = (
        CheckpointSource(request.model)
        if request.shape is None
        else RandomSource(request.shape, request.layers, longest + 1)
    )
    model = source.hybrid(request.deployment, progress)
    try:
        step = model.hybrimoe.step
        if not isinstance(step, Step):
            raise ConfigError(f"bench kv measures models with a compiled step: {model.hybrimoe.way.reason}")
        own = next(name for name, dtype in ROW_DTYPES.items() if dtype == model.dtype)
        names = list(dict.fromkeys((own, *request.dtypes)))
        rows = {name: {"dtype": name, "token_bytes": _token_bytes(model, name)} for name in names}
        text = None if request.shape is not None else _quality(model, step, request, rows, own)
        for context in request.contexts:
            times = _times(model, step, names, context, request.rounds, progress)
            for name, row in rows.items():
                row.setdefault("times", []).append({"context": context} | times[name])  # type: ignore[attr-defined]
    finally:
        model.hybrimoe.session.close()
    return {
        "bench": "kv",
        "model": request.shape or request.model or "demo",
        "weights": "random" if request.shape else "checkpoint",
        "expert_dtype": model.hybrimoe.session.config.expert_dtype,
        "rounds": request.rounds,
        "text": text,
        "machine": machine(),
        "rows": list(rows.values()),
    }


def cache_of(model: Any, name: str) -> Any:
    """An empty cache of `model` whose layers store what they keep as `name`."""
    cache = growing_cache(model.config.get_text_config(decoder=True))
    if ROW_DTYPES[name] != model.dtype:
        cache.layers = [StoredLayer(name) if type(layer) is GrowingLayer else layer for layer in cache.layers]
    return cache


# Errors --------------------------------------------------------------------------------------------------------------


def _quality(model: Any, step: Step, request: Request, rows: dict[str, dict[str, Any]], own: str) -> str:
    """Adds errors to the rows; returns the text's name."""
    from hybrimoe.checkpoint.source import model_path

    windows, text = text_windows(model_path(request.model), request.text, request.windows)
    if len(windows[0]) < PROMPT_TOKENS + ASKED_TOKENS:
        raise ModelError(f"{text} has {len(windows[0])} tokens, expected {WINDOW}; name a longer text with --text")
    targets = [window[PROMPT_TOKENS + 1 :] for window in windows]
    exact = [_decoded(model, step, own, window) for window in windows]
    with _attention_calls() as calls, torch.inference_mode():
        model(windows[0][None])
    for name, row in rows.items():
        logits = exact if name == own else [_decoded(model, step, name, window) for window in windows]
        cosine = partial(functional.cosine_similarity, dim=1)
        perplexity, agreement, similar = compare(logits, exact, targets, cosine)
        row |= {"perplexity": perplexity, "greedy_agreement": agreement, "logit_cosine": similar}
        row["attention_error"] = sum(_attention_error(name, *call) for call in calls) / max(1, len(calls))
    return text


def _decoded(model: Any, step: Step, name: str, window: torch.Tensor) -> torch.Tensor:
    """Logits float32 [tokens, V] after each token of a window behind its prompt, in compiled steps."""
    cache, found = cache_of(model, name), []
    with torch.inference_mode():
        model(window[None, :PROMPT_TOKENS], past_key_values=cache, use_cache=True)
    for part in window[PROMPT_TOKENS:].split(MAX_LOGITS):
        logits = step.next_logits(part.tolist(), cache, drafted=True)
        assert logits is not None
        found.append(logits.float())
    return torch.cat(found)


AttentionCall = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


@contextmanager
def _attention_calls() -> Iterator[list[AttentionCall]]:
    """Queries, keys, values and scale of each call that transformers' registry of attention gets within the block."""
    from transformers import AttentionInterface

    passed_on, calls = AttentionInterface()["sdpa"], []

    def listen(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        scale = others.get("scaling") or query.shape[-1] ** -0.5
        calls.append((query.float(), key.float(), value.float(), float(scale)))
        return passed_on(module, query, key, value, mask, **others)

    AttentionInterface.register("sdpa", listen)
    try:
        yield calls
    finally:
        AttentionInterface.register("sdpa", passed_on)


def _attention_error(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> float:
    """Relative error of what the last queries gather, where keys and values were stored as `name`, and the queries that
    meet codes were rounded to int8."""
    kind, group = KIND_OF[name], query.shape[1] // key.shape[1]
    asked = query[:, :, -ASKED_TOKENS:].contiguous()
    rounded = _stored(KIND_OF["int8"], asked) if name in ("int8", "int4") else asked

    def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return torch.softmax(scale * q @ k.transpose(2, 3), -1) @ v

    expected = gathered(asked, key, value)
    found = gathered(rounded, _stored(kind, key.contiguous()), _stored(kind, value.contiguous()))
    return float((found - expected).norm() / expected.norm())


def _stored(kind: int, floats: torch.Tensor) -> torch.Tensor:
    """What is left of float32 [B, heads, T, D] after it was stored."""
    rows = torch.empty(*floats.shape[:-1], row_bytes(kind, floats.shape[-1]), dtype=torch.uint8)
    found = torch.empty_like(floats)
    store_tokens(kind, floats, rows)
    load_tokens(kind, rows, found)
    return found


# Time and memory -----------------------------------------------------------------------------------------------------


def _times(
    model: Any, step: Step, names: Sequence[str], context: int, rounds: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """ms of a token behind `context` tokens, and ms of attention in it, of each dtype in alternating rounds."""
    caches = {name: _filled(model, name, context) for name in names}
    attention: dict[str, list[float]] = {name: [] for name in names}

    def token_ms(name: str) -> float:
        before = step.meter()
        for _ in range(STEPS_A_ROUND):
            if step.next_logits([SEED], caches[name]) is None:
                raise ConfigError("the compiled step does not take a cache of this model")
        after = step.meter()
        us = after[1] - before[1]
        ticks = {part: n - before[0][part] for part, n in after[0].items()}
        attention[name].append(us * ticks["attention"] / sum(ticks.values()) / STEPS_A_ROUND / 1e3)
        return us / STEPS_A_ROUND / 1e3

    times = harness.alternate({name: name for name in names}, token_ms, rounds, progress=progress)
    return {
        name: {"ms": harness.spread(times[name]), "attention_ms": harness.spread(attention[name][1:])} for name in names
    }


def _filled(model: Any, name: str, n_tokens: int) -> Any:
    """A cache that holds `n_tokens` of random keys and values."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.inference_mode():
        probe = growing_cache(model.config.get_text_config(decoder=True))
        model(torch.tensor([[SEED]]), past_key_values=probe, use_cache=True)
        cache = cache_of(model, name)
        for layer, like in zip(cache.layers, probe.layers, strict=True):
            parts = [
                torch.randn(*x.shape[:2], FILLED_TOKENS, x.shape[3], generator=generator).to(model.dtype)
                for x in (like.keys, like.values)
            ]
            _fill(layer, parts, n_tokens)
    return cache


def _fill(layer: Any, parts: list[torch.Tensor], n_tokens: int) -> None:
    """Writes keys and values until the layer has seen `n_tokens`: rows that are stored already are copied."""
    for first in range(0, n_tokens, FILLED_TOKENS):
        n_new = min(FILLED_TOKENS, n_tokens - first)
        if first and isinstance(layer, GrowingLayer):
            layer.append([tuple(rows[..., :n_new, :].clone() for rows in (layer.keys, layer.values))], n_tokens)
        else:
            layer.update(*(part[..., :n_new, :] for part in parts))


def _token_bytes(model: Any, name: str) -> int:
    """Bytes that the layers which keep every token keep of one, without room for growth."""
    layers = [layer for layer in _filled(model, name, 1).layers if keeps_every_token(layer)]
    return sum(int(rows.nbytes) for layer in layers for rows in (layer.keys, layer.values))
