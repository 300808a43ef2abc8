"""A session whose experts all have a slot: its layers can be computed on the accelerator alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cpu_kernels import ExpertSpec
from gpu_kernels import TorchAccelerator
from gpu_kernels.accelerator import Event
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.startup.units import Unit
from scheduler import Phase

MOST_UNCOUNTED = 1024
"""Calls of prompts whose counts are on the device; with more, those that have ended are fetched."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptCall:
    """A call of many tokens that the device computes. ends: as of `gpu_kernels.resident.run_resident_prompt`."""

    phase: Phase
    layer: int
    n_tokens: int
    ends: torch.Tensor
    event: Event


@dataclass(frozen=True, slots=True, eq=False)
class ResidentExperts:
    """slot_of: int32 [E] on the device, of each layer. Valid as long as `Session.resident` gives it."""

    runner: ExpertsCall
    accelerator: TorchAccelerator
    specs: tuple[ExpertSpec, ...]
    slot_of: tuple[torch.Tensor, ...]
    uncounted: list[PromptCall] = field(default_factory=list)

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The output of a layer's experts, as HybridExperts.forward, without a wait or a decision of the host."""
        shape = hidden.shape
        rows = hidden.reshape(-1, shape[-1])
        found = self.accelerator.run_resident(
            self.specs[layer], self.slot_of[layer], rows, ids.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        )
        return found.view(shape)

    def run_prompt(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The same for many tokens, each expert's together, which is then counted. None where the tensors lie
        elsewhere, or the device has no kernel for so many that was found right."""
        device, shape = self.accelerator.device, hidden.shape
        if any(tensor.device != device for tensor in (hidden, ids, weights)):
            return None
        rows = hidden.reshape(-1, shape[-1])
        found = self.accelerator.run_resident_prompt(
            self.specs[layer], self.slot_of[layer], rows, ids.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        )
        if found is None:
            return None
        output, ends, event = found
        runner, n_tokens = self.runner, len(rows)
        runner.begin_call(layer, n_tokens)
        if len(self.uncounted) >= MOST_UNCOUNTED:
            self.report(runner.experts.stats, only_ended=True)
        self.uncounted.append(PromptCall(runner.phase, layer, n_tokens, ends, event))
        return output.view(shape)

    def report(self, stats: StatsRecorder, *, only_ended: bool = False) -> None:
        """Adds the calls of prompts to the session's counters: all, once they have ended, or those that have."""
        calls = list(self.uncounted)
        self.uncounted.clear()
        for call in calls:
            if only_ended and not call.event.ended:
                self.uncounted.append(call)
                continue
            call.event.wait()
            start_us, end_us = call.event.span_us
            n_active = int((call.ends.diff() > 0).sum())
            stats.of(call.phase, call.layer).ran_on_accelerator(1, call.n_tokens, n_active, end_us - start_us)


def find_resident(runner: ExpertsCall, units: Sequence[Unit]) -> ResidentExperts | None:
    """The experts of all layers where each has a slot that holds it, on one accelerator; None otherwise."""
    planner = runner.experts.planner
    if planner is None or len(units) != 1 or runner.experts.lanes.queues[0].pending:
        return None
    accelerator = units[0].accelerator
    if not isinstance(accelerator, TorchAccelerator) or any(layer.transform() for layer in runner.layers):
        return None
    tables = []
    for index, layer in enumerate(runner.layers):
        table, own = planner.table(index)
        if layer.placement == "cpu" or not table.resident_mask(own)[: layer.num_experts].all():
            return None
        first = own * table.n_experts
        tables.append(torch.from_numpy(table.slot_of[first : first + layer.num_experts]))
    device = accelerator.device
    return ResidentExperts(
        runner, accelerator, tuple(layer.spec for layer in runner.layers),
        tuple(table.to(device, torch.int32) for table in tables),
    )  # fmt: skip
