"""From a session's settings to its experts call: slots, costs, planner, lookahead, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.dispatch import build_dispatch
from cpu_kernels.engine.team import start_team
from gpu_kernels import Accelerator, AcceleratorError
from hybrimoe.amounts import size_text
from hybrimoe.errors import BudgetError, debugging
from hybrimoe.machine.disks import calibrated_disk
from hybrimoe.machine.profiles import calibrated
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.layer_call import choosing, tallies
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.compiled import make_ready
from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.slots import TransferQueue
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.layer_call.steps import StepTracker
from hybrimoe.runtime.learnt import told_from
from hybrimoe.runtime.startup.measure import make_kernels_ready, measure_profile
from hybrimoe.runtime.startup.units import Unit, blocks_of, slots_by_unit
from hybrimoe.runtime.store import ExpertStore
from hybrimoe.runtime.tier.store import TieredStore
from scheduler import CostModel, ModelShape, Planner
from scheduler.forecast import host_worth
from scheduler.forecast.use_model import SLOW, Learnt
from scheduler.planner.protocol import LayerPlanner
from scheduler.planner.rehearsal import rehearse
from scheduler.planner.setup import PlannerSetup

WAIT_MARGIN = 20.0
"""The host waits for a device so many times as long as the work should take: costs are of a device that is idle."""
TOKENS_OF_A_WAIT = 512
"""Of each expert, in the work that a wait is for: all of a chunk of a prompt together."""

Frequencies = npt.NDArray[np.floating]
Probe = Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]


@dataclass(slots=True)
class Startup:
    """The parts of a session that its experts call is made of."""

    config: RuntimeConfig
    layers: Sequence[Layer]
    store: ExpertStore
    units: Sequence[Unit]
    model: nn.Module | None
    probe: Probe
    stats: StatsRecorder
    tracker: StepTracker
    make_planner: Callable[[PlannerSetup], LayerPlanner] = PlannerSetup.planner
    make_queue: Callable[[Accelerator, int, int], TransferQueue] = TransferQueue
    learnt: Learnt | None = None
    """What an earlier run has learnt of the model's routing."""

    def call(
        self, setting: int | float | str | None, previous: ExpertsCall | None, frequencies: Frequencies | None
    ) -> ExpertsCall:
        """What runs the layers, with freshly filled slots. `setting` None keeps the slot memory; `previous` hands over
        its costs, what its planner has learnt, counters and hooks. Raises BudgetError where slots do not fit."""
        if setting is not None:
            self.allocate(self.slots_of(setting))
        experts = self.experts(None if previous is None else previous.experts)
        call = ExpertsCall(experts, self.tracker)
        if self.config.lookahead > 0:
            call.lookahead = self.new_lookahead(self.config.lookahead)
        if previous is not None:
            call.take_over(previous)
        self.fill_slots(experts, frequencies)
        return call

    def experts(self, previous: Experts | None) -> Experts:
        """The experts in the slot memory that is allocated; `previous` hands over its costs and what its planner has
        learnt."""
        planner, queues, queue_of = None, [], []
        if self._slotted() and any(unit.accelerator.n_slots for unit in self.units):
            known = None if previous is None else previous.planner
            planner = self._planner([self._tried(unit) for unit in self.units] if known is None else known.cost_models)
            learnt, own = self.learnt if known is None else known.learnt(), planner.learnt()
            if learnt is not None and own is not None:
                planner.recall(told_from(learnt, own["distance"]))
            firsts = [block.first_slot for block in blocks_of(self.units)]
            queues = [self.make_queue(unit.accelerator, firsts[unit.index], unit.index) for unit in self.units]
            queue_of = [unit.index for unit in self.units for _ in unit.layers]
        if planner is not None and debugging():
            for index in range(len(self.layers)):
                planner.table(index)[0].validating = True
        self._limit_waits(planner)
        return Experts(self.layers, self.store, planner, self.stats, queues, queue_of)

    def _limit_waits(self, planner: LayerPlanner | None) -> None:
        """How long the host waits for an accelerator: as the settings say, else by what it should take to fill all
        slots and to compute all experts of a layer with many tokens each, and far longer."""
        for unit in self.units:
            limit, seconds = unit.accelerator.wait_limit, self.config.device_wait_s
            if seconds is None:
                seconds = limit.least_s
                if planner is not None and unit.layers:
                    costs, n_experts = planner.cost_models[unit.index], self.layers[unit.layers[0]].num_experts
                    copied_us = (unit.accelerator.n_slots + n_experts) * costs.transfer_us(0)
                    us = copied_us + n_experts * float(costs.accel_us(0, np.array([TOKENS_OF_A_WAIT]))[0])
                    seconds = max(seconds, WAIT_MARGIN * us * 1e-6)
            limit.allow(seconds)

    def fill_slots(self, experts: Experts, frequencies: Frequencies | None) -> None:
        """Starts the transfers of the experts that are used most, by `frequencies`, else by what the planner has
        learnt; makes ready what the first call would compile."""
        for threads in {layer.backend.n_threads for layer in self.layers if isinstance(layer.backend, NumbaBackend)}:
            start_team(threads)
        if self.config.lookahead > 0 or experts.planner is not None:
            make_ready()
        if isinstance(self.store, TieredStore):
            host_worth.make_ready()
        unplanned = (i for i, layer in enumerate(self.layers) if experts.planner is None or layer.placement == "cpu")
        if (first := next(unplanned, None)) is not None:
            _rehearse_alone(self.layers[first], self.store, first)
        if experts.planner is None:
            return
        tallies.make_ready()
        rehearse(self.config.policy, self.config.policy_params, self.config.lookahead)
        if isinstance(experts.planner, Planner) and experts.planner.decides_at_once:
            choosing.make_ready()
        known = experts.planner.learnt() if frequencies is None else None
        if known is not None and known["rates"].any():
            frequencies = known["rates"][:, SLOW]
        experts.warm_up(experts.planner.warm_up(frequencies))

    def _slotted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.placement != "cpu"]

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest record that has a slot; 0 where no layer has."""
        return max((layer.spec.record_bytes for layer in self._slotted()), default=0)

    def slots_of(self, setting: int | float | str) -> list[int]:
        """Number of slots of each accelerator that a setting stands for; 0 without a layer to cache."""
        return slots_by_unit(
            setting, self.units, self.layers, self.slot_bytes, self.model, self.config.kv_reserve_bytes
        )

    def check(self, setting: int | float | str) -> None:
        """Raises BudgetError where the slots that a setting stands for do not fit, as far as that can be seen while
        there are others."""
        for unit, n_slots in zip(self.units, self.slots_of(setting), strict=True):
            n_bytes, free_bytes = n_slots * self.slot_bytes, unit.accelerator.free_bytes()
            if free_bytes is not None and n_bytes > free_bytes:
                raise BudgetError(
                    f"{n_slots} slots need {size_text(n_bytes)} of {unit.accelerator.name}, which has"
                    f" {size_text(free_bytes)} for them: ask for fewer"
                )

    def allocate(self, n_slots: Sequence[int]) -> None:
        """Replaces the slot memory of each accelerator. Raises BudgetError where it does not fit; each accelerator then
        has as many slots as before."""
        if not self.slot_bytes:
            return
        before = [(unit.accelerator, unit.accelerator.n_slots, unit.accelerator.slot_bytes) for unit in self.units]
        for index, (unit, n) in enumerate(zip(self.units, n_slots, strict=True)):
            try:
                unit.accelerator.allocate(n, self.slot_bytes)
            except (AcceleratorError, MemoryError) as error:
                for accelerator, n_before, bytes_before in before[:index]:
                    accelerator.allocate(n_before, bytes_before)
                raise BudgetError(str(error) or f"no memory for {n} slots of {self.slot_bytes} bytes") from error

    def _tried(self, unit: Unit) -> CostModel:
        """`_costs`. Raises BudgetError where the slots leave a device no memory to compute an expert in."""
        try:
            return self._costs(unit)
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"{unit.accelerator.n_slots} slots leave {unit.accelerator.name} no memory to compute an expert in:"
                " lower gpu_expert_slots, or take auto"
            ) from error

    def _costs(self, unit: Unit) -> CostModel:
        """Of the unit's layers: from the given profile, this machine's calibration, or a short measurement of the first
        layer with slots."""
        with_slots = (i for i in unit.layers if self.layers[i].placement != "cpu")
        index = next(with_slots, unit.layers[0])
        layer = self.layers[index]
        spec, device = layer.spec, unit.accelerator
        if device.n_slots and device.kind != "emulated":
            make_kernels_ready(self.store, unit.layers, device)  # before anything is measured
        profile = self.config.profile or calibrated(spec.hidden, spec.inter, spec.dtype, device.name, device.kind)
        if profile is None:
            assert layer.backend is not None
            profile = measure_profile(self.store, index, layer.backend, device if device.n_slots else None)
        if self.config.profile is None and isinstance(self.store, TieredStore):
            profile = replace(profile, disk=calibrated_disk(self.store.cache.reader.path))
        shape = ModelShape(
            name=layer.path,
            n_layers=len(unit.layers),
            n_experts=max(item.num_experts for item in self.layers),
            top_k=1,
            hidden=layer.spec.hidden,
            inter=layer.spec.inter,
            gated=layer.spec.activation.gated,
        )
        return CostModel(profile, shape, spec.dtype, [self.layers[i].spec.record_bytes for i in unit.layers])

    def _planner(self, costs: Sequence[CostModel]) -> LayerPlanner:
        setup = PlannerSetup(
            max(layer.num_experts for layer in self.layers), costs, blocks_of(self.units),
            [layer.placement for layer in self.layers], self.config.policy, self.config.lookahead,
            self.config.policy_params,
        )  # fmt: skip
        return self.make_planner(setup)

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


def _rehearse_alone(layer: Layer, store: ExpertStore, index: int) -> None:
    """Compiles (or loads) calls on the CPU, with the first expert and a token of zeros: those of few tokens are one
    compiled function, those of many group them and are counted by themselves."""
    backend, spec = layer.backend, layer.spec
    assert backend is not None
    records = store.hold(index, [0])
    if isinstance(backend, NumbaBackend):
        hidden, nobody = torch.zeros(1, spec.hidden), torch.zeros(1, 1, dtype=torch.int64)
        backend.run_routed(spec, store.addresses(index), hidden, nobody, torch.ones(1, 1))
    tallies.make_ready()
    dispatch = build_dispatch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), layer.num_experts)
    rows = np.zeros((1, spec.hidden), np.float32), np.empty((1, spec.hidden), np.float32)
    run = backend.run_trusted if isinstance(backend, NumbaBackend) else backend.run
    run(spec, records, np.zeros(1, np.int32), dispatch, *rows)
