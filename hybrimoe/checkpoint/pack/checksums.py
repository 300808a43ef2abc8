"""Checksums of a pack: of every record and tensor, and of all that lies between them, so that no byte is without one.

The file is two lines: a hash of the second, and JSON that lists for each file of the pack its sections in order, as
[name, bytes, hash].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hybrimoe.checkpoint.pack.manifest import MOST_SIZE, SHOWN_CHARACTERS, Manifest, read_manifest
from hybrimoe.checkpoint.pack.record_file import READERS
from hybrimoe.checkpoint.progress import Progress
from hybrimoe.checkpoint.safetensors_file import open_safetensors
from hybrimoe.checkpoint.source import CHECKSUMS_NAME, CONFIG_NAME, MANIFEST_NAME, SINGLE_NAME, check_pack
from hybrimoe.errors import CheckpointError
from hybrimoe.text_files import parse_json

DIGITS = 16  # of each hash: 64 bits, for accidents and not for attacks
CHUNK_BYTES = 8 << 20
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Of configurations, tokenizers and chat templates."""
WHOLE, HEADER = "the file", "the header"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a file with a checksum of its own."""

    file: Path
    name: str
    offset_bytes: int
    n_bytes: int

    def digest(self) -> str:
        """Of what lies there now; of a file that ends before, of what is there. Raises OSError."""
        found, left = hashlib.sha256(), self.n_bytes
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.offset_bytes)
            while left and (chunk := opened.read(min(left, CHUNK_BYTES))):
                found.update(chunk)
                left -= len(chunk)
        return found.hexdigest()[:DIGITS]


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check found. damaged: file and record or tensor, in a sentence each; none where all is as written."""

    path: str
    n_files: int
    n_sections: int
    n_bytes: int
    damaged: tuple[str, ...]


def write_checksums(folder: Path, show: Progress) -> None:
    """Hashes everything in the folder of a pack. Raises OSError and CheckpointError."""
    manifest = _manifest(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS_NAME)
    sections = [section for file in files for section in _sections(folder, file, manifest)]
    digests = _digests(sections, show)
    listed: dict[str, list[Any]] = {}
    for section, digest in zip(sections, digests, strict=True):
        name = section.file.relative_to(folder).as_posix()
        listed.setdefault(name, []).append([section.name, section.n_bytes, digest])
    text = json.dumps(listed, separators=(",", ":"))
    (folder / CHECKSUMS_NAME).write_text(f"{_hash(text)}\n{text}\n", encoding="utf-8")


def verify_pack(folder: Path, show: Progress = lambda done, total, what: None) -> Verified:
    """Compares every byte of a pack with its checksums.

    Raises CheckpointError where the folder is no pack, or its checksums are missing or damaged themselves.
    """
    check_pack(folder)
    listed = _read(folder / CHECKSUMS_NAME)
    expected = {section: digest for name, rows in listed.items() for section, digest in _listed(folder / name, rows)}
    damaged = [f"{file.name}: {_size_text(file, rows)}" for file, rows in _other_sizes(folder, listed)]
    there = {section: digest for section, digest in expected.items() if section.file.is_file()}
    found = _digests(list(there), show)
    damaged += [
        f"{section.file.name}: {section.name} is not what was written"
        for (section, digest), now in zip(there.items(), found, strict=True)
        if digest != now
    ]
    if not damaged:  # so that the manifest is what was written
        damaged = [f"{name}: it has no checksum" for name in _read_by_loading(folder) if name not in listed]
        damaged += _named_otherwise(folder, listed)
    n_bytes = sum(section.n_bytes for section in expected)
    return Verified(str(folder), len(listed), len(expected), n_bytes, tuple(damaged))


def _read_by_loading(folder: Path) -> list[str]:
    """Names of the files without which a pack is none, and of those beside them that change what a model says. What
    sessions leave there (learnt routing, uses of experts) is none of them. Raises CheckpointError."""
    beside = [file.name for file in folder.iterdir() if file.is_file() and file.suffix in TEXT_SUFFIXES]
    return list(dict.fromkeys((MANIFEST_NAME, CONFIG_NAME, *_manifest(folder).files, *sorted(beside))))


def _named_otherwise(folder: Path, listed: Mapping[str, list[Any]]) -> list[str]:
    """What a list of checksums says of parts that the files do not have: it is of another pack, or was edited."""
    manifest = _manifest(folder)
    return [
        f"{name}: the list of checksums has other names or sizes for its parts"
        for name, rows in listed.items()
        if [(row[0], row[1]) for row in rows]
        != [(s.name, s.n_bytes) for s in _sections(folder, folder / name, manifest)]
    ]


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}")
    return manifest


def _sections(folder: Path, file: Path, manifest: Manifest) -> Iterator[Section]:
    """All of a file, without gaps."""
    size, end = file.stat().st_size, 0
    if file.parent == folder:
        for name, start, n_bytes in _named_parts(file, manifest, size):
            if start > end:
                yield Section(file, HEADER, end, start - end)
            yield Section(file, name, start, n_bytes)
            end = start + n_bytes
    if size > end or not size:
        yield Section(file, WHOLE if not end else "the end", end, size - end)


def _named_parts(file: Path, manifest: Manifest, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, bytes) of the records or tensors of a file, in order; none of a file that holds no weights."""
    if file.name == SINGLE_NAME:
        tensors = sorted(open_safetensors(file).tensors.values(), key=lambda tensor: tensor.offset_bytes)
        yield from ((tensor.key, tensor.offset_bytes, tensor.nbytes) for tensor in tensors if tensor.nbytes)
        return
    parts: list[tuple[str, int]] = []
    if file.name == manifest.experts:
        parts = [
            (f"{layer['path']}, expert {expert}", layer["record_bytes"])
            for layer in manifest.layers
            for expert in range(layer["num_experts"])
        ]
    elif file.name == manifest.dense:
        from cpu_kernels import LinearSpec

        parts = [
            (f"{path}.weight", LinearSpec(columns, rows, dtype).record_bytes)
            for path, rows, columns, dtype, _ in manifest.linears
        ]
    start = size - sum(n_bytes for _, n_bytes in parts)
    for name, n_bytes in parts:
        yield name, start, n_bytes
        start += n_bytes


def _digests(sections: list[Section], show: Progress) -> list[str]:
    total, done, digests = sum(section.n_bytes for section in sections), 0, []
    with ThreadPoolExecutor(READERS) as pool:
        for section, digest in zip(sections, pool.map(Section.digest, sections), strict=True):
            digests.append(digest)
            done += section.n_bytes
            show(done, total, "checksums")
    return digests


def _read(file: Path) -> Mapping[str, list[Any]]:
    try:
        first, text = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if _hash(text) != first:
            raise ValueError("its own checksum differs")
        listed: Mapping[str, list[Any]] = parse_json(text)
        _check_listed(listed)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is missing or damaged ({error}); copy the pack again, or `hybrimoe convert` the model again"
        ) from error
    return listed


def _check_listed(listed: Any) -> None:
    """Raises ValueError for what `write_checksums` does not write: sizes are read, and names are opened."""
    if not isinstance(listed, dict):
        raise ValueError("it is no list of files")
    for name, rows in listed.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not isinstance(rows, list):
            raise ValueError(f"it lists {name[:SHOWN_CHARACTERS]!r}, which is no file of the folder")
        for row in rows:
            whole = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[2], str)
            if not whole or type(row[1]) is not int or not 0 <= row[1] <= MOST_SIZE:
                raise ValueError(f"{name}: expected name, bytes and hash, found {str(row)[:SHOWN_CHARACTERS]}")


def _listed(file: Path, rows: list[Any]) -> Iterator[tuple[Section, str]]:
    offset = 0
    for name, n_bytes, digest in rows:
        yield Section(file, name, offset, n_bytes), digest
        offset += n_bytes


def _other_sizes(folder: Path, listed: Mapping[str, list[Any]]) -> Iterator[tuple[Path, list[Any]]]:
    for name, rows in listed.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != sum(row[1] for row in rows):
            yield file, rows


def _size_text(file: Path, rows: list[Any]) -> str:
    expected = sum(row[1] for row in rows)
    return f"it has {file.stat().st_size} bytes, {expected} were written" if file.is_file() else "it is missing"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
