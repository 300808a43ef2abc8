"""MoE-Lightning (arXiv 2411.11217): how many prompts at once, in how many micro-batches, so that the lanes overlap.

Its pipeline (CGOPipe) goes layer by layer: all micro-batches of layer l before layer l + 1, so that a transferred
expert serves all of them, while the CPU does the attention of one micro-batch and the accelerator the rest of another.
Its hierarchical roofline model (HRM) bounds each part by its processor's arithmetic, its memory, and the link:

    P = min(P_peak of the processor, B_memory * I, B_link * I_link),   I = operations / bytes read from that level

Per decode layer of N = n * m prompts (n micro-batches of m prompts, context c, cached share r of the experts):

    link_us  = (1 - r) * d(N) * transfer + activations back to the accelerator (+ keys and values where streamed)
    cpu_us   = n * (overhead + max(m * c * kv_bytes / B_cpu, 4 * hidden * c * m / P_cpu))      attention on the CPU
    accel_us = n * (projections(m) + router(m) + shared(m) + d(m) * g(m * k / d(m)))  (+ attention where it runs there)
    chain_us = one micro-batch through its stages, which depend on each other
    layer_us = max(link_us, cpu_us, accel_us, chain_us)

d(x): expected distinct experts of x tokens, sum_e 1 - (1 - p_e)^x; g: accelerator us of one expert. All experts run on
the accelerator, as in the paper. The plan is the (m, n, place of attention) with the least time for the whole job
among those whose keys, values and activations fit the memory that is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import SchedulerError
from scheduler.machine.costs import CostModel
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.simulator.dense import FLOPS_PER_PAIR_AND_HIDDEN, DenseCosts

Floats = NDArray[np.float64]
Attention = Literal["cpu", "accelerator", "streamed"]
ATTENTION_PLACES: tuple[Attention, ...] = ("cpu", "accelerator", "streamed")
"""cpu: keys and values in host memory, computed there. accelerator: both on the device. streamed: over the link."""

ACTIVATION_BYTES = 2
"""Hidden states that cross the link are bfloat16."""
ACTIVATION_COPIES = 8
"""float32 hidden states alive at once in a layer of a prefill (residual, norm, queries, keys, values, scores' output,
expert input and output): what a prompt token takes beside its keys and values."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``n_prompts`` prompts of ``prompt_tokens`` tokens (mean), each continued by ``new_tokens``."""

    n_prompts: int
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        for name in ("n_prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise SchedulerError(f"workload: {name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class MemoryLeft:
    """Bytes left for keys, values and activations once all weights and slots are placed; None: no limit known."""

    accel_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StageTimes:
    """us of one decode layer for the whole batch, by lane, and of one micro-batch from its first stage to its last."""

    link_us: float
    cpu_us: float
    accel_us: float
    chain_us: float

    @property
    def layer_us(self) -> float:
        """The longest of them bounds the layer."""
        return max(self.link_us, self.cpu_us, self.accel_us, self.chain_us)

    @property
    def bound_by(self) -> str:
        """Which one it is (ties: in this order)."""
        times = {"link": self.link_us, "cpu": self.cpu_us, "accelerator": self.accel_us, "chain": self.chain_us}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True, slots=True)
class LightningPlan:
    """The batch: ``n_micro_batches`` of ``micro_batch`` prompts. Times are the model's, not measured."""

    micro_batch: int
    n_micro_batches: int
    attention: Attention
    stages: StageTimes
    tokens_per_s: float

    @property
    def batch(self) -> int:
        """Prompts that run at once."""
        return self.micro_batch * self.n_micro_batches


class Roofline:
    """The model above for one machine, model and cached share. ``frequencies`` float [layers, experts]: chance that a
    token goes to an expert; None: all alike."""

    def __init__(
        self, profile: HardwareProfile, shape: ModelShape, expert_dtype: str = "int4", dense_dtype: str = "int8",
        cached_share: float = 0.25, frequencies: Floats | None = None,
    ) -> None:  # fmt: skip
        if not 0.0 <= cached_share <= 1.0:
            raise SchedulerError(f"the cached share must lie in 0..1, found {cached_share}")
        self.profile, self.shape, self.cached_share = profile, shape, cached_share
        self.costs = CostModel(profile, shape, expert_dtype)
        self.dense = DenseCosts(profile, shape, dense_dtype)
        uniform = np.full((1, shape.n_experts), shape.top_k / shape.n_experts)
        self._chance = uniform if frequencies is None else np.clip(np.asarray(frequencies, np.float64), 0.0, 1.0)

    def distinct(self, n_tokens: int) -> float:
        """d(x): expected distinct experts of a layer, mean over layers; tokens choose independently."""
        return float((1.0 - (1.0 - self._chance) ** n_tokens).sum(axis=-1).mean())

    def experts_us(self, n_tokens: int) -> float:
        """All experts of ``n_tokens`` tokens on the accelerator, their tokens spread evenly."""
        distinct = self.distinct(n_tokens)
        each = max(1, round(n_tokens * self.shape.top_k / max(distinct, 1.0)))
        return distinct * float(self.costs.accel_us(0, each))

    def weights_us(self, n_tokens: int, cpu_busy: bool) -> float:
        """The layer's absent experts over the link, once."""
        return (1.0 - self.cached_share) * self.distinct(n_tokens) * self.costs.transfer_us(0, cpu_busy)

    def decode(self, micro_batch: int, n_micro_batches: int, context: int, attention: Attention) -> StageTimes:
        """Stage times of one decode layer."""
        m, n, on_cpu = micro_batch, n_micro_batches, attention == "cpu"
        hidden_us = self._copy_us(m * self.shape.hidden * ACTIVATION_BYTES) if on_cpu else 0.0
        kv_us = self._copy_us(m * context * self.shape.kv_bytes) if attention == "streamed" else 0.0
        cpu_us = self._cpu_attention_us(m, context) if on_cpu else 0.0
        dense_us = self.dense.attention_us(m, 0 if on_cpu else context, m) + self.dense.gate_us(m)
        accel_us = dense_us + self.dense.shared_us(m) + self.experts_us(m)
        return StageTimes(
            link_us=self.weights_us(n * m, on_cpu) + n * (hidden_us + kv_us),
            cpu_us=n * cpu_us,
            accel_us=n * accel_us,
            chain_us=accel_us + cpu_us + 2.0 * hidden_us + kv_us,
        )

    def prefill_us(self, batch: int, prompt_tokens: int) -> float:
        """One layer of the prompts of a batch: the link brings each expert once, everything runs on the accelerator."""
        n_tokens = batch * prompt_tokens
        accel_us = self.dense.attention_us(n_tokens, 0, batch) + self.dense.gate_us(n_tokens)
        return max(
            self.weights_us(n_tokens, False), accel_us + self.dense.shared_us(n_tokens) + self.experts_us(n_tokens)
        )

    def _cpu_attention_us(self, n_prompts: int, context: int) -> float:
        cpu, slowed = self.profile.cpu, self.profile.contention.cpu_with_link
        read_us = n_prompts * context * self.shape.kv_bytes / (cpu.read_gbps * 1e3)
        rate = cpu.gflops.get("float32", min(cpu.gflops.values()))
        compute_us = FLOPS_PER_PAIR_AND_HIDDEN * self.shape.hidden * context * n_prompts / (rate * 1e3)
        return cpu.overhead_us + max(read_us, compute_us) / slowed

    def _copy_us(self, n_bytes: float) -> float:
        return self.profile.link.latency_us + n_bytes / (self.profile.link.gbps * 1e3)


def plan_lightning(
    roofline: Roofline, workload: Workload, memory: MemoryLeft = MemoryLeft(), max_batch: int | None = None,
    places: Sequence[Attention] = ATTENTION_PLACES,
) -> LightningPlan:  # fmt: skip
    """The plan that ends the workload first. Ties: the smaller batch, then fewer micro-batches, then ``places``' order.

    ``max_batch`` caps the prompts at once. Raises SchedulerError where not even one prompt fits the memory.
    """
    best: LightningPlan | None = None
    cap = min(workload.n_prompts, workload.n_prompts if max_batch is None else max_batch)
    for micro_batch, n_micro_batches in _candidates(cap):
        for place in places:
            if not _fits(roofline.shape, workload, micro_batch * n_micro_batches, place, memory):
                continue
            plan = _evaluate(roofline, workload, micro_batch, n_micro_batches, place)
            if best is None or plan.tokens_per_s > best.tokens_per_s:
                best = plan
    if best is None:
        raise SchedulerError(
            f"one prompt of {workload.prompt_tokens} tokens and {workload.new_tokens} new ones does not fit the memory"
            f" that is left ({memory}); cache fewer experts, or shorten the replies"
        )
    return best


def _candidates(cap: int) -> Iterator[tuple[int, int]]:
    """(micro-batch, number of them), by batch size: 1, 2, 3, 4, 6, 8, 12, 16, ... each, and the cap itself."""
    sizes = sorted({s for e in range(cap.bit_length()) for s in (1 << e, 3 << e) if s <= cap} | {cap})
    pairs = [(m, n) for m in sizes for n in sizes if m * n <= cap]
    yield from sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _fits(shape: ModelShape, workload: Workload, batch: int, place: Attention, memory: MemoryLeft) -> bool:
    kv_bytes = batch * (workload.prompt_tokens + workload.new_tokens) * shape.kv_bytes * shape.n_layers
    activations = batch * workload.prompt_tokens * shape.hidden * ACTIVATION_COPIES * 4
    on_device = activations + (kv_bytes if place == "accelerator" else 0)
    on_host = 0 if place == "accelerator" else kv_bytes
    return on_device <= _limit(memory.accel_bytes) and on_host <= _limit(memory.host_bytes)


def _limit(n_bytes: int | None) -> float:
    return math.inf if n_bytes is None else n_bytes


def _evaluate(roofline: Roofline, workload: Workload, m: int, n: int, place: Attention) -> LightningPlan:
    stages = roofline.decode(m, n, workload.prompt_tokens + workload.new_tokens // 2, place)
    batches = math.ceil(workload.n_prompts / (m * n))
    layer_us = roofline.prefill_us(m * n, workload.prompt_tokens) + workload.new_tokens * stages.layer_us
    total_us = batches * roofline.shape.n_layers * layer_us
    return LightningPlan(m, n, place, stages, workload.n_prompts * workload.new_tokens / total_us * 1e6)
