"""Which backend "auto" means: the fastest in the last calibration of this machine, numba before any."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

from cpu_kernels.jit.cache_dir import kernel_cache_dir

DEFAULT = "numba"
FILE_NAME = "backend.json"


@dataclass(frozen=True)
class BackendChoice:
    """A measured choice and what it was measured with; it does not count on another machine or other versions."""

    backend: str = DEFAULT
    times_us: dict[str, dict[str, float]] = field(default_factory=dict)
    setting: str = ""

    @classmethod
    def from_times(cls, times_us: Mapping[str, Mapping[str, float]]) -> "BackendChoice":
        """times_us[dtype][backend]. The backend with the least product of times, among those that ran every dtype."""
        common = set.intersection(*(set(times) for times in times_us.values())) if times_us else set()
        products = {name: prod(times[name] for times in times_us.values()) for name in sorted(common)}
        best = min(products, key=lambda name: (products[name], name)) if products else DEFAULT
        return cls(best, {dtype: dict(times) for dtype, times in times_us.items()}, setting())


def setting() -> str:
    """What a measurement depends on."""
    names = ("torch", "numba", "onnxruntime", "intel-extension-for-pytorch")
    return " ".join([platform.node(), platform.machine(), *(f"{name}={_version(name)}" for name in names)])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def choice_path() -> Path | None:
    """Where the choice is kept; None if no directory is writable."""
    directory = kernel_cache_dir()
    return None if directory is None else directory / FILE_NAME


def write_choice(choice: BackendChoice) -> None:
    """Keeps a choice for later starts, where a directory can be written to."""
    path = choice_path()
    if path is not None:
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(choice), indent=1), encoding="utf-8")
        partial.replace(path)
    measured_choice.cache_clear()


@cache
def measured_choice() -> BackendChoice:
    """The kept choice if it was measured here with these versions, else the default."""
    path = choice_path()
    if path is None or not path.is_file():
        return BackendChoice()
    try:
        kept = BackendChoice(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return BackendChoice()  # written by another version: measure again
    return kept if kept.setting == setting() else BackendChoice()
