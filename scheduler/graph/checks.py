"""What must hold of a plan's graph, and of an execution compared with it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from scheduler.errors import SchedulerError
from scheduler.graph.tasks import PlannedLayer, Task, TaskKey
from scheduler.records import TaskRecord

if TYPE_CHECKING:
    import networkx as nx

#: Kinds an execution must contain exactly as planned; dense work is checked when it was recorded.
REQUIRED_KINDS = frozenset({"cpu_expert", "accel_expert", "transfer"})
#: Prefetches may be dropped by the executor (an expert that was demanded first), never invented.
MAX_LISTED = 8

SlotContents = Mapping[int, tuple[int, int]]


class GraphError(SchedulerError):
    """A plan or an execution breaks a rule; the message lists what was found."""


def check_structure(
    graph: "nx.DiGraph[int]", items: Sequence[PlannedLayer], tasks: Sequence[Task], expert_bytes: int
) -> list[str]:
    """Acyclic; each activated expert exactly once with all its tokens; every copy moves one expert's bytes."""
    import networkx as nx

    problems = []
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [tasks[edge[0]].label for edge in nx.find_cycle(graph)]
        problems.append(f"cycle: {' -> '.join(cycle)}")
    for item in items:
        problems += _check_cover(item)
    copies = [task for task in tasks if task.kind in ("transfer", "prefetch")]
    problems += [f"{task.label} moves {task.bytes} bytes, an expert has {expert_bytes}"
                 for task in copies if task.bytes != expert_bytes]  # fmt: skip
    planned = sum(len(item.plan.transfers) + len(item.plan.prefetches) for item in items)
    if len(copies) != planned:
        problems.append(f"{len(copies)} copies for {planned} planned transfers: bytes are not conserved")
    return problems


def _check_cover(item: PlannedLayer) -> list[str]:
    plan, demand = item.plan, item.demand
    placed = Counter([*plan.cpu, *plan.accel])
    activated = Counter(demand.expert_ids.tolist())
    where = f"step {plan.step} layer {plan.layer}"
    problems = [f"{where}: expert {e} is placed {n} times" for e, n in sorted(placed.items()) if n > 1]
    missing, extra = sorted(set(activated) - set(placed)), sorted(set(placed) - set(activated))
    if missing:
        problems.append(f"{where}: activated experts {missing} are placed on no lane")
    if extra:
        problems.append(f"{where}: experts {extra} are placed but were not activated")
    if len(plan.accel) != len(plan.accel_slots):
        problems.append(f"{where}: {len(plan.accel)} accelerator experts but {len(plan.accel_slots)} slots")
    return problems


def check_slots(items: Sequence[PlannedLayer], n_slots: int | None, resident: SlotContents | None) -> list[str]:
    """Replay slot contents: within capacity, readers find their expert, no expert is evicted before its use.

    Without ``resident`` (slot -> (layer, expert) at the start) a slot's first content is taken from its first use.
    """
    contents: dict[int, tuple[int, int] | None] = dict(resident or {})
    known = resident is not None
    problems: list[str] = []
    for item in items:
        problems += _replay_layer(item, contents, known)
        for slot in _slots_of(item):
            if slot < 0 or (n_slots is not None and slot >= n_slots):
                problems.append(f"step {item.plan.step} layer {item.plan.layer}: slot {slot} of {n_slots} slots")
    return problems


def _slots_of(item: PlannedLayer) -> list[int]:
    copies = [*item.plan.transfers, *item.plan.prefetches]
    return sorted({*item.plan.accel_slots, *(copy.slot for copy in copies)})


def _replay_layer(item: PlannedLayer, contents: dict[int, tuple[int, int] | None], known: bool) -> list[str]:
    plan = item.plan
    where = f"step {plan.step} layer {plan.layer}"
    problems: list[str] = []
    pending = [(plan.layer, expert, slot) for expert, slot in zip(plan.accel, plan.accel_slots, strict=False)]

    def read(slot: int) -> None:
        """Consume, in accelerator order, the readers that find their expert in ``slot`` now."""
        for entry in [e for e in pending if e[2] == slot]:
            held = contents.get(slot)
            if held is None and not known:
                held = contents[slot] = (entry[0], entry[1])
            if held == (entry[0], entry[1]):
                pending.remove(entry)

    incoming = {(copy.layer, copy.expert) for copy in (*plan.transfers, *plan.prefetches)}
    for slot in sorted({entry[2] for entry in pending if (entry[0], entry[1]) not in incoming}):
        read(slot)
    for copy in (*plan.transfers, *plan.prefetches):
        read(copy.slot)
        held = contents.get(copy.slot)
        if held is not None and copy.evicts is not None and held != tuple(copy.evicts):
            problems.append(f"{where}: slot {copy.slot} holds {held}, the transfer says it evicts {copy.evicts}")
        if held is not None and any((layer, e) == held for layer, e, slot in pending if slot == copy.slot):
            problems.append(f"{where}: expert {held[1]} is evicted from slot {copy.slot} before its use")
        contents[copy.slot] = (copy.layer, copy.expert)
    for slot in sorted({entry[2] for entry in pending}):
        read(slot)
    problems += [f"{where}: expert {e} reads slot {slot}, which holds {contents.get(slot)}" for _, e, slot in pending]
    return problems


def check_records(
    graph: "nx.DiGraph[int]", tasks: Sequence[Task], records: Sequence[TaskRecord], slack_us: float
) -> list[str]:
    """The records are a linear extension of the graph, complete, and no lane ran two tasks at once."""
    import networkx as nx

    matched, problems = _match(tasks, records)
    ready_us: dict[int, float] = {}
    for node in nx.topological_sort(graph):
        ready = max((ready_us[p] for p in graph.predecessors(node)), default=float("-inf"))
        record = matched.get(node)
        if record is not None and record.start_us < ready - slack_us:
            late = max(graph.predecessors(node), key=lambda p: ready_us[p])
            problems.append(
                f"{tasks[node].label} started {ready - record.start_us:.1f} us before {tasks[late].label} ended"
            )
        ready_us[node] = ready if record is None else max(ready, record.end_us)
    return problems + _check_lanes(records, slack_us)


def _match(tasks: Sequence[Task], records: Sequence[TaskRecord]) -> tuple[dict[int, TaskRecord], list[str]]:
    by_key: dict[TaskKey, list[TaskRecord]] = {}
    for record in sorted(records, key=lambda r: (r.start_us, r.end_us)):
        by_key.setdefault((record.step, record.kind, record.layer, record.expert), []).append(record)
    matched: dict[int, TaskRecord] = {}
    problems = []
    for task in tasks:
        found = by_key.get(task.key)
        if found:
            record = found.pop(0)
            matched[task.id] = record
            problems += _compare(task, record)
        elif task.kind in REQUIRED_KINDS:
            problems.append(f"{task.label} of step {task.step} was planned and never ran")
    for key, left in by_key.items():
        if left:
            problems.append(
                f"{len(left)} x {key[1]} layer {key[2]} expert {key[3]} of step {key[0]} ran and was not planned"
            )
    return matched, problems


def _compare(task: Task, record: TaskRecord) -> list[str]:
    problems = []
    if record.end_us < record.start_us:
        problems.append(f"{task.label} ended before it started")
    if task.kind in REQUIRED_KINDS:
        for name in ("lane", "n_tokens", "bytes"):
            if getattr(task, name) != getattr(record, name):
                problems.append(f"{task.label}: {name} planned {getattr(task, name)}, ran {getattr(record, name)}")
    return problems


def _check_lanes(records: Iterable[TaskRecord], slack_us: float) -> list[str]:
    problems = []
    ordered = sorted(records, key=lambda r: (r.start_us, r.end_us))
    for lane in sorted({record.lane_name for record in ordered}):
        last = None
        for record in (r for r in ordered if r.lane_name == lane):
            if last is not None and record.start_us < last.end_us - slack_us:
                problems.append(
                    f"lane {lane} ran {last.kind} expert {last.expert} and {record.kind} expert {record.expert} at once"
                )
            last = record if last is None or record.end_us > last.end_us else last
    return problems


def raise_if(problems: Sequence[str], what: str) -> None:
    """Raise :class:`GraphError` with the first few problems and how many there are."""
    if problems:
        more = f" (and {len(problems) - MAX_LISTED} more)" if len(problems) > MAX_LISTED else ""
        raise GraphError(f"{what}: {'; '.join(problems[:MAX_LISTED])}{more}")
