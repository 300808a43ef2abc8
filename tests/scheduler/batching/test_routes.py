"""Route vectors, distinct experts by hand, and the trace as batches would run it."""

import numpy as np
import pytest

from scheduler.batching import batched, counted_distinct, expected_distinct, make_batches, route_vectors
from scheduler.batching.service import Request
from scheduler.errors import SchedulerError
from scheduler.machine.profile import ModelShape
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.synthetic import generate
from scheduler.traces.trace import Trace

KINDS = ("a", "b")


def two_kinds(n_each=3, length=6):
    """One layer, four experts, top-1: sequences of kind a use experts 0 and 1 in turn, of kind b experts 2 and 3."""
    ids, sequence = [], []
    for number in range(2 * n_each):
        first = 2 * (number % 2)
        ids += [[[first + t % 2]] for t in range(length)]
        sequence += [number] * length
    meta = {"model": "m", "num_layers": 1, "num_experts": 4, "top_k": 1}
    phase = np.tile(np.array([0, 0] + [1] * (length - 2), np.uint8), 2 * n_each)
    return Trace(np.array(ids, np.int16), np.array(sequence, np.int32), phase, meta)


def test_a_route_vector_is_the_share_of_tokens_that_go_to_each_expert():
    routes = route_vectors(two_kinds())
    assert routes.shape == (6, 1, 4)
    assert routes[0, 0].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert routes[1, 0].tolist() == [0.0, 0.0, 0.5, 0.5]
    assert route_vectors(two_kinds(), 0, 1)[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert route_vectors(two_kinds(), 100).sum() == 0.0, "no token there: no route"


def test_distinct_experts_by_hand():
    routes = route_vectors(two_kinds(2))
    # two of kind a: experts 0 and 1 with chance 1 - 0.5 * 0.5 each; one of each kind: four experts with chance 0.5
    assert expected_distinct(routes, [[0, 2], [1, 3]]) == pytest.approx(1.5)
    assert expected_distinct(routes, [[0, 1], [2, 3]]) == pytest.approx(2.0)
    assert counted_distinct(two_kinds(2), [[0, 2], [1, 3]]) == 1.0, "like sequences are in step here"
    assert counted_distinct(two_kinds(2), [[0, 1], [2, 3]]) == 2.0


def test_steps_after_the_end_of_the_shortest_do_not_count():
    trace = two_kinds(2)
    shorter = trace._take(np.flatnonzero((trace.sequence != 1) | (np.arange(trace.n_tokens) < 8)))
    assert counted_distinct(shorter, [[0, 1]]) == 2.0
    assert np.isnan(counted_distinct(shorter, [[0, 1]], first=2))


def test_regrouping_by_routes_touches_fewer_experts():
    trace = two_kinds(4)
    requests = [Request(2, 4) for _ in range(8)]
    before = make_batches(requests, "none", 4)
    after = make_batches(requests, "expertflow", 4, route_vectors(trace))
    assert before == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert after == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert counted_distinct(trace, after) < counted_distinct(trace, before)


def test_a_batched_trace_has_prompts_in_one_step_and_a_token_of_each_in_the_others():
    trace = two_kinds(2)
    made, steps = batched(trace, [[0, 2], [1, 3]], n_prompt=2, n_new=3)
    assert [(step.phase, step.n_tokens, step.n_sequences) for step in steps[:4]] == [
        ("prefill", 4, 2), ("decode", 2, 2), ("decode", 2, 2), ("decode", 2, 2),
    ]  # fmt: skip
    assert len(steps) == 8
    assert [step.first for step in steps] == [True, False, False, False] * 2
    assert made.expert_ids[:4, 0, 0].tolist() == [0, 1, 0, 1]
    assert made.expert_ids[4:10, 0, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert made.sequence.tolist() == [0] * 10 + [1] * 10
    assert steps[-1].stop == made.n_tokens


def test_the_simulator_runs_batches_and_regrouping_lowers_transfers(tiny_profile):
    trace = two_kinds(4, length=20)
    shape = ModelShape("m", 1, 4, 1, 64, 64)
    config = SimulationConfig(policy="on_demand/none/lru", n_slots=2, expert_dtype="bfloat16")

    def run(groups):
        made, steps = batched(trace, groups, 2, 18)
        results = Simulator(made, tiny_profile, shape, config, steps=steps).run()
        return next(result for result in results if result.phase == "decode")

    mixed, alike = run([[0, 1, 2, 3], [4, 5, 6, 7]]), run([[0, 2, 4, 6], [1, 3, 5, 7]])
    assert mixed.tokens == alike.tokens == 8 * 18
    assert alike.transfers < mixed.transfers
    assert alike.latency_ms < mixed.latency_ms


def test_one_sequence_a_batch_is_the_trace_itself(tiny_profile):
    trace = generate(2, 8, 2, 16, 3, n_prefill=4, seed=1)
    shape = ModelShape("m", 2, 8, 2, 64, 64)
    config = SimulationConfig(policy="static", cache_ratio=0.5, expert_dtype="bfloat16")
    made, steps = batched(trace, [[0], [1], [2]], 4, 12)
    assert Simulator(made, tiny_profile, shape, config, steps=steps).run() == (
        Simulator(trace, tiny_profile, shape, config).run()
    )


@pytest.mark.parametrize(
    ("groups", "n_prompt", "n_new", "words"),
    [
        ([[0, 0]], 1, 1, "at most once"),
        ([[0], []], 1, 1, "not be empty"),
        ([[0]], 0, 0, "at least one token"),
        ([[0, 1]], 3, 9, "6 tokens, fewer than 3"),
    ],
)
def test_bad_groups_are_refused(groups, n_prompt, n_new, words):
    with pytest.raises(SchedulerError, match=words):
        batched(two_kinds(), groups, n_prompt, n_new)


def test_no_groups_have_no_distinct_experts():
    with pytest.raises(SchedulerError, match="at least one group"):
        expected_distinct(route_vectors(two_kinds()), [])
