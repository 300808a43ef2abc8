"""Packed experts on disk: what a store holds, in one file, so that the next start maps it instead of packing again.

File: magic, u32 header length, JSON header (format and record layout versions, layers, fingerprint of the sources),
padding to a page, then all records as they lie in an `ExpertStore`. A file is written under a temporary name, synced,
and renamed when it is whole: a half file never has the final name. Each writer has a temporary file of its own, locked
while it lives, so several processes may pack the same model at once, and files of killed ones are swept away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels import LAYOUT_VERSION
from cpu_kernels.jit.cache_dir import cache_home
from hybrimoe.checkpoint.safetensors_file import SafetensorsFile
from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import ByteArray, ExpertStore, LayerSpec

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows, which renames and removes no file that is open
    HAS_LOCKS = False

MAGIC = b"HYBRIMOE"
FORMAT_VERSION = 2
SUFFIX, PARTIAL_SUFFIX = ".hybrimoe", ".partial"
PAGE_BYTES = 4096
CHUNK_BYTES = 64 << 20  # written or read at a time
READERS = 4  # threads: copying from the page cache takes cores, reading from a disk takes waiting
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each checkpoint file, to notice weights that were replaced
KEY_DIGITS = 12  # of the hash in a file's name
FILE_MODE = 0o644


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A whole packed file that fits the model: `open` maps it, `read` copies it to page-locked memory."""

    path: Path
    layers: tuple[LayerSpec, ...]
    offset_bytes: int

    def open(self) -> ExpertStore:
        """A store over the mapped, read-only file."""
        n_bytes = sum(layer.nbytes for layer in self.layers)
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.offset_bytes, shape=(n_bytes,))
        return ExpertStore.from_buffer(self.layers, mapped)

    def read(self, progress: Callable[[int], None] = lambda n_bytes: None, *, pinned: bool = True) -> ExpertStore:
        """A store of its own, page-locked memory, filled from the file; for accelerators that copy from such memory.

        progress: called with the bytes read so far. Raises CheckpointError where the file is shorter than it was.
        """
        store = ExpertStore(self.layers, pinned=pinned)
        starts = range(0, store.nbytes, CHUNK_BYTES)
        with ThreadPoolExecutor(READERS) as pool:
            chunks = [store.buffer[start : start + CHUNK_BYTES].data for start in starts]
            places = [self.offset_bytes + start for start in starts]
            for done in pool.map(partial(_read_all, self.path), chunks, places):
                progress(done - self.offset_bytes)
        return store


def describe(layers: Sequence[LayerSpec], files: Sequence[SafetensorsFile]) -> dict[str, Any]:
    """The header that a packed file must have to stand for these layers, packed from these checkpoint files."""
    return {
        "format": FORMAT_VERSION,
        "layout": LAYOUT_VERSION,
        "layers": [
            {
                "path": layer.path,
                "num_experts": layer.num_experts,
                "hidden": layer.spec.hidden,
                "inter": layer.spec.inter,
                "dtype": layer.spec.dtype,
                "has_bias": layer.spec.has_bias,
                "gated": layer.spec.activation.gated,
                "record_bytes": layer.spec.record_bytes,
            }
            for layer in layers
        ],
        "source": [[f.path.name, f.size_bytes, f.path.stat().st_mtime_ns, f.header_sha256, _sampled(f)] for f in files],
    }


def _sampled(file: SafetensorsFile) -> str:
    """A hash of blocks at even distances over all of a file, its end among them: other weights of the same name, size
    and time are other samples, and a file of any size takes a few milliseconds."""
    last = max(0, file.size_bytes - SAMPLE_BYTES)
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as stream:
        for index in range(SAMPLES):
            stream.seek(last * index // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def file_name(header: dict[str, Any]) -> str:
    """Name of the packed file: the dtypes in it and a hash of layers and layout, so that variants lie side by side."""
    dtypes = "-".join(sorted({layer["dtype"] for layer in header["layers"]}))
    key = hashlib.sha256(json.dumps([header["layout"], header["layers"]]).encode()).hexdigest()[:KEY_DIGITS]
    return f"experts-{dtypes}-{key}{SUFFIX}"


def folders(directory: Path, *, beside: bool) -> tuple[Path, ...]:
    """Where the packed file of a model may lie, best first: beside it, then in the cache directory."""
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:KEY_DIGITS]
    cache = cache_home() / f"{directory.resolve().name}-{key}"
    return (directory, cache) if beside else (cache,)


def find(places: Sequence[Path], layers: tuple[LayerSpec, ...], header: dict[str, Any]) -> PackedFile | None:
    """The packed file for these layers in one of `places`; None where none is whole and fresh."""
    for place in places:
        path = place / file_name(header)
        with contextlib.suppress(OSError):
            offset_bytes = _matching_offset(path, header)
            if offset_bytes is not None:
                return PackedFile(path, layers, offset_bytes)
    return None


def write(place: Path, records: ByteArray, header: dict[str, Any]) -> Path:
    """Writes a packed file into `place` (made if missing), returns its path. Raises OSError; then nothing is left."""
    with _whole_or_nothing(place, header) as (descriptor, offset_bytes):
        for start in range(0, records.nbytes, CHUNK_BYTES):
            _write_all(descriptor, records[start : start + CHUNK_BYTES].data, offset_bytes + start)
    return place / file_name(header)


@contextlib.contextmanager
def fill(place: Path, layers: tuple[LayerSpec, ...], header: dict[str, Any]) -> Iterator[ExpertStore]:
    """A writable store over a packed file in the making, for experts that do not fit memory.

    The file is kept if the block ends well. Raises OSError; then nothing is left.
    """
    n_bytes = sum(layer.nbytes for layer in layers)
    with _whole_or_nothing(place, header) as (descriptor, offset_bytes):
        with os.fdopen(os.dup(descriptor), "r+b") as file:
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", offset=offset_bytes, shape=(n_bytes,))
        yield ExpertStore.from_buffer(layers, mapped)
        mapped.flush()


@contextlib.contextmanager
def _whole_or_nothing(place: Path, header: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """A locked temporary file with header and room for the records (its descriptor, where records start), renamed to
    its final name when the block ends well, removed when it does not."""
    place.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    path, head = place / file_name(header), _encode(header)
    descriptor, name = tempfile.mkstemp(prefix=path.stem + "-", suffix=PARTIAL_SUFFIX, dir=place)
    opened = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        if HAS_LOCKS:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _reserve(descriptor, len(head) + _records_bytes(header))
        _write_all(descriptor, memoryview(head), 0)
        yield descriptor, len(head)
        os.fsync(descriptor)
        os.chmod(name, FILE_MODE)
        if not HAS_LOCKS:  # such a system renames no open file; where there are locks, it stays locked until then
            opened.close()
        os.replace(name, path)
        _sync_folder(place)
    except BaseException:
        if not HAS_LOCKS:
            opened.close()
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    finally:
        opened.close()


def _matching_offset(path: Path, header: dict[str, Any]) -> int | None:
    """Where the records start, if the file is whole and its header is `header`."""
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + 4)
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            return None
        (length,) = struct.unpack("<I", start[len(MAGIC) :])
        try:
            found = json.loads(file.read(length))
        except ValueError:
            return None
    offset_bytes = -(-(len(MAGIC) + 4 + length) // PAGE_BYTES) * PAGE_BYTES
    whole = path.stat().st_size == offset_bytes + _records_bytes(header)
    return offset_bytes if whole and found == header else None


def _encode(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text
    return head + bytes(-len(head) % PAGE_BYTES)


def _write_all(descriptor: int, chunk: memoryview, offset_bytes: int) -> None:
    os.lseek(descriptor, offset_bytes, os.SEEK_SET)
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def _read_all(path: Path, chunk: memoryview, offset_bytes: int) -> int:
    """Fills `chunk` from the file, opened anew as threads share no position in it; returns where it ends there."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset_bytes)
        while chunk:
            count = file.readinto(chunk) or 0
            if not count:
                raise CheckpointError(
                    "the packed experts were cut short while they were read; start again to pack them"
                )
            chunk, offset_bytes = chunk[count:], offset_bytes + count
    return offset_bytes


def _records_bytes(header: dict[str, Any]) -> int:
    return sum(layer["num_experts"] * layer["record_bytes"] for layer in header["layers"])


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Takes the space at once, so that a full disk is found before anything is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)


def _sweep(place: Path) -> None:
    """Removes partial files whose writer is gone (nobody holds their lock)."""
    for unfinished in place.glob(f"*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            if not HAS_LOCKS:  # such a system refuses to remove a file that its writer has open
                unfinished.unlink()
                continue
            with unfinished.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unfinished.unlink()


def _sync_folder(place: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
