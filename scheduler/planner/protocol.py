"""What the runtime asks of a planner: of one accelerator, of several, or of one that writes everything down.

``Planner``, ``group.PlannerGroup`` and ``recording.Recorder`` are one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand, LayerDemand, Phase
from scheduler.forecast.use_model import Learnt
from scheduler.future import Future
from scheduler.host import HostView
from scheduler.machine.costs import CostModel
from scheduler.plan import Event, LaneState, LayerPlan, ObservedTask, Transfer
from scheduler.planner.plan_view import PlanView
from scheduler.planner.planner import NOW
from scheduler.slots import SlotTable


class Costs(Protocol):
    """Predicted durations of every layer, as corrected so far; see ``CostModel``."""

    def cpu_us(self, layer: int, n_tokens: npt.ArrayLike, link_busy: bool = False) -> npt.NDArray[np.float64]: ...

    def accel_us(self, layer: int, n_tokens: npt.ArrayLike) -> npt.NDArray[np.float64]: ...

    def transfer_us(self, layer: int, cpu_busy: bool = False) -> float: ...

    def read_us(self, layer: int) -> float: ...

    def launch_us(self, layer: int) -> float: ...


class LayerPlanner(Protocol):
    """Plans layers and hears of what ran; see ``Planner`` for each method."""

    @property
    def n_layers(self) -> int: ...

    @property
    def n_experts(self) -> int: ...

    @property
    def costs(self) -> Costs: ...

    @property
    def cost_models(self) -> tuple[CostModel, ...]: ...

    @property
    def layers_ahead(self) -> int: ...

    @property
    def layers_skipped(self) -> int: ...

    @property
    def all_cached(self) -> bool: ...

    def table(self, layer: int) -> tuple[SlotTable, int]: ...

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]: ...

    def contents(self) -> dict[int, tuple[int, int]]: ...

    def warm_up(self, frequencies: npt.ArrayLike | None = None) -> tuple[Transfer, ...]: ...

    def learnt(self) -> Learnt | None: ...

    def recall(self, learnt: Mapping[str, npt.NDArray[Any]]) -> bool: ...

    def begin_sequence(self, future: Future | None = None) -> None: ...

    def begin_step(self, phase: Phase, n_tokens: int) -> None: ...

    def plan_layer(self, demand: LayerDemand, lanes: LaneState = NOW, host: HostView | None = None) -> LayerPlan: ...

    def decide(
        self, demand: Demand, cpu_ready_us: float = 0.0, accel_ready_us: float = 0.0, link_ready_us: float = 0.0,
        host: HostView | None = None,
    ) -> PlanView: ...  # fmt: skip

    def on_event(self, event: Event) -> None: ...

    def end_transfer(self, layer: int, expert: int, slot: int, us: float = 0.0) -> None: ...

    def end_layer(self, layer: int, observed: Sequence[ObservedTask] = ()) -> None: ...

    def observe(self, task: ObservedTask) -> None: ...
