"""What a planner has learnt of a model's routing, kept from one run to the next beside the packed experts.

One .npz file of the forecast's arrays (`scheduler.forecast.use_model.LEARNT`), written under another name and renamed
when it is whole. What does not fit is passed over: a forecast that begins with nothing learns the same in some thousand
tokens. A folder that cannot be written to is passed over, and where none can a warning says so: nothing fails for it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybrimoe.runtime.kept import keep
from scheduler.forecast.use_model import LEARNT, Learnt

SUFFIX = ".routing.npz"
HALVES = ("next_token", "same_token")
"""Arrays of a weight a pair of experts: nearly all of the file, and log-odds of which float16 keeps enough."""


class RoutingWarning(UserWarning):
    """What was learnt of the routing could not be kept for the next start."""


def told_from(learnt: Learnt, distance: npt.NDArray[np.integer]) -> Learnt:
    """What was learnt by a forecast that looks ahead from another layer, as one from `distance` [layers] layers before
    knows it.

    How far ahead is forecast follows from measured costs, so that it changes from run to run. What a layer says about
    a later one stays true: the table of the nearest source layers moves by the difference.
    """
    moved = dict(learnt)
    if learnt["distance"].shape == distance.shape and learnt["same_token"].ndim == 4:
        weights, nearer = learnt["same_token"], learnt["distance"] - distance
        moved["distance"], moved["same_token"] = distance.copy(), np.zeros_like(weights)
        for layer in range(min(len(nearer), len(weights))):
            n = weights.shape[1] - abs(int(nearer[layer]))
            into, out = max(int(nearer[layer]), 0), max(-int(nearer[layer]), 0)
            if n > 0:
                moved["same_token"][layer, into : into + n] = weights[layer, out : out + n]
    return moved


class RoutingFile:
    """What was learnt of the model whose packed experts have this file name, in one of `folders` (best first; none:
    nothing is kept)."""

    def __init__(self, packed_name: str, folders: Sequence[Path]) -> None:
        self._paths = [folder / f"{packed_name}{SUFFIX}" for folder in folders]

    def read(self) -> Learnt | None:
        """What an earlier run has kept; None where there is none, or no file that is whole."""
        for path in self._paths:
            try:
                with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
                    found = {name: file[name].astype(np.float32) if name in HALVES else file[name] for name in file}
            except Exception:  # noqa: BLE001 - errors of a damaged archive (zlib, struct, memory) have no common root
                continue
            if found.keys() != {*LEARNT, "distance"} or len({array.shape[:1] for array in found.values()}) > 1:
                continue
            return found
        return None

    def save(self, learnt: Learnt) -> Path | None:
        """Keeps what was learnt; the file's path. Where that fails, warns with RoutingWarning and returns None; None
        without a warning where there is nothing to keep."""
        if not self._paths or not any(learnt[name].any() for name in HALVES):
            return None
        content = io.BytesIO()
        kept = {name: array.astype(np.float16) if name in HALVES else array for name, array in learnt.items()}
        np.savez_compressed(content, **kept)  # type: ignore[arg-type]
        return keep(
            self._paths, content.getvalue(), "what was learnt of the routing", "it begins with nothing", RoutingWarning
        )
