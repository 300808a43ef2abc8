"""postgresql-doc-15: the PostgreSQL manual in HTML."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from hybrimoe.demo.training.corpora.document import Document
from hybrimoe.demo.training.errors import CorpusError

_SKIPPED_PAGES = re.compile(r"^(bookindex|index|legalnotice|biblio|acronyms|contributors)\.html$")


def read_postgresql(root: Path) -> Iterator[Document]:
    """The pages of the PostgreSQL manual, one document each; indexes and notices left out."""
    pages = sorted(root.rglob("*.html"), key=lambda page: page.name)
    if not pages:
        raise CorpusError(f"expected HTML pages below {root}, found none")
    for page in pages:
        if not _SKIPPED_PAGES.match(page.name):
            yield Document("postgresql", page.stem, html_text(page.read_text(encoding="utf-8")))


def html_text(markup: str) -> str:
    """Plain text of a page: headings, paragraphs, list items and cells as lines, <pre> kept as it is."""
    parser = _PageText()
    parser.feed(markup)
    parser.close()
    return parser.text()


class _PageText(HTMLParser):
    """Collects the blocks of a page; what lies in a navigation bar, head, script or index list is dropped."""

    _BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "li", "tr", "div", "table", "pre"})
    _DROPPED_CLASSES = frozenset({"navheader", "navfooter", "toc", "index"})
    _VOID = frozenset({"br", "hr", "img", "meta", "link", "input", "col"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[str] = []
        self._current: list[str] = []
        self._dropped_depth = 0
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._VOID:
            if tag == "br" and not self._dropped_depth:
                self._current.append("\n" if self._pre_depth else " ")
            return
        classes = set((dict(attrs).get("class") or "").split())
        if self._dropped_depth or tag in ("head", "script", "style") or classes & self._DROPPED_CLASSES:
            self._dropped_depth += 1
            return
        if tag in self._BLOCKS:
            self._end_block()
        if tag == "pre":
            self._pre_depth += 1
        if tag in ("td", "th"):
            self._current.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._VOID:
            return
        if self._dropped_depth:
            self._dropped_depth -= 1
            return
        if tag in self._BLOCKS:
            self._end_block()
        if tag == "pre":
            self._pre_depth = max(0, self._pre_depth - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if not self._dropped_depth:
            self._current.append(data)

    def text(self) -> str:
        self._end_block()
        return "\n\n".join(self._blocks)

    def _end_block(self) -> None:
        joined = "".join(self._current)
        self._current = []
        block = joined.strip("\n").rstrip() if self._pre_depth else " ".join(joined.split())
        if block.strip():
            self._blocks.append(block.replace("\u00a0", " "))
