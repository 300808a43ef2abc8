"""A calibration is used by sessions of the same expert shape, dtype and accelerator, and by no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrimoe.machine import profiles
from hybrimoe.machine.calibrate import quick_profile
from scheduler.errors import ProfileError
from scheduler.machine.profile import HardwareProfile, table_key

PROFILE = """
name: here
provenance: measured
source: hybrimoe calibrate on a test; accelerator emulated accelerator (emulated)
cpu: {{read_gbps: 20, gflops: {{int4: 100}}, table: {{{key}: [[1, 50], [4, 80]]}}}}
accel: {{mem_gbps: 20, tflops: 0.1, table: {{{key}: [[1, 30], [4, 40]]}}}}
link: {{gbps: 8, latency_us: 0}}
"""


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    path = profiles.profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PROFILE.format(key=f'"{table_key(64, 32, "int4")}"'), encoding="utf-8")
    return path


def test_it_is_found_for_what_it_measured_only(calibration: Path) -> None:
    found = profiles.calibrated(64, 32, "int4", "emulated accelerator", "emulated")
    assert found is not None
    assert found.name == "here"
    assert profiles.calibrated(64, 32, "int8", "emulated accelerator", "emulated") is None
    assert profiles.calibrated(96, 32, "int4", "emulated accelerator", "emulated") is None
    assert profiles.calibrated(64, 32, "int4", "NVIDIA H100", "cuda") is None


def test_without_a_calibration_there_is_none(calibration: Path) -> None:
    calibration.unlink()
    assert profiles.calibrated(64, 32, "int4", "emulated accelerator", "emulated") is None


def test_a_damaged_calibration_is_named(calibration: Path) -> None:
    calibration.write_text("cpu: {read_gbps: -1}", encoding="utf-8")
    with pytest.raises(ProfileError, match=r"profile\.yaml"):
        profiles.calibrated(64, 32, "int4", "emulated accelerator", "emulated")


def test_plans_are_made_for_this_machine_unless_another_is_named(calibration: Path) -> None:
    def measure() -> HardwareProfile:
        return replace(profiles.open_hardware("laptop"), name="measured now")

    named, told = profiles.hardware_for_plan("laptop", measure)
    assert (named.name, "laptop (datasheet), as asked" in told) == ("laptop", True)
    calibrated, told = profiles.hardware_for_plan(None, measure)
    assert calibrated.name == "here"
    assert str(calibration) in told
    calibration.unlink()
    found, told = profiles.hardware_for_plan(None, measure)
    assert found.name == "measured now"
    assert "this machine" in told


def test_a_quick_profile_measures_what_is_here_and_keeps_nothing(calibration: Path) -> None:
    before = sorted(path.name for path in calibration.parent.iterdir())
    found = quick_profile(64, 32, "int4")
    assert found.provenance == "measured"
    assert set(found.cpu.table) == {table_key(64, 32, "int4")}
    assert (found.accel.memory_gib > 0) == torch.accelerator.is_available()
    assert sorted(path.name for path in calibration.parent.iterdir() if path.name != "kernels") == before
