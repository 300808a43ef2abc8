"""A compiled branch beside the original, on the inputs of a recorded step.

Where an index chooses tokens, a short recorded step shows nothing of it: all its tokens are chosen. So the original is
called again with an index that chooses fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cpu_kernels.host.isa import detect
from cpu_kernels.step.compiled import CompiledLayers, CompiledStates, Workspace
from cpu_kernels.step.parts import Attention, Branch, Core, LatentAttention, Layer
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.generation.growing import Buffers
from hybrimoe.step.caches import place_of
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.prompts import PromptReading, computed
from hybrimoe.step.reading.attention import RopeTables, angles_at, at_positions, far_positions, reads_positions
from hybrimoe.step.reading.index import choice_of, narrowed
from hybrimoe.step.reading.layer import Site, rounding, whole_site
from hybrimoe.step.states import States, place_of_states, states_of
from hybrimoe.step.trace import NEW_TOKENS, PROMPT_TOKENS, Call, Trace

EXACT, ROUNDED = 1e-4, 6e-2
"""Relative error of what a branch adds to the stream: of float32 weights; where weights, activations or the cache are
rounded (bfloat16, int8, int4), whose roundings fall differently. Scores of an index that are as near count as equal."""
ROUNDED_ROWS = NEW_TOKENS // 2
"""Rows that must agree where things are rounded: a router whose scores nearly tie may choose another expert."""
FEWER_TOKENS = (2, 5, PROMPT_TOKENS + 2)
"""To how many tokens attention behind an index is held for the comparison: all rows must choose, or only the last."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares branches of a recorded model. exact: see `is_exact`."""

    trace: Trace
    ropes: RopeTables
    exact: bool
    n_threads: int

    def error(self, site: Site, branch: Branch, number: int) -> float:
        """Difference of what the compiled branch adds to the stream, as a multiple of what is allowed."""
        error, core = self._added(site, branch, number), branch.core
        if error <= 1 and len(site.cores) == 1 and isinstance(core, Attention | LatentAttention):
            far = far_positions(core.tuning) if reads_positions(site.cores[0].call) else []
            if far:
                error = self._far(site, core, number, far)
            if error <= 1 and isinstance(core, LatentAttention) and core.top_k:
                error = self._chosen(site, core, number, far)
        return error

    def _far(self, site: Site, core: Attention | LatentAttention, number: int, positions: list[int]) -> float:
        """The same at far positions, where attention is given these for itself."""
        call = site.cores[0].call
        block = replace(whole_site(call), after=at_positions(self.trace, call, positions))
        return self._added(block, block.branch(core), number, positions)

    def _added(self, site: Site, branch: Branch, number: int, positions: Sequence[int] = ()) -> float:
        """The same of the step as it was recorded, and of what it leaves in the cache. positions: of the tokens, where
        they are not those of their angles."""
        before, after = _rows(site.before), _rows(site.after)
        base = before if branch.keep == 1.0 and not branch.renews else np.zeros_like(before)
        unknown = rounding(site.after) * np.abs(after)
        with self._ready(site, branch, number, positions) as (compiled, parts):
            originals = [part.clone() for part in parts]
            states = self._bind_states(compiled)
            for core in branch.cores:
                self._give_choice(compiled, site, core)
            compiled.run()
            found = compiled.stream[: len(before)] - base
            if site.taken is not None:  # late results of a branch before, which is compared by itself
                found += _rows(site.taken).reshape(found.shape)
            error = self._relative(found, after - base, unknown)
            for part, original in zip(parts, originals, strict=True):
                error = max(error, self._relative(_by_token(part), _by_token(original)))
        return max([error, *(self._states_error(layer, held) for layer, held in states.items())])

    def prompts_error(self, call: Call, reading: PromptReading) -> float:
        """Difference of what a call gives as prompts do, and of its states, as a multiple of what is allowed."""
        held = self.trace.states[reading.core.cache].copy()
        states = CompiledStates(reading.core, self.n_threads, detect().isa.name, Workspace())
        with torch.no_grad():
            found = computed(reading, states, call.input, held)
        error = self._relative(_rows(found), _rows(call.result))
        return max(error, self._states_error(reading.core.cache, held))

    def _bind_states(self, compiled: CompiledLayers) -> dict[int, States]:
        """Copies of the recorded states before the step, which it changes, by layer of the cache."""
        states = {layer: self.trace.states[layer].copy() for layer in compiled.state_layers}
        for index, held in enumerate(states.values()):
            compiled.bind_states(index, 0, place_of_states(held, held, 0))
        return states

    def _states_error(self, layer: int, found: States) -> float:
        """Difference of the states after the step, as a multiple of what is allowed."""
        expected = states_of(self.trace.cache, layer)
        if expected is None:
            return float("inf")
        error = 0.0
        for one, other in zip(found, expected, strict=True):
            if one is not None and other is not None:
                largest = float((one.float() - other.float()).abs().max() / (other.float().abs().max() + 1e-30))
                allowed = EXACT if self.exact else ROUNDED
                error = max(error, largest / allowed) if math.isfinite(largest) else float("inf")
        return error

    @contextmanager
    def _ready(
        self, site: Site, branch: Branch, number: int, positions: Sequence[int] = ()
    ) -> Iterator[tuple[CompiledLayers, list[torch.Tensor]]]:  # fmt: skip
        """The compiled branch before its run, and what that overwrites in the cache, which is put back afterwards."""
        before = _rows(site.before)
        n_rows, width = before.shape
        compiled = CompiledLayers(
            [(number, Layer((branch,)))], width, tuple(self.ropes.sizes), self.n_threads, detect().isa.name
        )  # fmt: skip
        held = [self.trace.cache.layers[layer].grown(0) for layer in compiled.cache_layers]
        for index, buffers in enumerate(held):
            compiled.bind(index, 0, place_of(buffers))
        compiled.give_room(n_rows, PROMPT_TOKENS + n_rows)
        compiled.set_rows([PROMPT_TOKENS], n_rows, positions=positions)
        _fill_angles(compiled, self.ropes, torch.arange(PROMPT_TOKENS, PROMPT_TOKENS + n_rows)[None])
        compiled.stream[:n_rows] = before
        parts = [part for buffers in held for part in _written(buffers, n_rows)]
        originals = [part.clone() for part in parts]
        try:
            yield compiled, parts
        finally:
            for part, original in zip(parts, originals, strict=True):
                part.copy_(original)

    def _give_choice(self, compiled: CompiledLayers, site: Site, core: Core) -> None:
        """What an earlier layer's index has chosen in the recorded step, where that is not all."""
        if not isinstance(core, LatentAttention) or not core.top_k or core.index is not None:
            return
        for own in site.cores:
            choice = choice_of(self.trace, own.call, core.cache)
            if choice is not None and choice.call.result.shape[-1] == core.top_k:
                compiled.chosen(core.top_k)[:NEW_TOKENS] = choice.call.result.reshape(NEW_TOKENS, -1).numpy()

    def _relative(self, found: np.ndarray, expected: np.ndarray, unknown: np.ndarray | float = 0.0) -> float:
        """Largest error of a row over what is allowed; where things are rounded, that of the ROUNDED_ROWS best rows.

        unknown: how far each value of `expected` may be from what it stands for.
        """
        scale = np.abs(expected).max() + 1e-30
        rows = np.sort(np.maximum(np.abs(found - expected) - unknown, 0).max(-1) / scale)
        if not np.isfinite(rows).all():
            return float("inf")
        return float(rows[-1] / EXACT) if self.exact else float(rows[:ROUNDED_ROWS][-1] / ROUNDED)

    def _chosen(self, site: Site, core: LatentAttention, number: int, far: list[int]) -> float:
        """The same of attention by itself, held to fewer tokens than there are, at far positions as well if there are.

        Raises NotCompiled where it cannot be compared.
        """
        errors = [self._held_to(n_tokens, site, core, number) for n_tokens in FEWER_TOKENS]
        errors += [self._held_to(n_tokens, site, core, number, far) for n_tokens in FEWER_TOKENS if far]
        compared = [error for error in errors if error is not None]
        if not compared:
            raise NotCompiled(f"{site.path}: which tokens it chooses cannot be compared, their scores are equal")
        return max(compared)

    def _held_to(
        self, top_k: int, site: Site, core: LatentAttention, number: int, positions: Sequence[int] = ()
    ) -> float | None:
        """The same with `top_k` tokens; None where equal scores leave open what each row chooses."""
        changed = {"position_ids": torch.tensor([positions])} if positions else {}
        call, places = narrowed(self.trace, site.cores[0].call, core.cache, top_k, changed)
        block = whole_site(call)
        expected = _rows(block.after)
        with self._ready(block, block.branch(replace(core, top_k=top_k)), number, positions) as (compiled, _):
            chosen = compiled.chosen(top_k)
            if core.index is None:
                chosen[: len(places)] = places
            compiled.run()
            found = compiled.stream[: len(expected)].copy()
            scores = None if core.index is None else compiled.scores(0)
        told = []
        for row, own in enumerate(places):
            n_seen = PROMPT_TOKENS + row + 1
            if scores is not None and n_seen > top_k and set(own.tolist()) != set(chosen[row].tolist()):
                if not self._nearly_tie(scores[row, :n_seen], own, chosen[row]):
                    return float("inf")
                continue
            told.append(row)
        if not any(PROMPT_TOKENS + row + 1 > top_k for row in told):
            return None
        return self._relative(found[told], expected[told])

    def _nearly_tie(self, scores: np.ndarray, one: np.ndarray, other: np.ndarray) -> bool:
        """Whether two choices differ in tokens only whose scores are equal as far as they are known."""
        differ = scores[np.setxor1d(one, other)]
        allowed = (EXACT if self.exact else ROUNDED) * float(np.abs(scores).max())
        return bool(differ.size) and float(differ.max() - differ.min()) <= allowed


def is_exact(trace: Trace, session: Any) -> bool:
    """Whether everything is float32: nothing is rounded on the way."""
    if any(isinstance(module, PackedLinear) for module in trace.model.modules()):
        return False
    specs = {layer.spec.dtype for layer in session.layers}
    return specs == {"float32"} and all(p.dtype == torch.float32 for p in trace.model.parameters() if not p.is_meta)


def _rows(stream: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = stream.float().reshape(-1, stream.shape[-1]).numpy()
    return rows


def _written(buffers: Buffers, n_rows: int) -> list[torch.Tensor]:
    """The places of the recorded step's tokens in the buffers of a layer."""
    parts = [buffers.keys, buffers.values, buffers.index_keys]
    return [part[..., PROMPT_TOKENS : PROMPT_TOKENS + n_rows, :] for part in parts if part is not None]


def _by_token(part: torch.Tensor) -> np.ndarray:
    """[tokens, values] of keys or values [1, heads, tokens, D], or [1, tokens, D]."""
    values: np.ndarray = part.float().movedim(-2, 0).flatten(1).numpy()
    return values


def _fill_angles(compiled: CompiledLayers, ropes: RopeTables, positions: torch.Tensor) -> None:
    """Writes the angles of the rows' positions int64 [1, rows] (as one sequence) for the next run."""
    for (cos, sin), (source, doubled) in zip(compiled.angles, ropes.sources, strict=False):
        own_cos, own_sin = angles_at(source, positions, doubled)
        cos[: len(own_cos)], sin[: len(own_sin)] = own_cos, own_sin
