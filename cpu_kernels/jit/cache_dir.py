"""Where files are kept between starts: compiled kernels here, packed models and calibrations by `hybrimoe`."""

import os
import tempfile
from functools import cache
from pathlib import Path

ENV_CACHE = "HYBRIMOE_CACHE"


def cache_home() -> Path:
    """The folder of all that is kept: HYBRIMOE_CACHE, else hybrimoe in the user's cache directory."""
    chosen = os.environ.get(ENV_CACHE)
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hybrimoe").expanduser()


def candidate_dirs() -> tuple[Path, ...]:
    """Where compiled kernels may lie, in order: in a folder that was chosen, in Numba's, in the usual one."""
    numba = os.environ.get("NUMBA_CACHE_DIR")
    own = cache_home() / "kernels"
    return (own,) if os.environ.get(ENV_CACHE) or not numba else (Path(numba), own)


@cache
def kernel_cache_dir() -> Path | None:
    """The first candidate that can be written to, or None (kernels then compile at each start)."""
    for directory in candidate_dirs():
        if is_writable(directory):
            return directory
    return None


def is_writable(directory: Path) -> bool:
    """Whether files can be made in `directory` (which is made if it does not exist)."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
