"""Which disk a path is on, and what this machine's calibration says of it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from hybrimoe.machine.profiles import open_hardware, profile_path
from scheduler.machine.profile import DiskProfile


def device_of(path: Path) -> str:
    """The device of the file system that a path is on, or will be: "/dev/nvme0n1p2", "C:", "server:/share"."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    place = place.resolve()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    known = {part.mountpoint: part.device for part in psutil.disk_partitions(all=True)}
    return known.get(str(place), str(place))


def calibrated_disk(path: Path) -> DiskProfile | None:
    """What `hybrimoe calibrate` found of the disk that a path is on; None where it measured none, or another one.

    Raises ProfileError where the calibration is damaged.
    """
    file = profile_path()
    disk = open_hardware(file).disk if file.is_file() else None
    return disk if disk is not None and disk.device == device_of(path) else None


def disk_text(disk: DiskProfile) -> str:
    """A disk in words."""
    flight = f", {disk.reads_in_flight} reads in flight" if disk.reads_in_flight else ""
    where = f" ({disk.device})" if disk.device else ""
    return f"{disk.gbps:.2f} GB/s, {disk.latency_us:.0f} us more for one read alone{flight}{where}"
