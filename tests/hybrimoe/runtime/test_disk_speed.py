"""What `hybrimoe calibrate` finds of a disk, where it is kept, and who goes by it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hybrimoe
from hybrimoe.errors import CheckpointError, FileError
from hybrimoe.machine import disks, doctor_machine
from hybrimoe.machine.disks import calibrated_disk, device_of
from hybrimoe.machine.profiles import open_hardware, profile_path
from hybrimoe.runtime.tier import disk_speed, reader
from hybrimoe.runtime.tier.disk_speed import DiskSpeed, measure_disk
from hybrimoe.runtime.tier.reader import LEAST_IN_FLIGHT, READS_IN_FLIGHT
from scheduler.errors import ProfileError
from scheduler.machine.profile import DiskProfile, HardwareProfile

RECORD = 5000


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "ROUND_S", 0.001)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[DiskProfile | None], None]:
    """Writes a calibration of a machine with this disk."""
    import yaml

    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "cache"))

    def write(disk: DiskProfile | None) -> None:
        mapping = replace(open_hardware("laptop"), disk=disk).to_mapping()
        profile_path().parent.mkdir(parents=True, exist_ok=True)
        profile_path().write_text(yaml.safe_dump(mapping))

    return write


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = measure_disk(tmp_path, RECORD, rounds=2)
    assert list(tmp_path.iterdir()) == []
    assert found.gbps.keys() == {1, 2, 4, 8}
    assert all(len(values) == 2 and min(values) > 0 for values in found.gbps.values())
    disk = found.profile()
    assert disk.device == device_of(tmp_path)
    assert disk.reads_in_flight in found.gbps
    assert disk.gbps > 0
    assert disk.latency_us >= 0


def test_a_file_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    path.write_bytes(bytes(20 * 8192))
    path.chmod(0o400)
    before = path.stat()
    assert measure_disk(path, RECORD, rounds=1).device == device_of(path)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    with pytest.raises(FileError, match="too short to measure"):
        measure_disk(path, 1 << 20)


def test_fewest_reads_in_flight_that_are_enough() -> None:
    speed = DiskSpeed("disk", 2_000_000, {1: [1.0, 1.2], 2: [1.93, 1.95], 4: [2.0], 8: [1.5]}, [1500.0, 1700.0], True)
    assert speed.profile() == DiskProfile(1.94, pytest.approx(1600.0 - 2000.0 / 1.94), 2, "disk")


@pytest.mark.parametrize(("free", "expected"), [(10 * 8192, "too little room"), (1 << 40, "No space left")])
def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    usage = disk_speed.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(disk_speed.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=expected):
        measure_disk(tmp_path, RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_errors_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reader, "_read_at", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        measure_disk(tmp_path, RECORD)
    assert list(tmp_path.iterdir()) == []


def test_device_of_what_is_not_there_yet_is_that_of_its_folder(tmp_path: Path) -> None:
    assert device_of(tmp_path / "not" / "yet") == device_of(tmp_path)


def test_only_the_disk_that_was_measured_is_known(
    tmp_path: Path, calibrated: Callable[[DiskProfile | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibrated_disk(tmp_path) is None
    calibrated(None)
    assert calibrated_disk(tmp_path) is None
    here = DiskProfile(2.0, 50.0, 8, device_of(tmp_path))
    calibrated(here)
    assert calibrated_disk(tmp_path) == here
    monkeypatch.setattr(disks, "device_of", lambda path: "another")
    assert calibrated_disk(tmp_path) is None


@pytest.mark.parametrize("wrong", [{"gbps": 0}, {"latency_us": -1}, {"reads_in_flight": -1}, {"speed": 3}])
def test_impossible_disks_are_refused(wrong: dict[str, float]) -> None:
    mapping = open_hardware("laptop").to_mapping()
    mapping["disk"] = {"gbps": 1.0} | wrong
    with pytest.raises(ProfileError, match=next(iter(wrong))):
        HardwareProfile.from_mapping(mapping)


@pytest.mark.parametrize(("measured", "expected"), [(8, 8), (1, LEAST_IN_FLIGHT), (0, READS_IN_FLIGHT)])
def test_a_model_reads_with_as_many_in_flight_as_the_disk_wants(
    tmp_path: Path, calibrated: Callable[[DiskProfile | None], None], measured: int, expected: int
) -> None:
    calibrated(DiskProfile(2.0, 50.0, measured, device_of(tmp_path)))
    model = hybrimoe.load(expert_dtype="int4", accelerator="none", progress=False, memory={"host": 16, "disk": "auto"})
    try:
        assert model.hybrimoe.session.store.cache.reader.n_threads == expected
    finally:
        model.hybrimoe.session.close()


def test_planners_beside_an_accelerator_count_with_the_disk(
    tmp_path: Path, calibrated: Callable[[DiskProfile | None], None]
) -> None:
    calibrated(DiskProfile(0.5, 50.0, 2, device_of(tmp_path)))
    model = hybrimoe.load(
        expert_dtype="int4", accelerator="emulated", gpu_expert_slots=8, progress=False,
        memory={"host": 16, "disk": "auto"},
    )  # fmt: skip
    try:
        session = model.hybrimoe.session
        assert session.costs.read_us(0) == pytest.approx(session.layer_specs()[0].spec.record_bytes / 500.0)
    finally:
        model.hybrimoe.session.close()


def test_doctor_shows_the_disk(calibrated: Callable[[DiskProfile | None], None]) -> None:
    calibrated(DiskProfile(2.5, 80.0, 4, "/dev/disk9"))
    assert "2.50 GB/s, 80 us more for one read alone, 4 reads in flight (/dev/disk9)" in doctor_machine._profile().found
    calibrated(None)
    assert "without the disk" in doctor_machine._profile().found
    assert np.isfinite(open_hardware(profile_path()).cpu.read_gbps)
