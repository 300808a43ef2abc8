"""A session whose experts all have a slot: its layers can be computed on the accelerator alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpu_kernels import ExpertSpec
from gpu_kernels import TorchAccelerator
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.startup.units import Unit


@dataclass(frozen=True, slots=True, eq=False)
class ResidentExperts:
    """slot_of: int32 [E] on the device, of each layer. Valid as long as `Session.resident` gives it."""

    runner: ExpertsCall
    accelerator: TorchAccelerator
    specs: tuple[ExpertSpec, ...]
    slot_of: tuple[torch.Tensor, ...]

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The output of a layer's experts, as HybridExperts.forward, without a wait or a decision of the host."""
        shape = hidden.shape
        rows = hidden.reshape(-1, shape[-1])
        found = self.accelerator.run_resident(
            self.specs[layer], self.slot_of[layer], rows, ids.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        )
        return found.view(shape)


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
