"""A folder that is written whole or not at all: under a temporary name beside it, synced, then renamed.

Each writer has a temporary folder of its own, locked while it lives: several processes may write the same folder at
once, and the first one that is done wins. What a killed process leaves is swept away by the next writer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hybrimoe.checkpoint.pack.record_file import FILE_MODE, HAS_LOCKS, PARTIAL_SUFFIX, sync_folder

if HAS_LOCKS:
    import fcntl

FOLDER_MODE = 0o755


@contextlib.contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed when it does not.

    Raises OSError where it cannot be written, or `target` holds something meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent):  # so that no sweep comes between the making of a folder and its lock
        _sweep(target)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=PARTIAL_SUFFIX, dir=target.parent))
        own = contextlib.ExitStack()
        own.enter_context(_lock(place))
    with own:
        try:
            yield place
            for file in place.rglob("*"):
                if file.is_file():  # some libraries write files that their user alone may read
                    os.chmod(file, FILE_MODE)
                _sync(file)
            os.chmod(place, FOLDER_MODE)
            os.rename(place, target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def _sweep(target: Path) -> None:
    """Removes what writers of `target` left that are gone (nobody holds their lock)."""
    for left in target.parent.glob(f".{target.name}-*{PARTIAL_SUFFIX}") if HAS_LOCKS else ():
        with contextlib.suppress(OSError), _lock(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Raises BlockingIOError without `wait` where another process holds it."""
    if not HAS_LOCKS:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _sync(file: Path) -> None:
    if file.is_dir():
        sync_folder(file)
        return
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
