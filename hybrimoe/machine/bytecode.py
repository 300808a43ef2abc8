"""Bytecode of HybriMoE's own modules, kept in the cache where Python may not keep it beside them.

A checkout under PYTHONDONTWRITEBYTECODE, or in a folder that cannot be written to, would be compiled again by each
command: 0.7 s of the start of a server (500 modules, virtual Xeon). Installed packages have their bytecode.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path
from types import CodeType, ModuleType

from cpu_kernels.jit.cache_dir import cache_home

PACKAGES = ("hybrimoe", "scheduler", "cpu_kernels", "gpu_kernels", "yaml_rules")
ROOT = Path(__file__).parents[2]
STAMP = struct.Struct("<16sqq16s")
"""What a file begins with: Python's version of the bytecode, the source's time in ns and bytes, and a digest of what
follows."""


def keep_bytecode() -> None:
    """From now on imports of `PACKAGES` take bytecode from the cache, and leave it there, where there is none beside
    the sources and Python would write none. For programs of ours: the process is theirs."""
    if (sys.dont_write_bytecode or not os.access(ROOT, os.W_OK)) and not any(
        isinstance(finder, OwnModules) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, OwnModules(folder()))


def folder() -> Path:
    """Where the bytecode of these sources is kept for this Python."""
    of = f"{ROOT} {sys.implementation.cache_tag} {sys.flags.optimize}"
    return cache_home() / "bytecode" / hashlib.sha256(of.encode()).hexdigest()[:16]


class OwnModules(MetaPathFinder):
    """Finds modules of `PACKAGES` as Python does, and has those without bytecode loaded by `KeptLoader`."""

    def __init__(self, kept: Path) -> None:
        self._kept = kept

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; None for others, and for those that Python has bytecode of."""
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or type(spec.loader) is not SourceFileLoader:
            return None
        if os.path.exists(cache_from_source(spec.origin)):
            return None
        spec.loader = KeptLoader(fullname, spec.origin, self._kept / f"{fullname}.pyc")
        return spec


class KeptLoader(SourceFileLoader):
    """Loads a module from its source at `path`, or from what `kept` holds of the same source."""

    def __init__(self, fullname: str, path: str, kept: Path) -> None:
        super().__init__(fullname, path)
        self._kept = kept

    def get_code(self, fullname: str) -> CodeType | None:
        """The module's code; a file that is missing, damaged or of another source is written anew, if it can be."""
        status = os.stat(self.path)
        key = MAGIC_NUMBER, status.st_mtime_ns, status.st_size
        with suppress(OSError, struct.error):
            content = self._kept.read_bytes()
            magic, *found, digest = STAMP.unpack_from(content)
            code = content[STAMP.size :]
            if (magic.rstrip(b"\0"), *found) == key and digest == _digest(code):
                return marshal.loads(code)  # type: ignore[no-any-return]
        made = super().get_code(fullname)
        code = marshal.dumps(made)
        beside = self._kept.with_name(f"{self._kept.name}.{os.getpid()}")
        with suppress(OSError):
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(STAMP.pack(*key, _digest(code)) + code)
            beside.replace(self._kept)
        return made


def _digest(code: bytes) -> bytes:
    return hashlib.blake2b(code, digest_size=16).digest()
