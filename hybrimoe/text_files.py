"""Text files as people have them: UTF-8, also behind the mark (BOM) that editors of Windows write, and UTF-16 or UTF-32
where a mark says so."""

from __future__ import annotations

import codecs
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrimoe.errors import PromptError

ENCODINGS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MARKS = tuple(mark for mark, _ in ENCODINGS)
MARK = "\ufeff"
"""What a mark is once it is decoded."""
MODEL_TEXTS = ("*.json", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
"""Texts of a model folder that transformers and tokenizers read."""
OTHER_FILES = ("*.model", "*.tiktoken")
"""What else of a model folder makes its tokenizer."""


def read_text(path: Path) -> str:
    """The text of a file, with `\\n` at the ends of lines and without a mark. Raises OSError, UnicodeDecodeError."""
    return decoded(path.read_bytes())  # read once: it may be a pipe


def decoded(data: bytes) -> str:
    """As `read_text`, of the bytes of a file."""
    encoding = next((name for mark, name in ENCODINGS if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`. Raises ValueError for all that is no JSON, also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def require_text(text: str, what: str) -> None:
    """Raises PromptError where `what` came from bytes that are no UTF-8, which Python keeps as half surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is no UTF-8 text: there are other bytes at character {error.start}; write it in UTF-8"
        ) from error


@contextlib.contextmanager
def plain_texts(folder: Path) -> Iterator[Path]:
    """`folder`, or, where a text of a model in it begins with a mark, a temporary folder that has these texts in plain
    UTF-8: transformers and tokenizers read no other. Weights are not in it."""
    if not any(_has_mark(file) for file in _files(folder, MODEL_TEXTS)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hybrimoe-") as name:
        for file in _files(folder, (*MODEL_TEXTS, *OTHER_FILES)):
            copy = Path(name) / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            if _has_mark(file):
                copy.write_text(read_text(file), encoding="utf-8")
            else:
                shutil.copyfile(file, copy)
        yield Path(name)


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _has_mark(file: Path) -> bool:
    """False for a file that cannot be read, which its reader says."""
    try:
        with file.open("rb") as opened:
            return opened.read(max(map(len, MARKS))).startswith(MARKS)
    except OSError:
        return False
