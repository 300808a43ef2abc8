"""Which vector path runs on this CPU, and why.

`HYBRIMOE_ISA` forces a path; it is checked against the CPU, because an unknown instruction would kill the process.
"""

import ctypes
import errno
import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llvmlite import binding as llvm

from cpu_kernels.errors import IsaError

ENV_ISA = "HYBRIMOE_ISA"
TILES = "amx-"  # how the names of AMX's features begin
DotKind = Literal["vnni", "maddubs", "generic"]

# AMX's tile registers, which Linux gives to a process that asks (since 5.16): to all its threads, also those that run
# already, and to children made by fork. Another program that it starts asks for itself.
SYS_ARCH_PRCTL = 158  # of x86-64
ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 0x1023, 18
REFUSALS = {
    errno.ENOSPC: "a thread's stack for signals is too small for them",
    errno.ENOSYS: "it has no such call",
    errno.EINVAL: "it is older than Linux 5.16",
    errno.EOPNOTSUPP: "it does not save them",
}


@dataclass(frozen=True, slots=True)
class Isa:
    """A vector path: width, how it multiplies bytes, and how many tokens by vectors of rows a register tile holds.

    tiles: (tokens, vectors) from large to small; the last one has 1 token. 64 rows are a multiple of each width.
    float_tile: a larger one for many tokens and weights in floats, which need no registers but sums, weights and x.
    """

    name: str
    lanes: int  # 32-bit lanes of a vector
    dot: DotKind
    features: tuple[str, ...]  # LLVM feature names that the CPU must have
    tiles: tuple[tuple[int, int], ...]
    about: str
    float_tile: tuple[int, int] | None = None

    @property
    def bf16_dot(self) -> bool:
        """Whether vdpbf16ps multiplies pairs of bfloat16."""
        return "avx512bf16" in self.features

    @property
    def bf16_tiles(self) -> bool:
        """Whether AMX multiplies tiles of bfloat16."""
        return "amx-bf16" in self.features

    @property
    def fused(self) -> bool:
        """Whether fused multiply-add is an instruction (elsewhere LLVM decides)."""
        return "fma" in self.features

    @property
    def many_registers(self) -> bool:
        """Whether there are 32 vector registers, not 16."""
        return "avx512f" in self.features


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_VNNI = (*_AVX512, "avx512vnni")
_BF16 = (*_VNNI, "avx512bf16")
_AMX = (*_BF16, "amx-tile", "amx-bf16")
# One vector of rows by up to 8 tokens: a row block is then a single stream, which the hardware prefetchers follow at
# the bandwidth of a plain read (2 or 4 streams at once reach 70 % of it; Zen 4, measured).
_WIDE = ((8, 1), (4, 1), (2, 1), (1, 1))
# 256 bit: two vectors are one row block, the stream of a single token. More tokens take one, for want of registers.
_NARROW = ((4, 1), (2, 1), (1, 2))
_QUARTER = ((4, 1), (2, 2), (1, 4))
# Sums of 5 tokens by 2 vectors of rows are 10 of 16 registers: a multiply-add waits 4 to 5 cycles for the one before it
# in its sum, and each vector of weights and each column of a token is loaded for several of them.
_SIXTEEN = (5, 2)

# In order of preference: the first that the CPU supports runs.
PATHS: tuple[Isa, ...] = (
    Isa("amx", 16, "vnni", _AMX, _WIDE, "AMX tiles for bfloat16, else as avx512bf16"),
    Isa("avx512bf16", 16, "vnni", _BF16, _WIDE, "512-bit vpdpbusd and vdpbf16ps"),
    Isa("avx512vnni", 16, "vnni", _VNNI, _WIDE, "512-bit vpdpbusd"),
    Isa("avx512", 16, "maddubs", _AVX512, _WIDE, "512-bit vpmaddubsw + vpmaddwd"),
    Isa("avxvnni", 8, "vnni", (*_AVX2, "avxvnni"), _NARROW, "256-bit vpdpbusd (VEX)", _SIXTEEN),
    Isa("avx2", 8, "maddubs", _AVX2, _NARROW, "256-bit vpmaddubsw + vpmaddwd", _SIXTEEN),
    Isa("portable", 4, "generic", (), _QUARTER, "128-bit vectors, whatever LLVM makes of them"),
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
    """LLVM feature names of this CPU (as far as the operating system enables them for this process)."""
    found = _reported_features()
    return found if tile_refusal() is None else frozenset(name for name in found if not name.startswith(TILES))


@cache
def tile_refusal() -> str | None:
    """Why this process may not use the tiles that its CPU has; None where it may, or the CPU has none."""
    return _ask_for_tiles() if "amx-tile" in _reported_features() else None


def _ask_for_tiles() -> str | None:
    """None where this process may use tiles from here on, or why not."""
    if not sys.platform.startswith("linux"):
        return "tiles are used on Linux only"
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(*map(ctypes.c_long, (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))) == 0:
        return None
    number = ctypes.get_errno()
    return f"the system refused tiles: {REFUSALS.get(number, os.strerror(number))}"


@cache
def _reported_features() -> frozenset[str]:
    try:
        return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    except RuntimeError:  # LLVM cannot tell on this platform: only the portable path is safe
        return frozenset()


@cache
def is_zen() -> bool:
    """Whether this is one of AMD's Zen CPUs: some choices that were measured there do not hold for others."""
    name: str = llvm.get_host_cpu_name()
    return name.startswith("znver")


def path_features(isa: Isa, features: frozenset[str]) -> frozenset[str]:
    """`features` without those that only better paths need: a forced path runs as it would on an older CPU."""
    better = PATHS[: [path.name for path in PATHS].index(isa.name)]
    beyond = {name for path in better for name in path.features} - set(isa.features)
    wide = set() if "avx512f" in isa.features else {name for name in features if name.startswith(("avx512", "avx10"))}
    return features - beyond - wide


def missing_features(isa: Isa, features: frozenset[str]) -> tuple[str, ...]:
    """What `isa` needs beyond `features`."""
    return tuple(name for name in isa.features if name not in features)


def choose_isa(features: frozenset[str], wanted: str | None = None, refusal: str | None = None) -> IsaChoice:
    """Picks the first supported path, or `wanted`; raises IsaError if that is unknown or not supported.

    refusal: as `tile_refusal` returns it, where `features` lack what the CPU has.
    """
    if wanted:
        if wanted not in BY_NAME:
            raise IsaError(f"{ENV_ISA}={wanted!r} is unknown; expected one of {', '.join(BY_NAME)}")
        missing = missing_features(BY_NAME[wanted], features)
        if missing:
            why = _why(missing, refusal)
            raise IsaError(f"{ENV_ISA}={wanted} needs {', '.join(missing)}, which this CPU or its system lacks{why}")
        return IsaChoice(BY_NAME[wanted], f"asked for by {ENV_ISA}", ())
    rejected: list[tuple[str, str]] = []
    for path in PATHS:
        missing = missing_features(path, features)
        if not missing:
            return IsaChoice(path, f"the fastest this CPU supports ({path.about})", tuple(rejected))
        rejected.append((path.name, f"lacks {', '.join(missing)}{_why(missing, refusal)}"))
    raise IsaError("no path is supported")  # not reached: the portable path needs nothing


def _why(missing: tuple[str, ...], refusal: str | None) -> str:
    return f" ({refusal})" if refusal and any(name.startswith(TILES) for name in missing) else ""


def detect() -> IsaChoice:
    """The path for this process: `HYBRIMOE_ISA` if set, else the best one."""
    return choose_isa(cpu_features(), os.environ.get(ENV_ISA), tile_refusal())
