"""Counters of a layer call in compiled code: what a plan that was decided at once adds to a row of `stats.COUNTED`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, COUNT, CPU, TRANSFER
from scheduler.compiled import compiled
from scheduler.planner.decide import EVICTED
from scheduler.views import floats_at, ints_at

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

(CALLS, TOKENS, ACTIVATED, HITS, MISSES, LATE_PREFETCHES, CPU_EXPERTS, ACCEL_EXPERTS, TRANSFERS, PREFETCHES,
 PREFETCHES_USED, PREFETCHES_WASTED, TRANSFER_BYTES, CPU_US, ACCEL_US, LINK_US, OVERHEAD_US,
 WALL_US) = range(18)  # fmt: skip
"""Places in a row of counters, of those that a layer call adds to."""
N_TALLIES = 28
"""Counters of a row."""
ROWS, N_ROWS, ISSUED, N_KEYS, N_WORDS = range(5)
"""Places of `StatsRecorder.words`: addresses and sizes."""
NOT_ISSUED = -1
"""Where no prefetch of an expert waits for its fate."""


@compiled
def count_call(
    number: int, n_tokens: int, hits: int, late: int, expert_ids: npt.NDArray[np.int32], first_key: int, plan: Ints,
    fetched: Ints, n_fetched: int, record_bytes: Ints, n_experts: int, rows: Floats, issued: Ints,
) -> None:  # fmt: skip
    """`StatsRecorder.found` of a plan int64 [5, A + 1] (`decide.new_plan`), in row `number` of rows float64 [R,
    N_TALLIES].

    fetched int64 [3, n or more]: key and evicted key in rows 0 and 2, of `n_fetched` prefetches. record_bytes int64
    [L]; n_experts: by which keys are told from layers. issued: see `StatsRecorder`.
    """
    n_cpu, n_accel = plan[CPU, COUNT], plan[ACCEL, COUNT]
    _count_demand(number, n_tokens, hits, late, n_cpu, n_accel, expert_ids, first_key, rows, issued)
    own_bytes = record_bytes[first_key // n_experts]
    for i in range(plan[TRANSFER, COUNT]):
        position = plan[TRANSFER, i]
        _count_move(number, False, first_key + expert_ids[position], plan[EVICTED, position], own_bytes, rows, issued)
    for i in range(n_fetched):
        key = fetched[0, i]
        _count_move(number, True, key, fetched[2, i], record_bytes[key // n_experts], rows, issued)


@compiled
def count_demand(
    address: int, number: int, n_tokens: int, hits: int, late: int, n_cpu: int, n_accel: int,
    expert_ids: npt.NDArray[np.int32], first_key: int,
) -> None:  # fmt: skip
    """A call's demand and its lanes, in row `number`; address: of `StatsRecorder.words`."""
    words = ints_at(address, N_WORDS)
    _count_demand(number, n_tokens, hits, late, n_cpu, n_accel, expert_ids, first_key, *_arrays(words))


@compiled
def count_move(address: int, number: int, is_prefetch: bool, key: int, evicted: int, n_bytes: int) -> None:
    """A transfer of an expert in the place of another (-1: none), in row `number`; address as above."""
    _count_move(number, is_prefetch, key, evicted, n_bytes, *_arrays(ints_at(address, N_WORDS)))


@compiled
def _arrays(words: Ints) -> tuple[Floats, Ints]:
    """Rows and `issued`."""
    return floats_at(words[ROWS], (words[N_ROWS], N_TALLIES)), ints_at(words[ISSUED], words[N_KEYS])


@compiled
def _count_demand(
    number: int, n_tokens: int, hits: int, late: int, n_cpu: int, n_accel: int, expert_ids: npt.NDArray[np.int32],
    first_key: int, rows: Floats, issued: Ints,
) -> None:  # fmt: skip
    row, n_active = rows[number], expert_ids.size
    row[CALLS] += 1.0
    row[TOKENS] += n_tokens
    row[ACTIVATED] += n_active
    row[HITS] += hits
    row[MISSES] += n_active - hits
    row[LATE_PREFETCHES] += late
    row[CPU_EXPERTS] += n_cpu
    row[ACCEL_EXPERTS] += n_accel
    for i in range(n_active):
        _fate(first_key + expert_ids[i], PREFETCHES_USED, rows, issued)


@compiled
def _count_move(
    number: int, is_prefetch: bool, key: int, evicted: int, n_bytes: int, rows: Floats, issued: Ints
) -> None:
    rows[number, PREFETCHES if is_prefetch else TRANSFERS] += 1.0
    rows[number, TRANSFER_BYTES] += n_bytes
    _fate(evicted, PREFETCHES_WASTED, rows, issued)
    if is_prefetch:
        issued[key] = number


@compiled
def _fate(key: int, place: int, rows: Floats, issued: Ints) -> None:
    """What became of the prefetch of an expert, if one waits for its fate; key: -1 for none."""
    if key >= 0 and issued[key] != NOT_ISSUED:
        rows[issued[key], place] += 1.0
        issued[key] = NOT_ISSUED


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first call would otherwise wait for."""
    rows, issued, words = np.zeros((1, N_TALLIES)), np.full(1, NOT_ISSUED, np.int64), np.ones(N_WORDS, np.int64)
    words[ROWS], words[ISSUED] = rows.ctypes.data, issued.ctypes.data
    count_demand(words.ctypes.data, 0, 1, 0, 0, 0, 0, np.zeros(1, np.int32), 0)
    count_move(words.ctypes.data, 0, False, 0, NOT_ISSUED, 0)
