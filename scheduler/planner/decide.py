"""The hot path of the planner: costs, balance and slots of one layer on flat arrays, in compiled parts, no objects.

Slot arrays are read only here; ``SlotTable`` performs what is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.balancing import VALUE, Kernel, kernel_of
from scheduler.balancing.problem import ACCEL, ARRIVAL, COUNT, CPU, HOST, LINK, NOT_RESIDENT, PRIORITY, TRANSFER
from scheduler.balancing.timeline import keep_in_slots, plan_makespan
from scheduler.balancing.valued import valued
from scheduler.compiled import compiled
from scheduler.slots import FREE, RESIDENT

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLOT, EVICTED = 3, 4
"""Rows that the planner adds to a plan: by position, the slot of each accelerated expert (-1 else), and for each
transferred one the key that leaves (-1: none, REUSE: an expert of this very plan that runs earlier in that slot)."""
REUSE = -2


def new_plan(n: int) -> Ints:
    """An empty plan int64[5, n + 1] of n active experts: the rows of ``balancing.problem.COUNT``, SLOT and EVICTED."""
    return np.zeros((5, n + 1), np.int64)


@compiled
def grid_us(row: Floats, n_tokens: int) -> float:
    """Tabulated cost of ``n_tokens`` tokens; the last slope goes on beyond the table."""
    last = row.size - 1
    if n_tokens <= last:
        return float(row[n_tokens])
    return float(row[last] + (n_tokens - last) * (row[last] - row[last - 1]))


@compiled
def fill_table(
    ids: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], first_key: int, cpu: Floats, accel: Floats,
    scales: Floats, link_ready: float, slot_of: Ints, state: Ints, arrival: Floats, priority: Floats, table: Floats,
) -> None:  # fmt: skip
    """Fills the first five rows of a demand's cost table. scales = (cpu drift, accel drift, transfer us)."""
    for i in range(ids.size):
        key = first_key + ids[i]
        table[CPU, i] = grid_us(cpu, n_tokens[i]) * scales[CPU]
        table[ACCEL, i] = grid_us(accel, n_tokens[i]) * scales[ACCEL]
        table[TRANSFER, i] = scales[TRANSFER]
        slot = slot_of[key]
        if slot < 0:
            table[ARRIVAL, i] = NOT_RESIDENT
        else:
            table[ARRIVAL, i] = 0.0 if state[slot] >= RESIDENT else min(arrival[slot], link_ready)
        table[PRIORITY, i] = priority[key]


@compiled
def pick_slot(key_of: Ints, state: Ints, pins: Ints, keep: Floats, taken: npt.NDArray[np.bool_],
              first_key: int, end_key: int, capacity: int) -> int:  # fmt: skip
    """The slot to rewrite: a free one, else that of the idle resident with the lowest ``keep`` (ties: key); -1: none.

    capacity >= 0: the layer of keys first_key..end_key holds at most that many slots and evicts its own experts only.
    """
    in_slots, free, victim, least = 0, -1, -1, 0.0
    for slot in range(key_of.size):
        key = key_of[slot]
        in_layer = first_key <= key < end_key
        if in_layer:
            in_slots += 1
        if taken[slot] or pins[slot] > 0:
            continue
        if state[slot] == FREE:
            free = slot if free < 0 else free
        elif state[slot] == RESIDENT and (in_layer or capacity < 0):
            score = keep[key]
            if victim < 0 or score < least or (score == least and key < key_of[victim]):
                victim, least = slot, score
    if free >= 0 and (capacity < 0 or in_slots < capacity):
        return free
    return victim


@compiled
def victim_scores(
    key_of: Ints, state: Ints, pins: Ints, keep: Floats, first_key: int, ids: npt.NDArray[np.int32]
) -> Floats:
    """float64[A] ascending: eviction score of what the next A transfers would evict (0: a free slot).

    Experts of this demand are left out. Where slots run out, the last score goes on: a slot of this layer is reused.
    """
    scores = np.full(ids.size, np.inf)
    for slot in range(key_of.size):
        score = 0.0
        if state[slot] == RESIDENT and pins[slot] == 0:
            key = key_of[slot]
            score = keep[key]
            if score >= scores[-1] or _contains(ids, key - first_key):
                continue
        elif state[slot] != FREE:
            continue
        i = ids.size - 1
        while i > 0 and scores[i - 1] > score:
            scores[i] = scores[i - 1]
            i -= 1
        if scores[i] > score:
            scores[i] = score
    last = 0.0
    for i in range(scores.size):
        last = scores[i] if scores[i] < np.inf else last
        scores[i] = last
    return scores


@compiled
def _contains(ids: npt.NDArray[np.int32], expert: int) -> bool:
    found = False
    for candidate in ids:
        found = found or candidate == expert
    return found


@compiled
def assign_slots(
    ids: npt.NDArray[np.int32], first_key: int, end_key: int, capacity: int, slot_of: Ints,
    key_of: Ints, state: Ints, pins: Ints, keep: Floats, plan: Ints,
) -> int:  # fmt: skip
    """Gives every transfer of ``plan`` a slot; those that get none move to the CPU. Returns how many moved.

    Writes the plan's rows SLOT and EVICTED.
    """
    n = ids.size
    slots, evicted = plan[SLOT, :n], plan[EVICTED, :n]
    taken = np.zeros(key_of.size, np.bool_)
    turn = np.full(n, -1, np.int64)
    slots[:] = -1
    for i in range(plan[ACCEL, COUNT]):
        position = plan[ACCEL, i]
        turn[position] = i
        slots[position] = slot_of[first_key + ids[position]]
        if slots[position] >= 0:
            taken[slots[position]] = True
    reused = np.zeros(n, np.bool_)
    moved = 0
    for i in range(plan[TRANSFER, COUNT]):
        position = plan[TRANSFER, i]
        slot = pick_slot(key_of, state, pins, keep, taken, first_key, end_key, capacity)
        evicted[position] = -1
        if slot >= 0:
            evicted[position] = key_of[slot]
            if capacity >= 0 and key_of[slot] < 0:
                capacity -= 1
        else:
            for j in range(turn[position]):
                earlier = plan[ACCEL, j]
                if slots[earlier] >= 0 and not reused[earlier]:
                    slot = slots[earlier]
                    reused[earlier] = True
                    evicted[position] = REUSE
                    break
        slots[position] = slot
        if slot >= 0:
            taken[slot] = True
        else:
            moved += 1
    if moved > 0:
        _move_to_cpu(plan)
    return moved


@compiled
def _move_to_cpu(plan: Ints) -> None:
    """Accelerated experts without a slot go to the end of the CPU's list."""
    for row in (ACCEL, TRANSFER):
        kept = 0
        for i in range(plan[row, COUNT]):
            position = plan[row, i]
            if plan[SLOT, position] >= 0:
                plan[row, kept] = position
                kept += 1
            elif row == ACCEL:
                plan[CPU, plan[CPU, COUNT]] = position
                plan[CPU, COUNT] += 1
        plan[row, COUNT] = kept


@compiled
def assign(
    makespan: float, ids: npt.NDArray[np.int32], first_key: int, end_key: int, capacity: int, table: Floats,
    ready: Floats, slot_of: Ints, key_of: Ints, state: Ints, pins: Ints, keep: Floats, plan: Ints,
) -> float:  # fmt: skip
    """``assign_slots``; returns the makespan, anew where an expert moved to the CPU."""
    if assign_slots(ids, first_key, end_key, capacity, slot_of, key_of, state, pins, keep, plan):
        return float(plan_makespan(table, ready, plan))
    return makespan


@compiled
def decide_by_value(
    params: Floats, ids: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], first_key: int, end_key: int,
    capacity: int, cpu: Floats, accel: Floats, scales: Floats, ready: Floats, slot_of: Ints, key_of: Ints, state: Ints,
    pins: Ints, arrival: Floats, keep: Floats, priority: Floats, table: Floats, plan: Ints,
) -> float:  # fmt: skip
    """``decide_by_kernel`` for balance "value", in one compiled call."""
    fill_table(ids, n_tokens, first_key, cpu, accel, scales, ready[LINK], slot_of, state, arrival, priority, table)
    victims = victim_scores(key_of, state, pins, keep, first_key, ids)
    makespan = valued(table, ready, victims, params[0], params[1], plan)
    return assign(makespan, ids, first_key, end_key, capacity, table, ready, slot_of, key_of, state, pins, keep, plan)


def decide_by_kernel(
    kernel: Kernel, params: Floats, ids: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], first_key: int,
    end_key: int, capacity: int, cpu: Floats, accel: Floats, scales: Floats, ready: Floats, slot_of: Ints, key_of: Ints,
    state: Ints, pins: Ints, arrival: Floats, keep: Floats, priority: Floats, table: Floats, plan: Ints,
) -> float:  # fmt: skip
    """Plans one layer into ``plan`` (see ``new_plan``) by a balance kernel, in three compiled calls.

    params: the kernel's; ``table`` float64[5, A] is filled on the way, or float64[6, A], of which the row HOST is there
    already. Returns the predicted makespan in us.
    """
    fill_table(ids, n_tokens, first_key, cpu, accel, scales, ready[LINK], slot_of, state, arrival, priority, table)
    makespan = kernel(table, ready, params, plan)[0]
    if table.shape[0] > HOST and keep_in_slots(table, plan):
        makespan = plan_makespan(table, ready, plan)
    return assign(makespan, ids, first_key, end_key, capacity, table, ready, slot_of, key_of, state, pins, keep, plan)


def decision_of(policy: str, values: Mapping[str, Any]) -> tuple[Callable[..., float], Floats]:
    """How a balance policy decides, called as ``decide_by_value`` is, and its parameters. Raises PolicyError."""
    kernel, params = kernel_of(policy, **values)
    return (decide_by_value if policy == VALUE else partial(decide_by_kernel, kernel)), params
