"""Progress of loading: a callback, a bar on stderr, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in total, what is being done) from the loading thread."""


def silent(done: int, total: int, what: str) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def progress_of(choice: Progress | bool | None) -> Iterator[Progress]:
    """The callback to use: the given one; True a bar; False none; None a bar where stderr is a terminal."""
    if callable(choice):
        yield choice
    elif choice or (choice is None and sys.stderr.isatty()):
        with _bar() as show:
            yield show
    else:
        yield silent


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total or None, description=what)
