"""What an inference engine reaches on a machine that is known from data sheets: rates and overheads, fitted to public
measurements (``benchmarks/calibration_report.py``), and how far off such predictions were on machines not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.errors import ProfileError
from scheduler.machine.profile import HardwareProfile

INTERVAL = (0.1, 0.9)
"""Quantiles of the held-out ratios that an interval reaches to."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Shares are of a data sheet profile's rates; the rest are us. ``captured_launch_us``: of a launch where steps are
    captured as graphs, which is the case for decode steps with all experts on an accelerator that can capture.
    ``handoff_us``: of a layer whose experts the CPU computes, there and back; ``windows_handoff_us``: under Windows.
    ``cache_share``, ``attention_share``, ``fill_tokens``, ``token_passes``: see ``AccelProfile``.

    ``decode_ratios``, ``mixed_decode_ratios``, ``prefill_ratios``: measured / predicted speed of held-out rows:
    decode with all experts on the accelerator, with some or all on the CPU; prompts with all on the accelerator.
    """

    name: str
    accel_memory: float
    accel_tensor: float
    cpu_read: float
    launch_us: float
    captured_launch_us: float
    handoff_us: float
    windows_handoff_us: float
    cache_share: float
    attention_share: float
    fill_tokens: float
    token_passes: float
    expert_launches: int
    attention_launches: int
    decode_ratios: Sequence[float] = ()
    mixed_decode_ratios: Sequence[float] = ()
    prefill_ratios: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("accel_memory", "accel_tensor", "cpu_read", "cache_share", "attention_share"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ProfileError(f"engine {self.name}: {name} must be above 0, found {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineProfile:
        """The engine of a mapping as ``yaml_rules.engines`` reads it. Raises ProfileError for what is missing."""
        try:
            return cls(**{key: value for key, value in values.items() if key != "source"})
        except TypeError as error:
            raise ProfileError(f"engine profile: {error}") from error

    def on(self, profile: HardwareProfile, captured: bool = False, windows: bool = False) -> HardwareProfile:
        """The machine as this engine drives it, with steps that are captured as graphs or not."""
        cpu, accel = profile.cpu, profile.accel
        return replace(
            profile,
            cpu=replace(cpu, read_gbps=cpu.read_gbps * self.cpu_read),
            accel=replace(
                accel, mem_gbps=accel.mem_gbps * self.accel_memory, tflops=accel.tflops * self.accel_tensor,
                launch_us=self.captured_launch_us if captured else self.launch_us, expert_launches=self.expert_launches,
                attention_launches=self.attention_launches, own_attention=True, cache_share=self.cache_share,
                attention_share=self.attention_share, fill_tokens=self.fill_tokens, token_passes=self.token_passes,
            ),
            dense=replace(
                profile.dense, sync_us=0.0, handoff_us=self.windows_handoff_us if windows else self.handoff_us,
            ),
        )  # fmt: skip

    def interval(self, phase: str, speed: float, mixed: bool = False) -> tuple[float, float] | None:
        """The range in which a speed that was predicted as ``speed`` is to be expected; ``mixed``: the CPU has experts.

        None where no row that was held out is near: then nothing is known of how far off the prediction is.
        """
        of_phase = {
            ("decode", False): self.decode_ratios, ("decode", True): self.mixed_decode_ratios,
            ("prefill", False): self.prefill_ratios,
        }  # fmt: skip
        ratios = sorted(of_phase.get((phase, mixed), ()))
        if not ratios:
            return None
        low, high = (_quantile(ratios, at) for at in INTERVAL)
        return speed * low, speed * high


def _quantile(ordered: Sequence[float], at: float) -> float:
    place = at * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
