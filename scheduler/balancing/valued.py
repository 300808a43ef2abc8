"""Balance ``value`` (ours): the least makespan minus what the transferred experts' residency is worth (compiled).

Unlike the other policies it knows two things beyond the layer: contention (while the link reads host memory the CPU
is slower), and the worth in us of a newcomer and of what it evicts. The planner passes both; ``balance`` does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.optimal import optimal
from scheduler.balancing.problem import ACCEL, ARRIVAL, COUNT, CPU, HOST, LINK, PRIORITY, TRANSFER
from scheduler.balancing.timeline import by_host, by_key, host_us, johnson_order, write_plan
from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

STEALING_EXPERTS = 24
"""With more experts only the makespan's optimum steals: all pairs (m, s) would take milliseconds."""


@compiled
def shared_memory_end(cpu_ready: float, work_us: float, link_end: float, cpu_rate: float) -> float:
    """End of ``work_us`` of CPU work from ``cpu_ready``, at ``cpu_rate`` of the full rate while the link is busy."""
    slow = max(link_end - cpu_ready, 0.0)
    if work_us <= cpu_rate * slow:
        return cpu_ready + work_us / cpu_rate
    return cpu_ready + work_us + (1.0 - cpu_rate) * slow


@compiled
def contended_makespan(table: Floats, ready: Floats, order: Ints, on_accel: Flags, cpu_rate: float) -> float:
    """Makespan of a placement in accelerator order ``order``, CPU work slowed while the link works."""
    cpu, accel, link = 0.0, ready[ACCEL], ready[LINK]
    any_cpu, any_accel = False, False
    for expert in order:
        if not on_accel[expert]:
            cpu += table[CPU, expert]
            any_cpu = True
            continue
        any_accel = True
        arrival = table[ARRIVAL, expert]
        if arrival < 0.0:
            link = max(link, host_us(table, expert)) + table[TRANSFER, expert]
            arrival = link
        accel = max(accel, arrival) + table[ACCEL, expert]
    end = accel if any_accel else 0.0
    if any_cpu:
        end = max(end, shared_memory_end(ready[CPU], cpu, link, cpu_rate))
        if table.shape[0] > HOST:
            end = max(end, _waiting_end(table, ready[CPU], order, on_accel, cpu, link, cpu_rate))
    return end


@compiled
def _waiting_end(
    table: Floats, cpu_ready: float, order: Ints, on_accel: Flags, work_us: float, link_end: float, cpu_rate: float
) -> float:
    """The CPU's end where it waits for the disk: from each expert's arrival on, all that comes after it is still to do.

    The link counts as busy until its end, also while it waits.
    """
    end = 0.0
    for expert in order:
        if not on_accel[expert]:
            begin = max(cpu_ready, host_us(table, expert))
            end = max(end, shared_memory_end(begin, work_us, link_end, cpu_rate))
            work_us -= table[CPU, expert]
    return end


@compiled
def valued(table: Floats, ready: Floats, victims: Floats, link_price: float, cpu_rate: float, plan: Ints) -> float:
    """Plan with the least makespan + price of its transfers; returns its makespan in us.

    table row 4 = worth in us of an expert's residency after this layer; victims float64[n] ascending = worth of what
    the first, second, ... transfer evicts (inf: no slot). A transfer's price is ``link_price`` + its victim's worth -
    its own. Placements tried: the m misses with the highest cpu_us + worth, the s residents with the lowest cpu_us, for
    all m and s; and the makespan's optimum. Ties: fewest transfers, then fewest stolen.
    """
    n = table.shape[1]
    order = johnson_order(table)
    here = table[ARRIVAL] >= 0.0
    misses = by_key(-(table[CPU] + table[PRIORITY]), ~here)
    residents = by_key(table[CPU], here)
    if table.shape[0] > HOST:
        by_host(table, residents)
    optimal(table, ready, np.full(2, -1.0), plan)
    best_place = np.zeros(n, np.bool_)
    for i in range(plan[ACCEL, COUNT]):
        best_place[plan[ACCEL, i]] = True
    best = contended_makespan(table, ready, order, best_place, cpu_rate) + _price(
        table, best_place, victims, link_price
    )
    place = here.copy()
    stolen = residents.size if n <= STEALING_EXPERTS else 0
    for m in range(misses.size + 1):
        if m > 0:
            place[misses[m - 1]] = True
        price = _price(table, place, victims, link_price)  # of those that move, so the same for every s
        for s in range(stolen + 1):
            if s > 0:
                place[residents[s - 1]] = False
            cost = contended_makespan(table, ready, order, place, cpu_rate) + price
            if cost < best - 1e-9 * abs(best):
                best = cost
                best_place[:] = place
        place[residents] = True
    write_plan(table, best_place, order, plan)
    return contended_makespan(table, ready, order, best_place, cpu_rate)


@compiled
def _price(table: Floats, place: Flags, victims: Floats, link_price: float) -> float:
    price, count = 0.0, 0
    for i in range(place.size):
        if place[i] and table[ARRIVAL, i] < 0.0:
            price += link_price + victims[count] - table[PRIORITY, i]
            count += 1
    return price


@compiled
def value(table: Floats, ready: Floats, params: Floats, plan: Ints) -> tuple[float, float]:
    """``valued`` with free slots for all. params = (link price in us, CPU's share of its rate beside the link)."""
    makespan = valued(table, ready, np.zeros(table.shape[1]), params[0], params[1], plan)
    return makespan, 0.0
