"""From a lossy policy's settings to its stage: the policy, the low-precision copy, and how slot memory is shared."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.lookahead import LinearGate, Lookahead
from hybrimoe.runtime.layer_call.stages import LossyStage as Stage
from hybrimoe.runtime.lossy.low_copy import LowCopy, copy_errors
from hybrimoe.runtime.lossy.planes import PlaneQueue, PlaneStore
from hybrimoe.runtime.lossy.stage import LossyStage
from hybrimoe.runtime.startup.startup import Frequencies, Startup
from hybrimoe.runtime.store import ExpertStore
from scheduler.lossy import Lossy, LossyPolicy, LossySetting


def lossy_call(
    startup: Startup, lossy: Lossy, low: LowCopy | None, setting: int | float | str | None,
    previous: ExpertsCall | None, frequencies: Frequencies | None,
) -> ExpertsCall:  # fmt: skip
    """`Startup.call` with a lossy stage; what its policy has learned goes on from `previous`."""
    before = None if previous is None else previous.lossy
    low_startup = None if low is None else _low_startup(startup, low)
    if setting is not None:
        _allocate(startup, low_startup, lossy, setting)
    gates = startup.new_lookahead(startup.config.lookahead) if before is None else before.gates
    policy = _policy(lossy, startup, low, gates, frequencies) if before is None else before.policy
    policy.follow_slots(sum(unit.accelerator.n_slots for unit in startup.units))
    low_experts = None
    if low_startup is not None:
        low_before = None if before is None else before.low
        used = None if low_before is None or not low_before.routing_counts.any() else low_before.routing_counts
        low_experts = low_startup.experts(low_before)
        low_startup.fill_slots(low_experts, _of_part(frequencies, policy.low) if used is None else used)
    if policy.uses_planes and startup.units:
        startup.make_queue = partial(PlaneQueue, _planes(startup, before))
    experts = startup.experts(None if previous is None else previous.experts)
    stage = LossyStage(policy, experts, low_experts, gates)
    call = ExpertsCall(experts, startup.tracker, stage)
    if startup.config.lookahead > 0:
        call.lookahead = gates
    if previous is not None:
        call.take_over(previous)
    startup.fill_slots(experts, _of_part(frequencies, ~policy.low))
    return call


def _planes(startup: Startup, before: Stage | None) -> PlaneStore:
    """The bit planes of all experts, made once a session."""
    known = None if before is None else before.planes
    pinned = any(unit.accelerator.needs_pinned_host() for unit in startup.units)
    return known if isinstance(known, PlaneStore) else PlaneStore(startup.store, pinned=pinned)


def _low_startup(startup: Startup, low: LowCopy) -> Startup:
    """The same settings for the low part; its routing is not predicted."""
    assert startup.stats.low is not None
    config = dataclasses.replace(startup.config, lookahead=0)
    return dataclasses.replace(
        startup, config=config, learnt=None, layers=low.layers, store=low.store, stats=startup.stats.low,
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


def _policy(
    lossy: Lossy, startup: Startup, low: LowCopy | None, gates: Lookahead | None, frequencies: Frequencies | None
) -> LossyPolicy:
    """The lossy policy; where an expert has only one of the two precisions, the stores let go of the other."""

    def router(layer: int) -> npt.NDArray[np.float32] | None:
        gate = None if gates is None else gates.gate(layer)
        return gate.weight if isinstance(gate, LinearGate) else None

    layers, store = startup.layers, startup.store
    counts = np.array([layer.num_experts for layer in layers])
    setting = LossySetting(
        len(layers), int(counts.max()), max(layer.spec.record_bytes for layer in layers),
        expert_norms(store) if lossy.needs_expert_norms else None, router,
        exists=np.arange(counts.max())[None, :] < counts[:, None],
    )  # fmt: skip
    if low is not None and lossy.one_copy:
        setting.low_bytes = max(layer.spec.record_bytes for layer in low.layers)
        setting.low_errors = copy_errors(store, low.store)
        setting.frequencies = None if frequencies is None else np.asarray(frequencies, np.float64)
    policy = lossy.make(setting)
    if low is not None and lossy.one_copy:
        store.drop(policy.low)
        low.store.drop(~policy.low)
    return policy


def expert_norms(store: ExpertStore) -> npt.NDArray[np.float32]:
    """float32 [layers, experts]: length of all weights of each expert together."""
    norms = np.zeros((len(store.layers), max(layer.num_experts for layer in store.layers)), np.float32)
    for index, layer in enumerate(store.layers):
        for expert in range(layer.num_experts):
            weights = store.read(index, expert)
            matrices = [m for m in (weights.gate, weights.up, weights.down) if m is not None]
            norms[index, expert] = float(torch.stack([m.float().square().sum() for m in matrices]).sum().sqrt())
    return norms
