"""A short measurement of this machine for one session: CPU and accelerator us of an expert by tokens, link rate.

The result is an ordinary HardwareProfile, so that the scheduler sees measured and given costs alike. It takes some
tens of milliseconds; `hybrimoe calibrate` measures longer and more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from cpu_kernels import CpuBackend, Dispatch, ExpertSpec, build_dispatch
from gpu_kernels import Accelerator, LayerWork, TorchAccelerator
from gpu_kernels.streams import clock_us
from hybrimoe.runtime.store import ExpertStore
from scheduler import HardwareProfile
from scheduler.machine.profile import BYTES_PER_WEIGHT, AccelProfile, CpuProfile, LinkProfile, table_key

TOKEN_POINTS = (1, 2, 4, 16, 64)
"""Tokens per expert at which costs are measured; between and beyond them costs are linear."""
MAX_EXPERTS = 8
"""Experts in one measured call: as a decode step would have, so that the pool of threads is used as there."""
LEAST_OWN_SHARE = 0.1
"""Of the time of a group on the accelerator, at least so much is its experts' and not the launch's."""
POINT_BUDGET_US = 25_000.0
"""A point that takes longer than this is the last one of its lane."""
REPEATS = 3
KERNEL_TOKENS = (1, 4, 16, 64, 128)
"""Tokens of an expert for which a device may have kernels of their own, compiled when they are first called; the blocks
of `gpu_kernels.triton.fused`."""
TUNING_S = 5.0
"""Of a session's start, at most, for timing kernels that were never timed on this card (`gpu_kernels.tuning`)."""
COLD_S = 5.0
"""A start whose kernels took longer than this compiled them: it times none, the next one does."""


def measure_profile(
    store: ExpertStore, layer: int, backend: CpuBackend, accelerator: Accelerator | None
) -> HardwareProfile:
    """Measures one layer's experts on every lane. The accelerator must have at least one slot allocated."""
    spec = store.layers[layer].spec
    n_experts = min(MAX_EXPERTS, store.layers[layer].num_experts)
    cpu_points = _measure_lane(spec, n_experts, _cpu_call(store, layer, backend, spec))
    if accelerator is None:
        accel_points, link_gbps = cpu_points, 1.0
    else:
        link_gbps = _measure_link(store, layer, accelerator)
        n_slots = min(n_experts, accelerator.n_slots)
        accel_points = _measure_lane(spec, n_slots, _accel_call(accelerator, spec), launched=True)
    key = table_key(spec.hidden, spec.inter, spec.dtype)
    return HardwareProfile(
        name="this machine",
        provenance="measured",
        source="measured at session start",
        cpu=CpuProfile(
            read_gbps=spec.record_bytes / (cpu_points[0][1] * 1e3),
            gflops=dict.fromkeys(BYTES_PER_WEIGHT, _rate_gflops(spec, cpu_points)),
            table={key: cpu_points},
        ),
        accel=AccelProfile(
            mem_gbps=spec.record_bytes / (accel_points[0][1] * 1e3),
            tflops=_rate_gflops(spec, accel_points) * 1e-3,
            table={key: accel_points},
        ),
        link=LinkProfile(gbps=link_gbps, latency_us=0.0),
    )


def make_kernels_ready(store: ExpertStore, layers: Iterable[int], accelerator: Accelerator) -> None:
    """Compiles and compares every kernel that these layers can need, each cut as it is fastest as far as that is known;
    a start that need not compile times what is not. There must be a slot."""
    layers = list(layers)
    _tune(store, layers, accelerator, 0.0)
    started = time.monotonic()
    run_each_kernel(store, layers, accelerator)
    if time.monotonic() - started < COLD_S and _tune(store, layers, accelerator, TUNING_S):
        run_each_kernel(store, layers, accelerator)


def _tune(store: ExpertStore, layers: Sequence[int], accelerator: Accelerator, seconds: float) -> bool:
    """Chooses how a torch device's kernels are cut, in so many seconds for all. Whether one was changed."""
    until = time.monotonic() + seconds
    if not isinstance(accelerator, TorchAccelerator):
        return False
    specs = dict.fromkeys(store.layers[layer].spec for layer in layers)
    return sum(accelerator.tune(spec, until - time.monotonic()) for spec in specs) > 0


def run_each_kernel(store: ExpertStore, layers: Iterable[int], accelerator: Accelerator) -> None:
    """Calls what few tokens of an expert are computed by, for each kind of expert of these layers: the first reply is
    not to wait for a compiler. Fills slot 0, of which there must be one. Where the device has no memory for a number of
    tokens now, the first call of so many compiles."""
    first_of = {store.layers[layer].spec: layer for layer in reversed(list(layers))}
    for spec, layer in first_of.items():
        accelerator.copy_to_slot(0, store.record(layer, 0))
        for n_tokens in KERNEL_TOKENS:
            try:
                _accel_call(accelerator, spec)(_work(spec, 1, n_tokens), 1)
            except torch.OutOfMemoryError:
                accelerator.synchronize()  # what was submitted before still reads the slot


def _rate_gflops(spec: ExpertSpec, points: tuple[tuple[int, float], ...]) -> float:
    n_tokens, us = points[-1]
    return spec.flops_per_token * n_tokens / (us * 1e3)


def _measure_lane(
    spec: ExpertSpec, n_experts: int, call: Callable[[LayerWork, int], float], *, launched: bool = False
) -> tuple[tuple[int, float], ...]:
    """(n_tokens, us of one expert) points; `call` runs `n_experts` experts and returns their us together. launched:
    those hold the launch of all of them, which is no expert's: one takes what a group takes longer with one more."""
    points: list[tuple[int, float]] = []
    for n_tokens in TOKEN_POINTS:
        work = _work(spec, n_experts, n_tokens)
        call(work, n_experts)
        us = min(call(work, n_experts) for _ in range(REPEATS)) / n_experts
        if launched and n_experts > 1:
            first_us = min(call(work, 1) for _ in range(REPEATS))
            us = min(max((us * n_experts - first_us) / (n_experts - 1), LEAST_OWN_SHARE * us), us)
        floor_us = points[-1][1] if points else 0.01
        points.append((n_tokens, max(us, floor_us)))
        if us * n_experts > POINT_BUDGET_US:
            break
    return tuple(points)


def _work(spec: ExpertSpec, n_experts: int, n_tokens: int) -> LayerWork:
    """A call in which each of `n_experts` experts gets all of `n_tokens` tokens."""
    hidden = np.random.default_rng(0).standard_normal((n_tokens, spec.hidden), dtype=np.float32)
    index = np.tile(np.arange(n_experts, dtype=np.int64), (n_tokens, 1))
    dispatch: Dispatch = build_dispatch(index, np.full(index.shape, 1.0 / n_experts, np.float32), n_experts)
    rows = np.empty((n_tokens * n_experts, spec.hidden), dtype=np.float32)
    return LayerWork(dispatch, torch.from_numpy(hidden), hidden, rows)


def _cpu_call(
    store: ExpertStore, layer: int, backend: CpuBackend, spec: ExpertSpec
) -> Callable[[LayerWork, int], float]:
    """Runs on other experts each time, as far as there are any, so that caches are as cold as in a real step."""
    n_stored = store.layers[layer].num_experts
    state = {"first": 0}

    def call(work: LayerWork, n_experts: int) -> float:
        experts = (state["first"] + np.arange(n_experts)) % n_stored
        state["first"] += n_experts
        records = store.hold(layer, experts.tolist())
        start_us = clock_us()
        backend.run(
            spec, records, np.arange(n_experts, dtype=np.int32), work.dispatch, work.host_hidden, work.host_rows
        )
        return clock_us() - start_us

    return call


def _accel_call(accelerator: Accelerator, spec: ExpertSpec) -> Callable[[LayerWork, int], float]:
    def call(work: LayerWork, n_experts: int) -> float:
        work.hidden = work.hidden.to(accelerator.device)
        event = accelerator.run_experts(spec, range(n_experts), range(n_experts), work)
        event.wait()
        start_us, end_us = event.span_us
        return end_us - start_us

    return call


def _measure_link(store: ExpertStore, layer: int, accelerator: Accelerator) -> float:
    """1e9 bytes/s of record copies; fills the first slots on the way."""
    n_slots = min(MAX_EXPERTS, accelerator.n_slots, store.layers[layer].num_experts)
    rates = []
    for _ in range(REPEATS):
        events = [accelerator.copy_to_slot(slot, store.record(layer, slot)) for slot in range(n_slots)]
        for event in events:
            event.wait()
        spans = [event.span_us for event in events]
        rates.append(store.layers[layer].spec.record_bytes * n_slots / sum(end - start for start, end in spans))
    return max(max(rates) * 1e-3, 1e-3)
