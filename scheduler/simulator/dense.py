"""Time of what surrounds the experts: attention, router, shared experts, output head, synchronisation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.errors import ProfileError, did_you_mean
from scheduler.machine.profile import BYTES_PER_WEIGHT, HardwareProfile, ModelShape

#: Kernels that a dense MLP launches on the accelerator.
SHARED_LAUNCHES = 3
#: Values between matrices are float32.
VALUE_BYTES = 4
#: Scores and weighted values: 2 multiply-adds per query-key pair and unit of the heads' width (about hidden).
FLOPS_PER_PAIR_AND_HIDDEN = 4


@dataclass(frozen=True, slots=True)
class DenseCosts:
    """Dense work of one model on one machine; it runs on the accelerator. Weights are stored in ``dtype``, or as the
    shape's own file has them."""

    profile: HardwareProfile
    shape: ModelShape
    dtype: str = "int8"

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_PER_WEIGHT:
            raise ProfileError(f"unknown dense dtype {self.dtype!r}{did_you_mean(self.dtype, BYTES_PER_WEIGHT)}")

    def _block_us(self, params: int, n_tokens: int, launches: int, head: bool = False) -> float:
        """Weights are read once and used for every token: the larger of memory and arithmetic time, or their sum."""
        if params == 0:
            return 0.0
        accel = self.profile.accel
        bits = self.shape.weight_bits
        weight_bytes = BYTES_PER_WEIGHT[self.dtype] if bits is None else bits[1 if head else 2] / 8
        read_us = params * weight_bytes / (accel.mem_gbps * 1e3)
        compute_us = 2.0 * params * n_tokens / (accel.tflops * 1e6)
        apart = accel.reads_apart and n_tokens > 1
        return launches * accel.launch_us + (read_us + compute_us if apart else max(read_us, compute_us))

    def attention_us(self, n_tokens: int, context: int, n_sequences: int = 1) -> float:
        """One attention block over ``n_tokens`` new tokens, as many of each sequence, that see up to ``context``
        earlier ones of their own sequence.

        A measured decode time in the profile (``dense.attention_us``) is the floor. Dense decoder layers, where the
        model has any, are spread evenly over the MoE layers.
        """
        accel, shape = self.profile.accel, self.shape
        share, launches, width = 1.0, accel.attention_launches, shape.hidden
        if accel.own_attention:
            share, launches = shape.full_attention, launches + shape.attention_kernels
            width = shape.attention_width or shape.hidden
        pairs = share * n_tokens * (context + (n_tokens / n_sequences + 1) / 2)
        cache_us = max(
            share * shape.kv_bytes * (n_sequences * context + n_tokens) / (accel.mem_gbps * accel.cache_share * 1e3),
            FLOPS_PER_PAIR_AND_HIDDEN * width * pairs / (accel.tflops * accel.attention_share * 1e6),
        )
        one = self._block_us(shape.attention_params, n_tokens, launches) + cache_us
        extra = (
            shape.n_dense_layers
            * (one + self._block_us(shape.dense_params, n_tokens, SHARED_LAUNCHES))
            / shape.n_layers
        )
        return max(one, self.profile.dense.attention_us) + extra

    def gate_us(self, n_tokens: int) -> float:
        """Router, the launches of the layer's experts together, the time until the host knows the routing, and what
        the values between the layer's matrices take."""
        params, accel, dense = self.shape.hidden * self.shape.n_experts, self.profile.accel, self.profile.dense
        router_us = max(self._block_us(params, n_tokens, 1), dense.gate_us)
        launches_us = accel.expert_launches * accel.launch_us
        return router_us + launches_us + dense.sync_us + self._values_us(n_tokens)

    def _values_us(self, n_tokens: int) -> float:
        """Inputs and results of a layer's matrices, as they cross the memory; those of one token stay in caches."""
        accel, shape = self.profile.accel, self.shape
        if n_tokens < 2 or accel.token_passes == 0.0:
            return 0.0
        experts = 3 * shape.top_k * (shape.inter + shape.hidden)
        values = experts + 2 * shape.attention_params / shape.hidden + 6 * shape.hidden
        return accel.token_passes * VALUE_BYTES * values * n_tokens / (accel.mem_gbps * 1e3)

    def shared_us(self, n_tokens: int) -> float:
        """The always-active shared experts of a layer."""
        return self._block_us(self.shape.shared_params, n_tokens, SHARED_LAUNCHES)

    def combine_us(self) -> float:
        """Adding the two lanes' results."""
        return self.profile.accel.launch_us

    def head_us(self, n_sequences: int = 1) -> float:
        """Output head for the last token of each sequence of a step (a prefill needs one row only), and the host."""
        return self._block_us(self.shape.head_params, n_sequences, 1, head=True) + self.profile.dense.host_us

    def planner_profile(self, context: int) -> HardwareProfile:
        """The profile with attention and gate filled in for a decode token, for the planner's link budget."""
        dense = replace(
            self.profile.dense,
            attention_us=self.attention_us(1, context) + self.shared_us(1),
            gate_us=self.gate_us(1) - self.profile.dense.sync_us,
        )
        return replace(self.profile, dense=dense)
