"""Headers of GGUF files: metadata, and where each tensor lies and what it is.

Not by `gguf.GGUFReader`: it makes several numpy views for each entry of a vocabulary (seconds for 150,000 tokens),
trusts the counts and lengths that it reads, and checks no bounds. Here nothing is taken that the file does not have
left, so that a damaged header ends in a CheckpointError before memory is asked for.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError, listed, stands_for
from hybrimoe.checkpoint.gguf.tensor_types import TYPES, TensorType
from hybrimoe.errors import CheckpointError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
PART_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
PROJECTOR_NAME = "mmproj"
"""In the names that llama.cpp's scripts give to files of a model's projector."""
SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = "general.alignment", 32, 1 << 16
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 1 << 16  # limit of the format
MAX_PARTS = 4096
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""struct formats of metadata values, by their number in a file."""
STRING, ARRAY = 8, 9
FLOAT32 = 6
SMALLEST_STRING_BYTES = 8  # its length
SMALLEST_TENSOR_BYTES = 32  # name length, one letter, number of dimensions, one of them, type and offset; rounded down


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file: where it lies and what it is. shape: in torch's order, the contiguous dimension last."""

    key: str
    file: Path
    kind: TensorType
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.kind.n_bytes(self.shape)

    @property
    def type_name(self) -> str:
        """Its type, as llama.cpp calls it."""
        return self.kind.name


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header of one file."""

    path: Path
    size_bytes: int
    header_sha256: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model: one file, or all parts of a split one. `metadata` is that of the first part."""

    files: tuple[GgufFile, ...]
    tensors: Mapping[str, GgufTensor]

    @property
    def path(self) -> Path:
        """The (first) file."""
        return self.files[0].path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key and value: numbers, truth values, text, or lists of one of them."""
        return self.files[0].metadata


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def first_part(path: Path) -> Path:
    """The first part of the split model that a file is a part of, if it is there; else the file itself."""
    name = PART_NAME.match(path.name)
    first = path if name is None else path.with_name(f"{name['stem']}-00001-of-{name['count']}{SUFFIX}")
    return first if first.is_file() else path


def first_parts(directory: Path) -> list[Path]:
    """The GGUF models of a folder: whole files, and of split ones the first part there is. What sees or hears for the
    model beside it (mmproj) is none."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        part = PART_NAME.match(path.name)
        if path.is_file() and PROJECTOR_NAME not in path.name.lower():
            found.setdefault(f"{part['stem']}-of-{part['count']}" if part else path.name, path)
    return list(found.values())


def open_gguf(path: Path) -> GgufModel:
    """Reads and checks the header of a file and, where it is a part of a split model, those of all its parts.

    Raises CheckpointError for a file that is truncated or damaged and for a part that is missing,
    UnsupportedCheckpointError for a version or a type of tensor that is not read.
    """
    opened = open_file(path)
    count = opened.metadata.get(SPLIT_COUNT, 0)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_PARTS:
        raise CheckpointError(f"{path}: {SPLIT_COUNT} is {count!r}; expected a number of files")
    if count <= 1:
        return GgufModel((opened,), opened.tensors)
    files = tuple(open_file(part) for part in _parts(path, count))
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        found = file.metadata.get(SPLIT_NUMBER), file.metadata.get(SPLIT_COUNT)
        if found != (number, count):
            raise CheckpointError(
                f"{file.path} says that it is part {found[0]!r} (counted from 0) of {found[1]!r}, its name that it is"
                f" {number} of {count}; fetch the parts again"
            )
        if twice := sorted(tensors.keys() & file.tensors.keys()):
            raise CheckpointError(f"{file.path} has {listed(twice)} once more: the parts are of different models")
        tensors |= file.tensors
    expected = files[0].metadata.get(SPLIT_TENSORS, len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{path}: the parts have {len(tensors)} tensors together, {SPLIT_TENSORS} is {expected}")
    return GgufModel(files, tensors)


def _parts(path: Path, count: int) -> list[Path]:
    name = PART_NAME.match(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model; expected a name like model-00001-of-{count:05}.gguf, by which"
            " the others are found"
        )
    paths = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}{SUFFIX}") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(f"{path.parent} lacks {listed(missing)} ({len(missing)} of {count} parts); fetch them")
    return paths


def open_file(path: Path) -> GgufFile:
    """Reads and checks the header of one file; errors as `open_gguf`."""
    try:
        status = path.stat()
        return _opened(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


@lru_cache(maxsize=16)
def _opened(path: Path, size_bytes: int, mtime_ns: int) -> GgufFile:
    """Cached by what tells a file from a newer one: its configuration, tokenizer and weights are asked for one by
    one. A vocabulary is most of a header and takes a second to read."""
    with path.open("rb", buffering=1 << 20) as stream:
        reader = _Reader(path, stream, size_bytes)
        if reader.take(len(MAGIC)) != MAGIC:
            raise reader.damaged(f"it does not start with {MAGIC.decode()}")
        _check_version(path, reader.number("<I"))
        n_tensors, n_values = reader.number("<Q"), reader.number("<Q")
        metadata = _metadata(reader, n_values)
        entries = _entries(reader, n_tensors)
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
            raise reader.damaged(f"{ALIGNMENT_KEY} is {alignment!r}")
        end = reader.position
        data = -(-end // alignment) * alignment
        tensors = _placed(reader, entries, data, alignment)
        stream.seek(0)
        digest = hashlib.sha256(stream.read(end)).hexdigest()
    return GgufFile(path, size_bytes, digest, metadata, tensors)


def _check_version(path: Path, version: int) -> None:
    if version in VERSIONS:
        return
    swapped = struct.unpack(">I", struct.pack("<I", version))[0]
    what = "big-endian" if swapped in VERSIONS else f"version {version}"
    raise UnsupportedCheckpointError(
        f"{path} is GGUF of {what}; readable are the versions {' and '.join(map(str, VERSIONS))}, little-endian."
        " Fetch the file again, or a newer conversion of the model"
    )


class _Reader:
    """Takes values off the front of a file, never more than it has left."""

    def __init__(self, path: Path, stream: BinaryIO, size_bytes: int) -> None:
        self.path, self.stream, self.size_bytes, self.position = path, stream, size_bytes, 0

    def take(self, n_bytes: int) -> bytes:
        """The next bytes."""
        self.need(n_bytes, 1)
        self.position += n_bytes
        raw = self.stream.read(n_bytes)
        if len(raw) < n_bytes:
            raise self.damaged("it became shorter while it was read")
        return raw

    def need(self, count: int, each_bytes: int) -> None:
        """Raises CheckpointError unless `count` entries of at least `each_bytes` can still follow."""
        if count * each_bytes > self.size_bytes - self.position:
            raise self.damaged(f"its header asks for {count * each_bytes} bytes at {self.position}")

    def number(self, form: str) -> Any:
        """One number or truth value."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def name(self) -> str:
        """A key or the name of a tensor."""
        length = self.number("<Q")
        if length > MAX_KEY_BYTES:
            raise self.damaged(f"a name of {length} bytes at {self.position}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name at {self.position - length} is no text") from error

    def text(self) -> str:
        """A text value; bytes that are no UTF-8 are replaced."""
        return self.take(self.number("<Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        """One value of metadata."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self._scalar(kind)
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            self.need(count, SMALLEST_STRING_BYTES)
            return [self.text() for _ in range(count)]
        form = self._form(kind)
        self.need(count, struct.calcsize(form))
        return list(struct.unpack(f"<{count}{form[1:]}", self.take(count * struct.calcsize(form))))

    def _scalar(self, kind: int) -> Any:
        return self.number(self._form(kind))

    def _form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.damaged(f"a value of the unknown kind {kind} at {self.position}")
        return SCALARS[kind]

    def damaged(self, what: str) -> CheckpointError:
        """The error for a header that cannot be true."""
        return CheckpointError(
            stands_for(self.path)
            or f"{self.path} is truncated or no valid GGUF file: it has {self.size_bytes} bytes, and {what}; fetch it"
            " again"
        )


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.name()
        if key in metadata:
            raise reader.damaged(f"the key {key} is there twice")
        metadata[key] = reader.value(reader.number("<I"))
    return metadata


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the header says of a tensor; the offset counts from the first tensor."""

    key: str
    kind: TensorType
    shape: tuple[int, ...]
    offset_bytes: int


def _entries(reader: _Reader, count: int) -> list[_Entry]:
    reader.need(count, SMALLEST_TENSOR_BYTES)
    return [_entry(reader) for _ in range(count)]


def _entry(reader: _Reader) -> _Entry:
    key, n_dimensions = reader.name(), reader.number("<I")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise reader.damaged(f"{key} has {n_dimensions} dimensions")
    shape = tuple(reversed([reader.number("<Q") for _ in range(n_dimensions)]))
    code, offset_bytes = reader.number("<I"), reader.number("<Q")
    if code not in TYPES:
        known = ", ".join(kind.name for kind in TYPES.values())
        raise UnsupportedCheckpointError(f"{reader.path}: {key} has a type of number {code}; readable are {known}")
    kind = TYPES[code]
    if 0 in shape or shape[-1] % kind.block_values:
        raise reader.damaged(f"{key} is {kind.name}{list(shape)}, which is no whole number of blocks")
    return _Entry(key, kind, shape, offset_bytes)


def _placed(reader: _Reader, entries: list[_Entry], data: int, alignment: int) -> dict[str, GgufTensor]:
    """The tensors by name; inside the file, apart from each other, aligned."""
    tensors: dict[str, GgufTensor] = {}
    end, before = data, ""
    for entry in sorted(entries, key=lambda entry: entry.offset_bytes):
        tensor = GgufTensor(entry.key, reader.path, entry.kind, entry.shape, data + entry.offset_bytes)
        if entry.key in tensors:
            raise reader.damaged(f"{entry.key} is there twice")
        if entry.offset_bytes % alignment or tensor.offset_bytes < end:
            raise reader.damaged(f"{entry.key} starts at {tensor.offset_bytes}, inside {before or 'the header'}")
        if tensor.offset_bytes - end >= alignment and before:  # llama.cpp writes no gaps, and reads none
            raise reader.damaged(f"{before} ends at {end}, and {entry.key} starts at {tensor.offset_bytes} only")
        end, before = tensor.offset_bytes + tensor.nbytes, entry.key
        if end > reader.size_bytes:
            raise reader.damaged(f"{entry.key} ends at {end}")
        tensors[entry.key] = tensor
    return {entry.key: tensors[entry.key] for entry in entries}
