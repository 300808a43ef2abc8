"""Experts that cross the link in pieces: what a layer needs overtakes prefetches between two of them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from scheduler.demand import LayerDemand
from scheduler.machine.costs import CostModel
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.plan import LayerPlan, Transfer
from scheduler.planner.policies import POLICIES
from scheduler.simulator.engine import Engine
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.traces.predictions import predictions_for
from scheduler.traces.synthetic import generate

SHAPE = ModelShape(name="toy", n_layers=6, n_experts=8, top_k=2, hidden=256, inter=512)
PROFILE = HardwareProfile.from_mapping(
    {
        "name": "toy", "provenance": "datasheet",
        "cpu": {"read_gbps": 10.0, "gflops": {"int4": 20.0}},
        "accel": {"mem_gbps": 400.0, "tflops": 20.0, "launch_us": 3.0},
        "link": {"gbps": 8.0, "latency_us": 4.0},
    }
)  # fmt: skip
TRACE = generate(6, 8, 2, 60, 2, 4)
TRANSFER_US, CPU_US, ACCEL_US = 60.0, 10.0, 20.0


def demand(layer: int, *experts: int) -> LayerDemand:
    ids = np.array(experts, np.int32)
    return LayerDemand(layer, "decode", 1, ids, np.ones(ids.size, np.int32), np.zeros(8, np.float32))


def guess(layer: int, expert: int, slot: int) -> Transfer:
    return Transfer(layer, expert, slot, None, "prefetch", 0.0, True)


def ran(pieces: int, began_us: float = CPU_US) -> Engine:
    """A prefetch starts at 0; after ``began_us`` layer 1 needs an expert that nobody had thought of."""
    costs = CostModel.uniform(3, cpu_us=began_us, accel_us=ACCEL_US, transfer_us=TRANSFER_US)
    engine = Engine(costs, 1000, keep_records=True, pieces=pieces)
    engine.run_layer(LayerPlan(0, 0, (0,), (), (), (), (guess(2, 5, 0),), 0.0), demand(0, 0), 0.0)
    needed = Transfer(1, 3, 1, None, "demand", 0.0, True)
    engine.run_layer(LayerPlan(0, 1, (), (3,), (1,), (needed,), (), 0.0), demand(1, 3), 0.0)
    return engine


@pytest.mark.parametrize(("pieces", "waits_us"), [(0, 60.0), (1, 60.0), (2, 30.0), (3, 20.0), (6, 10.0)])
def test_a_demand_waits_for_the_piece_under_way(pieces: int, waits_us: float) -> None:
    engine = ran(pieces)
    assert engine.now_us == pytest.approx(waits_us + TRANSFER_US + ACCEL_US)
    (copy,) = [r for r in engine.records if r.kind == "transfer"]
    assert (copy.start_us, copy.end_us) == pytest.approx((waits_us, waits_us + TRANSFER_US))


def test_the_last_piece_is_not_interrupted() -> None:
    assert ran(3, began_us=45.0).now_us == pytest.approx(TRANSFER_US + TRANSFER_US + ACCEL_US)
    assert ran(3, began_us=35.0).now_us == pytest.approx(40.0 + TRANSFER_US + ACCEL_US)


def test_what_was_overtaken_goes_on_where_it_was() -> None:
    engine = ran(3)
    engine.dense("attention", 2, 1, 200.0, 0)
    first, second = [(r.start_us, r.end_us) for r in engine.records if r.kind == "prefetch"]
    assert first == pytest.approx((0.0, 20.0))
    assert second == pytest.approx((80.0, 120.0))
    assert engine.busy.link == pytest.approx(2 * TRANSFER_US)
    ended = {event.expert: event.us for event in engine.take_ended()}
    assert ended == pytest.approx({3: TRANSFER_US, 5: TRANSFER_US}), "the planner learns what a copy takes by itself"


def test_a_prefetch_of_this_very_layer_comes_before_what_was_guessed_for_later_ones() -> None:
    costs = CostModel.uniform(3, cpu_us=CPU_US, accel_us=ACCEL_US, transfer_us=TRANSFER_US)
    engine = Engine(costs, 1000, keep_records=True, pieces=3)
    guesses = (guess(2, 5, 0), guess(1, 3, 1))
    engine.run_layer(LayerPlan(0, 0, (0,), (), (), (), guesses, 0.0), demand(0, 0), 0.0)
    engine.run_layer(LayerPlan(0, 1, (), (3,), (1,), (), (), 0.0, awaited=(3,)), demand(1, 3), 0.0)
    assert engine.now_us == pytest.approx(20.0 + TRANSFER_US + ACCEL_US)


@pytest.mark.parametrize("policy", ["promoe", "optimal/gate_topk/lru"])
def test_the_link_carries_everything_once_and_one_thing_at_a_time(policy: str) -> None:
    results, copies = {}, {}
    for pieces in (0, 8):
        params = {"pieces": pieces, "depth": 3}
        config = SimulationConfig(policy, cache_ratio=0.4, params=params)
        told = predictions_for(TRACE, "noisy", seed=1)
        simulator = Simulator(TRACE, PROFILE, SHAPE, config, told, phase="decode", keep_records=True)
        (results[pieces],) = simulator.run()
        link = [record for record in simulator.records if record.lane == "link"]
        assert all(one.end_us <= next_.start_us + 1e-6 for one, next_ in pairwise(link))
        carried: dict[tuple[int, int], float] = {}
        for record in link:
            key = record.layer, record.expert
            carried[key] = carried.get(key, 0.0) + record.end_us - record.start_us
        transfer_us = simulator.engine.costs.transfer_us(0)
        whole = np.array(list(carried.values())) / transfer_us
        under_way = simulator.engine.link_ready_us() > 0.0
        assert np.isclose(whole, np.round(whole), atol=1e-6).mean() > (0.9 if under_way else 0.999)
        copies[pieces] = len(link)
    assert copies[8] > results[8].transfers + results[8].prefetches, "some were interrupted"
    assert results[8].latency_ms < results[0].latency_ms


def test_promoe_is_a_preset_with_pieces() -> None:
    promoe = POLICIES["promoe"]
    assert promoe.name == "on_demand/gate_topk/lru"
    assert (promoe.params["depth"], promoe.params["pieces"]) == (3, 4)
    whole = replace(promoe, params={**promoe.params, "pieces": 0})
    config = SimulationConfig("promoe", cache_ratio=0.4, params=dict(whole.params))
    assert Simulator(TRACE, PROFILE, SHAPE, config).engine.pieces == 0
