"""Hardware profiles and model shapes by name or file, as the scheduler's types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from scheduler.errors import ProfileError
from scheduler.profile import HardwareProfile, ModelShape
from yaml_rules.hardware import load_hardware
from yaml_rules.shapes import load_shape


def open_hardware(source: str | Path) -> HardwareProfile:
    """A shipped profile (``laptop``), or a YAML or JSON file such as ``hybrimoe calibrate`` writes."""
    try:
        return HardwareProfile.from_mapping(load_hardware(source))
    except ProfileError as error:
        raise ProfileError(f"{source}: {error}") from error


def open_shape(source: str | Path, *, n_layers: int | None = None) -> ModelShape:
    """A shipped shape (``mixtral-8x7b``), a config.json, or a model directory; ``n_layers`` overrides the MoE
    layers."""
    shape = ModelShape.from_mapping(load_shape(source))
    return shape if n_layers is None else replace(shape, n_layers=n_layers)
