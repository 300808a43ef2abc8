"""A file of packed records, whole or not there: what packed experts and packed dense layers are kept in between starts.

File: magic, u32 header length, JSON header, padding to a page, then all records as they lie in memory. A file is
written under a temporary name, synced, and renamed when it is whole: a half file never has the final name. Each writer
has a temporary file of its own, locked while it lives, so several processes may pack the same model at once, and files
of killed ones are swept away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from cpu_kernels.jit.cache_dir import cache_home
from hybrimoe.checkpoint.source import packed_folder
from hybrimoe.checkpoint.stored import WeightFile
from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import ByteArray
from hybrimoe.text_files import parse_json

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows, which renames and removes no file that is open
    HAS_LOCKS = False

Header = dict[str, Any]
"""What a file must say of itself to be used: JSON values only."""

ADAPTERS = "adapters"
"""The header's entry for what is merged into the records; packs without adapters have none."""

MAGIC = b"HYBRIMOE"
SUFFIX, PARTIAL_SUFFIX = ".hybrimoe", ".partial"
PAGE_BYTES = 4096
CHUNK_BYTES = 64 << 20  # written or read at a time
READERS = 4  # threads: copying from the page cache takes cores, reading from a disk takes waiting
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each checkpoint file, to notice weights that were replaced
KEY_DIGITS = 12  # of the hash in a file's name
FILE_MODE = 0o644


def folders(model: Path, *, beside: bool) -> tuple[Path, ...]:
    """Where the packed files of a model (a directory or a GGUF file) may lie, best first: beside it, then in the cache
    directory."""
    key = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:KEY_DIGITS]
    cache = cache_home() / f"{model.resolve().name}-{key}"
    return (packed_folder(model), cache) if beside else (cache,)


def other_folders(places: Collection[Path]) -> tuple[Path, ...]:
    """Folders of the cache that are not among `places`: what a model has left there that lay elsewhere when it was
    packed. Its files say what they were made from, so that those of other models are passed over."""
    found = sorted(cache_home().glob(f"*-{'[0-9a-f]' * KEY_DIGITS}"))
    return tuple(folder for folder in found if folder not in places)


def with_adapters(header: Header, adapters: Sequence[str]) -> Header:
    """The header of records that adapters of these identities are merged into; as it was where there are none."""
    return {**header, ADAPTERS: list(adapters)} if adapters else header


def name_of(what: str, dtypes: Collection[str], key: list[Any], header: Header) -> str:
    """A file's name: what it holds, in which dtypes, and a hash of `key` and of the header's adapters, so that variants
    lie side by side."""
    known = [*key, header[ADAPTERS]] if ADAPTERS in header else key
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:KEY_DIGITS]
    return f"{what}-{'-'.join(sorted(dtypes))}-{digest}{SUFFIX}"


def stamps(files: Sequence[WeightFile], sampled_keys: Collection[str] = ()) -> list[list[Any]]:
    """What tells each checkpoint file from one with other weights: name, size, time, header and samples of it.

    sampled_keys: tensors of which a block of their own is among the samples.
    """
    return [
        [f.path.name, f.size_bytes, f.path.stat().st_mtime_ns, f.header_sha256, _sampled(f, sampled_keys)]
        for f in files
    ]


def find(path: Path, header: Header, n_bytes: int) -> int | None:
    """Where the records of the file start, in bytes; None unless it is whole and says `header` of itself."""
    with contextlib.suppress(OSError):
        return _matching_offset(path, header, n_bytes)
    return None


def write(path: Path, records: ByteArray, header: Header) -> None:
    """Writes a file (its folder is made if missing). Raises OSError; then nothing is left."""
    with whole_or_nothing(path, header, records.nbytes) as (descriptor, offset_bytes):
        for start in range(0, records.nbytes, CHUNK_BYTES):
            _write_all(descriptor, records[start : start + CHUNK_BYTES].data, offset_bytes + start)


def read(
    path: Path, offset_bytes: int, records: ByteArray, progress: Callable[[int], None] = lambda n_bytes: None
) -> None:
    """Fills `records` from the file. progress: called with the bytes read so far.

    Raises CheckpointError where the file is shorter than it was.
    """
    starts = range(0, records.nbytes, CHUNK_BYTES)
    with ThreadPoolExecutor(READERS) as pool:
        chunks = [records[start : start + CHUNK_BYTES].data for start in starts]
        places = [offset_bytes + start for start in starts]
        for done in pool.map(partial(_read_all, path), chunks, places):
            progress(done - offset_bytes)


@contextlib.contextmanager
def whole_or_nothing(path: Path, header: Header, n_bytes: int) -> Iterator[tuple[int, int]]:
    """A locked temporary file with header and room for `n_bytes` of records (its descriptor, where records start),
    renamed to `path` when the block ends well, removed when it does not."""
    place, head = path.parent, _encode(header)
    place.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    opened, name = _partial(path)
    descriptor = opened.fileno()
    try:
        _reserve(descriptor, len(head) + n_bytes)
        _write_all(descriptor, memoryview(head), 0)
        yield descriptor, len(head)
        os.fsync(descriptor)
        os.chmod(name, FILE_MODE)
        if not HAS_LOCKS:  # such a system renames no open file; where there are locks, it stays locked until then
            opened.close()
        os.replace(name, path)
        sync_folder(place)
    except BaseException:
        if not HAS_LOCKS:
            opened.close()
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    finally:
        opened.close()


def _partial(path: Path) -> tuple[FileIO, str]:
    """A new partial file for `path`, locked, and its name."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=path.stem + "-", suffix=PARTIAL_SUFFIX, dir=path.parent)
        opened = os.fdopen(descriptor, "r+b", buffering=0)
        if not HAS_LOCKS:
            return opened, name
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            opened.close()
            os.unlink(name)
            raise
        if os.fstat(descriptor).st_nlink:
            return opened, name
        opened.close()  # before it was locked, another process took it for one that was left behind, and removed it


def _sampled(file: WeightFile, sampled_keys: Collection[str]) -> str:
    """A hash of blocks at even distances over all of a file, its end among them, and in the middle of some tensors:
    other weights of the same name, size and time are other samples, and a file of any size takes a few milliseconds."""
    last = max(0, file.size_bytes - SAMPLE_BYTES)
    places = [last * index // (SAMPLES - 1) for index in range(SAMPLES)]
    chosen = [file.tensors[key] for key in sorted(sampled_keys) if key in file.tensors]
    places += [tensor.offset_bytes + max(0, tensor.nbytes - SAMPLE_BYTES) // 2 for tensor in chosen]
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as stream:
        for place in places:
            stream.seek(place)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _matching_offset(path: Path, header: Header, n_bytes: int) -> int | None:
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + 4)
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            return None
        (length,) = struct.unpack("<I", start[len(MAGIC) :])
        try:
            found = parse_json(file.read(length))
        except ValueError:
            return None
    offset_bytes = -(-(len(MAGIC) + 4 + length) // PAGE_BYTES) * PAGE_BYTES
    whole = path.stat().st_size == offset_bytes + n_bytes
    return offset_bytes if whole and found == header else None


def _encode(header: Header) -> bytes:
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
                raise CheckpointError(f"{path} was cut short while it was read; start again to pack the model anew")
            chunk, offset_bytes = chunk[count:], offset_bytes + count
    return offset_bytes


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


def sync_folder(place: Path) -> None:
    """Makes what was renamed or removed in a folder last over a power cut. Raises OSError."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
