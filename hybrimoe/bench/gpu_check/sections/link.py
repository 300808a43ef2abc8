"""The link by size of a copy, and the latencies that decide what a layer call costs."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch

from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.sections.timing import device_us, graph_of, host_us, require_cuda
from hybrimoe.bench.gpu_check.setting import Setting

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
GRAPH_KERNELS = (1, 10, 60)
ROUND_TRIPS = 200
TRIP_LIMIT_S = 2.0


def run(setting: Setting, findings: Findings) -> None:
    """Copies both ways, then latencies."""
    device = require_cuda(setting)
    largest = SIZES[-1]
    on_device = torch.empty(largest, dtype=torch.uint8, device=device)
    locked, pageable = torch.empty(largest, dtype=torch.uint8, pin_memory=True), torch.empty(largest, dtype=torch.uint8)
    for size in SIZES:
        up = _copy_us(on_device[:size], locked[:size])
        down = _copy_us(locked[:size], on_device[:size])
        unlocked = _copy_us(on_device[:size], pageable[:size])
        findings.row(
            "copies", bytes=size, to_device_us=round(up, 1), to_device_gbps=round(size / up / 1e3, 2),
            to_host_us=round(down, 1), to_host_gbps=round(size / down / 1e3, 2),
            pageable_to_device_us=round(unlocked, 1), pageable_gbps=round(size / unlocked / 1e3, 2),
        )  # fmt: skip
    _latencies(findings, device)


def _copy_us(target: torch.Tensor, source: torch.Tensor) -> float:
    return device_us(lambda: target.copy_(source, non_blocking=True))


def _latencies(findings: Findings, device: torch.device) -> None:
    small = torch.zeros(8, device=device)
    wait = torch.cuda.synchronize
    stream, event = torch.cuda.Stream(device), torch.cuda.Event()
    latencies: dict[str, Any] = {
        "blocking copy to the host (32 bytes)": lambda: host_us(small.cpu),
        "wait for an idle device": lambda: host_us(wait),
        "launch by torch": lambda: host_us(lambda: small.add_(1), between=wait),
        "record an event": lambda: host_us(event.record),
        "query an event": lambda: host_us(event.query),
        "stream waits for an event": lambda: host_us(lambda: stream.wait_event(event)),
    }
    for what, measure in latencies.items():
        findings.row("latencies", what=what, host_us=round(measure(), 2))
    for n in GRAPH_KERNELS:
        graph = graph_of(partial(_add_often, small, n))
        findings.row(
            "latencies", what=f"replay of a graph of {n} kernels", host_us=round(host_us(graph.replay, between=wait), 2)
        )

        def replay_and_wait(graph: torch.cuda.CUDAGraph = graph) -> None:
            graph.replay()
            wait()

        findings.row("latencies", what="the same, until its end is known", host_us=round(host_us(replay_and_wait), 2))
    _mapped_word(findings, device)


def _add_often(values: torch.Tensor, n: int) -> None:
    for _ in range(n):
        values.add_(1)


def _mapped_word(findings: Findings, device: torch.device) -> None:
    """From a launch to the host's seeing what the kernel wrote into page-locked memory."""
    try:
        from hybrimoe.bench.gpu_check.sections.triton import ring
    except ImportError as error:
        findings.remark(f"the round trip of a mapped word needs Triton: {error}")
        return
    word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    seen = word.numpy()
    launches, trips = [], []
    for number in range(1, ROUND_TRIPS):
        started = time.perf_counter()
        ring.ring(word, number)
        launched = time.perf_counter()
        while seen[0] != number:
            if time.perf_counter() - launched > TRIP_LIMIT_S:
                findings.problem("a kernel's write to page-locked memory is not seen by the host")
                return
        launches.append(launched - started)
        trips.append(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    findings.row("latencies", what="launch by Triton", host_us=round(median(launches[1:]) * 1e6, 2))
    findings.row(
        "latencies", what="launch, write to a mapped word, seen by the host", host_us=round(median(trips[1:]) * 1e6, 2)
    )
