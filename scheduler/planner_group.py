"""Several accelerators behind the interface of one planner: each has a block of layers, slots and a planner of its own.

The rule: layers are shared out in contiguous blocks as even as they go, the first ones larger; all experts of a layer
belong to its accelerator (as in KTransformers' multi-GPU rule files and llama.cpp's ``--split-mode layer``: hidden
states cross once a block). Slots are shared out in proportion to the layers. Outside, slots and layers are numbered as
if there were one pool: accelerator a's slots follow those of a - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.demand import LayerDemand, Phase
from scheduler.errors import DemandError
from scheduler.explain import Explanation
from scheduler.future import Future
from scheduler.plan import Event, LaneState, LayerPlan, Transfer, TransferEnded
from scheduler.planner import NOW, Planner
from scheduler.slots import RESIDENT


class Block(NamedTuple):
    """Layers and slots of one accelerator, as ranges of the whole."""

    first_layer: int
    n_layers: int
    first_slot: int
    n_slots: int


def blocks(n_layers: int, n_slots: int, n_units: int) -> list[Block]:
    """The rule above. Raises DemandError for more accelerators than layers."""
    if not 1 <= n_units <= n_layers:
        raise DemandError(f"{n_units} accelerators for {n_layers} MoE layers: each needs at least one")
    layers = [n_layers // n_units + (unit < n_layers % n_units) for unit in range(n_units)]
    ends = np.cumsum(layers)
    slots = np.diff(np.round(n_slots * np.concatenate(([0], ends)) / n_layers)).astype(int)
    return [
        Block(int(ends[unit]) - layers[unit], layers[unit], int(slots[:unit].sum()), int(slots[unit]))
        for unit in range(n_units)
    ]


class PlannerGroup:
    """``make(block, unit)`` gives the planner of a block, over its own layers and slots from 0."""

    def __init__(self, parts: Sequence[Block], make: Callable[[Block], Planner]) -> None:
        self.parts = list(parts)
        self.planners = [make(part) for part in self.parts]
        self._unit = [unit for unit, part in enumerate(self.parts) for _ in range(part.n_layers)]
        self._latest: dict[int, LayerPlan] = {}

    def unit(self, layer: int) -> int:
        """The accelerator of a layer; what follows the last layer is on the last one."""
        return self._unit[min(layer, len(self._unit) - 1)]

    def warm_up(self, frequencies: npt.NDArray[np.float64] | None = None) -> tuple[Transfer, ...]:
        """As ``Planner.warm_up``."""
        found: list[Transfer] = []
        for part, planner in zip(self.parts, self.planners, strict=True):
            known = None if frequencies is None else frequencies[part.first_layer : part.first_layer + part.n_layers]
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

    def explain(self, plan: LayerPlan) -> Explanation:
        """As ``Planner.explain``."""
        found = self.planners[self.unit(plan.layer)].explain(self._latest[plan.layer])
        return replace(found, layer=plan.layer)

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool [experts]: bytes are in a slot now."""
        unit = self.unit(layer)
        return self.planners[unit].slots.resident_mask(layer - self.parts[unit].first_layer)

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
