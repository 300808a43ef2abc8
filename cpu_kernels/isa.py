"""Which vector path runs on this CPU, and why.

`HYBRIMOE_ISA` forces a path; it is checked against the CPU, because an unknown instruction would kill the process.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llvmlite import binding as llvm

from cpu_kernels.errors import IsaError

ENV_ISA = "HYBRIMOE_ISA"
DotKind = Literal["vnni", "maddubs", "generic"]


@dataclass(frozen=True, slots=True)
class Isa:
    """A vector path: width, how it multiplies bytes, and how many tokens by vectors of rows a register tile holds.

    tiles: (tokens, vectors) from large to small; the last one has 1 token. 64 rows are a multiple of each width.
    """

    name: str
    lanes: int  # 32-bit lanes of a vector
    dot: DotKind
    features: tuple[str, ...]  # LLVM feature names that the CPU must have
    integer_tiles: tuple[tuple[int, int], ...]
    float_tiles: tuple[tuple[int, int], ...]
    about: str

    @property
    def fused(self) -> bool:
        """Whether fused multiply-add is an instruction (elsewhere LLVM decides)."""
        return "fma" in self.features


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_WIDE = ((4, 2), (2, 2), (1, 4))
_WIDE_FLOAT = ((6, 4), (4, 4), (2, 4), (1, 4))
_NARROW = ((4, 1), (2, 2), (1, 4))
_NARROW_FLOAT = ((4, 2), (2, 4), (1, 4))

# In order of preference: the first that the CPU supports runs.
PATHS: tuple[Isa, ...] = (
    Isa("avx512vnni", 16, "vnni", (*_AVX512, "avx512vnni"), _WIDE, _WIDE_FLOAT, "512-bit vpdpbusd"),
    Isa("avx512", 16, "maddubs", _AVX512, _WIDE, _WIDE_FLOAT, "512-bit vpmaddubsw + vpmaddwd"),
    Isa("avxvnni", 8, "vnni", (*_AVX2, "avxvnni"), _NARROW, _NARROW_FLOAT, "256-bit vpdpbusd (VEX)"),
    Isa("avx2", 8, "maddubs", _AVX2, _NARROW, _NARROW_FLOAT, "256-bit vpmaddubsw + vpmaddwd"),
    Isa("portable", 4, "generic", (), _NARROW, _NARROW_FLOAT, "128-bit vectors, whatever LLVM makes of them"),
)
BY_NAME = {path.name: path for path in PATHS}


@dataclass(frozen=True, slots=True)
class IsaChoice:
    """The path that runs and the reason, for people."""

    isa: Isa
    reason: str
    rejected: tuple[tuple[str, str], ...]  # (path, why not)


@cache
def cpu_features() -> frozenset[str]:
    """LLVM feature names of this CPU (as far as the operating system enables them)."""
    try:
        return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    except RuntimeError:  # LLVM cannot tell on this platform: only the portable path is safe
        return frozenset()


def missing_features(isa: Isa, features: frozenset[str]) -> tuple[str, ...]:
    """What `isa` needs beyond `features`."""
    return tuple(name for name in isa.features if name not in features)


def choose_isa(features: frozenset[str], wanted: str | None = None) -> IsaChoice:
    """Picks the first supported path, or `wanted`; raises IsaError if that is unknown or not supported."""
    if wanted:
        if wanted not in BY_NAME:
            raise IsaError(f"{ENV_ISA}={wanted!r} is unknown; expected one of {', '.join(BY_NAME)}")
        missing = missing_features(BY_NAME[wanted], features)
        if missing:
            raise IsaError(f"{ENV_ISA}={wanted} needs {', '.join(missing)}, which this CPU or its system lacks; unset it")
        return IsaChoice(BY_NAME[wanted], f"asked for by {ENV_ISA}", ())
    rejected = []
    for path in PATHS:
        missing = missing_features(path, features)
        if not missing:
            return IsaChoice(path, f"the fastest this CPU supports ({path.about})", tuple(rejected))
        rejected.append((path.name, "lacks " + ", ".join(missing)))
    raise IsaError("no path is supported")  # not reached: the portable path needs nothing


def detect() -> IsaChoice:
    """The path for this process: `HYBRIMOE_ISA` if set, else the best one."""
    return choose_isa(cpu_features(), os.environ.get(ENV_ISA))
