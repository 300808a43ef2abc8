"""Chrome/Perfetto JSON and plain Gantt rows of executed or simulated tasks."""

from collections.abc import Iterable, Sequence
from typing import Any

from scheduler.graph.tasks import GanttRow, Segment
from scheduler.records import LANES, Lane, TaskRecord

#: One Perfetto thread per lane, in this order.
THREAD_IDS = {lane: index + 1 for index, lane in enumerate(LANES)}
LANE_TITLES = {"cpu": "CPU experts", "accel": "accelerator", "link": "link (host to device)", "disk": "disk"}
THREADS_AN_ACCELERATOR = len(LANES)
PROCESS_ID = 1


def _name(record: TaskRecord) -> str:
    expert = f" E{record.expert}" if record.expert >= 0 else ""
    return f"{record.kind} L{record.layer}{expert}"


def chrome_trace(records: Sequence[TaskRecord], label: str = "hybrimoe") -> dict[str, Any]:
    """Trace-event JSON (https://ui.perfetto.dev, chrome://tracing): complete events, thread names, flow arrows.

    ``label`` names the process; say there whether the times are measured, emulated or simulated.
    """
    events: list[dict[str, Any]] = [_metadata("process_name", 0, {"name": label})]
    for lane, accelerator in lanes_of(records):
        thread = _thread(lane, accelerator)
        several = any(record.lane == lane and record.accelerator for record in records)
        title = f"{LANE_TITLES[lane]} {accelerator}" if several else LANE_TITLES[lane]
        events.append(_metadata("thread_name", thread, {"name": title}))
        events.append(_metadata("thread_sort_index", thread, {"sort_index": thread}))
    events += [_complete(record) for record in records]
    events += _flows(records)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"label": label}}


def lanes_of(records: Iterable[TaskRecord]) -> list[tuple[Lane, int]]:
    """(lane, accelerator) of every lane that ran anything: CPU, accelerators, links, disk."""
    found = {(record.lane, record.accelerator) for record in records}
    return sorted(found, key=lambda pair: (LANES.index(pair[0]), pair[1]))


def _thread(lane: Lane, accelerator: int) -> int:
    return THREAD_IDS[lane] + accelerator * THREADS_AN_ACCELERATOR


def _metadata(name: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": PROCESS_ID, "tid": thread, "ts": 0, "args": args}


def _complete(record: TaskRecord) -> dict[str, Any]:
    args = {"layer": record.layer, "expert": record.expert, "n_tokens": record.n_tokens, "bytes": record.bytes,
            "step": record.step}  # fmt: skip
    thread = _thread(record.lane, record.accelerator)
    return {"ph": "X", "name": _name(record), "cat": record.kind, "pid": PROCESS_ID, "tid": thread,
            "ts": record.start_us, "dur": max(0.0, record.duration_us), "args": args}  # fmt: skip


def _flows(records: Sequence[TaskRecord]) -> list[dict[str, Any]]:
    """An arrow from each transfer to the first computation that reads what it brought."""
    arrived: dict[tuple[int, int], TaskRecord] = {}
    events: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda r: (r.start_us, r.end_us)):
        key = (record.layer, record.expert)
        if record.kind in ("transfer", "prefetch"):
            arrived[key] = record
        elif record.kind == "accel_expert" and key in arrived:
            source = arrived.pop(key)
            arrow = {"name": "arrives", "cat": "slot", "id": len(events) // 2 + 1, "pid": PROCESS_ID}
            events.append({**arrow, "ph": "s", "tid": _thread(source.lane, source.accelerator), "ts": source.start_us})
            events.append(
                {**arrow, "ph": "f", "bp": "e", "tid": _thread(record.lane, record.accelerator), "ts": record.start_us}
            )
    return events


def gantt(records: Iterable[TaskRecord]) -> list[GanttRow]:
    """Rows of bars, one per lane that ran anything, for the terminal."""
    kept = sorted((r for r in records if r.duration_us > 0), key=lambda r: (r.start_us, r.end_us))
    rows = []
    for lane, accelerator in lanes_of(kept):
        mine = [r for r in kept if (r.lane, r.accelerator) == (lane, accelerator)]
        name = f"{lane}:{accelerator}" if any(r.lane == lane and r.accelerator for r in kept) else lane
        rows.append(GanttRow(name, tuple(Segment(r.start_us, r.end_us, r.kind, _name(r)) for r in mine)))
    return rows
