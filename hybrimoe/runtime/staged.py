"""Prompts on one device of whose experts only some have slots: layers stream through two halves of the last slots.

While the device computes a part of a layer's experts, the next part crosses the link, that of the next layer behind the
last. The device sorts the tokens by experts itself, so that the host waits for nothing and plans nothing. That is worth
it where so many tokens use each expert that the CPU is no help, or the host has more to do with pieces of work than the
link with experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch

from gpu_kernels import TorchAccelerator
from gpu_kernels.accelerator import Event
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.layer_call.tallies import LINK_US, NOT_ISSUED, PREFETCHES_WASTED
from hybrimoe.runtime.startup.units import Unit
from scheduler import LayerDemand, Phase, Planner

HALVES = 2
LEAST_PLACES = 4
"""Slots of a half; with fewer the link waits for the device between two copies."""
NO_CALL = -1, -2
MOST_UNTOLD = 1024
"""Calls that are not counted yet; with more, those that have ended are."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Part:
    """Experts `begin` to `end` of a layer, of which `absent` have no slot and are copied in this order."""

    layer: int
    begin: int
    end: int
    absent: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """A half that holds a part, or will once its copies have ended."""

    part: Part
    copies: Event


@dataclass(frozen=True, slots=True, eq=False)
class StagedCall:
    """A call that the device computes. offsets int32 [E + 1], scores float32 [E]: on the device, of the rows sorted by
    experts; resident bool [E]; n_bytes: that cross the link for it."""

    phase: Phase
    layer: int
    n_tokens: int
    offsets: torch.Tensor
    scores: torch.Tensor
    resident: npt.NDArray[np.bool_]
    n_bytes: int
    ends: Sequence[Event]
    copies: Sequence[Event]


@dataclass(slots=True, eq=False)
class StagedPrompts:
    """Valid as long as `Session.staged` gives it. n_places: slots of a half, which are the last but one and the last
    `n_places`. read: of each half, the end of the work that reads it."""

    runner: ExpertsCall
    planner: Planner
    accelerator: TorchAccelerator
    n_places: int
    untold: list[StagedCall] = field(default_factory=list)
    n_calls: int = 0
    """How many calls of layers it has run."""
    _turn: int = 0
    _last: tuple[int, int] = NO_CALL
    """Step and layer of the latest call."""
    _filled: list[Filled | None] = field(default_factory=lambda: [None] * HALVES)
    _read: list[Event] = field(default_factory=list)

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """The output of a layer's experts, as HybridExperts.forward. None, with nothing done, where the usual way is
        expected to be faster, the tensors lie elsewhere, or the device has no kernel for so many tokens that was found
        right."""
        known, accelerator = self.runner.layers[layer], self.accelerator
        rows = hidden.reshape(-1, hidden.shape[-1])
        ids, weights = ids.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        if any(tensor.device != accelerator.device for tensor in (hidden, ids, weights)):
            return None
        lookahead, n_absent = self.runner.lookahead, int((~self._resident(layer)).sum())
        if lookahead is not None and not lookahead.knows_all:
            return None  # the first call of each layer tells what its gate is
        if not accelerator.can_run_prompt(known.spec, ids.shape, known.num_experts):
            return None
        if not self._pays(layer, ids.numel(), n_absent) or not self._lent():
            return None
        work, scores = accelerator.prompt_work(known.spec, known.num_experts, rows, ids, weights)
        self.runner.begin_call(layer, len(rows))
        step, before = self.runner.experts.step, self._last
        self._last = step, layer
        if before != (step, layer - 1):  # others may have used the halves since
            self._filled, self._read = [None] * HALVES, [accelerator.mark()] * HALVES
        resident, parts, ends, copies = self._resident(layer), self._parts(layer), [], []
        for number, part in enumerate(parts):
            half, filled = self._half_of(part)
            ends.append(accelerator.run_part(work, part.begin, self._slots_of(part, half), [filled.copies]))
            copies.append(filled.copies)
            self._read[half], self._filled[half] = ends[-1], None
            self._fill_next(parts, number)
        self._note(layer, len(rows), work.offsets, scores, resident, ends, copies)
        return accelerator.prompt_output(work).view(hidden.shape)

    def report(self, stats: StatsRecorder, *, only_ended: bool = False) -> None:
        """Adds the calls to the session's counters, and tells the planner what was routed: of all calls, once they have
        ended, or of those that have."""
        calls = list(self.untold)
        self.untold.clear()
        for number, call in enumerate(calls):
            if only_ended and not call.ends[-1].ended:
                self.untold += calls[number:]
                return
            call.ends[-1].wait()
            self._count(call, stats)

    # Which experts go where --------------------------------------------------------------------------------------

    def _resident(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool [E]: experts of a layer that are in slots which nobody else fills."""
        table, own = self.planner.table(layer)
        return table.resident_mask(own)[: self.runner.layers[layer].num_experts]

    def _parts(self, layer: int) -> list[Part]:
        """A layer's experts, in parts of at most `n_places` that have no slot."""
        absent = np.flatnonzero(~self._resident(layer)).tolist()
        cuts = [0, *absent[self.n_places :: self.n_places], self.runner.layers[layer].num_experts]
        return [
            Part(layer, begin, end, tuple(absent[at * self.n_places : (at + 1) * self.n_places]))
            for at, (begin, end) in enumerate(pairwise(cuts))
        ]

    def _slots_of(self, part: Part, half: int) -> Ints:
        """int32 [n]: where each expert of a part is."""
        table, own = self.planner.table(part.layer)
        slots = table.slot_of[own * table.n_experts + np.arange(part.begin, part.end)].astype(np.int32)
        slots[np.array(part.absent, np.int64) - part.begin] = self._first_slot(half) + np.arange(len(part.absent))
        return slots

    def _first_slot(self, half: int) -> int:
        return self.accelerator.n_slots - (HALVES - half) * self.n_places

    def _lent(self) -> bool:
        """Whether nobody else has the halves: once before a prompt the host waits for what is on its way there."""
        slots, n = self.planner.slots, HALVES * self.n_places
        if (slots.key_of[slots.n_slots - n :] < 0).all():
            return True
        for item in self.runner.experts.lanes.queues[0].pending:
            item.event.wait()
        self.runner.report()
        gone = [int(key) for key in slots.key_of[slots.n_slots - n :] if key >= 0]
        if not self.planner.lend(n):
            return False
        self._last = NO_CALL
        stats = self.runner.experts.stats
        for key in gone:  # prefetched in vain
            number = int(stats.issued[key])
            if number != NOT_ISSUED:
                stats.rows.reshape(-1, stats.rows.shape[-1])[number, PREFETCHES_WASTED] += 1
                stats.issued[key] = NOT_ISSUED
        return True

    # Copies ------------------------------------------------------------------------------------------------------

    def _half_of(self, part: Part) -> tuple[int, Filled]:
        """The half that has a part, filled now if none has."""
        for half, filled in enumerate(self._filled):
            if filled is not None and filled.part == part:
                self._turn = 1 - half
                return half, filled
        half, self._turn = self._turn, 1 - self._turn
        return half, self._fill(half, part)

    def _fill_next(self, parts: Sequence[Part], number: int) -> None:
        """The part behind one, or the first of the next layer, crosses the link while that one is computed."""
        layer = parts[number].layer + 1
        if number + 1 < len(parts):
            self._fill(self._turn, parts[number + 1])
        elif layer < len(self.runner.layers) and self.runner.layers[layer].placement != "cpu":
            self._fill(self._turn, self._parts(layer)[0])

    def _fill(self, half: int, part: Part) -> Filled:
        records = self.runner.experts.store.all_records(part.layer)
        assert records is not None
        runs = []
        for _, pairs in groupby(enumerate(part.absent), key=lambda pair: pair[1] - pair[0]):
            places = list(pairs)
            runs.append((places[0][0], records[places[0][1] : places[-1][1] + 1]))
        copies = self.accelerator.stage(self._first_slot(half), runs, self._read[half])
        self._filled[half] = filled = Filled(part, copies)
        return filled

    # Costs and counts --------------------------------------------------------------------------------------------

    def _pays(self, layer: int, n_pairs: int, n_absent: int) -> bool:
        """Whether the link is expected to bring a layer's experts, beside the device's work, sooner than link and CPU
        share them, with what the host then takes to submit work, as it did lately."""
        costs, n_experts = self.planner.costs, self.runner.layers[layer].num_experts
        if n_pairs < n_experts:
            return False  # of few tokens not all experts are needed
        each = -(-n_pairs // n_experts)
        n_needed = n_absent * (1.0 - math.exp(-n_pairs / n_experts))  # the others have no token, if chance decides
        link_us, cpu_us = costs.transfer_us(layer), float(costs.cpu_us(layer, each))
        accel_us = n_experts * float(costs.accel_us(layer, each))
        shared_us = n_needed * link_us * cpu_us / max(link_us + cpu_us, 1e-9) + self.runner.experts.lanes.cpu_ready_us()
        return max(n_absent * link_us, accel_us) <= max(shared_us, accel_us)

    def _note(
        self, layer: int, n_tokens: int, offsets: torch.Tensor, scores: torch.Tensor,
        resident: npt.NDArray[np.bool_], ends: Sequence[Event], copies: Sequence[Event],
    ) -> None:  # fmt: skip
        runner, self.n_calls = self.runner, self.n_calls + 1
        n_bytes = int((~resident).sum()) * runner.layers[layer].spec.record_bytes
        self.untold.append(StagedCall(runner.phase, layer, n_tokens, offsets, scores, resident, n_bytes, ends, copies))
        if len(self.untold) > MOST_UNTOLD:
            self.report(runner.experts.stats, only_ended=True)

    def _count(self, call: StagedCall, stats: StatsRecorder) -> None:
        n_tokens, scores = call.offsets.diff().cpu().numpy(), call.scores.cpu().numpy()
        ids = np.flatnonzero(n_tokens).astype(np.int32)
        counters = stats.of(call.phase, call.layer)
        us = sum(end.span_us[1] - end.span_us[0] for end in call.ends)
        counters.ran_on_accelerator(1, call.n_tokens, len(ids), us)
        n_missed = int((~call.resident[ids]).sum())
        counters.hits -= n_missed
        counters.misses += n_missed
        counters.transfers += int((~call.resident).sum())
        counters.transfer_bytes += call.n_bytes
        for copies in call.copies:
            stats.spent.append((counters, LINK_US, copies.span_us[1] - copies.span_us[0]))
        all_scores = np.zeros(self.planner.n_experts, np.float32)
        all_scores[: len(scores)] = scores / call.n_tokens
        self.planner.saw(
            LayerDemand(call.layer, call.phase, call.n_tokens, ids, n_tokens[ids].astype(np.int32), all_scores)
        )


def find_staged(runner: ExpertsCall, units: Sequence[Unit]) -> StagedPrompts | None:
    """What streams prompts where policy `ours` decides for one torch device with slots enough, whose host records it
    reads by itself; None otherwise."""
    planner = runner.planner
    if not isinstance(planner, Planner) or not planner.decides_at_once or len(units) != 1:
        return None
    accelerator, store, tier = units[0].accelerator, runner.experts.store, runner.experts.lanes.tier
    if not isinstance(accelerator, TorchAccelerator) or runner.lossy is not None or tier is not None:
        return None
    n_places = min(max(layer.num_experts for layer in runner.layers), accelerator.n_slots // HALVES)
    if n_places < LEAST_PLACES or any(layer.transform() is not None for layer in runner.layers):
        return None
    if accelerator.needs_pinned_host() and not store.is_locked:
        return None
    if any(store.all_records(layer) is None for layer in range(len(runner.layers))):
        return None
    return StagedPrompts(runner, planner, accelerator, n_places)
