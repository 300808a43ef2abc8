"""The index of an attention, which chooses the tokens that it reads: a module that is given the cache and returns
numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cpu_kernels.step.heads import HALVES, PAIRS
from cpu_kernels.step.parts import Index, Rope
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.reading.parts import LINEARS, array, read_linear, read_norm
from hybrimoe.step.trace import NEW_TOKENS, PROMPT_TOKENS, Call, Trace, same

KEY_TOLERANCE = {torch.float32: 1e-5}
"""Relative, of rotated keys, by their dtype."""
ROUNDED_KEYS = 1.6e-2
"""The same of all others: two units in the last place of bfloat16."""
TRIED = (2, 3)
"""What the number of chosen tokens is set to in order to find it; two, as the recorded one may be one of them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The call that has chosen an attention's tokens: of an index inside it, or (is_earlier) inside an earlier one.

    top_k: how many it chooses; name: of the module's attribute that says so.
    """

    call: Call
    top_k: int
    name: str
    is_earlier: bool


def choice_of(trace: Trace, call: Call, layer: int) -> Choice | None:
    """What chooses the tokens of an attention, whose layer of the cache is `layer`; None where nothing does.

    Raises NotCompiled where it is not clear how many are chosen.
    """
    own = next((inner for inner in trace.within(call.path) if _gives_places(trace, inner)), None)
    if own is not None:
        return Choice(own, *_number(trace, own, layer), is_earlier=False)
    earlier = [other for other in trace.calls if other.number < call.number and _gives_places(trace, other)]
    if earlier and any(same(value, earlier[-1].result) for value in _places_given(call).values()):
        used = getattr(earlier[-1].module, "layer_idx", None)
        if not isinstance(used, int):
            raise NotCompiled(f"{earlier[-1].path}: it does not say which layer of the cache is its own (layer_idx)")
        return Choice(earlier[-1], *_number(trace, earlier[-1], used), is_earlier=True)
    return None


def _gives_places(trace: Trace, call: Call) -> bool:
    given = any(value is trace.cache for value in (*call.args, *call.kwargs.values()))
    return given and isinstance(call.output, torch.Tensor) and call.output.dtype in (torch.int32, torch.int64)


def _places_given(call: Call) -> dict[str, torch.Tensor]:
    named = {name: value for name, value in call.kwargs.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in named.items() if value.dtype in (torch.int32, torch.int64)}


def _number(trace: Trace, call: Call, layer: int) -> tuple[int, str]:
    """How many tokens an index chooses, and its attribute that says so: the one that changes how many there are."""
    recorded = call.result.shape[-1]
    tried = next(number for number in TRIED if number != recorded)
    for name, value in vars(call.module).items():
        if type(value) is not int or value < 1:
            continue
        found = trace.again(call, layer, setting=(call.module, name, tried))
        if isinstance(found, torch.Tensor) and found.shape == (*call.result.shape[:-1], tried):
            return value, name
    raise NotCompiled(f"{call.path}: no number of it says how many tokens it chooses")


def narrowed(
    trace: Trace, call: Call, layer: int, top_k: int, changed: Mapping[str, torch.Tensor]
) -> tuple[Call, np.ndarray]:
    """The recorded call of an attention once more, to `top_k` tokens at most; and these, int32 [rows, top_k]. changed:
    arguments by name.

    An earlier choice is made up: of the prompt's tokens, other ones for each row. Raises NotCompiled where that fails.
    """
    choice = choice_of(trace, call, layer)
    assert choice is not None
    if choice.is_earlier:
        generator = np.random.default_rng(top_k)
        n_seen = [max(top_k, PROMPT_TOKENS + 1 + row) for row in range(NEW_TOKENS)]
        places = np.stack([np.sort(generator.permutation(n)[:top_k]) for n in n_seen]).astype(np.int32)
        name = next(name for name, value in _places_given(call).items() if same(value, choice.call.result))
        given = torch.from_numpy(places).view(1, NEW_TOKENS, top_k).to(choice.call.result.dtype)
        output = trace.again(call, layer, {name: given, **changed})
    else:
        kept: list[Any] = []
        handle = choice.call.module.register_forward_hook(lambda _, __, output: kept.append(output))
        try:
            output = trace.again(call, layer, changed, setting=(choice.call.module, choice.name, top_k))
        finally:
            handle.remove()
        places = kept[-1].reshape(NEW_TOKENS, -1).numpy() if kept else np.empty((0, 0), np.int32)
    again = replace(call, output=output)
    if isinstance(output, NotCompiled) or places.shape != (NEW_TOKENS, top_k):
        raise NotCompiled(f"{call.path}: it cannot be called again with fewer tokens")
    return again, places


def read_index(
    trace: Trace, choice: Choice, short: torch.Tensor, angles: Sequence[torch.Tensor],
    ropes: Callable[[int], list[Rope | None]], layer: Any,
) -> Index:  # fmt: skip
    """The index of a choice that is an attention's own. short: what its query is made from; angles: cosines and sines
    of the recorded rows, each once; ropes: the ways of rotating a number of columns; layer: of the cache.

    Raises NotCompiled where it is none that the step knows.
    """
    call = choice.call
    inside = list(trace.within(call.path))
    linears = [inner for inner in inside if isinstance(inner.module, LINEARS)]
    others = [inner for inner in inside if inner not in linears]
    queries = [inner for inner in linears if same(inner.input, short)]
    keys = [inner for inner in linears if any(same(inner.result, other.input) for other in others)]
    weights = [inner for inner in linears if inner not in (*queries, *keys) and _same_values(inner.input, call.input)]
    if [len(part) for part in (linears, queries, keys, weights, others)] != [3, 1, 1, 1, 1]:
        names = ", ".join(inner.path for inner in inside)
        raise NotCompiled(f"{call.path}: it has {names}, expected products for queries, keys and weights, and one norm")
    query, key, weight = (read_linear(one.module, one.path) for (one,) in (queries, keys, weights))
    norm = read_norm(others[0].module, key.n_out)
    if norm is None or query.n_out != key.n_out * weight.n_out or not _same_values(keys[0].input, call.input):
        raise NotCompiled(f"{call.path}: its queries, keys and weights do not fit together")
    rope = _rope_of_keys(others[0].result, layer.indexer_keys, angles, ropes(key.n_out))
    return Index(query, key, weight, norm, rope)


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are the same values, perhaps in another dtype."""
    return same(one, other) or (one.numel() == other.numel() and torch.equal(one.float(), other.float().view_as(one)))


def _rope_of_keys(
    normalised: torch.Tensor, stored: torch.Tensor, angles: Sequence[torch.Tensor], ropes: list[Rope | None]
) -> Rope | None:
    """How recorded keys were rotated before they were stored. Raises NotCompiled where it is in none of the ways."""
    before = array(normalised).reshape(NEW_TOKENS, -1)
    after = array(stored)[0, PROMPT_TOKENS:]
    cos_sin = [array(part).reshape(NEW_TOKENS, -1) for part in angles]
    errors = [float(np.abs(rotated(before, rope, *cos_sin) - after).max()) for rope in ropes]
    best = int(np.argmin(errors))
    if errors[best] > KEY_TOLERANCE.get(stored.dtype, ROUNDED_KEYS) * float(np.abs(after).max()):
        raise NotCompiled("keys of its index are rotated in an unknown way")
    return ropes[best]


def rotated(
    x: np.ndarray, rope: Rope | None, cos: np.ndarray | None = None, sin: np.ndarray | None = None
) -> np.ndarray:
    """The obvious form of what the compiled step makes of rows x [n, dim]. cos, sin: [n, rope.n / 2]."""
    result = x.copy()
    if rope is None:
        return result
    assert cos is not None
    assert sin is not None
    columns = np.arange(rope.first, rope.first + rope.n)
    halves, pairs = (columns[: rope.n // 2], columns[rope.n // 2 :]), (columns[::2], columns[1::2])
    source, target = (halves if rope.kind == HALVES else pairs), (pairs if rope.kind == PAIRS else halves)
    a, b = x[:, source[0]], x[:, source[1]]
    result[:, target[0]], result[:, target[1]] = a * cos - b * sin, b * cos + a * sin
    return result
