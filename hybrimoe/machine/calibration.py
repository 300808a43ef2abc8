"""What `hybrimoe calibrate` found: the profile with the spread of its figures, as a YAML file and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.machine.profile import HardwareProfile


@dataclass
class Calibration:
    """The profile, the spread of every figure as (min, median, max), and the backends' times in us."""

    profile: HardwareProfile
    spread: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    backends: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


def write_profile(result: Calibration, path: Path) -> None:
    """The profile as YAML, with the spread of each figure as comments; replaces the file in one step."""
    import yaml

    lines = [f"# Measured in {result.seconds:.0f} s. Figures are medians; least and greatest of the rounds:"]
    lines += [f"#   {name}: {low:.4g} .. {high:.4g}" for name, (low, _, high) in result.spread.items()]
    mapping = {key: value for key, value in result.profile.to_mapping().items() if value is not None}
    text = "\n".join(lines) + "\n" + yaml.safe_dump(json.loads(json.dumps(mapping)), sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def summary(result: Calibration) -> dict[str, Any]:
    """For --json."""
    return {
        "profile": result.profile.to_mapping(),
        "spread": {name: {"min": a, "median": b, "max": c} for name, (a, b, c) in result.spread.items()},
        "backends_us": result.backends,
        "seconds": result.seconds,
    }
