"""What an inference engine reaches on a machine that is known from data sheets: rates and overheads, fitted to public
measurements (``benchmarks/calibration_report.py``), and how far off such predictions were on machines not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from scheduler.errors import ProfileError
from scheduler.machine.profile import HardwareProfile

INTERVAL = (0.1, 0.9)
"""Quantiles of the held-out ratios that an interval reaches to."""
OF_RESIDUALS = ("decode_ratios", "mixed_decode_ratios", "prefill_ratios", "streamed_prefill_ratios", "prompt_tokens")
"""Keys of an engine's file that are its residuals."""


@dataclass(frozen=True, slots=True)
class Residuals:
    """Measured / predicted speed of public rows on machines that were held out: decode with all experts on the
    accelerator, and with some or all on the CPU; prompts with all on the accelerator, and with some or all streamed.

    ``prompt_tokens``: least and most tokens of the prompts among them.
    """

    decode: Sequence[float] = ()
    mixed_decode: Sequence[float] = ()
    prefill: Sequence[float] = ()
    streamed_prefill: Sequence[float] = ()
    prompt_tokens: tuple[int, int] = (1, 1 << 30)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Residuals:
        """Those of a mapping as ``yaml_rules.engines`` reads it: ``decode_ratios`` and so on, ``prompt_tokens``."""
        decode, mixed, prefill, streamed = (
            tuple(values.get(f"{name}_ratios", ()))
            for name in ("decode", "mixed_decode", "prefill", "streamed_prefill")
        )
        least, most = values.get("prompt_tokens", (1, 1 << 30))
        return cls(decode, mixed, prefill, streamed, (int(least), int(most)))

    def interval(
        self, phase: str, speed: float, mixed: bool = False, streamed: bool = False, tokens: float = 1.0
    ) -> tuple[float, float] | None:
        """The range in which a speed that was predicted as ``speed`` is to be expected. ``mixed``: not all experts are
        on the accelerator; ``streamed``: a prompt's then go over the link; ``tokens``: of the prompt.

        None where no row is near: then nothing is known of how far off the prediction is.
        """
        if phase == "decode":
            ratios = sorted(self.mixed_decode if mixed else self.decode)
        else:
            near = self.prompt_tokens[0] <= tokens <= self.prompt_tokens[1] and (streamed or not mixed)
            ratios = sorted((self.streamed_prefill if mixed else self.prefill) if near else ())
        if not ratios:
            return None
        low, high = (_quantile(ratios, at) for at in INTERVAL)
        return speed * low, speed * high


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Shares are of a data sheet profile's rates; the rest are us. ``captured_launch_us``: of a launch where steps are
    captured as graphs, which is the case for decode steps with all experts on an accelerator that can capture.
    ``handoff_us``: of a layer whose experts the CPU computes, there and back; ``windows_handoff_us``: under Windows.
    ``link_share``: what uploads of a prompt's experts reach of the link's rate.
    The others: see ``AccelProfile``. ``residuals``: of public rows of machines that were held out.
    """

    name: str
    accel_memory: float
    accel_tensor: float
    cpu_read: float
    link_share: float
    launch_us: float
    captured_launch_us: float
    handoff_us: float
    windows_handoff_us: float
    cache_share: float
    attention_share: float
    token_passes: float
    tile_tokens: int
    tile_by_expert: bool
    vector_tokens: int
    reads_apart: bool
    expert_launches: int
    attention_launches: int
    residuals: Residuals = Residuals()

    def __post_init__(self) -> None:
        for name in ("accel_memory", "accel_tensor", "cpu_read", "link_share", "cache_share", "attention_share"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ProfileError(f"engine {self.name}: {name} must be above 0, found {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineProfile:
        """The engine of a mapping as ``yaml_rules.engines`` reads it. Raises ProfileError for what is missing."""
        own = {field.name for field in fields(cls)}
        told = {key: value for key, value in values.items() if key not in OF_RESIDUALS and key != "source"}
        try:
            return cls(**told, residuals=Residuals.from_mapping(values))
        except TypeError as error:
            missing = sorted(own - set(values) - {"residuals"})
            raise ProfileError(f"engine profile: {error}; missing: {', '.join(missing) or 'nothing'}") from error

    def on(
        self, profile: HardwareProfile, captured: bool = False, windows: bool = False, expert_speed: float = 1.0,
        streamed: bool = False,
    ) -> HardwareProfile:  # fmt: skip
        """The machine as this engine drives it, with steps that are captured as graphs or not; ``expert_speed``: see
        ``AccelProfile``; ``streamed``: for prompts whose experts it uploads."""
        cpu, accel, link = profile.cpu, profile.accel, profile.link
        return replace(
            profile,
            cpu=replace(cpu, read_gbps=cpu.read_gbps * self.cpu_read),
            accel=replace(
                accel, mem_gbps=accel.mem_gbps * self.accel_memory, tflops=accel.tflops * self.accel_tensor,
                launch_us=self.captured_launch_us if captured else self.launch_us, expert_launches=self.expert_launches,
                attention_launches=self.attention_launches, own_attention=True, cache_share=self.cache_share,
                attention_share=self.attention_share, token_passes=self.token_passes, tile_tokens=self.tile_tokens,
                tile_by_expert=self.tile_by_expert, vector_tokens=self.vector_tokens, reads_apart=self.reads_apart,
                expert_speed=expert_speed,
            ),
            link=replace(link, gbps=link.gbps * self.link_share) if streamed else link,
            dense=replace(
                profile.dense, sync_us=0.0, handoff_us=self.windows_handoff_us if windows else self.handoff_us,
            ),
        )  # fmt: skip


def _quantile(ordered: Sequence[float], at: float) -> float:
    place = at * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
