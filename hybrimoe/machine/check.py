"""One line of `hybrimoe doctor`, and what its parts share. Imports neither torch nor transformers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "info", "warn", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it is, what was found, and what to do ("" where nothing is to be done).

    status: "ok"; "info" (absent or different, and fine so); "warn" (works, worse than it could); "broken" (nothing
    runs until it is mended).
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def guarded(name: str, check: Callable[[], Check], errors: tuple[type[Exception], ...], advice: str) -> Check:
    """`check()`, or a broken line with the message of one of `errors`."""
    try:
        return check()
    except errors as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}", advice)


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
