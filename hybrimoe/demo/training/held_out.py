"""The held-out text that ships beside the demo model, for quality figures: an excerpt of each domain.

python -m hybrimoe.demo.training.held_out --corpora corpora --out hybrimoe/demo/model/held-out.txt
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hybrimoe.demo.training.corpora import SOURCES, Document, read_corpora

__all__ = ["EXCERPT_CHARS", "excerpt"]

EXCERPT_CHARS = 9_000
"""Of each domain: about five windows of 512 tokens."""


def excerpt(documents: Sequence[Document], n_chars: int = EXCERPT_CHARS) -> str:
    """The first paragraphs of the held-out documents of each domain, at least `n_chars` of each where there is so much.

    No document is trained on; domains follow one another in the order of `SOURCES`.
    """
    parts = []
    for domain in SOURCES:
        held_out = (d.text for d in documents if d.domain == domain and d.held_out)
        paragraphs = (p for text in held_out for p in text.strip().split("\n\n"))
        length = 0
        for paragraph in paragraphs:
            if length >= n_chars:
                break
            parts.append(paragraph)
            length += len(paragraph)
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="Directory of the unpacked packages.")
    parser.add_argument("--out", type=Path, required=True, help="File to write.")
    arguments = parser.parse_args()
    arguments.out.write_text(excerpt(read_corpora(arguments.corpora)), encoding="utf-8")


if __name__ == "__main__":
    main()
