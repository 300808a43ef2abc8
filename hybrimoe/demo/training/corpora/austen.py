"""r-cran-janeaustenr: six novels as character vectors in an R lazy-load database."""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hybrimoe.demo.training.corpora.document import Document, largest_file
from hybrimoe.demo.training.errors import CorpusError

_R_HEADER = b"X\n"
_R_CHARSXP = 9
_R_STRSXP = 16
_R_NA_LENGTH = 0xFFFFFFFF
_CHAPTER = re.compile(r"^\s*chapter\s+([ivxlc]+|\d+)\.?\s*$", re.IGNORECASE)


def read_austen(root: Path) -> Iterator[Document]:
    """The novels of the R package janeaustenr, one document a chapter."""
    path = largest_file(root, "Rdata.rdb")
    for number, blob in enumerate(r_lazyload_blobs(path.read_bytes())):
        lines = r_character_vector(blob)
        title = next((line.strip() for line in lines if line.strip()), f"book {number}")
        for chapter, text in enumerate(_split_chapters(lines)):
            yield Document("austen", f"{title}/{chapter}", text)


def r_lazyload_blobs(data: bytes) -> Iterator[bytes]:
    """Unpacks an .rdb file: repeated [big-endian u32 unpacked length][zlib stream]."""
    offset = 0
    while offset < len(data):
        stream = zlib.decompressobj()
        try:
            (length,) = struct.unpack_from(">I", data, offset)
            blob = stream.decompress(data[offset + 4 :]) + stream.flush()
        except (struct.error, zlib.error) as error:
            raise CorpusError(f"expected [u32 length][zlib] at byte {offset} of the .rdb file: {error}") from error
        if len(blob) != length or not stream.eof:
            raise CorpusError(f"expected {length} bytes from the blob at byte {offset}, found {len(blob)}")
        yield blob
        offset = len(data) - len(stream.unused_data)


def r_character_vector(blob: bytes) -> list[str]:
    """Decodes a serialised R character vector (XDR, serialisation version 2 or 3); NA becomes an empty line."""
    if not blob.startswith(_R_HEADER):
        raise CorpusError(f"expected an XDR serialisation (b'X\\n'), found {blob[:2]!r}")
    try:
        (version,) = struct.unpack_from(">I", blob, 2)
        offset = 14  # 'X\n', version, writer version, minimal reader version
        if version >= 3:
            (encoding_length,) = struct.unpack_from(">I", blob, offset)
            offset += 4 + encoding_length
        flags, count = struct.unpack_from(">II", blob, offset)
        if flags & 0xFF != _R_STRSXP:
            raise CorpusError(f"expected a character vector (type {_R_STRSXP}), found type {flags & 0xFF}")
        return list(_r_strings(blob, offset + 8, count))
    except struct.error as error:
        raise CorpusError(f"expected a whole character vector, found a truncated one: {error}") from error


def _r_strings(blob: bytes, offset: int, count: int) -> Iterator[str]:
    for index in range(count):
        flags, length = struct.unpack_from(">II", blob, offset)
        if flags & 0xFF != _R_CHARSXP:
            raise CorpusError(f"expected a string (type {_R_CHARSXP}) at element {index}, found type {flags & 0xFF}")
        offset += 8
        if length == _R_NA_LENGTH:
            yield ""
            continue
        if offset + length > len(blob):
            raise CorpusError(f"expected {length} bytes of string at element {index}, found {len(blob) - offset}")
        yield blob[offset : offset + length].decode("utf-8")
        offset += length


def _split_chapters(lines: Iterable[str]) -> Iterator[str]:
    """Cuts at lines that read 'Chapter N' and unwraps the paragraphs between."""
    chapter: list[str] = []
    for line in lines:
        if _CHAPTER.match(line) and chapter:
            yield unwrap(chapter)
            chapter = []
        chapter.append(line)
    yield unwrap(chapter)


def unwrap(lines: Iterable[str]) -> str:
    """Joins hard-wrapped lines: paragraphs, separated by blank lines, become one line each."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].extend(line.split())
        elif paragraphs[-1]:
            paragraphs.append([])
    return "\n\n".join(" ".join(words) for words in paragraphs if words)
