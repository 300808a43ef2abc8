"""The semantics of a balance plan, in one place: what a placement and its orders take (compiled).

A plan travels as int64[3, n + 1], see ``problem.COUNT``; more rows are left alone. Where experts wait for the disk the
table has the row ``problem.HOST``, before which neither CPU nor link starts on them. Every policy kernel is
``(table float64[5 or 6, n], ready float64[3], params float64[2], plan int64[3, n + 1]) -> (makespan_us, bound_us)``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, ARRIVAL, COUNT, CPU, HOST, LINK, NEVER_US, TRANSFER
from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@compiled
def host_us(table: Floats, position: int) -> float:
    """us until an expert's bytes are in host memory: 0 where nothing waits for the disk."""
    return float(table[HOST, position]) if table.shape[0] > HOST else 0.0


@compiled
def plan_makespan(table: Floats, ready: Floats, plan: Ints) -> float:
    """Latest end of the compute lanes; a lane without an expert does not count."""
    n_cpu, n_accel, n_transfers = plan[CPU, COUNT], plan[ACCEL, COUNT], plan[TRANSFER, COUNT]
    arrival = table[ARRIVAL].copy()
    link = ready[LINK]
    for i in range(n_transfers):
        expert = plan[TRANSFER, i]
        link = max(link, host_us(table, expert)) + table[TRANSFER, expert]
        arrival[expert] = link
    cpu = ready[CPU]
    for i in range(n_cpu):
        cpu = max(cpu, host_us(table, plan[CPU, i])) + table[CPU, plan[CPU, i]]
    accel = ready[ACCEL]
    for i in range(n_accel):
        expert = plan[ACCEL, i]
        accel = max(accel, arrival[expert]) + table[ACCEL, expert]
    return max(cpu if n_cpu > 0 else 0.0, accel if n_accel > 0 else 0.0)


@compiled
def by_key(key: Floats, chosen: npt.NDArray[np.bool_]) -> Ints:
    """Positions with ``chosen``, ascending by ``key``; ties by position (insertion sort: n is small)."""
    order = np.empty(key.size, np.int64)
    n = 0
    for position in range(key.size):
        if not chosen[position]:
            continue
        i = n
        while i > 0 and key[order[i - 1]] > key[position]:
            order[i] = order[i - 1]
            i -= 1
        order[i] = position
        n += 1
    return order[:n]


@compiled
def johnson_order(table: Floats) -> Ints:
    """Order in which an accelerator takes experts without loss: all n positions, whatever subset it gets.

    Residents first, by arrival; then the rest by Johnson's rule for a two-machine flow shop (link, accelerator):
    those with transfer <= compute by rising transfer, then the others by falling compute. Ties by position.
    (S. M. Johnson, 1954. A later start of either machine only shifts its own sum, so the rule stays optimal;
    residents are jobs without a first operation, which the rule puts first.)

    Where experts wait for the disk, those that are there sooner come first, and the rule orders the others: best where
    all transfers take equally long and all computations do, as in a decode step of one token.
    """
    n = table.shape[1]
    here = table[ARRIVAL] >= 0.0
    short = ~here & (table[TRANSFER] <= table[ACCEL])
    order = np.empty(n, np.int64)
    first = by_key(table[ARRIVAL], here)
    second = by_key(table[TRANSFER], short)
    third = by_key(-table[ACCEL], ~here & ~short)
    order[: first.size] = first
    order[first.size : first.size + second.size] = second
    order[first.size + second.size :] = third
    if table.shape[0] > HOST:
        by_host(table, order[first.size :])
    return order


@compiled
def by_host(table: Floats, order: Ints) -> None:
    """Sorts positions by when they are in host memory, in place; those of one time keep their order."""
    for i in range(1, order.size):
        position, j = order[i], i
        while j > 0 and table[HOST, order[j - 1]] > table[HOST, position]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = position


@compiled
def keep_in_slots(table: Floats, plan: Ints) -> bool:
    """Residents that have no copy in host memory go from the CPU's list to the front of the accelerator's. Returns
    whether there were such: the plan's makespan is another one then."""
    if table.shape[0] <= HOST:
        return False
    kept, moved = 0, 0
    for i in range(plan[CPU, COUNT]):
        position = plan[CPU, i]
        if table[HOST, position] < NEVER_US:
            plan[CPU, kept] = position
            kept += 1
            continue
        for j in range(plan[ACCEL, COUNT], moved, -1):
            plan[ACCEL, j] = plan[ACCEL, j - 1]
        plan[ACCEL, moved] = position
        plan[ACCEL, COUNT] += 1
        moved += 1
    plan[CPU, COUNT] = kept
    return moved > 0


@compiled
def write_plan(table: Floats, on_accel: npt.NDArray[np.bool_], order: Ints, plan: Ints) -> None:
    """Fills ``plan`` from a placement: the accelerator and the link follow ``order``, the CPU goes short first.

    Where experts wait for the disk, the CPU computes them as they come: no order of one machine ends sooner.
    """
    n_accel = 0
    n_transfers = 0
    for position in order:
        if on_accel[position]:
            plan[ACCEL, n_accel] = position
            n_accel += 1
            if table[ARRIVAL, position] < 0.0:
                plan[TRANSFER, n_transfers] = position
                n_transfers += 1
    cpu = by_key(table[CPU], ~on_accel)
    if table.shape[0] > HOST:
        by_host(table, cpu)
    plan[CPU, : cpu.size] = cpu
    plan[CPU, COUNT], plan[ACCEL, COUNT], plan[TRANSFER, COUNT] = cpu.size, n_accel, n_transfers
