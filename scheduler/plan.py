"""What the planner answers with, and the events it is told: frozen data, performed by an executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TransferKind = Literal["demand", "prefetch", "warmup"]
Placement = Literal["hybrid", "cpu", "accelerator"]
"""Where a layer's experts may run: on both lanes, or on one of them only."""

LaneName = Literal["cpu", "accel", "link", "disk"]


@dataclass(frozen=True, slots=True)
class LaneState:
    """When each lane gets free, in us from now. The link's time includes every transfer already queued."""

    cpu_ready_us: float = 0.0
    accel_ready_us: float = 0.0
    link_ready_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """One expert's bytes from host to a slot.

    ``evicts`` is the (layer, expert) that loses the slot. It may be one that the same plan still computes from that
    slot (prefill with few slots): the executor waits for the slot's last read. ``admit`` False: the expert leaves its
    slot when the layer has ended. ``gain_us`` is the time that the planner expects to save by it.
    """

    layer: int
    expert: int
    slot: int
    evicts: tuple[int, int] | None
    kind: TransferKind
    gain_us: float
    admit: bool


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer of one step. Expert ids in execution order; ``accel_slots[i]`` holds ``accel[i]``.

    ``transfers`` are this layer's demand transfers in link order; ``prefetches`` (later layers) follow them.
    ``awaited`` are experts of ``accel`` whose earlier transfer (a prefetch) is still under way: they need no transfer,
    but the compute waits for it. ``predicted_makespan_us`` runs from the call to the later end of the compute lanes.
    ``reads`` are the (layer, expert) whose reads from disk the layer's call has begun, in the order in which the disk
    takes them: its own ones first, which ``cpu`` and ``transfers`` wait for, then those ahead of later layers.
    """

    step: int
    layer: int
    cpu: tuple[int, ...]
    accel: tuple[int, ...]
    accel_slots: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    prefetches: tuple[Transfer, ...]
    predicted_makespan_us: float
    awaited: tuple[int, ...] = ()
    reads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ObservedTask:
    """One finished task: ``n_tokens`` is 0 for a transfer or a read. ``us`` is its own duration, waiting left out; of a
    read, its share of the time in which the disk was at work.

    ``group`` > 0: the accelerator's experts that were launched together, told as so many like this one; ``us`` is then
    the time of all of them, launching included. ``recorded``: by one launch of recorded work; otherwise it is also the
    time of the host, which launches kernel after kernel.
    """

    lane: LaneName
    layer: int
    n_tokens: int
    us: float
    group: float = 0.0
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """The bytes of (layer, expert) are in ``slot``; ``us`` is the copy's duration, 0 if it was not measured."""

    layer: int
    expert: int
    slot: int
    us: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerEnded:
    """Every compute task of the layer's plan has ended, so its slots may be rewritten."""

    layer: int
    observed: tuple[ObservedTask, ...] = ()


Event = TransferEnded | LayerEnded
