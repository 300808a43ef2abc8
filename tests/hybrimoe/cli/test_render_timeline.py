"""The Gantt in the terminal and the summary lines, from made-up records and counters."""

import io

import pytest
from rich.console import Console

from hybrimoe.cli.views.render_timeline import KINDS, timeline
from scheduler.records import TaskRecord


def step(number, n_tokens, layers, origin):
    """Per layer: CPU for 60 us, beside it a transfer of 40 us and then the accelerator for 20 us; 100 us a layer."""
    records = []
    for layer in range(layers):
        at = origin + 100.0 * layer
        records += [
            TaskRecord("cpu", "cpu_expert", layer, 1, n_tokens, 0, at, at + 60, number),
            TaskRecord("link", "transfer", layer, 2, n_tokens, 64, at, at + 40, number),
            TaskRecord("accel", "accel_expert", layer, 2, n_tokens, 0, at + 40, at + 60, number),
            TaskRecord("link", "prefetch", min(layer + 1, layers - 1), 3, 1, 64, at + 60, at + 100, number),
        ]
    return records


def drawn(records, width=80, console_width=80):
    console = Console(width=console_width, record=True, file=io.StringIO())
    console.print(timeline(records, label="emulated", width=width))
    return console.export_text().splitlines()


def test_each_lane_is_a_row_whose_bars_lie_where_the_tasks_ran():
    lines = drawn(step(0, 9, 4, 0.0) + step(1, 1, 4, 1000.0), width=6 + 40 + 7, console_width=100)
    decode = lines[next(i for i, line in enumerate(lines) if line.startswith("decode")) :]
    assert decode[0] == "decode, step 1 (median of 1): 0.40 ms, a lane works in 0.40 ms of it"
    bars = {line[:6].strip(): line[6:46] for line in decode[2:5]}
    cpu, accel = KINDS["cpu_expert"][0], KINDS["accel_expert"][0]
    transfer, prefetch = KINDS["transfer"][0], KINDS["prefetch"][0]
    assert bars["CPU"] == (cpu * 6 + " " * 4) * 4
    assert bars["accel"] == (" " * 4 + accel * 2 + " " * 4) * 4
    assert bars["link"] == (transfer * 4 + "  " + prefetch * 4) * 4
    assert decode[1].split() == ["layer", "L0", "L1", "L2", "L3"]
    assert decode[2].endswith("60%")
    assert "prefetch" in lines[-2]
    assert lines[-1] == "times: emulated"


def test_time_in_which_no_lane_works_is_cut():
    records = [
        TaskRecord("cpu", "cpu_expert", 0, 1, 1, 0, 0.0, 100.0, 0),
        TaskRecord("link", "transfer", 1, 1, 1, 0, 5000.0, 5050.0, 0),
        TaskRecord("cpu", "cpu_expert", 1, 1, 1, 0, 5000.0, 5100.0, 0),
    ]
    lines = drawn(records, width=6 + 51 + 7)
    assert "5.10 ms, a lane works in 0.20 ms of it" in lines[0]
    assert lines[2][6:57] == KINDS["cpu_expert"][0] * 25 + " " + KINDS["cpu_expert"][0] * 25
    assert lines[3][6:57].strip() in (KINDS["transfer"][0] * 12, KINDS["transfer"][0] * 13)


def test_prefill_and_the_median_decode_step_are_chosen():
    lengths = {1: 3, 2: 5, 3: 4}
    records = step(0, 30, 2, 0.0)
    for number, layers in lengths.items():
        records += step(number, 1, layers, 1000.0 * number)
    titles = [line for line in drawn(records) if "a lane works in" in line]
    assert titles[0].startswith("prefill, step 0")
    assert titles[1].startswith("decode, step 3 (median of 3)")


def test_a_deep_model_is_cut_into_pieces_that_fit_the_width():
    lines = drawn(step(0, 1, 30, 0.0))
    assert sum(line.startswith("CPU") for line in lines) == 3
    assert max(len(line) for line in lines) <= 80


@pytest.mark.parametrize("records", [[], step(0, 1, 1, 0.0)[:1]])
def test_nothing_and_a_single_task_can_be_drawn(records):
    assert drawn(records)
