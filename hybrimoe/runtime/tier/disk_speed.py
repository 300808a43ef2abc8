"""How fast a disk gives records that are read past the page cache: its rate by reads in flight, and one read alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from cpu_kernels import page_aligned
from hybrimoe.amounts import size_text
from hybrimoe.errors import FileError
from hybrimoe.machine.disks import device_of
from hybrimoe.runtime.tier.reader import BLOCK_BYTES, Read, RecordReader, Urgency
from scheduler.machine.profile import DiskProfile

Ints = npt.NDArray[np.int64]

IN_FLIGHT = (1, 2, 4, 8)
ENOUGH = 0.95
"""Of the best rate: so many reads in flight are enough."""
SAMPLE_BYTES = 512 << 20
"""Of a file that is made to be read, at most."""
LEAST_RECORDS, MOST_RECORDS = 16, 256
"""Of a file: a round is more than its beginning, and small ones are soon made."""
FREE_SHARE = 0.25
"""Of the free space that such a file may take."""
ROUNDS = 3
ROUND_S = 0.25
"""Of one round with one number of reads in flight, about."""


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What was measured of `device`. gbps: 1e9 bytes/s of each round, by reads in flight. alone_us: of one record when
    no other is read. direct: past the page cache; where that cannot be, memory may have answered."""

    device: str
    record_bytes: int
    gbps: dict[int, list[float]]
    alone_us: list[float]
    direct: bool

    @property
    def in_flight(self) -> int:
        """The fewest reads in flight that reach the disk's rate."""
        rates = {depth: median(values) for depth, values in self.gbps.items()}
        return next(depth for depth in sorted(rates) if rates[depth] >= ENOUGH * max(rates.values()))

    def profile(self) -> DiskProfile:
        """As a hardware profile has it: the rate with `in_flight` reads, and what one alone takes beyond its share."""
        gbps = median(self.gbps[self.in_flight])
        latency_us = max(0.0, median(self.alone_us) - self.record_bytes / (gbps * 1e3))
        return DiskProfile(gbps, latency_us, self.in_flight, self.device)


def measure_disk(place: Path, record_bytes: int, *, rounds: int = ROUNDS) -> DiskSpeed:
    """Reads records of the file `place`, or of one that is made in the folder `place` and removed again.

    Raises FileError where the folder cannot be written to or has no room, or the file holds too few records,
    CheckpointError where it cannot be read.
    """
    size = -(-record_bytes // BLOCK_BYTES) * BLOCK_BYTES
    with _sample(place, size) as path:
        offsets = np.random.default_rng(0).permutation(path.stat().st_size // size) * size
        drop_from_page_cache(path)
        with RecordReader(path, n_threads=1) as reader:
            alone_us = _read(reader, size, offsets[:LEAST_RECORDS])[1]
            direct = reader.direct
        n_reads = int(np.clip(ROUND_S * 1e6 / median(alone_us), LEAST_RECORDS, len(offsets)))
        gbps: dict[int, list[float]] = {depth: [] for depth in IN_FLIGHT}
        for number in range(rounds):
            for depth in IN_FLIGHT:
                drop_from_page_cache(path)
                with RecordReader(path, n_threads=depth) as reader:
                    gbps[depth].append(_read(reader, size, np.roll(offsets, -number * n_reads)[:n_reads])[0])
    return DiskSpeed(device_of(place), record_bytes, gbps, alone_us, direct)


def drop_from_page_cache(path: Path) -> None:
    """Nothing of the file is in memory afterwards, where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(reader: RecordReader, size: int, offsets: Ints) -> tuple[float, list[float]]:
    """1e9 bytes/s of reads of `size` bytes, and us of each. Raises CheckpointError where one fails."""
    buffers = page_aligned(max(IN_FLIGHT) * size).reshape(-1, size)
    reads = [
        Read(number, buffers[number % len(buffers)].data, int(offset), size, Urgency.NEEDED, f"block {number}")
        for number, offset in enumerate(offsets)
    ]
    start_s, ended = time.perf_counter(), 0
    for read in reads:
        reader.submit(read)
    while ended < len(reads):
        reader.wait()
        ended += len(reader.take_ended())
    took_s = time.perf_counter() - start_s
    for read in reads:
        if read.error is not None:
            raise read.error
    return len(reads) * size / took_s * 1e-9, [read.end_us - read.start_us for read in reads]


@contextmanager
def _sample(place: Path, size: int) -> Iterator[Path]:
    """The file `place`, or one of random bytes in the folder `place`."""
    if place.is_file():
        if place.stat().st_size < LEAST_RECORDS * size:
            least = size_text(LEAST_RECORDS * size)
            raise FileError(f"{place} is too short to measure its disk: {least} or more are read; give a folder")
        yield place
        return
    with ExitStack() as removed:
        try:
            place.mkdir(parents=True, exist_ok=True)
            folder = removed.enter_context(tempfile.TemporaryDirectory(prefix="hybrimoe-disk-", dir=place))
            path = Path(folder) / "sample"
            _write_sample(path, size)
        except OSError as error:
            what = error.strerror or error
            raise FileError(f"{place} cannot be written to, to measure its disk: {what}") from error
        yield path


def _write_sample(path: Path, size: int) -> None:
    """Random records, on the disk when this returns. Raises OSError, FileError where there is too little room."""
    room = min(int(min(SAMPLE_BYTES, FREE_SHARE * shutil.disk_usage(path.parent).free)) // size, MOST_RECORDS)
    if room < LEAST_RECORDS:
        needed = size_text(int(LEAST_RECORDS * size / FREE_SHARE))
        raise FileError(f"{path.parent.parent} has too little room to measure its disk: {needed} are to be free")
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(room):
            file.write(generator.bytes(size))
        file.flush()
        os.fsync(file.fileno())
