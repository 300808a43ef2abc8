"""Everything that decides what a training run computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrimoe.demo.training.architecture import Shape
from hybrimoe.errors import ConfigError

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a run computes. Lengths in tokens unless the name says otherwise."""

    shape: Shape = field(default_factory=Shape)
    batch_size: int = 4
    seq_len: int = 512
    stable_seq_len: int = 256
    """Before the decay each window is read as shorter ones: attention over 256 tokens is a quarter cheaper in all."""
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.2
    """Length of the decay, as a share of the steps before it."""
    balance_weight: float = 0.04
    z_weight: float = 1e-3
    precision: str = "bf16"
    """'bf16' multiplies in bfloat16 under autocast, 'fp32' does not; weights and optimiser are float32 in both."""
    seed: int = 1
    max_tokens: int | None = None
    max_hours: float | None = None
    """Limit on processor time a thread, which stands still while the process is paused."""
    threads: int = 2
    """Each takes an equal part of the batch and computes alone: no thread waits for another inside a product."""
    log_steps: int = 20
    checkpoint_steps: int = 200
    evaluate_steps: int = 500
    evaluate_windows: int = 24

    def __post_init__(self) -> None:
        if self.batch_size % self.threads:
            raise ConfigError(
                f"expected batch_size to be a multiple of threads, found {self.batch_size} and {self.threads}"
            )
        if self.seq_len % self.stable_seq_len:
            raise ConfigError(
                f"expected seq_len to be a multiple of stable_seq_len, found {self.seq_len} and {self.stable_seq_len}"
            )
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"expected precision bf16 or fp32, found {self.precision!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that `dataclasses.asdict` wrote."""
        return cls(**{**values, "shape": Shape(**values["shape"])})
