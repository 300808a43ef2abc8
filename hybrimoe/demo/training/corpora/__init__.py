"""Reads the three training corpora as Debian packages ship them: novels (R), a Bible (SWORD), a manual (HTML).

Each reader yields `Document`s: one chapter or one page of plain text, with a stable name that decides for good
whether it is trained on or held out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hybrimoe.demo.training.corpora.austen import read_austen
from hybrimoe.demo.training.corpora.document import Document
from hybrimoe.demo.training.corpora.postgresql import read_postgresql
from hybrimoe.demo.training.corpora.sword import read_sword
from hybrimoe.demo.training.errors import CorpusError

__all__ = ["SOURCES", "Document", "Source", "read_corpora"]

MIN_DOCUMENT_CHARS = 200
"""Shorter pages are tables of contents and empty headings; they carry no prose."""


@dataclass(frozen=True, slots=True)
class Source:
    """A Debian package with text: its name is also the folder expected below the corpora directory."""

    package: str
    version: str
    title: str
    licence: str
    reader: Callable[[Path], Iterator[Document]]


SOURCES = {
    "austen": Source(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "Jane Austen's six novels",
        "texts: public domain (Project Gutenberg); the R package: MIT",
        read_austen,
    ),
    "web": Source("sword-text-web", "426.0-1", "World English Bible with Deuterocanon", "public domain", read_sword),
    "postgresql": Source(
        "postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL 15 manual", "PostgreSQL licence", read_postgresql
    ),
}
"""Domain -> where its text comes from; the versions are those that the shipped model was trained on."""


def read_corpora(directory: Path) -> list[Document]:
    """All documents below `directory`, in a fixed order (by domain, then as the sources order them).

    Raises:
        CorpusError: a package folder is missing, or one of its files is not in the expected format.
    """
    documents: list[Document] = []
    for source in SOURCES.values():
        package = source.package
        root = directory / package
        if not root.is_dir():
            raise CorpusError(
                f"expected the unpacked Debian package in {root}, found no such directory; "
                f"run: apt-get download {package} && dpkg-deb -x {package}_*.deb {root}"
            )
        documents.extend(source.reader(root))
    return [document for document in documents if len(document.text) >= MIN_DOCUMENT_CHARS]
