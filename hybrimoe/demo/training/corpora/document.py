"""One unit of training text, and whether it may be trained on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from hybrimoe.demo.training.errors import CorpusError

__all__ = ["HELD_OUT_PERCENT", "Document", "largest_file"]

HELD_OUT_PERCENT = 4
"""Share of the documents of every domain that is never trained on."""


@dataclass(frozen=True, slots=True)
class Document:
    """One chapter or page: `domain` names its corpus, `name` is unique within it."""

    domain: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by a hash of domain and name alone, so that no other document can change it."""
        digest = hashlib.sha256(f"{self.domain}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def largest_file(root: Path, name: str) -> Path:
    """The file called `name` below `root` that is largest, if packages carry several of that name."""
    found = sorted(root.rglob(name), key=lambda path: (-path.stat().st_size, str(path)))
    if not found:
        raise CorpusError(f"expected a file named {name} below {root}, found none; is the package unpacked there?")
    return found[0]
