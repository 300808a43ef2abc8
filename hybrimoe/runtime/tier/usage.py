"""Which experts were used, kept from one run to the next beside the packed file: what a start reads first.

One JSON file, written under another name and renamed when it is whole. It is ignored where the packed file has changed
since. A folder that cannot be written to is passed over, and where none can a warning says so: nothing fails for it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.runtime.kept import keep
from hybrimoe.text_files import parse_json

FORMAT_VERSION = 1
SUFFIX = ".usage.json"
KEPT_SHARE = 0.5
"""Of the counts of earlier runs, beside those of a new one: what was used long ago fades."""

Uses = npt.NDArray[np.float64]


class UsageWarning(UserWarning):
    """The usage of experts could not be kept for the next start."""


class UsageFile:
    """The uses of the experts in `packed`, in one of `folders` (best first; none: nothing is kept)."""

    def __init__(self, packed: Path, folders: Sequence[Path], shape: tuple[int, int]) -> None:
        self._packed, self._shape = packed, shape
        self._paths = [folder / f"{packed.name}{SUFFIX}" for folder in folders]
        self._stamp = _stamp(packed)
        self.earlier = self._read()

    def save(self, uses: Uses) -> Path | None:
        """Keeps the uses of this run with those of earlier ones; the file's path. Where that fails, warns with
        UsageWarning and returns None; None without a warning where there is nothing to keep."""
        if not self._paths or not uses.any():
            return None
        kept = uses if self.earlier is None else KEPT_SHARE * self.earlier + uses
        text = json.dumps(self._head() | {"uses": np.round(kept, 2).tolist()})
        return keep(
            self._paths, text.encode(), "which experts were used", "it begins without reading them ahead", UsageWarning
        )

    def _head(self) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, "packed": self._stamp}

    def _read(self) -> Uses | None:
        """The uses [layers, experts] that an earlier run has kept of this very file."""
        for path in self._paths:
            with contextlib.suppress(OSError, ValueError):
                found = parse_json(path.read_text(encoding="utf-8"))
                if not isinstance(found, dict) or {name: found.get(name) for name in self._head()} != self._head():
                    continue
                uses = np.asarray(found.get("uses"), np.float64)
                if uses.shape == self._shape and np.isfinite(uses).all() and (uses >= 0.0).all():
                    return uses
        return None


def _stamp(packed: Path) -> list[int]:
    known = packed.stat()
    return [known.st_size, known.st_mtime_ns]
