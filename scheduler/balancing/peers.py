"""Balance policies of the paper and its peers (compiled). All share one signature: see ``timeline``.

"Load" is cpu_us: it grows with an expert's tokens, so the order is the same. Ties go to the lower position.
The accelerator takes residents first (high load first, those under way last), then transfers in link order,
high load first, unless a policy says otherwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, ARRIVAL, COUNT, CPU, LINK, PRIORITY, TRANSFER
from scheduler.balancing.timeline import by_key, plan_makespan, write_plan
from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Bounds = tuple[float, float]


@compiled
def _finish(table: Floats, ready: Floats, on_accel: Flags, plan: Ints) -> Bounds:
    """Writes the plan of a placement in the common order and times it."""
    n = table.shape[1]
    here = table[ARRIVAL] >= 0.0
    late = here & (table[ARRIVAL] > ready[ACCEL])
    order = np.empty(n, np.int64)
    first = by_key(-table[CPU], here & ~late)
    second = by_key(table[ARRIVAL], late)
    third = by_key(-table[CPU], ~here)
    order[: first.size] = first
    order[first.size : first.size + second.size] = second
    order[first.size + second.size :] = third
    write_plan(table, on_accel, order, plan)
    return plan_makespan(table, ready, plan), 0.0


@compiled
def static_mapping(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """KTransformers: residents on the accelerator, everything else on the CPU, nothing moves."""
    return _finish(table, ready, table[ARRIVAL] >= 0.0, plan)


@compiled
def on_demand(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """MoE-Infinity, llama.cpp's expert cache: every miss is transferred, the accelerator computes everything."""
    return _finish(table, ready, np.ones(table.shape[1], np.bool_), plan)


@compiled
def cpu_only(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """Everything on the CPU (placement ``cpu``)."""
    return _finish(table, ready, np.zeros(table.shape[1], np.bool_), plan)


@compiled
def whole_layers(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """llama.cpp --n-cpu-moe: a layer whose activated experts are all resident runs on the accelerator, else the CPU."""
    return _finish(table, ready, np.full(table.shape[1], np.all(table[ARRIVAL] >= 0.0)), plan)


@compiled
def fiddler(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """Fiddler (arXiv 2402.07033), the sum form of its code: expert by expert the cheaper of c(n) and t + g(n).

    A resident has t = 0; equal costs stay off the link (CPU for a miss, accelerator for a resident).
    """
    here = table[ARRIVAL] >= 0.0
    there = np.where(here, table[ACCEL] <= table[CPU], table[TRANSFER] + table[ACCEL] < table[CPU])
    return _finish(table, ready, there, plan)


@compiled
def monde(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """MoNDE (arXiv 2405.18832): the H hottest experts on the accelerator, cold ones where they lie, both sides at once.

    params[0] = H, or -1: H = round(n * r_link / (r_link + r_cpu)), rates as experts a us (1 / mean transfer,
    1 / least cpu_us, which is the bandwidth-bound time of a cold expert). A cold resident stays on the accelerator.
    """
    n = table.shape[1]
    hot = int(params[0])
    if hot < 0:
        link = table[TRANSFER].mean()
        hot = int(np.floor(n * table[CPU].min() / max(link + table[CPU].min(), 1e-300) + 0.5))
    on_accel = table[ARRIVAL] >= 0.0
    order = by_key(-table[CPU], np.ones(n, np.bool_))
    for position in order[: min(hot, n)]:
        on_accel[position] = True
    return _finish(table, ready, on_accel, plan)


@compiled
def bandwidth(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """FreeToken q* (arXiv 2608.16157): of M misses fetch round(M * p / (p + c)), the rest runs on the CPU.

    p and c are the rates of link and CPU in experts a us, from the misses' mean transfer_us and cpu_us. The most
    recently active (highest priority) misses are fetched first, ties by position; residents stay.
    """
    on_accel = table[ARRIVAL] >= 0.0
    misses = by_key(-table[PRIORITY], ~on_accel)
    link = 0.0
    cpu = 0.0
    for position in misses:
        link += table[TRANSFER, position]
        cpu += table[CPU, position]
    fetch = int(np.floor(misses.size * cpu / max(link + cpu, 1e-300) + 0.5))
    for position in misses[:fetch]:
        on_accel[position] = True
    return _finish(table, ready, on_accel, plan)


@compiled
def hybrimoe(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """HybriMoE's greedy (arXiv 2504.05897, section 4.2 and Fig. 5).

    Queues: accelerator = residents, high load first; CPU = misses, low load first, then residents, low load first
    (stealing); link = misses, high load first. The lane that gets free first acts (ties: accelerator, CPU, link): it
    takes the head of its queue. What the link takes leaves the CPU's queue and enters the accelerator's by load; the
    accelerator keeps that order and waits if the head is still under way. Ends when every expert has run.
    The CPU steals only what it ends no later than the accelerator would end its queue (the stolen one is its last):
    the paper does not say so, but without it a slow CPU would make every layer wait for a steal.
    """
    n = table.shape[1]
    arrival = table[ARRIVAL].copy()
    open_ = np.ones(n, np.bool_)
    here = table[ARRIVAL] >= 0.0
    clock = ready.copy()
    plan[CPU, COUNT], plan[ACCEL, COUNT], plan[TRANSFER, COUNT] = 0, 0, 0
    placed = 0
    while placed < n:
        heads = _heads(table, clock, open_, here, arrival)
        lane = -1
        for candidate in (ACCEL, CPU, LINK):
            if heads[candidate] >= 0 and (lane < 0 or clock[candidate] < clock[lane]):
                lane = candidate
        expert = heads[lane]
        _append(plan, lane, expert)
        if lane == LINK:
            clock[LINK] += table[TRANSFER, expert]
            arrival[expert] = clock[LINK]
            continue
        start = clock[CPU] if lane == CPU else max(clock[ACCEL], arrival[expert])
        clock[lane] = start + table[lane, expert]
        open_[expert] = False
        placed += 1
    return plan_makespan(table, ready, plan), 0.0


@compiled
def hybrimoe_released(table: Floats, ready: Floats, params: Floats, plan: Ints) -> Bounds:
    """The balance of HybriMoE's published code (github.com/PKU-SEC-Lab/HybriMoE), which is not the one of its text.

    One queue: residents, high load first, then misses, high load first. The accelerator takes from its head (a miss
    by the link), the CPU from its tail; each time the lane that would end its expert first takes it (ties:
    accelerator). Ends when the queue is empty. (The release does so in decode; its prompts transfer every miss.)
    """
    n = table.shape[1]
    here = table[ARRIVAL] >= 0.0
    queue = np.empty(n, np.int64)
    residents = by_key(-table[CPU], here)
    queue[: residents.size] = residents
    queue[residents.size :] = by_key(-table[CPU], ~here)
    cpu_free, accel_free, link_free = ready[CPU], ready[ACCEL], ready[LINK]
    plan[CPU, COUNT], plan[ACCEL, COUNT], plan[TRANSFER, COUNT] = 0, 0, 0
    head, tail = 0, n - 1
    while head <= tail:
        first, last = queue[head], queue[tail]
        landed = table[ARRIVAL, first] if here[first] else link_free + table[TRANSFER, first]
        accel_end = max(accel_free, landed) + table[ACCEL, first]
        cpu_end = cpu_free + table[CPU, last]
        if accel_end <= cpu_end:
            accel_free = accel_end
            _append(plan, ACCEL, first)
            if not here[first]:
                link_free = landed
                _append(plan, TRANSFER, first)
            head += 1
        else:
            cpu_free = cpu_end
            _append(plan, CPU, last)
            tail -= 1
    return plan_makespan(table, ready, plan), 0.0


@compiled
def _append(plan: Ints, row: int, position: int) -> None:
    plan[row, plan[row, COUNT]] = position
    plan[row, COUNT] += 1


@compiled
def _heads(table: Floats, clock: Floats, open_: Flags, here: Flags, arrival: Floats) -> tuple[int, int, int]:
    """Heads of the three queues (-1: empty): CPU, accelerator, link."""
    load = table[CPU]
    miss, steal, accel, link = -1, -1, -1, -1
    queue_end, landed_end = clock[ACCEL], 0.0
    for i in range(load.size):
        if not open_[i]:
            continue
        if arrival[i] >= 0.0:
            queue_end += table[ACCEL, i]
            landed_end = max(landed_end, arrival[i] + table[ACCEL, i])
            if accel < 0 or load[i] > load[accel]:
                accel = i
            if here[i] and (steal < 0 or load[i] < load[steal]):
                steal = i
        else:
            if miss < 0 or load[i] < load[miss]:
                miss = i
            if link < 0 or load[i] > load[link]:
                link = i
    if steal >= 0 and clock[CPU] + load[steal] > max(queue_end, landed_end):
        steal = -1
    return (miss if miss >= 0 else steal), accel, link
