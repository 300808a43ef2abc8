"""Files that a run leaves beside the packed experts for the next one. The next start is better for them, and right
without."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path


def keep(paths: Sequence[Path], content: bytes, what: str, without: str, category: type[UserWarning]) -> Path | None:
    """Writes to the first of `paths` that takes it, whole or not at all; that path. Where none does, returns None and
    warns, in a `category`, that `what` could not be kept and what the next start does `without`."""
    problems: list[str] = []
    for path in paths:
        try:
            _write(path, content)
        except OSError as error:
            problems.append(f"{path.parent}: {error.strerror or error}")
            continue
        return path
    warnings.warn(
        f"{what} could not be kept for the next start ({'; '.join(problems)}): {without}", category, stacklevel=3
    )
    return None


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=path.name, suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
