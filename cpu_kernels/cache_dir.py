"""Where compiled kernels are kept between starts."""

import os
import tempfile
from functools import cache
from pathlib import Path

ENV_CACHE = "HYBRIMOE_CACHE_DIR"


def candidate_dirs() -> tuple[Path, ...]:
    """Directories to try, in order: the user's choice alone if there is one, else Numba's and the usual cache."""
    if os.environ.get(ENV_CACHE):
        return (Path(os.environ[ENV_CACHE]) / "kernels",)
    numba = [Path(os.environ["NUMBA_CACHE_DIR"])] if os.environ.get("NUMBA_CACHE_DIR") else []
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (*numba, Path(base) / "hybrimoe" / "kernels")


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
