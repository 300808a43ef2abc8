"""Counters of a session: what was hit, moved and computed, per layer, per phase and in total."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.runtime.layer_call.compiled import count_hits
from hybrimoe.runtime.layer_call.tallies import (
    ISSUED,
    N_KEYS,
    N_ROWS,
    N_TALLIES,
    N_WORDS,
    NOT_ISSUED,
    ROWS,
    count_demand,
    count_move,
)
from hybrimoe.runtime.tier.cache import TierState
from scheduler import LayerPlan, Phase, SlotTable
from scheduler.compiled import straight
from scheduler.planner.plan_view import PlanView

Floats = npt.NDArray[np.float64]

PHASES: tuple[Phase, ...] = ("prefill", "decode")


COUNTED = (
    "calls", "tokens", "activated", "hits", "misses", "late_prefetches", "cpu_experts", "accel_experts", "transfers",
    "prefetches", "prefetches_used", "prefetches_wasted", "transfer_bytes", "cpu_us", "accel_us", "link_us",
    "overhead_us", "wall_us", "routed", "skipped", "substituted", "lowered", "deferred", "disk_reads", "disk_ahead",
    "disk_bytes", "disk_us", "disk_wait_us",
)  # fmt: skip
"""The columns of a row of counters; `tallies` names the places of those that layer calls add to."""


class Whole:
    """A column that counts: whole numbers, or bytes."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._place = COUNTED.index(name)

    def __get__(self, counters: Counters, owner: type) -> int:
        return int(counters.row[self._place])

    def __set__(self, counters: Counters, value: int) -> None:
        counters.row[self._place] = value


class Amount(Whole):
    """A column of us."""

    def __get__(self, counters: Counters, owner: type) -> float:  # type: ignore[override]
        return float(counters.row[self._place])

    def __set__(self, counters: Counters, value: float) -> None:
        counters.row[self._place] = value


class Counters:
    """Sums over calls, in `row` float64 [len(COUNTED)]: its own, or one of a `StatsRecorder`, which then goes on.

    An activated expert is a hit if its bytes were resident when it was demanded, else a miss;
    `late_prefetches` are misses whose prefetch was still under way. Times in us, sizes in bytes. Of a lossy policy:
    `routed` (token, expert) pairs that the router asked for, of which `skipped`, `substituted`, `lowered` (computed
    from the low-precision copy) and `deferred` (added to the next layer's output). Where experts are read from disk:
    `disk_reads` of which a call needed the expert at once, `disk_ahead` before one did, their `disk_bytes` and
    `disk_us`, and the `disk_wait_us` in which the CPU lane had nothing else to do."""

    __slots__ = ("number", "row")

    calls, tokens, activated, hits, misses, late_prefetches = (Whole() for _ in range(6))
    cpu_experts, accel_experts, transfers, prefetches, prefetches_used = (Whole() for _ in range(5))
    prefetches_wasted, transfer_bytes = Whole(), Whole()
    cpu_us, accel_us, link_us, overhead_us, wall_us = (Amount() for _ in range(5))
    routed, skipped, substituted, lowered, deferred = (Whole() for _ in range(5))
    disk_reads, disk_ahead, disk_bytes, disk_us, disk_wait_us = Whole(), Whole(), Whole(), Amount(), Amount()

    def __init__(self, row: Floats | None = None, number: int = -1, **sums: float) -> None:
        """number: of the row among a recorder's."""
        self.row, self.number = np.zeros(len(COUNTED)) if row is None else row, number
        for name, value in sums.items():
            self.row[COUNTED.index(name)] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters) and bool(np.array_equal(self.row, other.row))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counted = ", ".join(f"{name}={getattr(self, name)}" for name in COUNTED if getattr(self, name))
        return f"Counters({counted})"

    def ran_on_cpu(self, n_tokens: int, n_experts: int, cpu_us: float, wall_us: float) -> None:
        """Counts one call without slots: every active expert was a miss and ran on the CPU."""
        self.calls += 1
        self.tokens += n_tokens
        self.activated += n_experts
        self.misses += n_experts
        self.cpu_experts += n_experts
        self.cpu_us += cpu_us
        self.wall_us += wall_us
        self.overhead_us += wall_us - cpu_us

    def ran_on_cpu_often(self, n_calls: int, n_tokens: int, n_experts: int, us: float) -> None:
        """Counts calls of one layer inside compiled steps: their experts' time is all that is theirs alone."""
        self.ran_on_cpu(n_tokens, n_experts, us, us)
        self.calls += n_calls - 1

    def ran_on_accelerator(self, n_calls: int, n_tokens: int, n_experts: int, us: float) -> None:
        """Counts calls of one layer without the host: every active expert was a hit, and what the accelerator took for
        the experts is all that is theirs alone."""
        self.calls += n_calls
        self.tokens += n_tokens
        self.activated += n_experts
        self.hits += n_experts
        self.accel_experts += n_experts
        self.accel_us += us
        self.wall_us += us

    def add(self, other: Counters) -> None:
        """Adds another one's sums."""
        self.row += other.row

    def since(self, before: Counters) -> Counters:
        """What was counted after an earlier reading of the same counters."""
        return Counters(self.row - before.row)

    @property
    def hit_rate(self) -> float | None:
        """Hits over activated experts; None before the first."""
        return self.hits / self.activated if self.activated else None

    @property
    def prefetch_precision(self) -> float | None:
        """Share of the prefetches whose fate is known that were used before eviction; None if there are none."""
        resolved = self.prefetches_used + self.prefetches_wasted
        return self.prefetches_used / resolved if resolved else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        values: dict[str, Any] = {name: getattr(self, name) for name in COUNTED}
        return values | {"hit_rate": self.hit_rate, "prefetch_precision": self.prefetch_precision}


@dataclass(frozen=True, slots=True)
class UnitStats:
    """One accelerator: its layers (indices), slots, and the sums over its layers (their CPU lane included)."""

    name: str
    kind: str
    layers: range
    n_slots: int
    slots_filled: int
    counters: Counters

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name, "kind": self.kind, "first_layer": self.layers.start, "n_layers": len(self.layers),
            "n_slots": self.n_slots, "slots_filled": self.slots_filled, "total": self.counters.as_dict(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SessionStats:
    """A snapshot: sums by phase and by layer (module path), and what the session runs on.

    tier: the host cache, where experts are read from disk. attention_calls: by module path, how many decode steps of it
    the CPU's attention kernel computed. store_bytes: of experts in host memory; dropped_bytes: what is not there any
    more because slots hold it (memory.host_copy). lost: what has become of an accelerator that hangs or has failed.
    """

    by_phase: dict[Phase, Counters]
    layers: dict[str, Counters]
    accelerators: tuple[UnitStats, ...]
    policy: str
    n_experts: int
    store_bytes: int
    warmup_transfers: int
    failures: int
    lossy: str | None = None
    n_low_slots: int = 0
    attention_calls: Mapping[str, int] = field(default_factory=dict)
    tier: TierState | None = None
    dropped_bytes: int = 0
    lost: str | None = None

    @property
    def total(self) -> Counters:
        """Sums over everything."""
        return _total(self.by_phase.values())

    @property
    def accelerator(self) -> str:
        """Names of the accelerators; "none" without one."""
        names = [unit.name for unit in self.accelerators]
        counts = {name: names.count(name) for name in names}
        return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items()) or "none"

    @property
    def accelerator_kind(self) -> str:
        """ "emulated" where one of them is (its times are emulated times), else the torch device type, or "none"."""
        kinds = sorted({unit.kind for unit in self.accelerators})
        return "emulated" if "emulated" in kinds else ", ".join(kinds) or "none"

    @property
    def n_slots(self) -> int:
        """Slots of all accelerators."""
        return sum(unit.n_slots for unit in self.accelerators)

    @property
    def slots_filled(self) -> int:
        """Slots that hold an expert, or are being filled with one."""
        return sum(unit.slots_filled for unit in self.accelerators)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers for JSON. Times of an emulated accelerator are emulated times."""
        return {
            "accelerator": self.accelerator,
            "accelerator_kind": self.accelerator_kind,
            "policy": self.policy,
            "lossy": self.lossy,
            "n_low_slots": self.n_low_slots,
            "n_slots": self.n_slots,
            "slots_filled": self.slots_filled,
            "n_experts": self.n_experts,
            "store_bytes": self.store_bytes,
            "dropped_bytes": self.dropped_bytes,
            "tier": None if self.tier is None else asdict(self.tier),
            "warmup_transfers": self.warmup_transfers,
            "failures": self.failures,
            "lost": self.lost,
            "total": self.total.as_dict(),
            **{phase: counters.as_dict() for phase, counters in self.by_phase.items()},
            "accelerators": [unit.as_dict() for unit in self.accelerators],
            "attention_calls": dict(self.attention_calls),
            "layers": {path: counters.as_dict() for path, counters in self.layers.items()},
        }


MOST_UNCOUNTED = 4096
"""Calls that are kept before they are added up."""
WholeCall = tuple[Phase, int, int, int, int, int]
"""A call without slots: phase, layer, tokens, active experts, ns in the kernels, ns in all."""


class StatsRecorder:
    """Counts per phase and layer while a session runs. `low`: what the low-precision copies add to it.

    `whole`: calls without slots, which are added up when somebody asks: adding costs more where they run.
    """

    def __init__(self, n_layers: int, n_experts: int, low: StatsRecorder | None = None) -> None:
        self.low, self._n_experts = low, n_experts
        self.whole: list[WholeCall] = []
        self.rows = np.zeros((len(PHASES), n_layers, N_TALLIES))
        """Of each phase and layer, a row of counters; it stays where it is."""
        self.issued = np.full(n_layers * n_experts, NOT_ISSUED, np.int64)
        """By (layer, expert): the row, counted over all phases, in which a prefetch of it was counted whose fate is not
        known yet."""
        numbers = iter(range(len(PHASES) * n_layers))
        self.counters = {
            phase: [Counters(row, next(numbers)) for row in rows] for phase, rows in zip(PHASES, self.rows, strict=True)
        }
        self.spent: list[tuple[Counters, int, float]] = []
        """us that are added to a column of counters when somebody asks, like `whole`."""
        self._words = np.zeros(N_WORDS, np.int64)
        self._words[[ROWS, N_ROWS]] = self.rows.ctypes.data, len(PHASES) * n_layers
        self._words[[ISSUED, N_KEYS]] = self.issued.ctypes.data, self.issued.size
        self._address = self._words.ctypes.data
        self._count_demand, self._count_move = count_demand, count_move
        self.warmup_transfers = 0
        self.failures = 0

    def add_up(self) -> None:
        """Adds the calls that were only kept to the counters."""
        kept, self.whole[:] = list(self.whole), []
        for phase, layer, n_tokens, n_active, kernels_ns, wall_ns in kept:
            self.counters[phase][layer].ran_on_cpu(n_tokens, n_active, kernels_ns * 1e-3, wall_ns * 1e-3)
        spent, self.spent[:] = list(self.spent), []
        for counters, place, us in spent:
            counters.row[place] += us

    def of(self, phase: Phase, layer: int) -> Counters:
        """The counters to add to."""
        return self.counters[phase][layer]

    def demand(
        self, counters: Counters, layer: int, expert_ids: npt.NDArray[np.int32], n_tokens: int,
        table: tuple[SlotTable, int] | None,
    ) -> None:  # fmt: skip
        """Counts one call's demand against the slots as they are before planning (`LayerPlanner.table`)."""
        found = 0, 0
        if table is not None and table[0].n_slots:
            slots, own = table
            found = count_hits(expert_ids, own * slots.n_experts, slots.slot_of, slots.state)
        self.found(counters, layer, expert_ids, n_tokens, *found)

    def found(
        self, counters: Counters, layer: int, expert_ids: npt.NDArray[np.int32], n_tokens: int, hits: int, late: int,
        plan: PlanView | None = None, record_bytes: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """Counts one call's demand, of which `hits` experts are in slots, and `late` on their way; and what its plan
        does with them."""
        n_cpu, n_accel = (0, 0) if plan is None else (plan.n_cpu, plan.n_accel)
        self._count_demand(
            self._address, counters.number, n_tokens, hits, late, n_cpu, n_accel, expert_ids, layer * self._n_experts
        )
        if self._count_demand is count_demand:
            self._count_demand = straight(count_demand)
        if plan is not None and (plan.transfers or plan.prefetches):
            self.moved(counters, plan, record_bytes)

    def moved(self, counters: Counters, plan: LayerPlan | PlanView, record_bytes: tuple[int, ...]) -> None:
        """Counts what a plan moves."""
        for transfer in (*plan.transfers, *plan.prefetches):
            key, evicted = transfer.layer * self._n_experts + transfer.expert, NOT_ISSUED
            if transfer.evicts is not None:
                evicted = transfer.evicts[0] * self._n_experts + transfer.evicts[1]
            is_prefetch = transfer.kind == "prefetch"
            n_bytes = record_bytes[transfer.layer]
            self._count_move(self._address, counters.number, is_prefetch, key, evicted, n_bytes)
            if self._count_move is count_move:
                self._count_move = straight(count_move)

    def forget_slots(self) -> None:
        """The slots were emptied: prefetches under way have no fate."""
        self.issued[:] = NOT_ISSUED
        if self.low is not None:
            self.low.forget_slots()

    def reset(self) -> None:
        """Sets every counter to zero; slot contents stay."""
        self.whole.clear()
        self.spent.clear()
        self.rows[:] = 0.0
        self.issued[:] = NOT_ISSUED
        self.warmup_transfers = self.failures = 0
        if self.low is not None:
            self.low.reset()

    def by_phase(self) -> dict[Phase, Counters]:
        """Sums over layers."""
        self.add_up()
        own = {phase: _total(layers) for phase, layers in self.counters.items()}
        if self.low is None:
            return own
        low = self.low.by_phase()
        return {phase: _with_low(counters, low[phase]) for phase, counters in own.items()}

    def by_layer(self) -> list[Counters]:
        """Sums over phases."""
        self.add_up()
        own = [_total(pair) for pair in zip(*self.counters.values(), strict=True)]
        return own if self.low is None else [_with_low(*pair) for pair in zip(own, self.low.by_layer(), strict=True)]


def _with_low(own: Counters, low: Counters) -> Counters:
    """Sums of both parts of the same calls on the same tokens."""
    total = _total((own, low))
    total.calls, total.tokens = own.calls, own.tokens
    return total


def _total(parts: Iterable[Counters]) -> Counters:
    total = Counters()
    for part in parts:
        total.add(part)
    return total


def ran_emulated(stats: Mapping[str, Any]) -> bool:
    """Whether a part of the work ran on the emulated accelerator; stats: `SessionStats.as_dict()`."""
    return bool(stats["n_slots"] > 0 and stats["accelerator_kind"] == "emulated")
