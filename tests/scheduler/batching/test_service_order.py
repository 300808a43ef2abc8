"""eMoE's order by hand: service level, slack, expert loading, input order."""

import numpy as np
import pytest

from scheduler.batching import Request, ServiceCosts, ServiceOrder, batching_kind, make_batches
from scheduler.errors import PolicyError, SchedulerError

UNKNOWN = ServiceCosts()


def all_of(order, costs=UNKNOWN):
    return [order.next(0.0, costs) for _ in range(len(order))]


def test_service_levels_come_before_deadlines_and_these_before_input_order():
    requests = [Request(4, 4), Request(4, 4, deadline_us=5e6), Request(4, 4, priority=1), Request(4, 4)]
    assert all_of(ServiceOrder(requests, [[0], [1], [2], [3]])) == [(2,), (1,), (0,), (3,)]


def test_the_one_with_the_longer_reply_has_less_slack():
    """Deadlines 1,000 and 900 us; replies of 50 and 10 tokens of 10 us: slack 500 and 800."""
    requests = [Request(1, 10, deadline_us=900.0), Request(1, 50, deadline_us=1000.0)]
    order = ServiceOrder(requests, [[0], [1]])
    costs = ServiceCosts(step_us=10.0)
    assert order.slack_us((0,), 0.0, costs) == 800.0
    assert order.slack_us((1,), 0.0, costs) == 500.0
    assert order.slack_us((1,), 100.0, ServiceCosts(prompt_token_us=7.0, step_us=10.0)) == 393.0
    assert all_of(order, costs) == [(1,), (0,)]
    assert all_of(ServiceOrder(requests, [[0], [1]])) == [(0,), (1,)], "without known costs: the earlier deadline"


def test_among_equals_the_cheapest_to_load_after_the_one_before():
    routes = np.zeros((3, 1, 4))
    routes[0, 0, :2] = 1.0
    routes[1, 0, 2:] = 1.0
    routes[2, 0, :2] = [1.0, 0.5]
    requests = [Request(1, 1)] * 3
    order = ServiceOrder(requests, [[0], [1], [2]], routes)
    costs = ServiceCosts(expert_us=100.0)
    assert order.load_us((2,), costs) == pytest.approx(150.0)
    assert all_of(order, costs) == [(2,), (0,), (1,)]


def test_batches_do_not_mix_service_levels():
    requests = [Request(1, 1, priority=level) for level in (0, 1, 0, 1, 0)]
    assert make_batches(requests, "none", 4) == [[0, 2, 4], [1, 3]]


def test_lightning_batches_are_longest_first():
    requests = [Request(n, 1) for n in (3, 9, 5, 7)]
    assert make_batches(requests, "moe-lightning", 2) == [[2, 0], [1, 3]]


def test_bad_requests_and_batches_are_refused():
    with pytest.raises(SchedulerError, match="prompt and new tokens"):
        Request(0, 1)
    for deadline in (0.0, -1.0, float("nan")):
        with pytest.raises(SchedulerError, match="deadline"):
            Request(1, 1, deadline_us=deadline)
    with pytest.raises(SchedulerError, match="batch size"):
        make_batches([Request(1, 1)], "none", 0)
    with pytest.raises(SchedulerError, match="batch size"):
        make_batches([], "none", 1)
    with pytest.raises(SchedulerError, match="route vectors"):
        make_batches([Request(1, 1)], "expertflow", 1)
    with pytest.raises(PolicyError, match="did you mean 'expertflow'"):
        batching_kind("expertflo")
    with pytest.raises(SchedulerError, match="no batch"):
        ServiceOrder([], []).next(0.0)
