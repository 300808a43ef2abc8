"""Host memory that this process may use: the machine's, or that of its control group where it is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["available_bytes", "total_bytes"]

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
LIMIT_AND_USE = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Names of the limit and of the use, in version 2 and in version 1 of control groups."""


def available_bytes(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> int:
    """Free bytes: what the machine has available, and no more than the control groups around this process leave.

    Page cache that a group can give back counts as free, as it does for the machine.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups(root, own)]))


def total_bytes(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> int:
    """All memory of the machine, or the lowest limit of the control groups around this process."""
    limits = (_number(group / name) for group in _groups(root, own) for name, _ in LIMIT_AND_USE)
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def _left_in_groups(root: Path, own: Path) -> Iterator[int]:
    for group in _groups(root, own):
        for limit_name, use_name in LIMIT_AND_USE:
            limit, use = _number(group / limit_name), _number(group / use_name)
            if limit is not None and use is not None:
                yield limit - use + _reclaimable(group)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process, from the innermost to the root."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = base / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base))


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no file, or the word for no limit."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(group: Path) -> int:
    """Bytes of files that the group caches and can give back."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    stat = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(stat.get("inactive_file", 0))
