"""How fast an accelerator's fused kernels read experts, beside the rate of a plain read on the same device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from cpu_kernels import ExpertDtype, ExpertSpec, reference_ffn, relative_error, unpack_expert
from cpu_kernels.format.layout import SCALE_BYTES, block_bytes, is_quantised
from gpu_kernels import fused_choice
from gpu_kernels.devices import indexed, memory_info
from gpu_kernels.fused_choice import FusedChoice, Group
from hybrimoe.bench.kernels.measure import ParityError
from hybrimoe.bench.kernels.setting import Shape
from hybrimoe.errors import HybriMoEError

CARD_SHAPES = (Shape("olmoe", 2048, 1024, 8), Shape("qwen3-30b", 2048, 768, 8), Shape("mixtral", 4096, 14336, 2))
CARD_DTYPES: tuple[ExpertDtype, ...] = ("int4", "int8", "bfloat16")
CARD_TOKENS = (1, 4, 16, 64)
FEW_EXPERTS = 2
"""As a layer call has them when most of its experts are on the CPU; measured at one token."""
POOL_BYTES = 512 << 20
"""Experts of one measurement together: several times the largest cache of a card, so that memory serves them."""
READ_BYTES = 2 << 30
CALLS = 8
"""At least so many calls, each of other experts, between two time stamps: what one launch costs is then hidden."""
REPEATS = 20
TUNING_S = 5.0
"""For each shape and dtype that was never timed on this card; as at a session's start."""
WEIGHT_SIZE = 0.02
"""Standard deviation of random weights."""


@dataclass(frozen=True, slots=True)
class KernelRate:
    """One measured call of `experts` experts with `tokens` tokens each.

    us: median of one call. gbps: 1e9 bytes of records a second. read_share: gbps over the device's read rate. cut: how
    the kernels' work is shared between programs, as it was chosen on this card; "default" where nothing was chosen.
    """

    shape: str
    dtype: ExpertDtype
    tokens: int
    experts: int
    us: float
    gbps: float
    read_share: float
    cut: str


def device_name(device: torch.device) -> str:
    """What the device is called in reports."""
    return str(torch.get_device_module(device).get_device_name(device))


def read_gbps(device: torch.device) -> float:
    """1e9 bytes/s of a sum over as much memory as a quarter of what is free, 2 GiB at most."""
    n_bytes = min(READ_BYTES, memory_info(device)[0] // 4)
    values = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    us = _median_us(device, lambda: values.sum(), REPEATS)
    return n_bytes / (us * 1e3)


def kernel_rates(
    device: torch.device | str, shapes: Sequence[Shape] = CARD_SHAPES, dtypes: Sequence[ExpertDtype] = CARD_DTYPES,
    tokens: Sequence[int] = CARD_TOKENS, *, progress: Callable[[str], None] = lambda text: None,
) -> list[KernelRate]:  # fmt: skip
    """Rates of the fused kernels, random weights; what does not fit the device's free memory is left out.

    Raises HybriMoEError where the kernels are not installed, ParityError where their result is wrong.
    """
    device = indexed(device)
    fused = fused_choice.load_fused()
    if fused is None:
        raise HybriMoEError("the fused kernels need Triton: pip install 'hybrimoe[gpu]'")
    rows = []
    with torch.accelerator.device_index(device.index), torch.no_grad():
        plain_gbps = read_gbps(device)
        for shape in shapes:
            for dtype in dtypes:
                progress(f"{shape.name} {dtype}")
                rows += _rates(device, fused, shape, dtype, tokens, plain_gbps)
    return rows


def one_token_cuts(device: torch.device, shape: Shape, dtype: ExpertDtype) -> Sequence[Any]:
    """The cuts for one token of an expert that a session may choose from on the device, those of one launch among them;
    each has a `label`."""
    fused = fused_choice.load_fused()
    return () if fused is None else fused.module.candidates(ExpertSpec(shape.hidden, shape.inter, dtype), 1, device)


def cut_rates(device: torch.device, shape: Shape, dtype: ExpertDtype, cuts: Any) -> list[KernelRate]:
    """As `kernel_rates` for one token, by kernels cut so, whether a session would choose them or not."""
    fused, spec = fused_choice.load_fused(), ExpertSpec(shape.hidden, shape.inter, dtype)
    n_slots = max(-(-POOL_BYTES // spec.record_bytes), shape.k)
    if fused is None or spec.record_bytes * n_slots > memory_info(device)[0] // 2:
        return []
    rows = []
    with torch.accelerator.device_index(device.index), torch.no_grad():
        fused.take(spec, fused.module.block_tokens([1]), cuts, device)
        slots, plain_gbps = random_slots(spec, n_slots, device), read_gbps(device)
        for n_experts in sorted({shape.k, FEW_EXPERTS}, reverse=True):
            us = _call_us(device, fused, spec, slots, n_experts, 1)
            gbps = n_experts * spec.record_bytes / (us * 1e3)
            rows.append(KernelRate(shape.name, dtype, 1, n_experts, us, gbps, gbps / plain_gbps, cuts.label))
    return rows


def _rates(
    device: torch.device, fused: FusedChoice, shape: Shape, dtype: ExpertDtype, tokens: Sequence[int],
    plain_gbps: float,
) -> list[KernelRate]:  # fmt: skip
    spec = ExpertSpec(shape.hidden, shape.inter, dtype)
    n_slots = -(-POOL_BYTES // spec.record_bytes)
    if spec.record_bytes * max(n_slots, shape.k) > memory_info(device)[0] // 2:
        return []
    slots = random_slots(spec, max(n_slots, shape.k), device)
    fused.tune(spec, slots, TUNING_S)
    rows = []
    for n_tokens in tokens:
        if n_tokens > fused.module.MAX_TOKENS:
            continue
        for n_experts in sorted({shape.k, FEW_EXPERTS} if n_tokens == 1 else {shape.k}, reverse=True):
            us = _call_us(device, fused, spec, slots, n_experts, n_tokens)
            gbps = n_experts * spec.record_bytes / (us * 1e3)
            cuts = fused.cuts(spec, [n_tokens])
            cut = "default" if cuts is None else cuts.label
            rows.append(KernelRate(shape.name, dtype, n_tokens, n_experts, us, gbps, gbps / plain_gbps, cut))
    return rows


def random_slots(spec: ExpertSpec, n_slots: int, device: torch.device) -> torch.Tensor:
    """uint8 [n_slots, record_bytes] of records with random weights, made on the device."""
    shape = n_slots, spec.record_bytes
    if not is_quantised(spec.dtype):
        dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
        values = torch.randn((n_slots, spec.record_bytes // dtype.itemsize), dtype=dtype, device=device)
        return values.mul_(WEIGHT_SIZE).view(torch.uint8)
    slots = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    blocks = slots.view(n_slots, -1, block_bytes(spec.dtype))
    largest = 8 if spec.dtype == "int4" else 128
    scales = torch.rand((*blocks.shape[:2], SCALE_BYTES // 2), device=device).add_(0.5).mul_(2 * WEIGHT_SIZE / largest)
    blocks[:, :, -SCALE_BYTES:] = scales.bfloat16().view(torch.uint8)
    return slots


def _call_us(
    device: torch.device, fused: FusedChoice, spec: ExpertSpec, slots: torch.Tensor, n_experts: int, n_tokens: int
) -> float:
    """Median us of a call, over enough calls of different experts to leave the caches behind."""
    n_rows = n_experts * n_tokens
    n_calls = max(CALLS, len(slots) // n_experts)
    order = torch.arange(n_calls * n_experts, dtype=torch.int32, device=device) % len(slots)
    offsets = torch.arange(n_experts + 1, dtype=torch.int32, device=device) * n_tokens
    rows = torch.arange(n_rows, dtype=torch.int64, device=device).view(n_tokens, n_experts).T.reshape(-1).contiguous()
    hidden = torch.randn((n_tokens, spec.hidden), device=device)
    weights = torch.rand(n_rows, device=device)
    out = torch.empty((n_rows, spec.hidden), device=device)

    def call(number: int) -> None:
        ids = order[number * n_experts : (number + 1) * n_experts]
        counts = [n_tokens] * n_experts
        fused.run_known(spec, slots, Group(ids, offsets, rows, counts, hidden, weights, n_experts, out))

    call(0)
    expected = reference_ffn(spec, unpack_expert(spec, slots[int(order[0])]), hidden) * weights[rows[:n_tokens], None]
    error = relative_error(out[rows[:n_tokens]], expected)
    if not error <= fused_choice.agreement(spec):
        raise ParityError(f"{spec.dtype} experts, {n_tokens} tokens: off by {error:.1e}, not timed")

    def calls() -> None:
        for number in range(n_calls):
            call(number)

    return _median_us(device, _captured(device, calls), REPEATS) / n_calls


def _captured(device: torch.device, work: Callable[[], None]) -> Callable[[], object]:
    """`work` as one CUDA graph, so that the host's launches are not what is timed; elsewhere `work` itself."""
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _median_us(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median device time of `work`, the first time left out."""
    times = []
    work()
    for _ in range(repeats):
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        stream = torch.accelerator.current_stream(device)
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times)
