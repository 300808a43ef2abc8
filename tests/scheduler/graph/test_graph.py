"""The task graph: structure, slot rules, list scheduling, execution check, exports."""

import json
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.demand import LayerDemand
from scheduler.graph import DenseTimes, GraphError, PlannedLayer, TaskGraph, as_plain, chrome_trace, gantt
from scheduler.machine.costs import CostModel
from scheduler.plan import LayerPlan, Transfer

EXPERT_BYTES = 1000
DENSE = DenseTimes(attention_us=10.0, gate_us=2.0, shared_us=5.0, combine_us=1.0)


def demand(layer, experts, tokens=None):
    ids = np.array(experts, np.int32)
    counts = np.array(tokens or [1] * len(experts), np.int32)
    return LayerDemand(layer, "decode", 1, ids, counts, np.zeros(16, np.float32))


def transfer(layer, expert, slot, evicts=None, kind="demand"):
    return Transfer(layer, expert, slot, evicts, kind, 0.0, True)


def plan(layer, cpu=(), accel=(), slots=(), transfers=(), prefetches=(), step=0):
    return LayerPlan(step, layer, tuple(cpu), tuple(accel), tuple(slots), tuple(transfers), tuple(prefetches), 0.0)


def costs(n_layers=4):
    return CostModel.uniform(n_layers, cpu_us=100.0, accel_us=20.0, transfer_us=60.0)


def two_layers():
    """Layer 0: 2 on the CPU, 0 resident, 1 transferred over a free slot; prefetch of (1, 5), which layer 1 then
    reads."""
    first = plan(0, cpu=[2], accel=[0, 1], slots=[0, 1], transfers=[transfer(0, 1, 1)],
                 prefetches=[transfer(1, 5, 2, kind="prefetch")])  # fmt: skip
    second = plan(1, cpu=[6], accel=[5], slots=[2])
    return [PlannedLayer(first, demand(0, [0, 1, 2]), DENSE), PlannedLayer(second, demand(1, [5, 6]), DENSE)]


def graph(items=None):
    return TaskGraph.from_plans(items or two_layers(), costs(), EXPERT_BYTES)


def find(tasks, kind, expert=-1, layer=0):
    return next(t.id for t in tasks if t.kind == kind and t.expert == expert and t.layer == layer)


def test_edges_are_the_data_and_slot_dependencies():
    built = graph()
    tasks, edges = built.tasks, built.graph.edges
    assert (find(tasks, "transfer", 1), find(tasks, "accel_expert", 1)) in edges
    assert (find(tasks, "prefetch", 5, 1), find(tasks, "accel_expert", 5, 1)) in edges
    assert (find(tasks, "gate"), find(tasks, "cpu_expert", 2)) in edges
    assert (find(tasks, "combine", layer=0), find(tasks, "attention", layer=1)) in edges
    assert nx.is_directed_acyclic_graph(built.graph)


def test_makespan_critical_path_and_idle_by_hand():
    built = graph()
    # attention 10 + gate 2 = 12; CPU 12..112; link 12..72 then prefetch 72..132; accel 5 + 20, then 72..92; combine 113
    schedule = built.simulate()
    assert schedule.end_us[find(built.tasks, "combine")] == pytest.approx(113.0)
    # layer 1: attention 123, gate 125; prefetch is there at 132: 132..152; CPU 125..225; combine 226
    assert schedule.start_us[find(built.tasks, "accel_expert", 5, 1)] == pytest.approx(132.0)
    assert built.makespan_us == pytest.approx(226.0)
    kinds = [task.kind for task in built.critical_path()]
    assert kinds == ["attention", "gate", "cpu_expert", "combine"] * 2
    assert sum(task.duration_us for task in built.critical_path()) == pytest.approx(226.0)
    idle = built.idle_us()
    assert idle["cpu"] == pytest.approx(26.0)
    assert idle["link"] == pytest.approx(226.0 - 120.0)


def test_slot_is_rewritten_only_after_its_last_reader():
    first = plan(0, accel=[0, 1], slots=[0, 0], transfers=[transfer(0, 1, 0, evicts=(0, 0))])
    built = graph([PlannedLayer(first, demand(0, [0, 1]))])
    built.validate(n_slots=1, resident={0: (0, 0)})
    schedule = built.simulate()
    reader, copy = find(built.tasks, "accel_expert", 0), find(built.tasks, "transfer", 1)
    assert schedule.start_us[copy] >= schedule.end_us[reader]
    assert schedule.start_us[find(built.tasks, "accel_expert", 1)] >= schedule.end_us[copy]


def test_valid_plan_passes_and_counts_bytes():
    built = graph()
    built.validate(n_slots=3, resident={0: (0, 0)})
    assert sum(task.bytes for task in built.tasks) == 2 * EXPERT_BYTES


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (plan(0, cpu=[2], accel=[0], slots=[0]), r"activated experts \[1\] are placed on no lane"),
        (plan(0, cpu=[2, 1, 0], accel=[0], slots=[0]), "expert 0 is placed 2 times"),
        (plan(0, cpu=[2, 1, 0, 9]), r"experts \[9\] are placed but were not activated"),
        (plan(0, cpu=[2, 1], accel=[0], slots=[7]), "slot 7 of 3 slots"),
        (plan(0, cpu=[2, 0], accel=[1], slots=[1]), "expert 1 reads slot 1, which holds None"),
        (plan(0, cpu=[2], accel=[1, 0], slots=[0, 0], transfers=[transfer(0, 1, 0, evicts=(0, 0))]), "deadlock"),
        (plan(0, cpu=[2], accel=[0, 1], slots=[0, 1], transfers=[transfer(0, 1, 1, evicts=(3, 3))]), "holds|evicts"),
    ],
)
def test_invalid_plans_are_refused(broken, message):
    resident = {0: (0, 0), 1: (2, 2)} if broken.transfers and broken.transfers[0].slot == 1 else {0: (0, 0)}
    with pytest.raises(GraphError, match=message):
        graph([PlannedLayer(broken, demand(0, [0, 1, 2]))]).validate(n_slots=3, resident=resident)


def test_eviction_before_use_is_refused():
    bad = plan(
        0, accel=[1, 0], slots=[0, 0], transfers=[transfer(0, 1, 0, evicts=(0, 0)), transfer(0, 0, 0, evicts=(0, 1))]
    )
    good = plan(0, accel=[0, 1], slots=[0, 0], transfers=[transfer(0, 1, 0, evicts=(0, 0))])
    graph([PlannedLayer(good, demand(0, [0, 1]))]).validate(1, {0: (0, 0)})
    graph([PlannedLayer(bad, demand(0, [0, 1]))]).validate(1, {0: (0, 0)})  # evicted unread, brought back, then read
    lost = plan(0, accel=[0], slots=[0], prefetches=[transfer(1, 4, 0, evicts=(0, 7), kind="prefetch")])
    with pytest.raises(GraphError, match="evicts"):
        graph([PlannedLayer(lost, demand(0, [0]))]).validate(1, {0: (0, 0)})


def test_simulated_execution_is_accepted_and_each_kind_of_defect_is_found():
    built = graph()
    records = built.records()
    built.check_execution(records)
    by_kind = {(r.kind, r.layer, r.expert): i for i, r in enumerate(records)}

    def changed(key, **fields):
        copy = list(records)
        copy[by_kind[key]] = replace(copy[by_kind[key]], **fields)
        return copy

    early = records[by_kind["accel_expert", 1, 5]].start_us - 30.0
    with pytest.raises(GraphError, match="accel_expert L1 E5 started"):
        built.check_execution(changed(("accel_expert", 1, 5), start_us=early))
    with pytest.raises(GraphError, match="never ran"):
        built.check_execution([r for r in records if r.kind != "cpu_expert"])
    with pytest.raises(GraphError, match="was not planned"):
        built.check_execution([*records, replace(records[by_kind["cpu_expert", 0, 2]], expert=9)])
    with pytest.raises(GraphError, match="n_tokens planned 1, ran 3"):
        built.check_execution(changed(("cpu_expert", 0, 2), n_tokens=3))
    with pytest.raises(GraphError, match="at once"):
        built.check_execution(changed(("accel_expert", 0, 0), end_us=200.0))
    with pytest.raises(GraphError, match="bytes"):
        built.check_execution(changed(("transfer", 0, 1), bytes=1))


def test_dropped_prefetch_and_unrecorded_dense_work_are_legal():
    first = plan(0, cpu=[0], prefetches=[transfer(1, 5, 2, kind="prefetch")])
    built = graph([PlannedLayer(first, demand(0, [0]), DENSE)])
    built.check_execution([r for r in built.records() if r.kind == "cpu_expert"])


def test_chrome_trace_is_what_perfetto_reads():
    document = json.loads(json.dumps(chrome_trace(graph().records(), "test (simulated)")))
    events = document["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert {"name", "ph", "ts", "dur", "pid", "tid"} <= set(complete[0])
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(names) == {e["tid"] for e in complete}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert set(starts) == set(ends)
    assert len(starts) == 2
    assert all(starts[i]["ts"] <= ends[i]["ts"] for i in starts)


def test_gantt_rows_cover_the_lanes_in_time_order():
    rows = gantt(graph().records())
    assert [row.lane for row in rows] == ["cpu", "accel", "link"]
    for row in rows:
        assert all(a.end_us <= b.start_us + 1e-6 for a, b in zip(row.segments, row.segments[1:], strict=False))
    assert json.dumps(as_plain(rows))


def test_empty_graph():
    built = TaskGraph.from_plans([], costs(), EXPERT_BYTES)
    built.validate(0, {})
    assert built.makespan_us == 0.0
    assert built.critical_path() == []


@st.composite
def random_layers(draw):
    """Plans of a few layers over a slot pool, with transfers into least recently written slots."""
    n_slots = draw(st.integers(1, 4))
    held: dict[int, tuple[int, int] | None] = dict.fromkeys(range(n_slots))
    items = []
    for layer in range(draw(st.integers(1, 4))):
        experts = sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=5)))
        where = {key: slot for slot, key in held.items() if key is not None}
        cpu, accel, slots, transfers = [], [], [], []
        for expert in experts:
            slot = where.get((layer, expert))
            if slot is None and draw(st.booleans()):
                cpu.append(expert)
                continue
            if slot is None:
                slot = draw(st.integers(0, n_slots - 1))
                evicted = held[slot]
                if evicted is not None and evicted[0] == layer and evicted[1] in experts and evicted[1] not in accel:
                    cpu.append(expert)
                    continue
                transfers.append(transfer(layer, expert, slot, evicts=evicted))
                held[slot] = (layer, expert)
                where = {key: s for s, key in held.items() if key is not None}
            accel.append(expert)
            slots.append(slot)
        items.append(PlannedLayer(plan(layer, cpu, accel, slots, transfers), demand(layer, experts), DENSE))
    return items, n_slots


@settings(max_examples=60, deadline=None)
@given(random_layers(), st.randoms(use_true_random=False))
def test_any_valid_plan_simulates_to_a_linear_extension(case, random):
    items, n_slots = case
    built = TaskGraph.from_plans(items, costs(), EXPERT_BYTES)
    built.validate(n_slots, {})
    schedule = built.simulate()
    for source, target in built.graph.edges:
        assert schedule.end_us[source] <= schedule.start_us[target] + 1e-9
    records = built.records()
    random.shuffle(records)
    built.check_execution(records)
    path = built.critical_path()
    assert sum(task.duration_us for task in path) == pytest.approx(built.makespan_us)
