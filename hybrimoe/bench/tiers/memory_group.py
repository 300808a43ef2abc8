"""MemoryGroup: a memory limit of the system (Linux cgroup) that holds the page cache of the processes in it, too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from hybrimoe.errors import BudgetError

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows its groups."""
MEMBERSHIP = Path("/proc/self/cgroup")
"""In which of them this process is."""


@dataclass(frozen=True, slots=True)
class Names:
    """Files of a group, by the version of the interface (kernel: admin-guide/cgroup-v1/memory, cgroup-v2). no_swap: its
    file and what is written there, so that nothing leaves memory for a swap device."""

    limit: str
    peak: str
    no_swap: tuple[str, str]


V1 = Names("memory.limit_in_bytes", "memory.max_usage_in_bytes", ("memory.swappiness", "0"))
V2 = Names("memory.max", "memory.peak", ("memory.swap.max", "0"))


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group of processes that have so much memory together. Charged are what they allocate, and the pages of files
    that they are the first to bring into memory; what a process had before it joined is not."""

    folder: Path
    names: Names

    def join(self) -> None:
        """This process is a member from now on."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """The most that the members had at once; None where the kernel does not say (before Linux 5.19)."""
        with contextlib.suppress(OSError):
            return int((self.folder / self.names.peak).read_text())
        return None


@contextlib.contextmanager
def memory_group(limit_bytes: int, *, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[MemoryGroup]:
    """A group with this limit and without swap, removed afterwards: its members must have ended by then.

    Raises BudgetError where the system does not let this process make one.
    """
    problems = []
    for parent, names in _parents(root, membership):
        folder = parent / f"hybrimoe-{uuid4().hex}"
        try:
            folder.mkdir()
        except OSError as error:
            problems.append(f"{parent}: {error.strerror or error}")
            continue
        try:
            (folder / names.limit).write_text(str(limit_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                (folder / names.no_swap[0]).write_text(names.no_swap[1])
        except OSError as error:
            problems.append(f"{parent}: {error.strerror or error}")
            _remove(folder)
            continue
        try:
            yield MemoryGroup(folder, names)
        finally:
            _remove(folder)
        return
    raise BudgetError(
        f"no memory cgroup can be made ({'; '.join(problems) or f'{root} has none for memory'}): run it as root on"
        " Linux (sudo, or a container that may write to /sys/fs/cgroup)"
    )


def _parents(root: Path, membership: Path) -> Iterator[tuple[Path, Names]]:
    """Groups beneath which one might be made, best first: that of this process, then the outermost."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.strip("/"))
    for hierarchy, name, names in ((root / "memory", "memory", V1), (root, "", V2)):
        if (hierarchy / "cgroup.procs").is_file():
            yield from dict.fromkeys([(hierarchy / own.get(name, ""), names), (hierarchy, names)])


def _remove(folder: Path) -> None:
    """Of a folder of this file system only the folder itself can be removed. One that the system keeps is empty."""
    with contextlib.suppress(OSError):
        folder.rmdir()
