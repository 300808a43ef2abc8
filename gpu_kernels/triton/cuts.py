"""How the fused kernels are cut: what one program takes. The cut changes the order of sums, and so the time; no more.

For a kernel and a number of tokens there are a few cuts worth trying (`candidates`); which of them is the fastest on a
card is measured there (`gpu_kernels.tuning`). Without a measurement the first one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cpu_kernels import ExpertDtype
from cpu_kernels.format.layout import is_quantised

BLOCK_TOKENS = (1, 4, 16, 64, 128)
"""Tokens that one program takes: kernels are compiled once for each, and more tokens take several programs."""
FEW_TOKENS = 4
"""Up to so many tokens, multiplying them one by one takes no longer than reading the record."""
OVERLAP_FROM = (9, 0)
"""Compute capability of the first NVIDIA cards that start a kernel before the one before it has ended."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One kernel's. warps: of a program. units: groups of 32 columns (int8, int4) or times 4 lines (floats) that a
    program for few tokens takes at once. rows: that a program of down takes. tokens: that a program takes; 0: as many
    as the group's block says."""

    warps: int
    units: int = 0
    rows: int = 32
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Cuts:
    """Both kernels' of a group. overlap: each may start, and read weights, before the one before it has ended."""

    up: Cut
    down: Cut
    overlap: bool = False

    @property
    def label(self) -> str:
        """A name that says all of it, for files and tables."""
        up, down = self.up, self.down
        text = f"up {up.units}u {up.warps}w {up.tokens}t, down {down.units}u {down.warps}w {down.rows}r {down.tokens}t"
        return text + (", overlapping" if self.overlap else "")


def can_overlap(device: torch.device) -> bool:
    """Whether kernels of a device can start before the one before them has ended."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= OVERLAP_FROM


def candidates(dtype: ExpertDtype, block: int, overlap: bool) -> tuple[Cuts, ...]:
    """Cuts worth trying for programs of `block` tokens, the default first."""
    if block > FEW_TOKENS:
        return (_MANY[block],)
    plain = _FEW_QUANTISED[block] if is_quantised(dtype) else _FEW_FLOATS[block]
    return tuple(replace(cuts, overlap=overlap) for cuts in plain)


_FEW_QUANTISED = {
    1: (
        Cuts(Cut(8, 32), Cut(4, 32, 16)),
        Cuts(Cut(8, 16), Cut(4, 32, 16)),
        Cuts(Cut(8, 32), Cut(4, 16, 32)),
        Cuts(Cut(16, 32), Cut(8, 32, 32)),
    ),
    4: (
        Cuts(Cut(8, 16), Cut(4, 16)),
        Cuts(Cut(4, 16), Cut(2, 16)),
    ),
}
_FEW_FLOATS = {
    1: (
        Cuts(Cut(8, 32), Cut(4, 32)),
        Cuts(Cut(8, 64), Cut(4, 64, 16)),
        Cuts(Cut(16, 32), Cut(8, 32)),
    ),
    4: (Cuts(Cut(8, 32), Cut(4, 32)), Cuts(Cut(8, 16), Cut(4, 16))),
}
_MANY = {
    16: Cuts(Cut(4), Cut(4, rows=64)),
    64: Cuts(Cut(4), Cut(4, rows=64)),
    128: Cuts(Cut(4), Cut(4, rows=64, tokens=64)),
}
