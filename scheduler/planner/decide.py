"""The hot path of the planner: costs, balance and slots of one layer on flat arrays, in compiled parts, no objects.

Slot arrays are read only here; ``SlotTable`` performs what is decided.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from scheduler.balancing.optimal import fiddler_max, optimal
from scheduler.balancing.peers import (
    bandwidth,
    cpu_only,
    fiddler,
    hybrimoe,
    monde,
    on_demand,
    static_mapping,
    whole_layers,
)
from scheduler.balancing.timeline import plan_makespan
from scheduler.balancing.valued import valued
from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Kernel = Callable[[Floats, Floats, Floats, Ints], tuple[float, float]]

VALUE = "value"
KERNELS: dict[str, Kernel] = {
    "optimal": optimal, "hybrimoe": hybrimoe, "static": static_mapping, "on_demand": on_demand, "accel_only": on_demand,
    "layers": whole_layers, "fiddler": fiddler, "fiddler_max": fiddler_max, "monde": monde, "bandwidth": bandwidth,
    "cpu_only": cpu_only,
}  # fmt: skip
"""Balance policies by name. Each is compiled when it is first used: one function over all would take half a minute."""

FREE, RESIDENT = 0, 2
REUSE = -2
"""In ``evicted``: the slot's expert of this very plan is overwritten after its last read."""


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
    scales: Floats, link_ready: float, slot_of: Ints, state: Ints, arrival: Floats, priority: Floats,
) -> Floats:  # fmt: skip
    """Cost table float64[5, A] of a demand. scales = (cpu drift, accel drift, transfer us)."""
    n = ids.size
    table = np.empty((5, n))
    for i in range(n):
        key = first_key + ids[i]
        table[0, i] = grid_us(cpu, n_tokens[i]) * scales[0]
        table[1, i] = grid_us(accel, n_tokens[i]) * scales[1]
        table[2, i] = scales[2]
        slot = slot_of[key]
        table[3, i] = -1.0 if slot < 0 else (0.0 if state[slot] >= RESIDENT else min(arrival[slot], link_ready))
        table[4, i] = priority[key]
    return table


@compiled
def pick_slot(key_of: Ints, state: Ints, claims: Ints, keep: Floats, taken: npt.NDArray[np.bool_],
              first_key: int, end_key: int, capacity: int) -> int:  # fmt: skip
    """The slot to rewrite: a free one, else that of the idle resident with the lowest ``keep`` (ties: key); -1: none.

    capacity >= 0: the layer of keys first_key..end_key holds at most that many slots and evicts its own experts only.
    """
    held, free, victim, least = 0, -1, -1, 0.0
    for slot in range(key_of.size):
        key = key_of[slot]
        own = first_key <= key < end_key
        if own:
            held += 1
        if taken[slot] or claims[slot] > 0:
            continue
        if state[slot] == FREE:
            free = slot if free < 0 else free
        elif state[slot] == RESIDENT and (own or capacity < 0):
            worth = keep[key]
            if victim < 0 or worth < least or (worth == least and key < key_of[victim]):
                victim, least = slot, worth
    if free >= 0 and (capacity < 0 or held < capacity):
        return free
    return victim


@compiled
def victim_worths(
    key_of: Ints, state: Ints, claims: Ints, keep: Floats, first_key: int, ids: npt.NDArray[np.int32]
) -> Floats:
    """float64[A] ascending: worth of what the next A transfers would evict (0: a free slot).

    Experts of this demand are left out. Where slots run out, the last worth goes on: a slot of this layer is reused.
    """
    worths = np.full(ids.size, np.inf)
    for slot in range(key_of.size):
        worth = 0.0
        if state[slot] == RESIDENT and claims[slot] == 0:
            key = key_of[slot]
            worth = keep[key]
            if worth >= worths[-1] or _contains(ids, key - first_key):
                continue
        elif state[slot] != FREE:
            continue
        i = ids.size - 1
        while i > 0 and worths[i - 1] > worth:
            worths[i] = worths[i - 1]
            i -= 1
        if worths[i] > worth:
            worths[i] = worth
    last = 0.0
    for i in range(worths.size):
        last = worths[i] if worths[i] < np.inf else last
        worths[i] = last
    return worths


@compiled
def _contains(ids: npt.NDArray[np.int32], expert: int) -> bool:
    found = False
    for candidate in ids:
        found = found or candidate == expert
    return found


@compiled
def assign_slots(
    ids: npt.NDArray[np.int32], first_key: int, end_key: int, capacity: int, table: Floats, slot_of: Ints,
    key_of: Ints, state: Ints, claims: Ints, keep: Floats, plan: Ints, slots: Ints, evicted: Ints,
) -> int:  # fmt: skip
    """Gives every transfer of ``plan`` a slot; those that get none move to the CPU. Returns how many moved.

    slots int64[A]: slot of each accelerated expert by position (-1 else). evicted int64[A]: by position of a
    transferred expert: key that leaves, -1 none, REUSE the slot of an expert that this plan runs earlier.
    """
    n = ids.size
    taken = np.zeros(key_of.size, np.bool_)
    turn = np.full(n, -1, np.int64)
    slots[:] = -1
    for i in range(plan[1]):
        position = plan[3 + n + i]
        turn[position] = i
        slots[position] = slot_of[first_key + ids[position]]
        if slots[position] >= 0:
            taken[slots[position]] = True
    reused = np.zeros(n, np.bool_)
    moved = 0
    for i in range(plan[2]):
        position = plan[3 + 2 * n + i]
        slot = pick_slot(key_of, state, claims, keep, taken, first_key, end_key, capacity)
        evicted[position] = -1
        if slot >= 0:
            evicted[position] = key_of[slot]
            if capacity >= 0 and key_of[slot] < 0:
                capacity -= 1
        else:
            for j in range(turn[position]):
                earlier = plan[3 + n + j]
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
        _move_to_cpu(table, plan, slots)
    return moved


@compiled
def _move_to_cpu(table: Floats, plan: Ints, slots: Ints) -> None:
    """Accelerated experts without a slot go to the end of the CPU's list."""
    n = table.shape[1]
    for block in (1, 2):
        kept = 0
        for i in range(plan[block]):
            position = plan[3 + block * n + i]
            if slots[position] >= 0:
                plan[3 + block * n + kept] = position
                kept += 1
            elif block == 1:
                plan[3 + plan[0]] = position
                plan[0] += 1
        plan[block] = kept


@compiled
def seat(
    makespan: float, ids: npt.NDArray[np.int32], first_key: int, end_key: int, capacity: int, table: Floats,
    ready: Floats, slot_of: Ints, key_of: Ints, state: Ints, claims: Ints, keep: Floats, out: Ints,
) -> float:  # fmt: skip
    """Gives the transfers of the plan in ``out`` their slots; returns the makespan, anew where one moved to the CPU."""
    n = ids.size
    plan, slots, evicted = out[: 3 + 3 * n], out[3 + 3 * n : 3 + 4 * n], out[3 + 4 * n :]
    if assign_slots(
        ids, first_key, end_key, capacity, table, slot_of, key_of, state, claims, keep, plan, slots, evicted
    ):
        return float(plan_makespan(table, ready, plan))
    return makespan


@compiled
def decide_by_value(
    params: Floats, ids: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], first_key: int, end_key: int,
    capacity: int, cpu: Floats, accel: Floats, scales: Floats, ready: Floats, slot_of: Ints, key_of: Ints, state: Ints,
    claims: Ints, arrival: Floats, keep: Floats, priority: Floats, out: Ints,
) -> float:  # fmt: skip
    """``decide`` for "value"."""
    table = fill_table(ids, n_tokens, first_key, cpu, accel, scales, ready[2], slot_of, state, arrival, priority)
    victims = victim_worths(key_of, state, claims, keep, first_key, ids)
    makespan = valued(table, ready, victims, params[0], params[1], out[: 3 + 3 * ids.size])
    return seat(makespan, ids, first_key, end_key, capacity, table, ready, slot_of, key_of, state, claims, keep, out)


def decide(
    policy: str, params: Floats, ids: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], first_key: int,
    end_key: int, capacity: int, cpu: Floats, accel: Floats, scales: Floats, ready: Floats, slot_of: Ints, key_of: Ints,
    state: Ints, claims: Ints, arrival: Floats, keep: Floats, priority: Floats, out: Ints,
) -> float:  # fmt: skip
    """Plans one layer: out int64[3 + 5A] = plan (timeline), slots, evicted. Returns the predicted makespan in us.

    policy: "value" or a key of ``KERNELS``, params its parameters. Calls compiled parts one after another, for "value"
    in one compiled call.
    """
    if policy == VALUE:
        return decide_by_value(
            params, ids, n_tokens, first_key, end_key, capacity, cpu, accel, scales, ready, slot_of, key_of, state,
            claims, arrival, keep, priority, out,
        )  # fmt: skip
    table = fill_table(ids, n_tokens, first_key, cpu, accel, scales, ready[2], slot_of, state, arrival, priority)
    makespan = KERNELS[policy](table, ready, params, out[: 3 + 3 * ids.size])[0]
    return seat(makespan, ids, first_key, end_key, capacity, table, ready, slot_of, key_of, state, claims, keep, out)
