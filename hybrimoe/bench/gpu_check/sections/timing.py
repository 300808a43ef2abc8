"""Times on a CUDA device: by its own events, and of the host's calls. Medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from hybrimoe.bench.gpu_check.findings import SkippedError
from hybrimoe.bench.gpu_check.setting import Setting


def require_cuda(setting: Setting) -> torch.device:
    """The device. Raises SkippedError where torch's CUDA interface does not reach it."""
    device = torch.device("cpu" if setting.emulated else setting.accelerator)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise SkippedError(f"measured through torch.cuda, which does not know {setting.accelerator}")
    torch.cuda.set_device(device)
    return device


def device_us(work: Callable[[], object], repeats: int = 20) -> float:
    """us of the device's own clock for what `work` submits."""
    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return float(median(times))


def host_us(work: Callable[[], object], repeats: int = 200, between: Callable[[], object] = lambda: None) -> float:
    """us of the host's clock for a call of `work`; `between` runs after each, untimed."""
    work()
    between()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
        between()
    return median(times) * 1e6


def graph_of(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `work` submits, captured; it has run before."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
