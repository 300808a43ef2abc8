"""List scheduling of a task graph, its critical path, and the idle time of each lane."""

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from scheduler.graph.tasks import Schedule, Task

if TYPE_CHECKING:
    import networkx as nx

#: Times closer than this are the same instant (floating-point sums of microseconds).
SAME_INSTANT_US = 1e-6


def list_schedule(graph: "nx.DiGraph[int]", tasks: Sequence[Task], lane_order: Mapping[str, Sequence[int]]) -> Schedule:
    """Run every lane first in, first out; a task starts when its lane and its predecessors are done.

    Raises ``ValueError`` when the lane orders and the dependencies wait for each other.
    """
    waiting = {node: graph.in_degree(node) for node in graph}
    position = dict.fromkeys(lane_order, 0)
    free_us = dict.fromkeys(lane_order, 0.0)
    ready_us = dict.fromkeys(graph, 0.0)
    schedule = Schedule()
    heads: list[tuple[float, int]] = []

    offered: set[str] = set()  # lanes whose next task waits in the heap: at most one each

    def offer(lane: str) -> None:
        order = lane_order[lane]
        if lane not in offered and position[lane] < len(order) and waiting[order[position[lane]]] == 0:
            node = order[position[lane]]
            position[lane] += 1
            offered.add(lane)
            heappush(heads, (max(free_us[lane], ready_us[node]), node))

    for lane in lane_order:
        offer(lane)
    while heads:
        start, node = heappop(heads)
        task = tasks[node]
        end = start + task.duration_us
        schedule.start_us[node], schedule.end_us[node] = start, end
        free_us[task.lane_name] = end
        offered.discard(task.lane_name)
        woken = {task.lane_name}
        for successor in graph.successors(node):
            waiting[successor] -= 1
            ready_us[successor] = max(ready_us[successor], end)
            woken.add(tasks[successor].lane_name)
        for lane in lane_order:  # fixed order: ties never depend on set order
            if lane in woken:
                offer(lane)
    if len(schedule.start_us) != len(tasks):
        stuck = [tasks[node].label for node in graph if node not in schedule.start_us][:5]
        raise ValueError(f"lane orders and dependencies deadlock; first tasks that never start: {', '.join(stuck)}")
    return schedule


def critical_path(
    graph: "nx.DiGraph[int]", tasks: Sequence[Task], lane_order: Mapping[str, Sequence[int]], schedule: Schedule
) -> list[int]:
    """Chain of task ids without a gap that ends with the last task: shortening none of them helps nothing.

    Of several binding predecessors the dependency with the smallest id is followed, then the lane's previous task.
    """
    if not tasks:
        return []
    before = {node: order[i - 1] for order in lane_order.values() for i, node in enumerate(order) if i}
    node = min(schedule.end_us, key=lambda item: (-schedule.end_us[item], item))
    path = [node]
    while schedule.start_us[node] > SAME_INSTANT_US:
        candidates = sorted(graph.predecessors(node))
        if node in before:
            candidates.append(before[node])
        binding = [c for c in candidates if schedule.start_us[node] - schedule.end_us[c] <= SAME_INSTANT_US]
        if not binding:
            break
        node = binding[0]
        path.append(node)
    return path[::-1]


def idle_us(tasks: Sequence[Task], schedule: Schedule) -> dict[str, float]:
    """Makespan less busy time of each lane that has a task."""
    busy: dict[str, float] = {}
    for task in tasks:
        busy[task.lane_name] = busy.get(task.lane_name, 0.0) + task.duration_us
    return {lane: schedule.makespan_us - total for lane, total in sorted(busy.items())}
