"""Hardware profiles and model shapes by name or file, as the scheduler's types; this machine's own calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cpu_kernels.jit.cache_dir import cache_home
from scheduler.errors import ProfileError
from scheduler.machine.profile import HardwareProfile, ModelShape, table_key
from yaml_rules.hardware import load_hardware
from yaml_rules.shapes import load_shape

PROFILE_NAME = "profile.yaml"


def profile_path() -> Path:
    """Where `hybrimoe calibrate` keeps this machine's profile."""
    return cache_home() / PROFILE_NAME


def accelerator_note(name: str, kind: str) -> str:
    """How a calibration's `source` names the accelerator that it measured."""
    return f"accelerator {name} ({kind})"


def calibrated(hidden: int, inter: int, dtype: str, name: str, kind: str) -> HardwareProfile | None:
    """This machine's calibration if it measured experts of this shape and dtype on this accelerator; else None.

    Raises ProfileError where the file is damaged; `hybrimoe calibrate` writes it anew.
    """
    path = profile_path()
    if not path.is_file():
        return None
    profile, key = open_hardware(path), table_key(hidden, inter, dtype)
    measured = key in profile.cpu.table and key in profile.accel.table
    return profile if measured and accelerator_note(name, kind) in profile.source else None


def hardware_for_plan(source: str | Path | None, measure: Callable[[], HardwareProfile]) -> tuple[HardwareProfile, str]:
    """The profile that `hybrimoe plan` and batch plans use, and a sentence that says which one it is.

    Without ``source`` it is this machine: its calibration, else what ``measure`` returns (calibrate.quick_profile). A
    profile whose accelerator has no memory describes a machine without one.
    """
    path = profile_path()
    if source is not None:
        profile = open_hardware(source)
        return profile, f"hardware: {profile.name} ({profile.provenance}), as asked"
    if path.is_file():
        profile = open_hardware(path)
        return profile, f"hardware: this machine's calibration, {path} ({profile.source})"
    return measure(), "hardware: this machine, measured just now for a moment; hybrimoe calibrate measures it well"


def open_hardware(source: str | Path) -> HardwareProfile:
    """A shipped profile (``laptop``), or a YAML or JSON file such as ``hybrimoe calibrate`` writes."""
    try:
        return HardwareProfile.from_mapping(load_hardware(source))
    except ProfileError as error:
        raise ProfileError(f"{source}: {error}") from error


def with_changes(profile: HardwareProfile, changes: str) -> HardwareProfile:
    """The profile with other numbers: ``"link.gbps=8,dense.sync_us=500"``; empty for none.

    Raises ProfileError for a name that a profile does not have, or a number that cannot be.
    """
    mapping = profile.to_mapping()
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        part, _, key = name.partition(".")
        if not isinstance(mapping.get(part), dict) or key not in mapping[part]:
            raise ProfileError(
                f"change {change!r}: a profile has no {name!r}; expected PART.NAME=NUMBER as link.gbps=8"
            )
        try:
            mapping[part][key] = float(value)
        except ValueError:
            raise ProfileError(f"change {change!r}: expected a number, found {value!r}") from None
    return HardwareProfile.from_mapping(mapping)


def with_accelerators(profile: HardwareProfile, count: int | None, shared_link: bool) -> HardwareProfile:
    """The profile with so many accelerators like its own; None: as many as it says."""
    link = replace(profile.link, shared=profile.link.shared or shared_link)
    return replace(
        profile, accel=replace(profile.accel, count=profile.accel.count if count is None else count), link=link
    )


def open_shape(source: str | Path, *, n_layers: int | None = None) -> ModelShape:
    """A shipped shape (``mixtral-8x7b``), a config.json, or a model directory; ``n_layers`` overrides the MoE
    layers."""
    shape = ModelShape.from_mapping(load_shape(source))
    return shape if n_layers is None else replace(shape, n_layers=n_layers)
