"""Files that a command reads and writes: checked before the work, told with their names where they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_readable(path: Path | None) -> None:
    """Raises FileError where `path` cannot be read, before the imports and the work that come before it is."""
    from hybrimoe.errors import FileError

    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise FileError(f"cannot read {path} ({error.strerror}): expected a file that exists") from error


def check_writable(path: Path | None) -> None:
    """Raises FileError where no file can be written at `path`, before the work whose result it is for."""
    from hybrimoe.errors import FileError

    if path is None:
        return
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise FileError(
            f"cannot write {path} ({error.strerror}): expected a file in a directory that exists and can be written to"
        ) from error
    if not existed:
        path.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a result: a disk that fills in the middle is told with the file's name (FileError)."""
    from hybrimoe.errors import FileError

    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path} ({error.strerror}): make room, or give another file") from error


def check_folder(path: Path | None) -> None:
    """Makes the folder `path` where it is not there. Raises FileError where that cannot be."""
    from hybrimoe.errors import FileError

    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {path} ({error.strerror}): expected a place for a folder") from error


def write_trace(path: Path, records: list[Any], label: str) -> None:
    """Write a Chrome/Perfetto trace. Raises FileError, with the path, where it cannot be written."""
    import json

    from scheduler.graph.export import chrome_trace

    with writing(path):
        path.write_text(json.dumps(chrome_trace(records, label)), encoding="utf-8")
