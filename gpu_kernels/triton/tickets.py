# ruff: noqa: ANN001, ANN201 - what Triton compiles has no Python types
# mypy: ignore-errors
"""Programs of one launch that wait for others of the same launch: tickets, counters, and why nobody waits for ever.

A program takes a ticket: the number of programs of the launch that have taken one before. What it does follows from the
ticket, not from its place in the grid, of which nothing says in which order programs start.

**Nobody waits for ever.** The first tickets are those of work that waits for nothing; all later ones wait for such work
only. So a program that waits has a ticket, so all lower tickets have been taken, each by a program that has started and
will never wait. On the cards that this is compiled for, a program that has started keeps its registers until it ends,
and its threads go on whatever others do: it ends, and the counters fill up. How many programs the card holds at once
does not matter. Should a card break that promise all the same, a wait ends after POLLS looks, and gives NaN:
results that are seen to be wrong, instead of a device that hangs.

**What was written is seen.** `tell` has a barrier, so that all threads' stores come before the one thread's atomic with
release; `wait_for` ends by an atomic with acquire that has seen it, and a barrier, behind which all threads load. Both
are of the card's scope. Loads are plain ones that the acquire orders: none is through the cache for constants.

**Counters are right at each launch**, without one that clears them. The state is a word and two sets of counters. The
word holds which set is in use (bit 30) and the next ticket (below it). Between two launches the next ticket is 0, and
the set in use is all zeros: so it is made (`fused.new_state`). In a launch, the program with ticket 0 zeroes the
other set, which nobody uses, and the one with the last ticket, after which nobody takes one, writes the word for the
next launch: ticket 0, the other set. Each launch is complete, and its stores seen, before the next one on its stream
begins (`single` is never launched to overlap), so the same holds between the next two, whatever number of programs each
has. A replayed graph is such launches again; nothing of it comes from the host. Pairs without an expert in a slot count
nothing, and nobody waits for them. Two launches at once must not have the same state: it belongs to one accelerator,
whose work is on one stream after the other (`FusedChoice`).

The interpreter runs programs one after the other, in the order of the grid: tickets are then the programs' numbers, and
every wait finds its counter full.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_PAIRS = tl.constexpr(256)
"""Counters of a set."""
COUNTER_WORDS = tl.constexpr(32)
"""From one counter to the next: a line of the cache each."""
POLLS = tl.constexpr(1 << 18)
"""Looks at a counter, some tenths of a us each, before a wait is given up: a hundred times what the largest expert
takes."""
IN_USE = tl.constexpr(1 << 30)
"""The bit of a state's first word that says which set is in use; tickets are below it."""
STATE_WORDS = COUNTER_WORDS.value * (1 + 2 * MAX_PAIRS.value)


@triton.jit
def take_ticket(state_ptr, n_programs):
    """(this program's ticket, where the counters of this launch begin)."""
    word = tl.atomic_add(state_ptr, 1, sem="relaxed", scope="gpu")
    in_use, ticket = word // IN_USE, word & (IN_USE - 1)
    if ticket == 0:
        others = (1 + (1 - in_use) * MAX_PAIRS + tl.arange(0, MAX_PAIRS)) * COUNTER_WORDS
        tl.store(state_ptr + others, tl.zeros((MAX_PAIRS,), tl.int32))
    if ticket == n_programs - 1:
        tl.store(state_ptr, (1 - in_use) * IN_USE)
    return ticket, state_ptr + (1 + in_use * MAX_PAIRS) * COUNTER_WORDS


@triton.jit
def counter_of(counts_ptr, pair):
    """Where the programs of a pair are counted."""
    return counts_ptr + pair * COUNTER_WORDS


@triton.jit
def tell(count_ptr):
    """Counts this program, once all of its stores are seen by whoever finds it counted."""
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(count_ptr, n_awaited):
    """Waits until so many programs were counted. 0.0; NaN where they never were."""
    counted = tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu")
    polls = 0
    while (counted < n_awaited) & (polls < POLLS):
        counted = tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    tl.debug_barrier()
    return tl.where(counted < n_awaited, float("nan"), 0.0)
