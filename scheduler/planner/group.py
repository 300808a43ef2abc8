"""Several accelerators behind the interface of one planner: each has a block of layers, slots and a planner of its own.

All experts of a layer belong to its accelerator (``scheduler.planner.layer_blocks`` says which). Outside, slots and
layers are numbered as if there were one pool: accelerator a's slots follow those of a - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from scheduler.demand import LayerDemand, Phase
from scheduler.future import Future
from scheduler.machine.costs import CostModel
from scheduler.plan import Event, LaneState, LayerPlan, ObservedTask, Transfer, TransferEnded
from scheduler.planner.explain import Explanation
from scheduler.planner.layer_blocks import Block
from scheduler.planner.planner import NOW, Planner
from scheduler.slots import RESIDENT, SlotTable


class GroupCosts:
    """Predicted durations of every layer, from the cost model of its accelerator (``CostModel``'s own methods)."""

    def __init__(self, parts: Sequence[tuple[CostModel, int]]) -> None:
        """``parts``: of each layer, the cost model of its block and the layer's number there."""
        self._parts = list(parts)

    def cpu_us(self, layer: int, n_tokens: npt.ArrayLike, link_busy: bool = False) -> npt.NDArray[np.float64]:
        """As ``CostModel.cpu_us``."""
        costs, own = self._parts[layer]
        return costs.cpu_us(own, n_tokens, link_busy)

    def accel_us(self, layer: int, n_tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """As ``CostModel.accel_us``."""
        costs, own = self._parts[layer]
        return costs.accel_us(own, n_tokens)

    def transfer_us(self, layer: int, cpu_busy: bool = False) -> float:
        """As ``CostModel.transfer_us``."""
        costs, own = self._parts[layer]
        return costs.transfer_us(own, cpu_busy)


class PlannerGroup:
    """``make(block, unit)`` gives the planner of a block, over its own layers and slots from 0."""

    def __init__(self, parts: Sequence[Block], make: Callable[[Block], Planner]) -> None:
        self.parts = list(parts)
        self.planners = [make(part) for part in self.parts]
        self._unit = [unit for unit, part in enumerate(self.parts) for _ in range(part.n_layers)]
        self._latest: dict[int, LayerPlan] = {}
        self.n_layers, self.n_experts = len(self._unit), max(planner.n_experts for planner in self.planners)
        homes = [(self.planners[unit], layer - self.parts[unit].first_layer) for layer, unit in enumerate(self._unit)]
        self._homes = homes
        self.costs = GroupCosts([(planner.costs, own) for planner, own in homes])

    @property
    def layers_ahead(self) -> int:
        """As ``Planner.layers_ahead``: the most that one of the planners reads."""
        return max(planner.layers_ahead for planner in self.planners)

    @property
    def all_cached(self) -> bool:
        """As ``Planner.all_cached``: of every accelerator."""
        return all(planner.all_cached for planner in self.planners)

    @property
    def cost_models(self) -> tuple[CostModel, ...]:
        """The cost model of each accelerator's block, in order."""
        return tuple(planner.costs for planner in self.planners)

    def table(self, layer: int) -> tuple[SlotTable, int]:
        """The slots of the layer's accelerator, and the layer's number in them."""
        planner, own = self._homes[layer]
        return planner.slots, own

    def unit(self, layer: int) -> int:
        """The accelerator of a layer; what follows the last layer is on the last one."""
        return self._unit[min(layer, len(self._unit) - 1)]

    def warm_up(self, frequencies: npt.ArrayLike | None = None) -> tuple[Transfer, ...]:
        """As ``Planner.warm_up``."""
        found: list[Transfer] = []
        every = None if frequencies is None else np.asarray(frequencies)
        for part, planner in zip(self.parts, self.planners, strict=True):
            known = None if every is None else every[part.first_layer : part.first_layer + part.n_layers]
            found += [_outside(transfer, part) for transfer in planner.warm_up(known)]
        return tuple(found)

    def begin_sequence(self, future: Future | None = None) -> None:
        """As ``Planner.begin_sequence``."""
        for part, planner in zip(self.parts, self.planners, strict=True):
            planner.begin_sequence(None if future is None else future.layers(part.first_layer, part.n_layers))

    def begin_step(self, phase: Phase, n_tokens: int) -> None:
        """As ``Planner.begin_step``."""
        for planner in self.planners:
            planner.begin_step(phase, n_tokens)

    def plan_layer(self, demand: LayerDemand, lanes: LaneState = NOW) -> LayerPlan:
        """As ``Planner.plan_layer``; ``lanes`` are those of the layer's accelerator."""
        unit = self.unit(demand.layer)
        part = self.parts[unit]
        plan = self.planners[unit].plan_layer(_inside(demand, part), lanes)
        self._latest[demand.layer] = plan
        return replace(
            plan,
            layer=demand.layer,
            accel_slots=tuple(slot + part.first_slot for slot in plan.accel_slots),
            transfers=tuple(_outside(transfer, part) for transfer in plan.transfers),
            prefetches=tuple(_outside(transfer, part) for transfer in plan.prefetches),
        )

    def on_event(self, event: Event) -> None:
        """As ``Planner.on_event``."""
        unit = self.unit(event.layer)
        part = self.parts[unit]
        layer = event.layer - part.first_layer
        if isinstance(event, TransferEnded):
            self.planners[unit].on_event(replace(event, layer=layer, slot=event.slot - part.first_slot))
            return
        observed = tuple(replace(task, layer=layer) for task in event.observed)
        self.planners[unit].on_event(replace(event, layer=layer, observed=observed))

    def observe(self, task: ObservedTask) -> None:
        """As ``Planner.observe``."""
        planner, own = self._homes[task.layer]
        planner.observe(replace(task, layer=own))

    def explain(self, plan: LayerPlan) -> Explanation:
        """As ``Planner.explain``."""
        found = self.planners[self.unit(plan.layer)].explain(self._latest[plan.layer])
        return replace(found, layer=plan.layer)

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool [experts]: bytes are in a slot now."""
        planner, own = self._homes[layer]
        return planner.slots.resident_mask(own)

    def contents(self) -> dict[int, tuple[int, int]]:
        """slot -> (layer, expert) of everything whose bytes are there now."""
        held: dict[int, tuple[int, int]] = {}
        for part, planner in zip(self.parts, self.planners, strict=True):
            for slot in np.flatnonzero(planner.slots.state >= RESIDENT).tolist():
                layer, expert = divmod(int(planner.slots.key_of[slot]), planner.n_experts)
                held[slot + part.first_slot] = (layer + part.first_layer, expert)
        return held


def _inside(demand: LayerDemand, part: Block) -> LayerDemand:
    last = part.first_layer + part.n_layers
    known = tuple(replace(p, layer=p.layer - part.first_layer) for p in demand.predictions if p.layer < last)
    return replace(demand, layer=demand.layer - part.first_layer, predictions=known)


def _outside(transfer: Transfer, part: Block) -> Transfer:
    evicts = None if transfer.evicts is None else (transfer.evicts[0] + part.first_layer, transfer.evicts[1])
    return replace(
        transfer, layer=transfer.layer + part.first_layer, slot=transfer.slot + part.first_slot, evicts=evicts
    )
