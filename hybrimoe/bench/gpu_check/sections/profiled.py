"""What torch's profiler saw of a piece of work: spans of kernels, copies and the CPU lane, and the runtime's calls."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Span = tuple[float, float]
"""Start and end in us."""
CPU_LANE = "hybrimoe: CPU lane"
WAIT = "hybrimoe: wait"
"""A wait that asks the runtime again and again (`gpu_kernels.waiting`); its asking is counted as event queries, too."""

CALLS: Mapping[str, tuple[str, ...]] = {
    "waits of the host": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", WAIT),
    "launches": (
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchCooperativeKernel",
    ),
    "graph launches": ("cudaGraphLaunch", "cuGraphLaunch"),
    "copies submitted": ("cudaMemcpyAsync", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"),
    "fills submitted": ("cudaMemsetAsync",),
    "events recorded": ("cudaEventRecord", "cudaEventRecordWithFlags"),
    "stream waits": ("cudaStreamWaitEvent",),
    "event queries": ("cudaEventQuery", "cudaStreamQuery"),
}  # fmt: skip
"""Calls of the runtime and the driver by what they are for."""


@dataclass(slots=True)
class Seen:
    """calls: of the runtime, by name, with the host's us in them. kernels, copies (by kind, "HtoD", "DtoH"), fills: by
    the device's clock, which the profiler aligns with the host's. cpu_lane: the host computing experts. streams: of
    kernels and of copies."""

    calls: Counter[str] = field(default_factory=Counter)
    host_us: Counter[str] = field(default_factory=Counter)
    kernels: list[Span] = field(default_factory=list)
    copies: dict[str, list[Span]] = field(default_factory=dict)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    cpu_lane: list[Span] = field(default_factory=list)
    kernel_us: Counter[str] = field(default_factory=Counter)
    kernel_calls: Counter[str] = field(default_factory=Counter)
    streams: dict[str, set[int]] = field(default_factory=dict)

    def called(self, what: str) -> int:
        """Calls of one kind of CALLS."""
        return sum(self.calls[name] for name in CALLS[what])

    def spent_us(self, what: str) -> float:
        """us of the host inside calls of one kind."""
        return sum(self.host_us[name] for name in CALLS[what])


@contextmanager
def host_marked() -> Iterator[None]:
    """The CPU lane's work stands in the profile under CPU_LANE, a wait for a device under WAIT."""
    from torch.profiler import record_function

    from gpu_kernels.waiting import WaitLimit
    from hybrimoe.runtime.layer_call.lanes import Lanes

    compute, wait = Lanes.compute, WaitLimit.wait

    def marked(self: Any, space: Any) -> None:
        if not len(space.plan.cpu):
            compute(self, space)
            return
        with record_function(CPU_LANE):
            compute(self, space)

    def waiting(self: Any, awaited: Any, what: str) -> None:
        with record_function(WAIT):
            wait(self, awaited, what)

    Lanes.compute, WaitLimit.wait = marked, waiting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Lanes.compute, WaitLimit.wait = compute, wait  # type: ignore[method-assign]


def profile(work: Callable[[], object]) -> Seen:
    """Runs `work` under torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with host_marked(), torch.profiler.profile(activities=activities) as profiler:
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    with tempfile.TemporaryDirectory(prefix="hybrimoe-") as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def read_trace(events: Sequence[Mapping[str, Any]]) -> Seen:
    """Of the events of a Chrome trace as torch writes it."""
    seen = Seen()
    for event in events:
        if event.get("ph") != "X":
            continue
        name, category = str(event["name"]), str(event.get("cat", ""))
        start, took = float(event["ts"]), float(event.get("dur", 0.0))
        arguments = event.get("args", {})
        span = start, start + took
        if category in ("cuda_runtime", "cuda_driver"):
            seen.calls[name] += 1
            seen.host_us[name] += took  # type: ignore[assignment]  # a Counter of float sums
        elif category == "kernel":
            seen.kernels.append(span)
            seen.kernel_us[name] += took  # type: ignore[assignment]
            seen.kernel_calls[name] += 1
            seen.streams.setdefault("kernels", set()).add(int(arguments.get("stream", -1)))
        elif category == "gpu_memcpy":
            kind = next((kind for kind in ("HtoD", "DtoH", "DtoD") if kind in name), "other")
            seen.copies.setdefault(kind, []).append(span)
            seen.copied_bytes[kind] += int(arguments.get("bytes", 0))
            seen.streams.setdefault(kind, set()).add(int(arguments.get("stream", -1)))
        elif name == WAIT and category in ("user_annotation", "cpu_op"):
            seen.calls[name] += 1
            seen.host_us[name] += took  # type: ignore[assignment]
        elif name == CPU_LANE and category in ("user_annotation", "cpu_op"):
            seen.cpu_lane.append(span)
    return seen


def union(spans: Sequence[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def busy_us(spans: Sequence[Span]) -> float:
    """us covered by at least one span."""
    return sum(end - start for start, end in union(spans))


def both_us(one: Sequence[Span], other: Sequence[Span]) -> float:
    """us covered by both."""
    return busy_us(one) + busy_us(other) - busy_us([*one, *other])


def begun_while(started: Sequence[Span], busy: Sequence[Span]) -> int:
    """How many spans began while one of the others was under way."""
    others = union(busy)
    return sum(any(start <= begin < end for start, end in others) for begin, _ in started)
