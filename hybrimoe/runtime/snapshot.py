"""The counters of a session and what it runs on, as one value."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.stats import Counters, SessionStats, StatsRecorder, UnitStats
from hybrimoe.runtime.lossy.low_copy import LowCopy
from hybrimoe.runtime.startup.units import Unit
from hybrimoe.runtime.store import ExpertStore
from hybrimoe.runtime.tier.store import TieredStore


def snapshot(
    config: RuntimeConfig, layers: Sequence[Layer], stats: StatsRecorder, store: ExpertStore | None,
    units: Sequence[Unit], runner: ExpertsCall | None, low: LowCopy | None,
) -> SessionStats:  # fmt: skip
    """What a session has done so far. `runner` has reported what ended; None before the start and after the close."""
    planes = None if runner is None or runner.lossy is None else runner.lossy.planes
    in_host_memory = [held.nbytes for held in (low and low.store, planes) if held]
    in_host_memory += [] if store is None else [store.held_bytes]
    by_layer = stats.by_layer()
    return SessionStats(
        by_phase=stats.by_phase(),
        layers={layer.path: counters for layer, counters in zip(layers, by_layer, strict=False)},
        accelerators=tuple(_unit_stats(unit, by_layer, runner) for unit in units),
        policy=config.policy,
        n_experts=sum(layer.num_experts for layer in layers),
        store_bytes=sum(in_host_memory),
        dropped_bytes=0 if store is None else store.released_bytes,
        warmup_transfers=stats.warmup_transfers,
        failures=stats.failures,
        lossy=None if config.lossy is None else config.lossy.name,
        tier=store.cache.state() if isinstance(store, TieredStore) else None,
        n_low_slots=0 if low is None else sum(device.n_slots for device in low.accelerators),
    )


def _unit_stats(unit: Unit, by_layer: Sequence[Counters], runner: ExpertsCall | None) -> UnitStats:
    device, contents = unit.accelerator, {} if runner is None else runner.slot_contents()
    filled = sum(layer in unit.layers for layer, _ in contents.values())
    counters = Counters()
    for layer in unit.layers:
        counters.add(by_layer[layer])
    return UnitStats(device.name, device.kind, unit.layers, device.n_slots, filled, counters)
