"""A time that no policy can beat: a lower bound of a simulated phase, and how it is found.

What the engine makes every schedule obey is relaxed to a linear program. Moments are the layers of all steps in turn,
each with its dense work F before and after, and the time T of its experts:

- T is at least the CPU's work of the moment, slowed while the link runs, and its hand-over;
- T is at least the shared experts and the accelerator's work; T0, all of it there, and for each expert on the CPU what
  that takes beyond T0 (a layer's experts are not divided: one on the CPU takes all its time);
- copies of a moment take no more than the link carries within F + T, less while the CPU works;
- at the start of a moment no more experts are in slots, or on their way there, than there are slots;
- an expert that the accelerator computes has been in its slot since its last use, or was copied since.

Everything that is coming is known, the slots' first contents are free, experts may be copied and kept in part, and the
disk is as fast as memory. Prices of the constraints (Lagrange multipliers) leave one small problem for each expert:
its cheapest life, from use to use in a slot, copied when the link is cheap, or on the CPU. The sum over experts is a
lower bound at any prices, so that none can break it; gradient steps look for good ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.demand import Phase
from scheduler.simulator.engine import SimulationError
from scheduler.simulator.simulator import Simulator
from scheduler.traces.trace import TraceStep

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BOUND: Final = "bound"
"""Name of the bound where results of policies stand."""
ROUNDS: Final = 300
"""Gradient steps; twice as many raise the bound by 0.3 to 0.4 % (gpt-oss-20b, 25 % cached, 1,000 tokens)."""
RATE: Final = 0.05
MEAN_WEIGHT, SQUARE_WEIGHT = 0.1, 0.01
"""Adam: largest step in log-odds and logarithms of prices, weights of the newest gradient and of its square."""
FIRST_SLOT: Final = 0.002
"""First price of a slot, as a share of that at which an expert of mean use costs as much in a slot as on the CPU."""
PRICED_LAYERS: Final = 8
"""At most so many layers in turn share a price of the link and of slots: finer prices take longer and gain little."""
ROUNDING: Final = 1e-9
"""Share by which the engine's clock may be fast, from sums of rounded durations."""
LANES: Final = 3
CPU, ACCEL, APART = range(LANES)
"""Rows of the prices of what T is at least: the CPU's work, the accelerator's, T0 and more for each on the CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The steps of one phase, as arrays over moments M, experts K (layer * n_experts + expert) and their uses U.

    dense_us, shared_us, all_accel_us (T0), n_active float64[M]; idle bool[M]: steps of another phase pass, in which
    copies are free. group int64[M]: which price of link and slots holds. first int64[K + 1]: uses of each expert, in
    ``at`` (moment) int64[U], cpu_us, accel_us float64[U]. copy_us float64[K]. cpu_rate, link_rate: share of its rate
    that each keeps beside the other.
    """

    dense_us: Floats
    shared_us: Floats
    all_accel_us: Floats
    n_active: Floats
    idle: Flags
    group: Ints
    first: Ints
    at: Ints
    cpu_us: Floats
    accel_us: Floats
    copy_us: Floats
    handoff_us: float
    cpu_rate: float
    link_rate: float
    n_slots: int


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """Of one us of each constraint: lanes float64[3, M] and link float64[M], which add up to 1; slots float64[M]: us
    for a slot at the start of the moment."""

    lanes: Floats
    link: Floats
    slots: Floats


def lower_bounds(simulator: Simulator, rounds: int = ROUNDS) -> dict[Phase, float]:
    """Phase -> ms a step (as ``PhaseResult.latency_ms``) that no policy can beat in what the simulator was made for.

    Its policy is not asked. Raises SimulationError for a lossy policy or several accelerators: their work is another.
    """
    if simulator.stage is not None or len(simulator.planners()) > 1:
        raise SimulationError("the bound is of one accelerator and of a lossless policy: leave the others out")
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return {phase: _bound_ms(simulator, phase, rounds) for phase in phases if _steps(simulator, phase)}


def _bound_ms(simulator: Simulator, phase: Phase, rounds: int) -> float:
    """Prompts in chunks count once, as in ``PhaseStats.end``."""
    n = sum(step.first or phase == "decode" for _, step in _steps(simulator, phase))
    return (1.0 - ROUNDING) * least_us(work_of(simulator, phase), rounds) / max(n, 1) / 1e3


def _steps(simulator: Simulator, phase: Phase) -> list[tuple[int, TraceStep]]:
    return [(index, step) for index, step in enumerate(simulator.steps) if step.phase == phase]


def work_of(simulator: Simulator, phase: Phase) -> Work:
    """What the simulator's steps of a phase ask of any policy."""
    shape, costs = simulator.shape, simulator.engine.costs
    moments: list[tuple[float, float, float, float, bool, int]] = []
    keys, at = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    cpu, accel = [np.empty(0)], [np.empty(0)]
    group, last = -1, -1
    for index, step in _steps(simulator, phase):
        if last >= 0 and index != last + 1:
            group += 1
            moments.append((0.0, 0.0, 0.0, 1.0, True, group))
        last = index
        dense, own = simulator.dense_times(step), simulator.costs_of(step.n_tokens)
        for demand in simulator.source.step(step):
            layer, ids = demand.layer, demand.expert_ids
            group += layer % PRICED_LAYERS == 0
            keys.append(layer * shape.n_experts + ids.astype(np.int64))
            at.append(np.full(ids.size, len(moments)))
            cpu.append(own.cpu_us(layer, demand.n_tokens))
            accel.append(own.accel_us(layer, demand.n_tokens))
            around_us = dense.attention_us + dense.gate_us + dense.combine_us
            if layer + 1 == shape.n_layers:
                around_us += simulator.dense.head_us(step.n_sequences)
            all_us = dense.shared_us + float(accel[-1].sum())
            moments.append((around_us, dense.shared_us, all_us, float(max(ids.size, 1)), False, group))
    of_key = np.concatenate(keys)
    order = np.argsort(of_key, kind="stable")
    around, shared, whole, n_active, idle, groups = (np.array(column) for column in zip(*moments, strict=True))
    n_keys = shape.n_layers * shape.n_experts
    return Work(
        around, shared, whole, n_active, idle, groups,
        np.searchsorted(of_key[order], np.arange(n_keys + 1)).astype(np.int64),
        np.concatenate(at)[order], np.concatenate(cpu)[order], np.concatenate(accel)[order],
        np.repeat([costs.transfer_us(layer) for layer in range(shape.n_layers)], shape.n_experts),
        simulator.engine.handoff_us, costs.cpu_with_link, costs.link_with_cpu,
        simulator.n_slots + (shape.n_experts if simulator.streamer is not None else 0),
    )  # fmt: skip


def least_us(work: Work, rounds: int = ROUNDS) -> float:
    """The largest lower bound, in us of all steps, that ``rounds`` steps of Adam on the prices have met.

    The first price of a slot is next to nothing, as it stays where slots are plenty.
    """
    n, n_groups = work.dense_us.size, int(work.group[-1]) + 1
    slot_us = FIRST_SLOT * float(work.cpu_us.sum()) / (n * (work.first.size - 1))
    guess = [np.full(n_groups, -1.0), np.zeros((LANES, n)), np.full(n_groups, np.log(max(slot_us, 1e-6)))]
    means, squares = ([np.zeros_like(part) for part in guess] for _ in range(2))
    best = 0.0
    for turn in range(1, rounds + 1):
        prices, shares = _prices(work, guess)
        found, slopes = priced(work, prices)
        best = max(best, found)
        rate = RATE * min(1.0, 2.0 * (1.0 - (turn - 1) / rounds))
        for part, slope, mean, square in zip(guess, _chain(work, prices, shares, slopes), means, squares, strict=True):
            mean += MEAN_WEIGHT * (slope - mean)
            square += SQUARE_WEIGHT * (slope * slope - square)
            typical = np.sqrt(square / (1.0 - (1.0 - SQUARE_WEIGHT) ** turn))
            part += rate * mean / (1.0 - (1.0 - MEAN_WEIGHT) ** turn) / (typical + 1e-9)
    return best


def _prices(work: Work, guess: list[Floats]) -> tuple[Prices, Floats]:
    """The prices that free numbers stand for: log-odds of the link's, logits of the lanes', logarithm of the slots'.

    Also the lanes' shares float64[3, M] of what the link leaves.
    """
    link_odds, lane_odds, slots_log = guess
    link = np.where(work.idle, 0.0, (1.0 / (1.0 + np.exp(-link_odds)))[work.group])
    shares = np.exp(lane_odds - lane_odds.max(axis=0))
    shares /= shares.sum(axis=0)
    return Prices((1.0 - link) * shares, link, np.exp(slots_log)[work.group]), shares


def _chain(work: Work, prices: Prices, shares: Floats, slopes: Prices) -> tuple[Floats, Floats, Floats]:
    """Slopes by the free numbers of ``_prices``, from those by the prices."""
    mean = (shares * slopes.lanes).sum(axis=0)
    by_link = (slopes.link - mean) * prices.link * (1.0 - prices.link)
    by_lanes = (1.0 - prices.link) * shares * (slopes.lanes - mean)
    by_slots = slopes.slots * prices.slots
    grouped = [np.bincount(work.group, part).astype(np.float64) for part in (by_link, by_slots)]
    return grouped[0], by_lanes, grouped[1]


def priced(work: Work, prices: Prices) -> tuple[float, Prices]:
    """(lower bound in us at these prices, its slopes by each of them)."""
    cpu, accel, apart = prices.lanes
    both, link = cpu + apart, prices.link
    lost, freed = (1.0 - work.cpu_rate) / work.cpu_rate, (work.cpu_rate + work.link_rate - 1.0) / work.cpu_rate
    beside = freed * link > lost * both  # link and CPU at once pay: per us of CPU work the link carries ``freed`` us
    work_price = both + link - np.where(beside, freed * link - lost * both, 0.0)
    apart_us = np.minimum(work.handoff_us, work.all_accel_us) - work.all_accel_us
    each_price = cpu * work.handoff_us / work.n_active + apart * apart_us
    n = work.dense_us.size
    cpu_us, n_cpu, accel_us, copies_us, held = (np.zeros(n + 2) for _ in range(5))
    ends = np.searchsorted(work.group, work.group, side="right") - 1
    total = cheapest_lives(
        work.first, work.at, work.cpu_us, work.accel_us, work.copy_us, ends, prices.slots, link, work_price, each_price,
        accel, cpu_us, n_cpu, accel_us, copies_us, held,
    )  # fmt: skip
    fixed_us = work.dense_us * (1.0 - link) + accel * work.shared_us + apart * work.all_accel_us
    cpu_us, n_cpu, accel_us, copies_us, held = (
        used[:n] for used in (cpu_us, n_cpu, accel_us, copies_us, np.cumsum(held))
    )
    slowed_us = cpu_us * (1.0 + np.where(beside, lost, 0.0))
    lanes = np.stack((
        slowed_us + work.handoff_us * n_cpu / work.n_active,
        accel_us + work.shared_us,
        slowed_us + apart_us * n_cpu + work.all_accel_us,
    ))  # fmt: skip
    by_link = copies_us + cpu_us * (1.0 - np.where(beside, freed, 0.0)) - work.dense_us
    slots = held - work.n_slots
    return float(total + fixed_us.sum() - work.n_slots * prices.slots.sum()), Prices(lanes, by_link, slots)


@compiled
def cheapest_lives(
    first: Ints, at: Ints, cpu_us: Floats, accel_us: Floats, copy_us: Floats, ends: Ints, slots: Floats, link: Floats,
    work_price: Floats, each_price: Floats, accel: Floats, on_cpu_us: Floats, n_cpu: Floats, on_accel_us: Floats,
    copies_us: Floats, held: Floats,
) -> float:  # fmt: skip
    """The sum over experts of the price of its cheapest life, by dynamic programming from use to use.

    ends int64[M]: the last moment of each one's group. slots, link, accel float64[M]: prices of a slot, of the link
    and of the accelerator; work_price, each_price: of CPU work, and of each expert on the CPU. Adds what is used to the
    last five, float64[M + 2]; ``held`` gets its differences.
    """
    kept, on_accel, came = np.zeros(at.size, np.bool_), np.zeros(at.size, np.bool_), np.zeros(at.size, np.bool_)
    copied_at = np.zeros(at.size, np.int64)
    so_far = np.cumsum(slots)
    total = 0.0
    for key in range(first.size - 1):
        absent, resident, before = 0.0, 0.0, -1
        for i in range(first[key], first[key + 1]):
            moment = at[i]
            cheapest, where, copied_at[i] = np.inf, max(before, 0), 0
            while where <= moment:  # within a group the latest moment holds the slot for the shortest time
                where = min(ends[where], moment)
                price = link[where] * copy_us[key] - so_far[where]
                if price < cheapest:
                    cheapest, copied_at[i] = price, where
                where += 1
            keep = resident - (so_far[before] if before >= 0 else 0.0)
            kept[i] = keep <= absent + cheapest
            arrived = so_far[moment] + min(keep, absent + cheapest)
            by_accel = accel[moment] * accel_us[i]
            by_cpu = work_price[moment] * cpu_us[i] + each_price[moment]
            on_accel[i] = by_accel <= by_cpu
            resident = arrived + min(by_accel, by_cpu)
            came[i] = resident <= absent + by_cpu
            absent, before = min(resident, absent + by_cpu), moment
        total += min(absent, resident)
        there = resident < absent
        for i in range(first[key + 1] - 1, first[key] - 1, -1):
            there = there or came[i]
            if there and on_accel[i]:
                on_accel_us[at[i]] += accel_us[i]
            else:
                on_cpu_us[at[i]] += cpu_us[i]
                n_cpu[at[i]] += 1.0
            if there:
                since = copied_at[i]
                if kept[i]:
                    since = at[i - 1] if i > first[key] else -1
                else:
                    copies_us[since] += copy_us[key]
                    there = False
                held[since + 1] += 1.0
                held[at[i] + 1] -= 1.0
    return total
