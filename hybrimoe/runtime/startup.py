"""From a session's settings to a runner: slots, costs, planner, lookahead, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import scheduler
from gpu_kernels import Accelerator, AcceleratorError
from hybrimoe.errors import BudgetError
from hybrimoe.profiles import calibrated
from hybrimoe.runtime.budget import reserve_bytes, resolve_slots
from hybrimoe.runtime.compiled import make_ready
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.executor import Executor
from hybrimoe.runtime.layers import Layer
from hybrimoe.runtime.lookahead import Lookahead
from hybrimoe.runtime.measure import measure_profile
from hybrimoe.runtime.runner import Runner
from hybrimoe.runtime.slots import SlotCache
from hybrimoe.runtime.stats import StatsRecorder
from hybrimoe.runtime.steps import StepTracker
from hybrimoe.runtime.store import ExpertStore
from scheduler import CostModel, ModelShape
from scheduler.rehearsal import rehearse

Frequencies = npt.NDArray[np.floating]
Probe = Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]


@dataclass(slots=True)
class Startup:
    """The parts of a session that a runner is made of."""

    config: RuntimeConfig
    layers: Sequence[Layer]
    store: ExpertStore
    accelerator: Accelerator | None
    model: nn.Module | None
    probe: Probe
    stats: StatsRecorder
    tracker: StepTracker
    make_runner: Callable[..., Runner] = Runner
    make_planner: Callable[..., scheduler.Planner] = scheduler.Planner
    make_slots: Callable[[Accelerator], SlotCache] = SlotCache

    def runner(
        self, setting: int | float | str | None, previous: Runner | None, frequencies: Frequencies | None
    ) -> Runner:
        """A runner with freshly filled slots. `setting` None keeps the slot memory; `previous` hands over its costs,
        counters and hooks. Raises BudgetError where slots do not fit."""
        if setting is not None:
            self.allocate(self.slots_of(setting))
        slots, planner, costs = None, None, None
        if self.accelerator is not None and self.accelerator.n_slots and self._slotted():
            costs = self._costs() if previous is None or previous.costs is None else previous.costs
            slots = self.make_slots(self.accelerator)
            planner = self._planner(self.accelerator.n_slots, costs)
        runner = self.make_runner(self.layers, Executor(self.store, slots), planner, costs, self.stats, self.tracker)
        if self.config.lookahead > 0:
            runner.lookahead = self.new_lookahead(self.config.lookahead)
            make_ready()
        if previous is not None:
            runner.take_over(previous)
        if planner is not None:
            rehearse(self.config.policy, self.config.policy_params, self.config.lookahead)
            runner.warm_up(planner.warm_up(frequencies))
        return runner

    def _slotted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.placement != "cpu"]

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest record that has a slot; 0 where no layer has."""
        return max((layer.spec.record_bytes for layer in self._slotted()), default=0)

    def slots_of(self, setting: int | float | str) -> int:
        """Number of slots that a setting stands for; 0 without accelerator or layer to cache."""
        accelerator, slotted = self.accelerator, self._slotted()
        if accelerator is None or not slotted:
            return 0
        n_experts = sum(layer.num_experts for layer in slotted)
        reserve = reserve_bytes(self.model, accelerator, self.config.kv_reserve_bytes)
        return resolve_slots(setting, n_experts, self.slot_bytes, accelerator, reserve)

    def allocate(self, n_slots: int) -> None:
        """Replaces the slot memory, if there is an accelerator. Raises BudgetError where it does not fit."""
        if self.accelerator is None or not self.slot_bytes:
            return
        try:
            self.accelerator.allocate(n_slots, self.slot_bytes)
        except (AcceleratorError, MemoryError) as error:
            raise BudgetError(str(error) or f"no memory for {n_slots} slots of {self.slot_bytes} bytes") from error

    def _costs(self) -> CostModel:
        """From the given profile, this machine's calibration, or a short measurement of the first layer with slots."""
        index = next(i for i, layer in enumerate(self.layers) if layer.placement != "cpu")
        layer = self.layers[index]
        spec, device = layer.spec, self.accelerator
        profile = self.config.profile
        if profile is None and device is not None:
            profile = calibrated(spec.hidden, spec.inter, spec.dtype, device.name, device.kind)
        if profile is None:
            assert layer.backend is not None
            profile = measure_profile(self.store, index, layer.backend, self.accelerator)
        shape = ModelShape(
            name=layer.path,
            n_layers=len(self.layers),
            n_experts=max(item.num_experts for item in self.layers),
            top_k=1,
            hidden=layer.spec.hidden,
            inter=layer.spec.inter,
            gated=layer.spec.activation.gated,
        )
        return CostModel(profile, shape, layer.spec.dtype, [item.spec.record_bytes for item in self.layers])

    def _planner(self, n_slots: int, costs: CostModel) -> scheduler.Planner:
        return self.make_planner(
            len(self.layers),
            max(layer.num_experts for layer in self.layers),
            n_slots,
            costs,
            policy=self.config.policy,
            lookahead=self.config.lookahead,
            seed=self.config.seed,
            placements=[layer.placement for layer in self.layers],
            **self.config.policy_params,
        )

    def new_lookahead(self, depth: int) -> Lookahead | None:
        """Knows the gates of all layers once they have run; None where the model's blocks cannot be found."""
        if self.model is None:
            return None
        blocks = []
        for layer in self.layers:
            parent = layer.path.rpartition(".")[0]
            try:
                blocks.append(self.model.get_submodule(parent))
            except AttributeError:
                return None
        experts = [layer.experts for layer in self.layers]
        counts = [layer.num_experts for layer in self.layers]
        return Lookahead(blocks, experts, counts, depth, self.probe)
