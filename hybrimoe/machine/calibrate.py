"""Measures this machine into a HardwareProfile: CPU, accelerator and link, each alone and while the others run.

Every figure is the median of alternating rounds; the spread is kept beside it. Costs of an expert are those of a call
with several experts, divided by their number, as a decode step has them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch

import cpu_kernels as ck
from cpu_kernels.backends.choice import BackendChoice, write_choice
from cpu_kernels.engine.bandwidth import ReadBandwidth
from gpu_kernels import Accelerator, LayerWork
from gpu_kernels.opening import open_accelerator
from hybrimoe.machine.calibration import Calibration
from hybrimoe.machine.facts import machine
from hybrimoe.machine.profiles import accelerator_note
from scheduler.machine.profile import (
    AccelProfile,
    ContentionProfile,
    CpuProfile,
    HardwareProfile,
    LinkProfile,
    table_key,
)

Points = tuple[tuple[int, float], ...]  # (n_tokens, us of one expert)
TOKEN_POINTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POINT_BUDGET_S = 0.25  # a point whose call takes longer is the last of its table
N_EXPERTS = 4  # in a measured call
ROUNDS = 5
POOL_BYTES = 128 << 20  # of packed experts: more than the last-level cache, so that weights come from memory
MAX_POOL_EXPERTS = 64
BACKEND_POINTS = (1, 16)  # tokens at which backends compete
CONTENTION_SECONDS = 0.4
QUICK_BUDGET_S = 1.0  # for the tables of a measurement that nobody asked for
GIB = 1 << 30
LEAST_SHARE = 0.05  # of its own rate that a lane is credited with beside the other


@dataclass(frozen=True)
class Request:
    """What to measure. Shapes are (hidden, inter) of an expert; budget_s ends the tables early."""

    shapes: tuple[tuple[int, int], ...] = ((2048, 1024),)
    dtypes: tuple[ck.ExpertDtype, ...] = ("int4", "int8", "bfloat16", "float32")
    accelerator: str = "auto"
    budget_s: float = 75.0
    name: str = "this machine"
    backends: tuple[str, ...] = ("numba", "torch", "onnx", "ipex")  # compete for `backend: auto`; none: no contest


class _Pool:
    """Packed experts of one spec in memory, more than fit into the cache."""

    def __init__(self, spec: ck.ExpertSpec) -> None:
        self.spec = spec
        count = min(MAX_POOL_EXPERTS, max(2 * N_EXPERTS, -(-POOL_BYTES // spec.record_bytes)))
        self.memory = ck.page_aligned(count * spec.record_bytes).reshape(count, -1)
        generator = torch.Generator().manual_seed(0)
        up, gate = (torch.randn(spec.inter, spec.hidden, generator=generator).mul_(0.02) for _ in range(2))
        down = torch.randn(spec.hidden, spec.inter, generator=generator).mul_(0.02)
        ck.pack_expert(spec, ck.ExpertWeights(up=up, down=down, gate=gate), self.memory[0])
        self.memory[1:] = self.memory[0]
        self._next = 0

    def addresses(self) -> np.ndarray:
        """The next N_EXPERTS experts in turn."""
        chosen = (self._next + np.arange(N_EXPERTS)) % len(self.memory)
        self._next += N_EXPERTS
        return np.array([self.memory[i].ctypes.data for i in chosen], np.uint64)


def calibrate(request: Request, progress: Callable[[str], None] = lambda text: None) -> Calibration:
    """Measures; also records the fastest backend per dtype for `backend: auto`."""
    started = time.perf_counter()
    result = _Run(request, progress, started)
    accelerator = open_accelerator(request.accelerator)
    try:
        profile = result.measure(accelerator)
    finally:
        if accelerator is not None:
            accelerator.close()
    write_choice(BackendChoice.from_times(result.backends))
    return Calibration(profile, result.spread, result.backends, time.perf_counter() - started)


def quick_profile(hidden: int, inter: int, dtype: ck.ExpertDtype) -> HardwareProfile:
    """This machine measured for experts of one shape and dtype in a few seconds; nothing is kept on disk."""
    request = Request(((hidden, inter),), (dtype,), budget_s=QUICK_BUDGET_S, backends=())
    accelerator = open_accelerator(request.accelerator)
    try:
        return _Run(request, lambda text: None, time.perf_counter()).measure(accelerator)
    finally:
        if accelerator is not None:
            accelerator.close()


class _Run:
    """One calibration in progress."""

    def __init__(self, request: Request, progress: Callable[[str], None], started: float) -> None:
        self.request, self.progress = request, progress
        self.end = started + request.budget_s
        self.spread: dict[str, tuple[float, float, float]] = {}
        self.backends: dict[str, dict[str, float]] = {}
        self.cpu = ck.get_backend("numba")

    def measure(self, accelerator: Accelerator | None) -> HardwareProfile:
        """All figures."""
        self.progress("compiling kernels")
        ck.warm_up(self.request.dtypes)
        bandwidth = ReadBandwidth()
        read_gbps = self._figure("cpu.read_gbps", [bandwidth.measure() for _ in range(ROUNDS + 1)][1:])
        cpu_table: dict[str, Points] = {}
        accel_table: dict[str, Points] = {}
        gflops: dict[str, float] = {}
        link_gbps, contention = 0.0, ContentionProfile()
        for hidden, inter in self.request.shapes:
            for dtype in self.request.dtypes:
                pool = _Pool(ck.ExpertSpec(hidden, inter, dtype))
                key = table_key(hidden, inter, dtype)
                self.progress(f"{key} on the CPU")
                cpu_table[key] = self._table(f"cpu {key}", pool, partial(self._cpu_us, pool))
                gflops[dtype] = max(gflops.get(dtype, 0.0), _gflops(pool.spec, cpu_table[key]))
                if dtype not in self.backends:
                    self._compete(pool)
                if accelerator is not None:
                    self.progress(f"{key} on {accelerator.name}")
                    _fill(accelerator, pool)
                    accel_table[key] = self._table(f"accel {key}", pool, partial(_accel_us, accelerator, pool))
                    if not link_gbps:
                        link_gbps = self._figure("link.gbps", [_link_gbps(accelerator, pool) for _ in range(ROUNDS)])
                        contention = self._contention(accelerator, pool)
        cpu = CpuProfile(read_gbps, gflops, self._overhead_us(), cpu_table)
        return self._profile(cpu, accel_table, accelerator, link_gbps, contention)

    def _profile(
        self,
        cpu: CpuProfile,
        accel_table: dict[str, Points],
        accelerator: Accelerator | None,
        link_gbps: float,
        contention: ContentionProfile,
    ) -> HardwareProfile:
        """Without an accelerator its figures are the CPU's own and the link's the read rate; the source says so."""
        here = machine()
        source = f"hybrimoe calibrate on {here['cpu']}, {here['cores']} cores"
        table = accel_table if accelerator is not None else dict(cpu.table)
        if accelerator is None:
            source += "; no accelerator: its figures repeat the CPU's"
            link_gbps = cpu.read_gbps
        else:
            source += f"; {accelerator_note(accelerator.name, accelerator.kind)}"
        rates = [_rates(key, points) for key, points in table.items()]
        free_bytes = None if accelerator is None else accelerator.free_bytes()
        accel = AccelProfile(
            mem_gbps=max(gbps for gbps, _ in rates), tflops=max(rate for _, rate in rates) * 1e-3, table=table,
            memory_gib=(free_bytes or 0) / GIB,
        )  # fmt: skip
        return HardwareProfile(
            name=self.request.name,
            provenance="measured",
            cpu=cpu,
            accel=accel,
            link=LinkProfile(link_gbps, 0.0),
            source=source,
            contention=contention,
        )

    def _figure(self, name: str, values: list[float]) -> float:
        self.spread[name] = (min(values), median(values), max(values))
        return median(values)

    def _table(self, name: str, pool: _Pool, call: Callable[[LayerWork], float]) -> Points:
        """(n_tokens, us of one expert), not falling, until a point or the whole budget is used up."""
        points: list[tuple[int, float]] = []
        for n_tokens in TOKEN_POINTS:
            work = _work(pool.spec, n_tokens)
            call(work)
            values = [call(work) / N_EXPERTS for _ in range(ROUNDS)]
            us = self._figure(f"{name} {n_tokens} tokens, us", values)
            points.append((n_tokens, max(us, points[-1][1] if points else 0.0)))
            if us * N_EXPERTS > POINT_BUDGET_S * 1e6 or (time.perf_counter() > self.end and len(points) > 1):
                break
        return tuple(points)

    def _cpu_us(self, pool: _Pool, work: LayerWork) -> float:
        return _run_us(self.cpu, pool, work, pool.addresses())

    def _overhead_us(self) -> float:
        """What a call costs beside its arithmetic: a call of tiny experts."""
        pool = _Pool(ck.ExpertSpec(64, 64, self.request.dtypes[0]))
        work = _work(pool.spec, 1)
        return self._figure("cpu.overhead_us", [self._cpu_us(pool, work) for _ in range(50)][10:])

    def _compete(self, pool: _Pool) -> None:
        """Times of every backend that runs this spec here, summed over BACKEND_POINTS."""
        times = {}
        works = [_work(pool.spec, n_tokens) for n_tokens in BACKEND_POINTS]
        records = pool.addresses()
        for name in self.request.backends:
            try:
                backend = ck.get_backend(name)
            except ck.BackendError:
                continue  # not installed, or not for this machine: `hybrimoe doctor` tells why
            if backend.supports(pool.spec) is None:
                # The same experts each time: backends that convert records keep the converted ones.
                times[name] = sum(min(_run_us(backend, pool, work, records) for _ in range(3)) for work in works)
        self.backends[pool.spec.dtype] = times

    def _contention(self, accelerator: Accelerator, pool: _Pool) -> ContentionProfile:
        """Shares of their own rates that CPU and link keep side by side."""
        work = _work(pool.spec, 1)
        cpu_alone, link_alone = self._cpu_us(pool, work), _link_gbps(accelerator, pool)
        cpu_us, link_gbps, stop = [cpu_alone], [link_alone], threading.Event()

        def copy() -> None:
            while not stop.is_set():
                link_gbps.append(_link_gbps(accelerator, pool))

        cpu_alone = median(self._cpu_us(pool, work) for _ in range(20))
        with ThreadPoolExecutor(1) as copier:
            copying = copier.submit(copy)
            until = time.perf_counter() + CONTENTION_SECONDS
            try:
                while time.perf_counter() < until or (len(link_gbps) == 1 and not copying.done()):
                    cpu_us.append(self._cpu_us(pool, work))
            finally:  # the thread copies until it is told to stop, and a program does not end before its threads
                stop.set()
            copying.result()  # what went wrong while copying is this call's error
        cpu_share = self._figure("contention.cpu_with_link", [cpu_alone / us for us in cpu_us[1:]])
        link_share = self._figure("contention.link_with_cpu", [gbps / link_alone for gbps in link_gbps[1:]])
        return ContentionProfile(*(min(1.0, max(LEAST_SHARE, share)) for share in (cpu_share, link_share)))


def _work(spec: ck.ExpertSpec, n_tokens: int) -> LayerWork:
    """A call in which each of N_EXPERTS experts gets all of n_tokens tokens."""
    hidden = np.random.default_rng(0).standard_normal((n_tokens, spec.hidden), dtype=np.float32)
    index = np.tile(np.arange(N_EXPERTS), (n_tokens, 1))
    dispatch = ck.build_dispatch(index, np.full(index.shape, 1 / N_EXPERTS, np.float32), N_EXPERTS)
    rows = np.empty((n_tokens * N_EXPERTS, spec.hidden), np.float32)
    return LayerWork(dispatch, torch.from_numpy(hidden), hidden, rows)


def _run_us(backend: ck.CpuBackend, pool: _Pool, work: LayerWork, records: np.ndarray) -> float:
    positions = np.arange(N_EXPERTS, dtype=np.int32)
    start = time.perf_counter()
    backend.run(pool.spec, records, positions, work.dispatch, work.host_hidden, work.host_rows)
    return 1e6 * (time.perf_counter() - start)


def _fill(accelerator: Accelerator, pool: _Pool) -> None:
    accelerator.allocate(N_EXPERTS, pool.spec.record_bytes)
    _link_gbps(accelerator, pool)


def _link_gbps(accelerator: Accelerator, pool: _Pool) -> float:
    """Copies N_EXPERTS records into their slots."""
    spans = []
    for event in [accelerator.copy_to_slot(slot, pool.memory[slot]) for slot in range(N_EXPERTS)]:
        event.wait()
        start_us, end_us = event.span_us
        spans.append(end_us - start_us)
    return N_EXPERTS * pool.spec.record_bytes / (sum(spans) * 1e3)


def _accel_us(accelerator: Accelerator, pool: _Pool, work: LayerWork) -> float:
    work.hidden = work.hidden.to(accelerator.device)
    event = accelerator.run_experts(pool.spec, range(N_EXPERTS), range(N_EXPERTS), work)
    event.wait()
    start_us, end_us = event.span_us
    return end_us - start_us


def _gflops(spec: ck.ExpertSpec, points: Points) -> float:
    return max(spec.flops_per_token * n_tokens / (us * 1e3) for n_tokens, us in points)


def _rates(key: str, points: Points) -> tuple[float, float]:
    """(GB/s at the first point, GFLOP/s at the best) of a table."""
    sizes, dtype = key.split("/")
    hidden, inter = (int(size) for size in sizes.split("x"))
    spec = ck.ExpertSpec(hidden, inter, dtype)  # type: ignore[arg-type]
    return spec.record_bytes / (points[0][1] * 1e3), _gflops(spec, points)
