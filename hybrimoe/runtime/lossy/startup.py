"""From a lossy policy to its runner: the relaxation, the low-precision copy, and how slot memory is shared."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from hybrimoe.runtime.layer_call.lookahead import LinearGate, Lookahead
from hybrimoe.runtime.layer_call.runner import Runner
from hybrimoe.runtime.lossy.low_copy import LowCopy, copy_errors
from hybrimoe.runtime.lossy.planes import PlaneSlots, PlaneStore
from hybrimoe.runtime.lossy.runner import RelaxedRunner
from hybrimoe.runtime.startup.startup import Frequencies, Startup
from hybrimoe.runtime.store import ExpertStore
from scheduler.lossy import Lossy, Relaxation, RelaxSetting


def relaxed_runner(
    startup: Startup, lossy: Lossy, low: LowCopy | None, setting: int | float | str | None, previous: Runner | None,
    frequencies: Frequencies | None,
) -> RelaxedRunner:  # fmt: skip
    """`Startup.runner` for a lossy policy; what the relaxation has learned goes on from `previous`."""
    before = previous if isinstance(previous, RelaxedRunner) else None
    low_startup = None if low is None else _low_startup(startup, low)
    if setting is not None:
        _allocate(startup, low_startup, lossy, setting)
    gates = startup.new_lookahead(startup.config.lookahead) if before is None else before.gates
    relaxation = _relaxation(lossy, startup, low, gates, frequencies) if before is None else before.relaxation
    relaxation.follow_slots(sum(unit.accelerator.n_slots for unit in startup.units))
    low_runner = None
    if low_startup is not None:
        low_before = None if before is None else before.low
        if low_before is not None and low_before.activations.any():
            low_used: Frequencies | None = low_before.activations
        else:
            low_used = _of_part(frequencies, relaxation.low)
        low_runner = low_startup.runner(None, low_before, low_used)
    make = partial(RelaxedRunner, relaxation=relaxation, low=low_runner, gates=gates)
    used = _of_part(frequencies, ~relaxation.low)
    startup = dataclasses.replace(startup, make_runner=make)
    if relaxation.uses_planes and startup.units:
        startup.make_slots = partial(PlaneSlots, _planes(startup, before))
    runner = startup.runner(None, previous, used)
    assert isinstance(runner, RelaxedRunner)
    runner.lookahead = gates if startup.config.lookahead > 0 else None
    return runner


def _planes(startup: Startup, before: RelaxedRunner | None) -> PlaneStore:
    """The bit planes of all experts, made once a session."""
    known = None if before is None else before.planes
    pinned = any(unit.accelerator.needs_pinned_host() for unit in startup.units)
    return PlaneStore(startup.store, pinned=pinned) if known is None else known


def _low_startup(startup: Startup, low: LowCopy) -> Startup:
    """The same settings for the low part; its routing is not predicted."""
    assert startup.stats.low is not None
    config = dataclasses.replace(startup.config, lookahead=0)
    return dataclasses.replace(
        startup, config=config, layers=low.layers, store=low.store, stats=startup.stats.low,
        units=[dataclasses.replace(u, accelerator=low.accelerators[u.index]) for u in startup.units],
    )  # fmt: skip


def _allocate(startup: Startup, low: Startup | None, lossy: Lossy, setting: int | float | str) -> None:
    if low is None or lossy.low is None:
        startup.allocate(startup.slots_of(setting))
        return
    low.allocate([0] * len(low.units))
    shares = []
    for unit, n_slots in zip(startup.units, startup.slots_of(setting), strict=True):
        layers = [low.layers[index] for index in unit.layers]
        n_experts = sum(layer.num_experts for layer in layers if layer.placement != "cpu")
        shares.append(lossy.low.split(n_slots, startup.slot_bytes, low.slot_bytes, n_experts) if n_slots else (0, 0))
    startup.allocate([n_high for n_high, _ in shares])
    low.allocate([n_low for _, n_low in shares])


def _of_part(frequencies: Frequencies | None, part: npt.NDArray[np.bool_]) -> Frequencies | None:
    """Use of the experts that live in a part, 0 for the others; as given where every expert is in both."""
    if not part.size:
        return frequencies
    return np.where(part, 1.0 if frequencies is None else np.maximum(frequencies, 1e-9), 0.0)


def _relaxation(
    lossy: Lossy, startup: Startup, low: LowCopy | None, gates: Lookahead | None, frequencies: Frequencies | None
) -> Relaxation:
    """The relaxation; where an expert has only one of the two precisions, the stores let go of the other."""

    def router(layer: int) -> npt.NDArray[np.float32] | None:
        gate = None if gates is None else gates.gate(layer)
        return gate.weight if isinstance(gate, LinearGate) else None

    layers, store = startup.layers, startup.store
    counts = np.array([layer.num_experts for layer in layers])
    setting = RelaxSetting(
        len(layers), int(counts.max()), max(layer.spec.record_bytes for layer in layers),
        expert_norms(store) if lossy.needs_expert_norms else None, router,
        exists=np.arange(counts.max())[None, :] < counts[:, None],
    )  # fmt: skip
    if low is not None and lossy.one_copy:
        setting.low_bytes = max(layer.spec.record_bytes for layer in low.layers)
        setting.low_errors = copy_errors(store, low.store)
        setting.frequencies = None if frequencies is None else np.asarray(frequencies, np.float64)
    relaxation = lossy.make(setting)
    if low is not None and lossy.one_copy:
        store.drop(relaxation.low)
        low.store.drop(~relaxation.low)
    return relaxation


def expert_norms(store: ExpertStore) -> npt.NDArray[np.float32]:
    """float32 [layers, experts]: length of all weights of each expert together."""
    norms = np.zeros((len(store.layers), max(layer.num_experts for layer in store.layers)), np.float32)
    for index, layer in enumerate(store.layers):
        for expert in range(layer.num_experts):
            weights = store.read(index, expert)
            matrices = [m for m in (weights.gate, weights.up, weights.down) if m is not None]
            norms[index, expert] = float(torch.stack([m.float().square().sum() for m in matrices]).sum().sqrt())
    return norms
