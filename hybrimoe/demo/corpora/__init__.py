"""Reads the three training corpora as Debian packages ship them: novels (R), a Bible (SWORD), a manual (HTML).

Each reader yields `Document`s: one chapter or one page of plain text, with a stable name that decides for good
whether it is trained on or held out.
"""

from pathlib import Path

from hybrimoe.demo.corpora.austen import read_austen
from hybrimoe.demo.corpora.document import Document
from hybrimoe.demo.corpora.postgresql import read_postgresql
from hybrimoe.demo.corpora.sword import read_sword
from hybrimoe.demo.errors import CorpusError

__all__ = ["DEBIAN_PACKAGES", "DOMAINS", "Document", "read_corpora"]

MIN_DOCUMENT_CHARS = 200
"""Shorter pages are tables of contents and empty headings; they carry no prose."""

_READERS = {"austen": read_austen, "web": read_sword, "postgresql": read_postgresql}

DEBIAN_PACKAGES = {
    "austen": "r-cran-janeaustenr",
    "web": "sword-text-web",
    "postgresql": "postgresql-doc-15",
}
"""Domain -> Debian package, which is also the folder name expected below the corpora directory."""

DOMAINS = tuple(DEBIAN_PACKAGES)


def read_corpora(directory: Path) -> list[Document]:
    """All documents below `directory`, in a fixed order (by domain, then as the sources order them).

    Raises:
        CorpusError: a package folder is missing, or one of its files is not in the expected format.
    """
    documents: list[Document] = []
    for domain, package in DEBIAN_PACKAGES.items():
        root = directory / package
        if not root.is_dir():
            raise CorpusError(
                f"expected the unpacked Debian package in {root}, found no such directory; "
                f"run: apt-get download {package} && dpkg-deb -x {package}_*.deb {root}"
            )
        documents.extend(_READERS[domain](root))
    return [document for document in documents if len(document.text) >= MIN_DOCUMENT_CHARS]
