"""Several accelerators behind the interface of one planner: each has a block of layers, slots and a planner of its own.

All experts of a layer belong to its accelerator (``scheduler.planner.layer_blocks`` says which). Outside, slots and
layers are numbered as if there were one pool: accelerator a's slots follow those of a - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand, DemandView, LayerDemand, Phase, Prediction
from scheduler.errors import SlotError
from scheduler.forecast.use_model import Learnt
from scheduler.future import Future
from scheduler.host import HostView
from scheduler.machine.costs import CostModel
from scheduler.plan import Event, LaneState, LayerPlan, ObservedTask, Transfer
from scheduler.planner.explain import Explanation
from scheduler.planner.layer_blocks import Block
from scheduler.planner.plan_view import PlanView
from scheduler.planner.planner import NOW, Planner
from scheduler.slots import SlotTable

NO_IDS, NO_SCORES = np.empty(0, np.int32), np.empty(0, np.float32)


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

    def read_us(self, layer: int) -> float:
        """As ``CostModel.read_us``."""
        costs, own = self._parts[layer]
        return costs.read_us(own)

    def launch_us(self, layer: int) -> float:
        """As ``CostModel.launch_us``."""
        costs, own = self._parts[layer]
        return costs.launch_us(own)


class PlannerGroup:
    """``make(block)`` gives the planner of a block, which numbers its layers and slots from the block's first ones."""

    def __init__(self, parts: Sequence[Block], make: Callable[[Block], Planner]) -> None:
        self.parts = list(parts)
        self.planners = [make(part) for part in self.parts]
        for part, planner in zip(self.parts, self.planners, strict=True):
            if (planner.first_layer, planner.first_slot) != (part.first_layer, part.first_slot):
                raise SlotError(
                    f"the planner of {part} starts at layer {planner.first_layer}, slot {planner.first_slot}; pass it "
                    "the block's first_layer and first_slot"
                )
        self._accelerators = [index for index, part in enumerate(self.parts) for _ in range(part.n_layers)]
        self._home = [self.planners[index] for index in self._accelerators]
        self._inside = [_Inside(layer - home.first_layer, home.n_layers) for layer, home in enumerate(self._home)]
        self.n_layers, self.n_experts = len(self._accelerators), max(planner.n_experts for planner in self.planners)
        self.costs = GroupCosts([(home.costs, layer - home.first_layer) for layer, home in enumerate(self._home)])
        self.layers_ahead = max(planner.layers_ahead for planner in self.planners)
        self.layers_skipped = min(planner.layers_skipped for planner in self.planners)
        self.all_cached = all(planner.all_cached for planner in self.planners)

    @property
    def cost_models(self) -> tuple[CostModel, ...]:
        """The cost model of each accelerator's block, in order."""
        return tuple(planner.costs for planner in self.planners)

    def table(self, layer: int) -> tuple[SlotTable, int]:
        """The slots of the layer's accelerator, and the layer's number in them."""
        home = self._home[layer]
        return home.slots, layer - home.first_layer

    def accelerator_of(self, layer: int) -> int:
        """The accelerator of a layer; what follows the last layer is on the last one."""
        return self._accelerators[min(layer, len(self._accelerators) - 1)]

    def warm_up(self, frequencies: npt.ArrayLike | None = None) -> tuple[Transfer, ...]:
        """As ``Planner.warm_up``."""
        found: list[Transfer] = []
        every = None if frequencies is None else np.asarray(frequencies)
        for part, planner in zip(self.parts, self.planners, strict=True):
            known = None if every is None else every[part.first_layer : part.first_layer + part.n_layers]
            found += planner.warm_up(known)
        return tuple(found)

    def study(self, demands: Sequence[Demand], begins: bool) -> None:
        """As ``Planner.study``."""
        for part, planner in zip(self.parts, self.planners, strict=True):
            own = [d for d in demands if part.first_layer <= d.layer < part.first_layer + part.n_layers]
            planner.study([self._inside[demand.layer].of(demand) for demand in own], begins)

    def learnt(self) -> Learnt | None:
        """As ``Planner.learnt``, copied; None where not all blocks have such forecasts."""
        found = [known for planner in self.planners if (known := planner.learnt()) is not None]
        shapes = {tuple(array.shape[1:] for array in known.values()) for known in found}
        if len(found) < len(self.planners) or len(shapes) != 1:
            return None
        return {name: np.concatenate([known[name] for known in found]) for name in found[0]}

    def recall(self, learnt: Mapping[str, npt.NDArray[Any]]) -> bool:
        """As ``Planner.recall``, of each block; whether it fits all of them."""
        fits = [
            planner.recall({name: array[part.first_layer :][: part.n_layers] for name, array in learnt.items()})
            for part, planner in zip(self.parts, self.planners, strict=True)
        ]
        return all(fits)

    def begin_sequence(self, future: Future | None = None) -> None:
        """As ``Planner.begin_sequence``."""
        for part, planner in zip(self.parts, self.planners, strict=True):
            planner.begin_sequence(None if future is None else future.layers(part.first_layer, part.n_layers))

    def begin_step(self, phase: Phase, n_tokens: int) -> None:
        """As ``Planner.begin_step``."""
        for planner in self.planners:
            planner.begin_step(phase, n_tokens)

    def plan_layer(self, demand: LayerDemand, lanes: LaneState = NOW, host: HostView | None = None) -> LayerPlan:
        """As ``Planner.plan_layer``; ``lanes`` are those of the layer's accelerator."""
        return self.decide(demand, lanes.cpu_ready_us, lanes.accel_ready_us, lanes.link_ready_us, host).plan(demand)

    def decide(
        self, demand: Demand, cpu_ready_us: float = 0.0, accel_ready_us: float = 0.0, link_ready_us: float = 0.0,
        host: HostView | None = None,
    ) -> PlanView:  # fmt: skip
        """As ``Planner.decide``; the times are those of the layer's accelerator."""
        layer = demand.layer
        inside = self._inside[layer].of(demand)
        return self._home[layer].decide(inside, cpu_ready_us, accel_ready_us, link_ready_us, host)

    def on_event(self, event: Event) -> None:
        """As ``Planner.on_event``."""
        self._of(event.layer).on_event(event)

    def end_transfer(self, layer: int, expert: int, slot: int, us: float = 0.0) -> None:
        """As ``Planner.end_transfer``."""
        self._of(layer).end_transfer(layer, expert, slot, us)

    def end_layer(self, layer: int, observed: Sequence[ObservedTask] = ()) -> None:
        """As ``Planner.end_layer``."""
        self._of(layer).end_layer(layer, observed)

    def observe(self, task: ObservedTask) -> None:
        """As ``Planner.observe``."""
        self._of(task.layer).observe(task)

    def explain(self, plan: LayerPlan) -> Explanation:
        """As ``Planner.explain``."""
        return self._of(plan.layer).explain(plan)

    def _of(self, layer: int) -> Planner:
        """The planner of a layer; one that does not exist is refused by the first or last of them."""
        return self._home[min(max(layer, 0), self.n_layers - 1)]

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool [experts]: bytes are in a slot now."""
        home = self._home[layer]
        return home.slots.resident_mask(layer - home.first_layer)

    def contents(self) -> dict[int, tuple[int, int]]:
        """As ``Planner.contents``, of all accelerators."""
        return {slot: key for planner in self.planners for slot, key in planner.contents().items()}


class _Inside:
    """The demand of one layer as its planner numbers it: what is wrapped is set anew by each call, not made."""

    def __init__(self, layer: int, n_layers: int) -> None:
        """``layer``: its number among the block's ``n_layers``."""
        self._last = n_layers
        self._view = DemandView(layer, "decode", 0, NO_IDS, NO_IDS, NO_SCORES)
        self._given: tuple[Prediction, ...] = ()

    def of(self, demand: Demand) -> DemandView:
        """The same demand; predictions of other blocks are left out."""
        view = self._view
        view.phase, view.n_tokens_total = demand.phase, demand.n_tokens_total
        view.expert_ids, view.n_tokens, view.gate_scores = demand.expert_ids, demand.n_tokens, demand.gate_scores
        if demand.predictions is not self._given:
            self._given = demand.predictions
            first = demand.layer - view.layer
            view.predictions = tuple(
                [
                    Prediction(p.layer - first, p.expert_ids, p.n_tokens, p.scores)
                    for p in self._given
                    if p.layer - first < self._last
                ]
            )
        return view
