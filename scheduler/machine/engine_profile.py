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

    ``decode_ratios``, ``prefill_ratios``: measured / predicted speed of the rows that were held out.
    """

    name: str
    accel_memory: float
    accel_tensor: float
    cpu_read: float
    launch_us: float
    captured_launch_us: float
    handoff_us: float
    host_us: float
    expert_launches: int
    attention_launches: int
    tile_tokens: int
    decode_ratios: Sequence[float] = ()
    prefill_ratios: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("accel_memory", "accel_tensor", "cpu_read"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ProfileError(f"engine {self.name}: {name} must be above 0, found {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineProfile:
        """The engine of a mapping as ``yaml_rules.engines`` reads it. Raises ProfileError for what is missing."""
        try:
            return cls(**{key: value for key, value in values.items() if key != "source"})
        except TypeError as error:
            raise ProfileError(f"engine profile: {error}") from error

    def on(self, profile: HardwareProfile, captured: bool = False) -> HardwareProfile:
        """The machine as this engine drives it, with steps that are captured as graphs or not."""
        cpu, accel = profile.cpu, profile.accel
        return replace(
            profile,
            cpu=replace(cpu, read_gbps=cpu.read_gbps * self.cpu_read),
            accel=replace(
                accel, mem_gbps=accel.mem_gbps * self.accel_memory, tflops=accel.tflops * self.accel_tensor,
                launch_us=self.captured_launch_us if captured else self.launch_us, expert_launches=self.expert_launches,
                attention_launches=self.attention_launches, tile_tokens=self.tile_tokens,
            ),
            dense=replace(profile.dense, sync_us=0.0, handoff_us=self.handoff_us, host_us=self.host_us),
        )  # fmt: skip

    def interval(self, phase: str, speed: float) -> tuple[float, float]:
        """The range in which a speed that was predicted as ``speed`` is to be expected."""
        ratios = sorted(self.decode_ratios if phase == "decode" else self.prefill_ratios)
        if not ratios:
            raise ProfileError(f"engine {self.name} has no held-out rows of {phase}")
        low, high = (_quantile(ratios, at) for at in INTERVAL)
        return speed * low, speed * high


def _quantile(ordered: Sequence[float], at: float) -> float:
    place = at * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
