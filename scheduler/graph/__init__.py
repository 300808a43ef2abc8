"""The schedule of a step as one directed acyclic graph: validated, simulated, explained, exported."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler.graph.build import build
from scheduler.graph.checks import GraphError, SlotContents, check_records, check_slots, check_structure, raise_if
from scheduler.graph.export import chrome_trace, gantt
from scheduler.graph.tasks import DenseTimes, Durations, GanttRow, PlannedLayer, Schedule, Segment, Task, as_plain
from scheduler.graph.timing import critical_path, idle_us, list_schedule
from scheduler.records import TaskRecord

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "DenseTimes",
    "Durations",
    "GanttRow",
    "GraphError",
    "PlannedLayer",
    "Schedule",
    "Segment",
    "Task",
    "TaskGraph",
    "as_plain",
    "chrome_trace",
    "gantt",
]


class TaskGraph:
    """Tasks of one or more planned layers with their data and slot dependencies.

    ``graph`` is a :class:`networkx.DiGraph` over task ids; each node carries ``task`` (:class:`Task`), each edge
    ``kind`` (``data`` or ``slot``). ``lane_order`` is the first-in-first-out order of each lane.
    """

    def __init__(
        self,
        items: Sequence[PlannedLayer],
        graph: "nx.DiGraph[int]",
        lane_order: dict[str, list[int]],
        tasks: list[Task],
        expert_bytes: int,
    ) -> None:
        self.items = tuple(items)
        self.graph = graph
        self.lane_order = lane_order
        self.tasks = tasks
        self.expert_bytes = expert_bytes
        self._schedule: Schedule | None = None

    @classmethod
    def from_plans(cls, items: Sequence[PlannedLayer], durations: Durations, expert_bytes: int) -> "TaskGraph":
        """Graph of planned layers in execution order; all layers share one expert size in bytes."""
        return cls(items, *build(items, durations, expert_bytes), expert_bytes)

    def with_durations(self, duration_us: Mapping[int, float]) -> "TaskGraph":
        """The same tasks and edges, the tasks named by id with other durations."""
        tasks = [replace(task, duration_us=duration_us.get(task.id, task.duration_us)) for task in self.tasks]
        return TaskGraph(self.items, self.graph, self.lane_order, tasks, self.expert_bytes)

    def validate(self, n_slots: int | None = None, resident: SlotContents | None = None) -> None:
        """Raise :class:`GraphError` unless the plan keeps every rule (see :mod:`scheduler.graph.checks`)."""
        problems = check_structure(self.graph, self.items, self.tasks, self.expert_bytes)
        problems += check_slots(self.items, n_slots, resident)
        raise_if(problems, "invalid plan")
        try:
            self.simulate()
        except ValueError as error:
            raise GraphError(f"invalid plan: {error}") from error

    def simulate(self) -> Schedule:
        """Expected start and end of each task; computed once."""
        if self._schedule is None:
            self._schedule = list_schedule(self.graph, self.tasks, self.lane_order)
        return self._schedule

    @property
    def makespan_us(self) -> float:
        """Expected time from the first task's start to the last task's end."""
        return self.simulate().makespan_us

    def critical_path(self) -> list[Task]:
        """Tasks that bound the makespan, in time order."""
        return [self.tasks[i] for i in critical_path(self.graph, self.tasks, self.lane_order, self.simulate())]

    def idle_us(self) -> dict[str, float]:
        """Expected idle time of each used lane."""
        return idle_us(self.tasks, self.simulate())

    def records(self) -> list[TaskRecord]:
        """The simulated execution as records, in start order."""
        schedule = self.simulate()
        records = [
            TaskRecord(
                t.lane,
                t.kind,
                t.layer,
                t.expert,
                t.n_tokens,
                t.bytes,
                schedule.start_us[t.id],
                schedule.end_us[t.id],
                t.step,
                t.accelerator,
            )
            for t in self.tasks
        ]
        return sorted(records, key=lambda record: (record.start_us, record.end_us))

    def check_execution(self, records: Sequence[TaskRecord], slack_us: float = 0.0) -> None:
        """Raise :class:`GraphError` unless ``records`` is a linear extension of this graph.

        Every planned expert and demand transfer ran exactly once with its tokens and bytes, nothing else ran, no task
        started before one it depends on had ended, no lane ran two tasks at once. ``slack_us`` allows for the
        resolution of the clock that stamped the records.
        """
        raise_if(check_records(self.graph, self.tasks, records, slack_us), "execution does not follow the plan")
