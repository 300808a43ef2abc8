"""A Gantt of the lanes in the terminal, from the records of what ran."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median_low
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

if TYPE_CHECKING:
    from scheduler.records import TaskRecord

# kind -> (glyph, style, words of the legend); glyphs differ so that a terminal without colours can tell them apart
KINDS = {
    "cpu_expert": ("█", "green", "CPU expert"),
    "accel_expert": ("▓", "cyan", "accelerator expert"),
    "transfer": ("▒", "yellow", "demand transfer"),
    "prefetch": ("░", "magenta", "prefetch"),
    "shared_expert": ("▄", "blue", "shared expert"),
    "attention": ("▁", "bright_black", "attention"),
    "gate": ("▂", "bright_black", "gate"),
    "combine": ("▂", "bright_black", "combine"),
    "read": ("▬", "white", "read from disk"),
    "evict": ("·", "red", "eviction"),
}
LANE_TITLES = {"cpu": "CPU", "accel": "accel", "link": "link", "disk": "disk"}
TITLE_COLUMNS, BUSY_COLUMNS = 6, 7
LAYERS_A_PIECE = 12
GAP_SHARE = 0.02
SEEN_COLUMNS = 0.02
"""A task that fills less of a column than this is not drawn."""


def timeline(records: Sequence[TaskRecord], *, label: str, width: int = 80, phase: str = "prefill") -> Group:
    """The longest prefill step and the decode step of median length, one row a lane, `width` columns in all.

    `label` says whether the times are measured or emulated; `phase`: which kind of step a single one is.
    """
    steps: dict[int, list[TaskRecord]] = defaultdict(list)
    for record in records:
        steps[record.step].append(record)
    if not steps:
        return Group("no step was recorded")
    parts = [_step(name, steps[step], width) for name, step in _chosen(steps, phase)]
    return Group(*parts, _legend({record.kind for record in records}), Text(f"times: {label}", style="dim"))


def _chosen(steps: dict[int, list[TaskRecord]], phase: str) -> list[tuple[str, int]]:
    tokens = {step: max(record.n_tokens for record in records) for step, records in steps.items()}
    first = min(steps, default=None)
    decode = [step for step in steps if step != first]
    if not decode:
        return [] if first is None else [(f"{phase}, step {first}", first)]
    length = {step: _span(steps[step])[1] - _span(steps[step])[0] for step in decode}
    middle = median_low(length.values())
    chosen = min(step for step in decode if length[step] == middle)
    shown = [(f"decode, step {chosen} (median of {len(decode)})", chosen)]
    longest_prompt = max(steps, key=lambda step: (tokens[step], -step))
    return [(f"prefill, step {longest_prompt}", longest_prompt), *shown] if longest_prompt != chosen else shown


def _span(records: Sequence[TaskRecord]) -> tuple[float, float]:
    return min(record.start_us for record in records), max(record.end_us for record in records)


def _step(name: str, records: Sequence[TaskRecord], width: int) -> Group:
    """One step; a deep model's is cut into pieces of `LAYERS_A_PIECE` layers, one below the other."""
    begin, finish = _span(records)
    records, working_us = _without_gaps(records)
    start, end = _span(records)
    begins = _layer_begins(records)
    cuts = [start, *sorted(begins.values())[LAYERS_A_PIECE::LAYERS_A_PIECE], end]
    pieces = [_piece(records, begins, low, high, width) for low, high in pairwise(cuts)]
    title = f"{name}: {(finish - begin) / 1000:.2f} ms, a lane works in {working_us / 1000:.2f} ms of it"
    return Group(Text(title, style="bold"), *pieces, "")


def _without_gaps(records: Sequence[TaskRecord]) -> tuple[list[TaskRecord], float]:
    """The records moved together where no lane works (attention, norms), and the time in which any lane works.

    Such a gap is shown with at most `GAP_SHARE` of the working time, so that small models are more than blanks.
    """
    busy: list[list[float]] = []
    for record in sorted(records, key=lambda item: (item.start_us, item.end_us)):
        if busy and record.start_us <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], record.end_us)
        else:
            busy.append([record.start_us, record.end_us])
    working_us = sum(stop - start for start, stop in busy)
    moved_us, shifts = 0.0, [(busy[0][0], 0.0)]
    for before, after in pairwise(busy):
        moved_us += max(0.0, after[0] - before[1] - GAP_SHARE * working_us)
        shifts.append((after[0], moved_us))
    starts = [start for start, _ in shifts]
    moved = []
    for record in records:
        shift = shifts[bisect_right(starts, record.start_us) - 1][1]
        moved.append(replace(record, start_us=record.start_us - shift, end_us=record.end_us - shift))
    return moved, working_us


def _piece(records: Sequence[TaskRecord], begins: dict[int, float], low: float, high: float, width: int) -> Group:
    """Every lane from `low` to `high` us: a bar and the share of the shown time in which it works."""
    from scheduler.graph.export import gantt

    columns = max(10, width - TITLE_COLUMNS - BUSY_COLUMNS)
    scale = columns / max(high - low, 1e-9)
    lines = [_axis({layer: (begin - low) * scale for layer, begin in begins.items() if low <= begin < high}, columns)]
    for row in gantt(records):
        spans = [(max(s.start_us, low), min(s.end_us, high), s.kind) for s in row.segments]
        busy = sum(max(0.0, stop - begin) for begin, stop, _ in spans) / max(high - low, 1e-9)
        bar = _bar([((begin - low) * scale, (stop - low) * scale, kind) for begin, stop, kind in spans], columns)
        title = Text(f"{_title(row.lane):<{TITLE_COLUMNS}}")
        lines.append(title + bar + Text(f" {min(busy, 1):>5.0%}", style="dim"))
    return Group(*lines)


def _title(lane: str) -> str:
    """Of one lane; several accelerators and links are numbered: acc 1, link 1."""
    kind, _, number = lane.partition(":")
    return f"{LANE_TITLES[kind][:4].rstrip('e')} {number}"[:TITLE_COLUMNS] if number else LANE_TITLES[kind]


def _layer_begins(records: Sequence[TaskRecord]) -> dict[int, float]:
    """When the first task of each layer begins, prefetches for it not counted."""
    begins: dict[int, float] = {}
    for record in records:
        if record.kind != "prefetch":
            begins[record.layer] = min(begins.get(record.layer, record.start_us), record.start_us)
    return begins


def _axis(begins: dict[int, float], columns: int) -> Text:
    """Each layer's number at the column where it begins, as far as there is room."""
    cells = [" "] * columns
    free_from = 0
    for layer, begin in sorted(begins.items(), key=lambda item: (item[1], item[0])):
        column, text = min(int(begin), columns - 1), f"L{layer}"
        if column >= free_from and column + len(text) <= columns:
            cells[column : column + len(text)] = text
            free_from = column + len(text) + 1
    return Text(f"{'layer':<{TITLE_COLUMNS}}" + "".join(cells), style="dim")


def _bar(spans: Sequence[tuple[float, float, str]], columns: int) -> Text:
    """One character a column, in columns from the left: the kind that fills most of it."""
    weight: list[dict[str, float]] = [defaultdict(float) for _ in range(columns)]
    for low, high, kind in spans:
        for column in range(max(0, int(low)), min(int(high) + 1, columns)):
            weight[column][kind] += max(0.0, min(high, column + 1) - max(low, column))
    bar = Text()
    for kinds in weight:
        most = max(sorted(kinds), key=lambda name: kinds[name], default="")
        glyph, style, _ = KINDS[most] if kinds.get(most, 0.0) > SEEN_COLUMNS else (" ", "", "")
        bar.append(glyph, style)
    return bar


def _legend(kinds: set[str]) -> Text:
    legend = Text()
    for kind, (glyph, style, words) in KINDS.items():
        if kind in kinds:
            legend.append(f"{glyph}{glyph}", style).append(f" {words}  ")
    return legend
