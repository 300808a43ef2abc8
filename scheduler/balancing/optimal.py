"""Balance ``optimal``: the placement with the least makespan (compiled).

For a given placement the best orders are known (``timeline.johnson_order``), so only the placement is searched:
threshold enumeration where an exchange argument makes it exact, else branch and bound with a bound on the gap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, ARRIVAL, COUNT, CPU, HOST, LINK, TRANSFER
from scheduler.balancing.timeline import by_key, host_us, johnson_order, plan_makespan, write_plan
from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

EXHAUSTIVE_EXPERTS = 20
"""Up to here the search has no effective node limit: 2^21 nodes cover every placement."""
LARGE_NODE_LIMIT = 1024
"""Nodes for more experts: about 30 us of search."""
READING_NODE_LIMIT = 1 << 14
"""Nodes where experts wait for the disk, so that 13 of them are searched whole: below a millisecond, less than a read.
"""
TOLERANCE = 1e-9
"""A placement replaces the best one only if it is better by more than this share (float sums differ by order)."""
DUAL_LEVELS = 4
"""Refinements of the dual's grid: steps 1/8, 1/20, 1/50, 1/125."""
N_MULTIPLIERS = 9
"""Lagrange multipliers 0, 1/8, ..., 1 of the bound."""
SENT = 3
"""Column of the search's lane ends float64[depth, 4] (CPU, ACCEL, LINK, SENT): transfers so far."""


@compiled
def optimal(table: Floats, ready: Floats, params: Floats, plan: Ints) -> tuple[float, float]:
    """Least makespan; ties: fewest transfers, then fewest stolen residents (thresholds), else first found.

    params[0] = node limit of the branch and bound, or -1: no effective limit up to EXHAUSTIVE_EXPERTS experts,
    LARGE_NODE_LIMIT above, READING_NODE_LIMIT where experts wait for the disk. Where the limit is hit, the returned
    bound says how far the optimum can be; so it does where experts that wait take different times on link or
    accelerator, since the order in which they are sent is then a good one, not the best (a flow shop with release
    dates).
    """
    n = table.shape[1]
    order = johnson_order(table)
    here = table[ARRIVAL] >= 0.0
    residents = by_key(table[CPU], here)
    misses = by_key(-table[CPU], ~here)
    on_accel = np.empty(n, np.bool_)
    exact = _thresholds_suffice(table, ready, residents, misses)
    if exact:
        _best_thresholds(table, ready, residents, misses, on_accel)
    else:
        best, bound = _start(table, ready, order, on_accel)
        limit = int(params[0])
        if limit < 0:
            limit = 1 << (EXHAUSTIVE_EXPERTS + 1) if n <= EXHAUSTIVE_EXPERTS else LARGE_NODE_LIMIT
            limit = min(limit, READING_NODE_LIMIT) if table.shape[0] > HOST else limit
        bound = max(bound, _latest_read(table))
        bound, exact = _branch_and_bound(table, ready, order, limit, best, bound, on_accel)
        if not _order_is_best(table, misses):  # of all lanes from 0 on, so that it holds for one lane alone as well
            bound = max(_start(table, np.zeros(3), order, on_accel.copy())[1], _latest_read(table))
            exact = False
    write_plan(table, on_accel, order, plan)
    makespan = plan_makespan(table, ready, plan)
    return makespan, makespan if exact else min(bound, makespan)


@compiled
def _thresholds_suffice(table: Floats, ready: Floats, residents: Ints, misses: Ints) -> bool:
    """Whether some optimum transfers the misses with the highest cpu_us and steals the residents with the lowest.

    True if accel_us never rises with cpu_us within each group, the transfers are equal, and no resident is late:
    exchanging two experts of a group towards the threshold then lowers the CPU's sum and no accelerator term. Where
    experts wait for the disk, the CPU's end is no sum.
    """
    if table.shape[0] > HOST:
        return False
    for i in range(residents.size):
        if table[ARRIVAL, residents[i]] > ready[ACCEL]:
            return False
        if i > 0 and table[ACCEL, residents[i]] > table[ACCEL, residents[i - 1]]:
            return False
    for i in range(1, misses.size):
        if (
            table[ACCEL, misses[i]] < table[ACCEL, misses[i - 1]]
            or table[TRANSFER, misses[i]] != table[TRANSFER, misses[0]]
        ):
            return False
    return True


@compiled
def _order_is_best(table: Floats, misses: Ints) -> bool:
    """Whether no order of the link ends sooner than ``johnson_order``: nothing waits for the disk, or all misses take
    the same times, so that one that is there sooner may always go first."""
    if table.shape[0] <= HOST:
        return True
    for expert in misses:
        for row in (ACCEL, TRANSFER):
            if table[row, expert] != table[row, misses[0]]:
                return False
    return True


@compiled
def _latest_read(table: Floats) -> float:
    """No layer ends before the expert that is read last has been computed somewhere."""
    latest = 0.0
    for i in range(table.shape[1]):
        if table[ARRIVAL, i] < 0.0 and host_us(table, i) > 0.0:
            work = min(table[CPU, i], table[TRANSFER, i] + table[ACCEL, i])
            latest = max(latest, host_us(table, i) + work)
    return latest


@compiled
def _best_thresholds(table: Floats, ready: Floats, residents: Ints, misses: Ints, on_accel: Flags) -> float:
    """Enumerates (transferred m, stolen s), O(misses * residents); writes and times the best placement.

    With equal transfers t, and accel_us rising along ``misses``, Johnson's order of the first m is the reverse, so the
    (m + 1)-th goes to the front and the flow's end is F(m + 1) = t + max(F(m), link_ready + sum of accel_us).
    """
    cpu_misses = table[CPU][misses].sum()
    accel_transfers, flow = 0.0, -np.inf
    accel_all = table[ACCEL][residents].sum()
    best, best_m, best_s = np.inf, 0, 0
    for m in range(misses.size + 1):
        if m > 0:
            expert = misses[m - 1]
            cpu_misses -= table[CPU, expert]
            accel_transfers += table[ACCEL, expert]
            flow = table[TRANSFER, expert] + max(flow, ready[LINK] + accel_transfers)
        cpu, accel = ready[CPU] + cpu_misses, ready[ACCEL] + accel_all + accel_transfers
        for s in range(residents.size + 1):
            if s > 0:
                cpu += table[CPU, residents[s - 1]]
                accel -= table[ACCEL, residents[s - 1]]
            end = cpu if misses.size - m + s > 0 else 0.0
            if residents.size - s + m > 0:
                end = max(end, accel, flow)
            if end < best - TOLERANCE * best or best == np.inf:
                best, best_m, best_s = end, m, s
    on_accel[:] = False
    on_accel[misses[:best_m]] = True
    on_accel[residents[best_s:]] = True
    return best


@compiled
def _placement_makespan(table: Floats, ready: Floats, order: Ints, on_accel: Flags) -> float:
    cpu, accel, link = ready[CPU], ready[ACCEL], ready[LINK]
    any_cpu, any_accel = False, False
    for expert in order:
        if not on_accel[expert]:
            cpu = max(cpu, host_us(table, expert)) + table[CPU, expert]
            any_cpu = True
            continue
        any_accel = True
        arrival = table[ARRIVAL, expert]
        if arrival < 0.0:
            link = max(link, host_us(table, expert)) + table[TRANSFER, expert]
            arrival = link
        accel = max(accel, arrival) + table[ACCEL, expert]
    return max(cpu if any_cpu else 0.0, accel if any_accel else 0.0)


@compiled
def _start(table: Floats, ready: Floats, order: Ints, on_accel: Flags) -> tuple[float, float]:
    """First placement to beat and a lower bound for placements in which both compute lanes work.

    Lagrange dual over weights (u, v, w) >= 0 of CPU, accelerator and link, u + v + w = 1: every makespan is at least
    their weighted mean, so sum of min(u c, v g + w t) + u cpu_ready + v accel_ready bounds it. A grid on the simplex
    is refined around its best point; the placements met on the way are timed, then improved by single moves.
    """
    n = order.size
    trial = np.zeros(n, np.bool_)
    on_accel[:] = trial
    best = _placement_makespan(table, ready, order, trial)
    bound, centre_u, centre_v, step = 0.0, 0.5, 0.5, 0.125
    for level in range(DUAL_LEVELS):
        reach = 8 if level == 0 else 2
        around_u, around_v = centre_u, centre_v
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                u, v = around_u + i * step, around_v + j * step
                if u < 0.0 or v < 0.0 or u + v > 1.0 + 1e-12:
                    continue
                dual = _dual(table, u, v, trial) + u * ready[CPU] + v * ready[ACCEL]
                if dual > bound:
                    bound, centre_u, centre_v = dual, u, v
                elif dual < 0.97 * bound:
                    continue
                end = _placement_makespan(table, ready, order, trial)
                if end < best - TOLERANCE * best:
                    best = end
                    on_accel[:] = trial
        step *= 0.4
    return _single_moves(table, ready, order, on_accel, best), bound


@compiled
def _dual(table: Floats, u: float, v: float, trial: Flags) -> float:
    """Sum over experts of the cheaper weighted lane; writes the placement that attains it."""
    w = max(1.0 - u - v, 0.0)
    total = 0.0
    for i in range(trial.size):
        cpu = u * table[CPU, i]
        accel = v * table[ACCEL, i]
        if table[ARRIVAL, i] < 0.0:
            accel += w * table[TRANSFER, i]
        trial[i] = accel < cpu
        total += min(cpu, accel)
    return total


@compiled
def _single_moves(table: Floats, ready: Floats, order: Ints, on_accel: Flags, best: float) -> float:
    """Moves one expert to the other lane wherever that helps; one pass."""
    for expert in range(on_accel.size):
        on_accel[expert] = not on_accel[expert]
        end = _placement_makespan(table, ready, order, on_accel)
        if end < best - TOLERANCE * best:
            best = end
        else:
            on_accel[expert] = not on_accel[expert]
    return best


@compiled
def _suffix_bounds(table: Floats, order: Ints, accel_side: Floats, link_side: Floats) -> None:
    """For each depth and multiplier w: least sum of w * cpu + (1 - w) * (accel or link) over the experts still open."""
    n = order.size
    accel_side[n] = 0.0
    link_side[n] = 0.0
    for depth in range(n - 1, -1, -1):
        expert = order[depth]
        transfer = table[TRANSFER, expert] if table[ARRIVAL, expert] < 0.0 else 0.0
        for k in range(N_MULTIPLIERS):
            w = k / (N_MULTIPLIERS - 1)
            cpu = w * table[CPU, expert]
            accel_side[depth, k] = accel_side[depth + 1, k] + min(cpu, (1.0 - w) * table[ACCEL, expert])
            link_side[depth, k] = link_side[depth + 1, k] + min(cpu, (1.0 - w) * transfer)


@compiled
def _bound(cpu: float, accel: float, link: float, accel_side: Floats, link_side: Floats) -> float:
    """Lower bound of any completion in which both lanes work: max over w of w * cpu end + (1 - w) * other end."""
    bound = max(cpu, accel)
    for k in range(N_MULTIPLIERS):
        w = k / (N_MULTIPLIERS - 1)
        bound = max(bound, w * cpu + (1.0 - w) * accel + accel_side[k], w * cpu + (1.0 - w) * link + link_side[k])
    return bound


@compiled
def _branch_and_bound(
    table: Floats, ready: Floats, order: Ints, limit: int, best: float, root: float, on_accel: Flags
) -> tuple[float, bool]:
    """Depth-first over the experts in ``order``, so that lane times grow expert by expert; improves ``on_accel``.

    The two one-lane placements are tried first; in all others both lanes work, so their ready times count in bounds.
    Returns (lower bound of the optimum, whether the search was complete).
    """
    n = order.size
    for lane in (False, True):
        trial = np.full(n, lane)
        end = _placement_makespan(table, ready, order, trial)
        if end < best - TOLERANCE * best:
            best = end
            on_accel[:] = trial
    accel_side = np.empty((n + 1, N_MULTIPLIERS))
    link_side = np.empty((n + 1, N_MULTIPLIERS))
    _suffix_bounds(table, order, accel_side, link_side)
    first = on_accel.copy()
    clock = np.empty((n + 1, 4))
    clock[0, CPU], clock[0, ACCEL], clock[0, LINK], clock[0, SENT] = ready[CPU], ready[ACCEL], ready[LINK], 0.0
    tried = np.zeros(n + 1, np.int64)
    trial = np.zeros(n, np.bool_)
    counts = np.zeros(2, np.int64)
    root = max(root, _bound(ready[CPU], ready[ACCEL], 0.0, accel_side[0], link_side[0]))
    depth, nodes = 0, 0
    while depth >= 0 and best > root * (1.0 + TOLERANCE):
        if tried[depth] == 2:
            tried[depth] = 0
            depth -= 1
            if depth >= 0:
                counts[int(trial[order[depth]])] -= 1
            continue
        nodes += 1
        if nodes > limit:
            return root, False
        expert = order[depth]
        place = first[expert] == (tried[depth] == 0)
        tried[depth] += 1
        _advance(table, clock, depth, expert, place)
        cpu, accel, transfers = clock[depth + 1, CPU], clock[depth + 1, ACCEL], clock[depth + 1, SENT]
        link = clock[depth + 1, LINK] if transfers > 0.0 else 0.0
        if _bound(cpu, accel, link, accel_side[depth + 1], link_side[depth + 1]) >= best - TOLERANCE * best:
            continue
        trial[expert] = place
        counts[int(place)] += 1
        if depth + 1 < n:
            depth += 1
            continue
        if counts[0] > 0 and counts[1] > 0:
            best = max(cpu, accel)
            on_accel[:] = trial
        counts[int(place)] -= 1
    return best, True


@compiled
def _advance(table: Floats, clock: Floats, depth: int, expert: int, on_accel: bool) -> None:
    """clock[depth + 1] = lane ends (cpu, accel, link, transfers so far) after the expert at this depth is placed."""
    clock[depth + 1] = clock[depth]
    if not on_accel:
        clock[depth + 1, CPU] = max(clock[depth + 1, CPU], host_us(table, expert)) + table[CPU, expert]
        return
    arrival = table[ARRIVAL, expert]
    if arrival < 0.0:
        clock[depth + 1, LINK] = max(clock[depth + 1, LINK], host_us(table, expert)) + table[TRANSFER, expert]
        clock[depth + 1, SENT] += 1.0
        arrival = clock[depth + 1, LINK]
    clock[depth + 1, ACCEL] = max(clock[depth + 1, ACCEL], arrival) + table[ACCEL, expert]


@compiled
def fiddler_max(table: Floats, ready: Floats, params: Floats, plan: Ints) -> tuple[float, float]:
    """Fiddler's max form (the comment of its code): least max(sum of CPU costs, sum of accelerator-side costs).

    A miss costs t + g on the accelerator side (no overlap of transfer and compute is assumed), ready times are not
    looked at. The plan is then timed with the real semantics.
    """
    n = table.shape[1]
    here = table[ARRIVAL] >= 0.0
    flat = table.copy()
    flat[ACCEL] = np.where(here, table[ACCEL], table[ACCEL] + table[TRANSFER])
    flat[TRANSFER] = 0.0
    flat[ARRIVAL] = 0.0
    optimal(flat, np.zeros(3), params, plan)
    on_accel = np.zeros(n, np.bool_)
    for i in range(plan[ACCEL, COUNT]):
        on_accel[plan[ACCEL, i]] = True
    write_plan(table, on_accel, johnson_order(table), plan)
    return plan_makespan(table, ready, plan), 0.0
