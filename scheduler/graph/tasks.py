"""Nodes of the task graph and the inputs it is built from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand
from scheduler.plan import LayerPlan
from scheduler.records import NO_EXPERT, Lane, TaskKind, lane_name

EdgeKind = Literal["data", "slot"]
#: Identifies a task across plan and execution: (step, kind, layer, expert).
TaskKey = tuple[int, str, int, int]


@dataclass(frozen=True, slots=True)
class Task:
    """One node: what runs where, how long, and which expert and slot it concerns (``-1``: none)."""

    id: int
    lane: Lane
    kind: TaskKind
    layer: int
    step: int
    duration_us: float
    expert: int = NO_EXPERT
    n_tokens: int = 0
    bytes: int = 0
    slot: int = -1
    accelerator: int = 0

    @property
    def lane_name(self) -> str:
        """The lane, with its number from the second accelerator on (``records.lane_name``)."""
        return lane_name(self.lane, self.accelerator)

    @property
    def key(self) -> TaskKey:
        """(step, kind, layer, expert), as executed records carry it."""
        return (self.step, self.kind, self.layer, self.expert)

    @property
    def label(self) -> str:
        """Short name for drawings, such as ``transfer L3 E17``."""
        expert = f" E{self.expert}" if self.expert >= 0 else ""
        return f"{self.kind} L{self.layer}{expert}"


class Durations(Protocol):
    """Expected time of each kind of expert task; :class:`scheduler.machine.costs.CostModel` is one."""

    def cpu_us(self, layer: int, n_tokens: NDArray[np.int32]) -> NDArray[np.float64]: ...

    def accel_us(self, layer: int, n_tokens: NDArray[np.int32]) -> NDArray[np.float64]: ...

    def transfer_us(self, layer: int) -> float: ...

    def read_us(self, layer: int) -> float: ...


@dataclass(frozen=True, slots=True)
class DenseTimes:
    """Time of what surrounds the experts of one layer, and the lane it runs on."""

    attention_us: float = 0.0
    gate_us: float = 0.0
    shared_us: float = 0.0
    combine_us: float = 0.0
    lane: Lane = "accel"


class PlannedLayer(NamedTuple):
    """A layer's demand, the plan made for it, the dense work around it, and which accelerator and link it has."""

    plan: LayerPlan
    demand: LayerDemand
    dense: DenseTimes = DenseTimes()
    accelerator: int = 0
    link: int = 0


@dataclass(slots=True)
class Schedule:
    """When each task starts and ends (microseconds from 0), by task id."""

    start_us: dict[int, float] = field(default_factory=dict)
    end_us: dict[int, float] = field(default_factory=dict)

    @property
    def makespan_us(self) -> float:
        """End of the last task; 0 for an empty graph."""
        return max(self.end_us.values(), default=0.0)


class Segment(NamedTuple):
    """One bar of a Gantt row."""

    start_us: float
    end_us: float
    kind: str
    label: str


class GanttRow(NamedTuple):
    """All bars of one lane in time order."""

    lane: str
    segments: tuple[Segment, ...]


def as_plain(rows: Iterable[GanttRow]) -> list[dict[str, Any]]:
    """Gantt rows as JSON-ready data."""
    return [{"lane": row.lane, "segments": [segment._asdict() for segment in row.segments]} for row in rows]
