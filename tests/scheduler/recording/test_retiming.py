"""Recorded plans in simulated time: by hand, with waits, with other costs."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler import CostModel, LayerDemand, LayerPlan, Transfer
from scheduler.graph import PlannedLayer
from scheduler.recording.retiming import Lag, Retiming
from scheduler.records import TaskRecord

ONES = np.ones(3, np.int32)


def layer(step: int) -> PlannedLayer:
    """Experts 0 and 2 on the CPU, 1 transferred and on the accelerator."""
    demand = LayerDemand(0, "decode", 1, np.arange(3, dtype=np.int32), ONES, np.zeros(4, np.float32))
    move = Transfer(0, 1, 0, None, "demand", 0.0, True)
    return PlannedLayer(LayerPlan(step, 0, (0, 2), (1,), (0,), (move,), (), 0.0), demand)


def ran(step: int, at: float) -> list[TaskRecord]:
    """CPU 0..40 and 45..80, link 3..30, accelerator 38..50: it waited 8 us after the transfer, the CPU 5 us."""
    return [
        TaskRecord("cpu", "cpu_expert", 0, 0, 1, 0, at, at + 40, step),
        TaskRecord("cpu", "cpu_expert", 0, 2, 1, 0, at + 45, at + 80, step),
        TaskRecord("link", "transfer", 0, 1, 0, 9, at + 3, at + 30, step),
        TaskRecord("accel", "accel_expert", 0, 1, 1, 0, at + 38, at + 50, step),
    ]


@pytest.fixture
def joined() -> Retiming:
    return Retiming([layer(0), layer(1)], [*ran(0, 100.0), *ran(1, 200.0)], 9)


def test_durations_alone_leave_the_waits_out(joined: Retiming) -> None:
    """CPU: 40 + 35 = 75; accelerator: 27 + 12 = 39."""
    times = joined.step_times()
    assert [t.simulated_us for t in times] == pytest.approx([75.0, 75.0])
    assert [t.recorded_us for t in times] == pytest.approx([80.0, 80.0])
    assert times[0].error == pytest.approx(5 / 80)


def test_with_the_recorded_waits_it_is_what_ran(joined: Retiming) -> None:
    assert [t.simulated_us for t in joined.replayed()] == pytest.approx([80.0, 80.0])


def test_lags_are_medians_by_lane(joined: Retiming) -> None:
    assert joined.lags() == Lag(cpu_us=5.0, first_cpu_us=0.0, first_accel_us=8.0, first_link_us=3.0)
    assert joined.lags(2) == joined.lags(end_step=0) == Lag()


def test_costs_of_a_model_and_lags(joined: Retiming) -> None:
    """CPU 50 + 7 + 50 + 5 = 112, accelerator 20 + 10 + 30 + 2 = 62."""
    costs = CostModel.uniform(1, cpu_us=50.0, accel_us=30.0, transfer_us=20.0)
    times = joined.step_times(
        lambda step: costs, lambda step: Lag(cpu_us=5.0, first_cpu_us=7.0, first_accel_us=2.0, first_link_us=10.0)
    )
    assert [t.simulated_us for t in times] == pytest.approx([112.0, 112.0])


def test_a_step_without_records_is_left_out() -> None:
    joined = Retiming([layer(0), layer(1)], ran(1, 0.0), 9)
    assert [t.step for t in joined.step_times()] == [1]
