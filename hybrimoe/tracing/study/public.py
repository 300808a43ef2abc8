"""What to expect around a simulated speed: the range that public measurements had around the simulator's speeds.

Only of machines that are known from data sheets, and only where a public row is near: llama.cpp on one GPU with
everything in memory (docs/calibration.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.machine.engine_profile import Residuals
from scheduler.machine.profile import HardwareProfile
from yaml_rules.engines import load_engine

#: The residuals of the shipped data sheet profiles as they are.
DATASHEET = "datasheet"
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What was simulated. ``mixed``: not all experts have slots; ``streamed``: those of prompts go over the link;
    ``in_memory``: no expert is on disk; ``exact``: no lossy policy."""

    profile: HardwareProfile
    mixed: bool
    streamed: bool = False
    in_memory: bool = True
    exact: bool = True

    @property
    def is_like_public_rows(self) -> bool:
        """Whether rows of such machines exist at all."""
        accel = self.profile.accel
        return self.profile.provenance == "datasheet" and accel.count == 1 and self.in_memory and self.exact


def datasheet_residuals() -> Residuals:
    """Those of profiles that are simulated by their data sheets alone."""
    return Residuals.from_mapping(load_engine(DATASHEET))


def speed_range(residuals: Residuals, setting: Setting, phase: str, speed: float, tokens: float) -> Range | None:
    """Least and most tokens/s to expect where ``speed`` was simulated; ``tokens``: of a prompt. None where no row is
    near."""
    if not setting.is_like_public_rows:
        return None
    return residuals.interval(phase, speed, setting.mixed, setting.streamed, tokens)
