"""The counters of a session and what it runs on, as one value."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_kernels import Accelerator
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.layers import Layer
from hybrimoe.runtime.low_copy import LowCopy
from hybrimoe.runtime.relaxed import RelaxedRunner
from hybrimoe.runtime.runner import Runner
from hybrimoe.runtime.stats import SessionStats, StatsRecorder
from hybrimoe.runtime.store import ExpertStore


def snapshot(
    config: RuntimeConfig, layers: Sequence[Layer], stats: StatsRecorder, store: ExpertStore | None,
    accelerator: Accelerator | None, runner: Runner | None, low: LowCopy | None,
) -> SessionStats:  # fmt: skip
    """What a session has done so far. `runner` has reported what ended; None before the start and after the close."""
    planes = runner.planes if isinstance(runner, RelaxedRunner) else None
    in_host_memory = [held.nbytes for held in (store, low and low.store, planes) if held]
    return SessionStats(
        by_phase=stats.by_phase(),
        layers={layer.path: counters for layer, counters in zip(layers, stats.by_layer(), strict=False)},
        accelerator="none" if accelerator is None else accelerator.name,
        accelerator_kind="none" if accelerator is None else accelerator.kind,
        policy=config.policy,
        n_slots=_slots(accelerator),
        slots_filled=0 if runner is None else len(runner.slot_contents()),
        n_experts=sum(layer.num_experts for layer in layers),
        store_bytes=sum(in_host_memory),
        warmup_transfers=stats.warmup_transfers,
        failures=stats.failures,
        lossy=None if config.lossy is None else config.lossy.name,
        n_low_slots=0 if low is None else _slots(low.accelerator),
    )


def _slots(accelerator: Accelerator | None) -> int:
    return 0 if accelerator is None else accelerator.n_slots
