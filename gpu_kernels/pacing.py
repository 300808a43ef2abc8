"""How slow an emulated device should be: link and compute times from a device's datasheet or measurement."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_kernels import ExpertSpec


@dataclass(frozen=True, slots=True)
class Pacing:
    """Rates of the device to imitate. Pacing only slows down: real work that takes longer is not shortened.

    link_gbps, mem_gbps: 1e9 bytes/s; tflops: 1e12 FLOP/s of the dtype used; the others in us.
    """

    link_gbps: float
    link_latency_us: float
    mem_gbps: float
    tflops: float
    launch_us: float

    def transfer_us(self, n_bytes: int) -> float:
        """Time of one host-to-device copy of `n_bytes`."""
        return self.link_latency_us + n_bytes / (self.link_gbps * 1e3)

    def expert_us(self, spec: ExpertSpec, n_tokens: int) -> float:
        """Time of one expert: launch, then the larger of reading its record and its multiplications."""
        matrices = 3 if spec.activation.gated else 2
        flops = 2.0 * matrices * spec.hidden * spec.inter * n_tokens
        return self.launch_us + max(spec.record_bytes / (self.mem_gbps * 1e3), flops / (self.tflops * 1e6))
