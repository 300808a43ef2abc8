"""Counting during a simulation: latency, hits, busy lanes, and whether prefetches were of use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand, Phase
from scheduler.plan import LayerPlan
from scheduler.simulator.engine import Busy


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """Outcome of one phase. ``latency_ms`` is the mean per decode token or per prefill, in however many chunks;
    ``steps`` is how many tokens or prefills there were. Busy figures are shares of time.

    ``hit_rate``: share of activated (layer, expert) pairs whose bytes were in a slot when the layer was planned.
    ``lossy``: the lossy policy, empty without; ``changed``: share of the routed (token, expert) pairs that it skipped,
    substituted or lowered.
    ``link_bytes``: put on the link, transfers and prefetches together, over the whole phase.
    ``prefetch_precision``: share of prefetches whose expert was activated the next time its layer ran; 0 without any.
    """

    policy: str
    cache_ratio: float
    phase: Phase
    tokens: int
    latency_ms: float
    hit_rate: float
    cpu_busy: float
    accel_busy: float
    link_busy: float
    disk_busy: float
    transfers: int
    prefetches: int
    prefetch_precision: float
    n_slots: int
    steps: int
    p95_latency_ms: float
    stolen: int
    late_prefetches: int
    link_bytes: int
    lossy: str = ""
    changed: float = 0.0

    @property
    def step_tokens(self) -> float:
        """Tokens of a prefill in the mean; 1 in decode, unless steps are batches."""
        return self.tokens / max(1, self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Simulated speed of the phase."""
        return self.step_tokens * 1e3 / self.latency_ms if self.latency_ms else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON and tables."""
        return asdict(self)


@dataclass(slots=True)
class PhaseStats:
    """Running sums of one phase."""

    tokens: int = 0
    step_us: list[float] = field(default_factory=list)
    activated: int = 0
    hits: int = 0
    transfers: int = 0
    prefetches: int = 0
    useful: int = 0
    judged: int = 0
    stolen: int = 0
    late: int = 0
    busy: Busy = field(default_factory=Busy)
    _begin_us: float = 0.0
    _begin_busy: Busy = field(default_factory=Busy)
    _resident: NDArray[np.bool_] | None = None

    def begin(self, now_us: float, busy: Busy) -> None:
        """A step starts."""
        self._begin_us = now_us
        self._begin_busy = replace(busy)

    def end(self, now_us: float, busy: Busy, n_tokens: int, goes_on: bool = False) -> None:
        """A step has ended; ``goes_on``: it was a further chunk of the prompt before it."""
        self.tokens += n_tokens
        if goes_on and self.step_us:
            self.step_us[-1] += now_us - self._begin_us
        else:
            self.step_us.append(now_us - self._begin_us)
        before = self._begin_busy
        self.busy.cpu += busy.cpu - before.cpu
        self.busy.accel += busy.accel - before.accel
        self.busy.link += busy.link - before.link
        self.busy.disk += busy.disk - before.disk
        self.busy.link_bytes += busy.link_bytes - before.link_bytes

    def count_demand(self, demand: LayerDemand, resident: NDArray[np.bool_]) -> None:
        """Hits and misses of a layer, before anything is planned for it."""
        self.activated += int(demand.expert_ids.size)
        self.hits += int(resident[demand.expert_ids].sum())
        self._resident = resident

    def count_plan(self, plan: LayerPlan) -> None:
        """What the planner decided."""
        self.transfers += len(plan.transfers)
        self.prefetches += len(plan.prefetches)
        self.late += len(plan.awaited)
        if self._resident is not None and plan.cpu:
            self.stolen += int(self._resident[list(plan.cpu)].sum())

    def result(self, policy: str, cache_ratio: float, phase: Phase, n_slots: int) -> PhaseResult:
        """Means and shares."""
        total_us = sum(self.step_us) or 1.0
        per_step = np.array(self.step_us) / 1e3
        return PhaseResult(
            policy=policy,
            cache_ratio=cache_ratio,
            phase=phase,
            tokens=self.tokens,
            latency_ms=float(per_step.mean()),
            hit_rate=self.hits / max(1, self.activated),
            cpu_busy=self.busy.cpu / total_us,
            accel_busy=self.busy.accel / total_us,
            link_busy=self.busy.link / total_us,
            disk_busy=self.busy.disk / total_us,
            transfers=self.transfers,
            prefetches=self.prefetches,
            prefetch_precision=self.useful / self.judged if self.judged else 0.0,
            n_slots=n_slots,
            steps=len(self.step_us),
            p95_latency_ms=float(np.percentile(per_step, 95)),
            stolen=self.stolen,
            late_prefetches=self.late,
            link_bytes=self.busy.link_bytes,
        )


class PrefetchJudge:
    """A prefetch is useful if its expert is activated the next time that its layer runs."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._open: list[dict[int, Phase]] = [{} for _ in range(n_layers)]
        self._useful: dict[Phase, int] = {"prefill": 0, "decode": 0}
        self._judged: dict[Phase, int] = {"prefill": 0, "decode": 0}

    def planned(self, plan: LayerPlan, phase: Phase) -> None:
        """Remember the prefetches of a plan."""
        for transfer in plan.prefetches:
            self._open[transfer.layer][transfer.expert] = phase

    def demand(self, demand: LayerDemand) -> None:
        """Judge what was prefetched for this layer."""
        waiting = self._open[demand.layer]
        if not waiting:
            return
        activated = set(demand.expert_ids.tolist())
        for expert, phase in waiting.items():
            self._judged[phase] += 1
            self._useful[phase] += expert in activated
        waiting.clear()

    def settle_into(self, stats: Mapping[Phase, PhaseStats]) -> None:
        """Write the counts into each phase's sums; prefetches that were never judged do not count."""
        for phase, collected in stats.items():
            collected.useful, collected.judged = self._useful[phase], self._judged[phase]
