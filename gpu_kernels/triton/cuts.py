"""How the fused kernels are cut: what one program takes. The cut changes the order of sums, and so the time; no more.

For a kernel and a number of tokens there are a few cuts worth trying (`candidates`); which of them is the fastest on a
card is measured there (`gpu_kernels.tuning`). Without a measurement the first one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cpu_kernels import ExpertDtype
from gpu_kernels.triton.launch import CAN_OVERLAP

BLOCK_TOKENS: tuple[int, ...] = (1, 4, 16, 64, 128)
"""Tokens that one program takes: kernels are compiled once for each, and more tokens take several programs."""
FEW_TOKENS = 4
"""Up to so many tokens, multiplying them one by one takes no longer than reading the record."""
HOPPER = 9
"""Major compute capability of the cards whose tensor cores read an operand from shared memory."""
BLACKWELL = 12
"""Major compute capability of the cards whose compiler keeps an int8 tile of 128 tokens in no less than eight warps'
registers."""
OVERLAP_FROM = (9, 0)
"""Compute capability of the first NVIDIA cards that start a kernel before the one before it has ended."""

SINGLE_FROM = (8, 0)
"""Compute capability of the first NVIDIA cards for which the kernel of one launch was compiled and read."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One kernel's. warps: of a program. units: groups of 32 columns (int8, int4) or times 4 lines (floats) that a
    program for few tokens takes at once. rows: that a program of down takes."""

    warps: int
    units: int = 0
    rows: int = 32


@dataclass(frozen=True, slots=True)
class Cuts:
    """Both kernels' of a group. overlap: each may start, and read weights, before the one before it has ended. single:
    they are one launch (`gpu_kernels.triton.single`), whose programs all have up's warps, which are down's, too."""

    up: Cut
    down: Cut
    overlap: bool = False
    single: bool = False

    @property
    def label(self) -> str:
        """A name that says all of it, for files and tables."""
        up, down = self.up, self.down
        text = f"up {up.units}u{up.warps}w, down {down.units}u{down.warps}w{down.rows}r"
        return text + (", overlapping" if self.overlap else "") + (", one launch" if self.single else "")


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA card; None for anything else."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else None


def candidates(dtype: ExpertDtype, block: int, capability: tuple[int, int] | None) -> tuple[Cuts, ...]:
    """Cuts worth trying for programs of `block` tokens on such a card, the default first."""
    if block > FEW_TOKENS:  # tensor cores are busy: kernels that overlapped were slower (H200)
        major = None if capability is None else capability[0]
        spills = (dtype == "bfloat16" and major != HOPPER) or (dtype == "int8" and major == BLACKWELL)
        wide = spills and block == BLOCK_TOKENS[-1]
        return (_WIDE_TILES if wide else _TILES,)
    overlap = CAN_OVERLAP and capability is not None and capability >= OVERLAP_FROM
    several = tuple(replace(cuts, overlap=overlap) for cuts in _FEW[block][dtype])
    can_wait = block == 1 and capability is not None and capability >= SINGLE_FROM
    return several + (_SINGLE[dtype] if can_wait else ())


_ONE_FLOATS = (
    Cuts(Cut(16, 32), Cut(4, 32, 16)), Cuts(Cut(8, 32), Cut(4, 32, 16)), Cuts(Cut(16, 64), Cut(4, 32, 16)),
)  # fmt: skip
_FOUR_QUANTISED = Cuts(Cut(4, 16), Cut(2, 16)), Cuts(Cut(8, 16), Cut(4, 16))
_FOUR_FLOATS = (Cuts(Cut(8, 16), Cut(4, 16)),)
_FEW: dict[int, dict[ExpertDtype, tuple[Cuts, ...]]] = {
    1: {
        "int4": (
            Cuts(Cut(8, 32), Cut(4, 32, 16)), Cuts(Cut(4, 16), Cut(4, 32, 16)), Cuts(Cut(8, 16), Cut(4, 32, 32)),
        ),
        "int8": (
            Cuts(Cut(8, 16), Cut(4, 16, 32)), Cuts(Cut(8, 32), Cut(4, 32, 16)), Cuts(Cut(4, 16), Cut(2, 16, 16)),
        ),
        "bfloat16": _ONE_FLOATS,
        "float32": _ONE_FLOATS,
    },
    4: {"int4": _FOUR_QUANTISED, "int8": _FOUR_QUANTISED, "bfloat16": _FOUR_FLOATS, "float32": _FOUR_FLOATS},
}  # fmt: skip
_SINGLE: dict[ExpertDtype, tuple[Cuts, ...]] = {
    "int4": (
        Cuts(Cut(4, 16), Cut(4, 32, 32), single=True), Cuts(Cut(8, 32), Cut(8, 32, 32), single=True),
    ),
    "int8": (
        Cuts(Cut(4, 8), Cut(4, 16, 32), single=True), Cuts(Cut(8, 16), Cut(8, 32, 32), single=True),
    ),
    "bfloat16": (Cuts(Cut(8, 32), Cut(8, 32, 32), single=True),),
    "float32": (Cuts(Cut(8, 32), Cut(8, 32, 32), single=True),),
}  # fmt: skip
_TILES = Cuts(Cut(4), Cut(4, rows=64))
_WIDE_TILES = Cuts(Cut(8), Cut(8, rows=64))
"""Where sums and both operands of a product are in registers, four warps have not enough for a tile of 128 tokens."""
