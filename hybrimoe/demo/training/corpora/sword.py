"""sword-text-web: the World English Bible as a SWORD zText module with OSIS markup."""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hybrimoe.demo.training.corpora.document import Document, largest_file
from hybrimoe.demo.training.errors import CorpusError

_NOTE = re.compile(r"<note\b.*?</note>|<title\b.*?</title>|<reference\b.*?</reference>", re.DOTALL)
_PARAGRAPH = re.compile(r'<div\b[^>]*\bsID="[^"]*"[^>]*\btype="x-p"[^>]*/?>|<lb\b[^>]*/?>')
_VERSE_LINE = re.compile(r'<l\b[^>]*\bsID="[^"]*"[^>]*/?>')
_TAG = re.compile(r"<[^>]*>")
_CHAPTER_MARK = re.compile(r'<chapter\b[^>]*\bosisID="([^"]+)"[^>]*\bsID=[^>]*/>')
_BOOK_TITLE = re.compile(r'<milestone\b[^>]*\bn="([^"]*)"[^>]*\btype="x-usfm-toc2"[^>]*/>')
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&amp;": "&"}


def read_sword(root: Path) -> Iterator[Document]:
    """A SWORD zText module, one document a chapter, verses joined to paragraphs, notes left out."""
    for testament in ("ot", "nt"):
        index = largest_file(root, f"{testament}.bzs")
        entries = ztext_entries(*(index.with_suffix(suffix).read_bytes() for suffix in (".bzs", ".bzv", ".bzz")))
        yield from _sword_chapters(entries)


def ztext_entries(blocks: bytes, verses: bytes, compressed: bytes) -> Iterator[str]:
    """Decodes zText, verse by verse.

    `blocks` is an array of little-endian u32 (offset, size, unpacked size), one entry a zlib block of `compressed`;
    `verses` is one of (u32 block, u32 start, u16 size).
    """
    unpacked: dict[int, bytes] = {}
    for block, start, size in struct.iter_unpack("<IIH", verses):
        if size == 0:
            continue
        if block not in unpacked:
            unpacked = {block: _ztext_block(blocks, compressed, block)}
        if start + size > len(unpacked[block]):
            raise CorpusError(f"expected {size} bytes at {start} of block {block}, found {len(unpacked[block])} in all")
        yield unpacked[block][start : start + size].decode("utf-8")


def _ztext_block(blocks: bytes, compressed: bytes, number: int) -> bytes:
    try:
        offset, size, length = struct.unpack_from("<III", blocks, 12 * number)
        data = zlib.decompress(compressed[offset : offset + size])
    except (struct.error, zlib.error) as error:
        raise CorpusError(f"expected a zlib block {number} in the SWORD module: {error}") from error
    if len(data) != length:
        raise CorpusError(f"expected {length} bytes in block {number} of the SWORD module, found {len(data)}")
    return data


def _sword_chapters(entries: Iterable[str]) -> Iterator[Document]:
    """Cuts the verses at chapter marks; what stands before a book's first mark is front matter and is left out."""
    title, chapter, verses = "", "", list[str]()
    for entry in entries:
        if found := _BOOK_TITLE.search(entry):
            if chapter:
                yield _sword_document(chapter, title, verses)
            title, chapter, verses = found.group(1), "", []
        position = 0
        for mark in _CHAPTER_MARK.finditer(entry):
            if chapter:
                yield _sword_document(chapter, title, [*verses, entry[position : mark.start()]])
            chapter, verses, position = mark.group(1), [], mark.end()
        if chapter:
            verses.append(entry[position:])
    if chapter:
        yield _sword_document(chapter, title, verses)


def _sword_document(chapter: str, title: str, verses: list[str]) -> Document:
    number = chapter.rpartition(".")[2]
    return Document("web", chapter, f"{title} {number}\n\n{osis_text(' '.join(verses))}")


def osis_text(markup: str) -> str:
    """Plain text of OSIS markup: notes and titles dropped, paragraphs as blank lines, verse lines as newlines."""
    text = _NOTE.sub("", markup)
    text = _VERSE_LINE.sub("\n", _PARAGRAPH.sub("\n\n", text))
    text = _TAG.sub("", text)
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", re.sub(r"[ \t]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()
