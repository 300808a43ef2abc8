"""Recorded plans simulated again: with the durations that were recorded, or with those of a cost model.

The time between layers (attention, router, planning: the host's) is taken as it was recorded; what is simulated are
the lanes. ``service`` splits each recorded task into its own duration and the lag between the moment when it could have
started (its dependencies and the task before it on its lane had ended) and the moment when it did: dispatch, wake-up
and synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.graph import DenseTimes, Durations, PlannedLayer, Task, TaskGraph
from scheduler.records import Lane, TaskRecord

if TYPE_CHECKING:
    import networkx as nx

COMPUTE: Final = ("cpu_expert", "accel_expert")
HOST: Final[Lane] = "disk"
"""The lane of the time between layers. No expert uses it here: waiting for reads from disk counts as lag."""


class StepTime(NamedTuple):
    """us in which layers of one step ran, without the time between them."""

    step: int
    phase: str
    simulated_us: float
    recorded_us: float

    @property
    def error(self) -> float:
        """|simulated - recorded| / recorded."""
        return abs(self.simulated_us - self.recorded_us) / self.recorded_us


@dataclass(frozen=True, slots=True)
class Lag:
    """Median us from when a task could start to when it did, by lane: what dispatch and synchronisation cost.

    ``first_*``: of a layer's first task on the lane, which the host has to start.
    """

    cpu_us: float = 0.0
    accel_us: float = 0.0
    link_us: float = 0.0
    first_cpu_us: float = 0.0
    first_accel_us: float = 0.0
    first_link_us: float = 0.0

    def of(self, lane: Lane, first: bool) -> float:
        """us of one task of a lane."""
        return float(getattr(self, f"first_{lane}_us" if first else f"{lane}_us"))


class Retiming:
    """Plans and what ran, joined: the graph of all steps with the recorded time between layers on the host's lane.

    Layers without a record of each of their computations are left out, and so is the rest of their step.
    """

    def __init__(self, plans: Sequence[PlannedLayer], tasks: Sequence[TaskRecord], expert_bytes: int) -> None:
        self._spans = _spans(tasks)
        whole = _whole_steps(plans, self._spans)
        self.items = self._with_gaps([item for item in plans if item.plan.step in whole])
        self.graph = TaskGraph.from_plans(self.items, _Nothing(), expert_bytes)
        self._record = _match(self.graph.tasks, tasks)
        self._first = _first_tasks(self.graph.tasks)
        self._lagging = self._lags()

    def _with_gaps(self, plans: Iterable[PlannedLayer]) -> list[PlannedLayer]:
        items, ended = [], None
        for item in plans:
            start, end = self._spans[item.plan.step, item.plan.layer]
            gap_us = 0.0 if ended is None else max(start - ended, 0.0)
            plan = replace(item.plan, reads=())
            items.append(item._replace(plan=plan, dense=DenseTimes(attention_us=gap_us, lane=HOST)))
            ended = end
        return items

    def lags(self, first_step: int = 0, end_step: int | None = None) -> Lag:
        """Median lag of each lane, over the steps from ``first_step`` to before ``end_step`` (None: all)."""
        found: dict[str, list[float]] = {}
        for task, lag in self._lagging:
            if first_step <= task.step and (end_step is None or task.step < end_step):
                name = f"first_{task.lane}_us" if task.id in self._first else f"{task.lane}_us"
                found.setdefault(name, []).append(lag)
        return Lag(**{name: median(values) for name, values in found.items()})

    def _lags(self) -> list[tuple[Task, float]]:
        """Recorded tasks with their lag; a layer's first task has none, a prefetch before it a negative one."""
        import networkx as nx

        before = {b: a for order in self.graph.lane_order.values() for a, b in pairwise(order)}
        ended: dict[int, float] = {}
        result = []
        for node in nx.topological_sort(self._with_lanes(before)):
            task, record = self.graph.tasks[node], self._record.get(node)
            ready = max((ended[p] for p in (*self.graph.graph.predecessors(node), before.get(node)) if p in ended),
                        default=float("-inf"))  # fmt: skip
            if task.kind == "gate":
                ready = self._spans[task.step, task.layer][0]
            if record is not None:
                result.append((task, record.start_us - ready))
            ended[node] = ready if record is None else record.end_us
        return result

    def _with_lanes(self, before: Mapping[int, int]) -> nx.DiGraph[int]:
        joined = self.graph.graph.copy()
        joined.add_edges_from((a, b) for b, a in before.items())
        return joined

    def step_times(
        self, costs: Callable[[int], Durations] | None = None, lag: Callable[[int], Lag] | None = None
    ) -> list[StepTime]:
        """Each step with the recorded durations (``costs`` None) or those of its ``costs``, each task longer by the
        step's lag."""
        durations = {}
        for task in self.graph.tasks:
            if task.id in self._record:
                own = self._record[task.id].duration_us if costs is None else _cost_us(costs(task.step), task)
                wait = 0.0 if lag is None else lag(task.step).of(task.lane, task.id in self._first)
                durations[task.id] = own + wait
        return self._by_step(self.graph.with_durations(durations))

    def replayed(self) -> list[StepTime]:
        """Each step with recorded durations and recorded lags: what ran, if the graph explains it."""
        lags = {task.id: lag for task, lag in self._lagging}
        durations = {node: max(record.duration_us + lags[node], 0.0) for node, record in self._record.items()}
        return self._by_step(self.graph.with_durations(durations))

    def _by_step(self, graph: TaskGraph) -> list[StepTime]:
        schedule, tasks = graph.simulate(), graph.tasks
        begun: dict[tuple[int, int], float] = {}
        spent: dict[tuple[int, int], float] = {}
        for task in tasks:
            key = (task.step, task.layer)
            if task.kind == "gate":
                begun[key] = schedule.end_us[task.id]
            elif task.kind in COMPUTE:
                spent[key] = max(spent.get(key, 0.0), schedule.end_us[task.id] - begun[key])
        times: dict[int, list[float]] = {}
        phases = {}
        for item in self.items:
            key = (item.plan.step, item.plan.layer)
            start, end = self._spans[key]
            total = times.setdefault(item.plan.step, [0.0, 0.0])
            total[0], total[1] = total[0] + spent[key], total[1] + end - start
            phases[item.plan.step] = item.demand.phase
        return [StepTime(step, phases[step], *total) for step, total in times.items()]


class _Nothing:
    """Durations before the records are put in."""

    def cpu_us(self, layer: int, n_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        return np.zeros(len(n_tokens))

    accel_us = cpu_us

    def transfer_us(self, layer: int) -> float:
        return 0.0

    read_us = transfer_us


def _first_tasks(tasks: Iterable[Task]) -> set[int]:
    """Ids of each layer's first expert task on each lane; prefetches belong to the layer that planned them."""
    first: dict[tuple[int, int, Lane], int] = {}
    planned_by = -1
    for task in tasks:
        planned_by = task.layer if task.kind == "gate" else planned_by
        if task.kind in (*COMPUTE, "transfer", "prefetch"):
            first.setdefault((task.step, planned_by, task.lane), task.id)
    return set(first.values())


def _cost_us(costs: Durations, task: Task) -> float:
    if task.lane == "link":
        return costs.transfer_us(task.layer)
    of_lane = costs.cpu_us if task.lane == "cpu" else costs.accel_us
    return float(of_lane(task.layer, np.array([task.n_tokens], np.int32))[0])


def _spans(tasks: Iterable[TaskRecord]) -> dict[tuple[int, int], tuple[float, float]]:
    """(start, end) of each (step, layer): its first computation or demand transfer, its last computation."""
    spans: dict[tuple[int, int], tuple[float, float]] = {}
    for record in tasks:
        if record.kind in (*COMPUTE, "transfer"):
            key = (record.step, record.layer)
            start, end = spans.get(key, (record.start_us, record.start_us))
            spans[key] = min(start, record.start_us), max(end, record.end_us if record.kind in COMPUTE else end)
    return spans


def _whole_steps(plans: Iterable[PlannedLayer], spans: Mapping[tuple[int, int], tuple[float, float]]) -> set[int]:
    known: dict[int, bool] = {}
    for item in plans:
        step = item.plan.step
        known[step] = known.get(step, True) and (step, item.plan.layer) in spans
    return {step for step, whole in known.items() if whole}


def _match(tasks: Iterable[Task], records: Iterable[TaskRecord]) -> dict[int, TaskRecord]:
    """Record of each task id, in order of start where a key occurs twice."""
    by_key: dict[tuple[int, str, int, int], list[TaskRecord]] = {}
    for record in sorted(records, key=lambda r: (r.start_us, r.end_us)):
        by_key.setdefault((record.step, record.kind, record.layer, record.expert), []).append(record)
    return {task.id: found.pop(0) for task in tasks if (found := by_key.get(task.key))}
