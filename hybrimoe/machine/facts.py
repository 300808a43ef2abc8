"""What a figure was measured on: CPU, versions, commit. Benchmarks and calibrations write it beside their figures."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "numba", "networkx", "torch", "transformers")


def machine() -> dict[str, Any]:
    """The machine and the libraries that compute, as plain data."""
    import torch

    from cpu_kernels.host.isa import detect

    return {
        "cpu": cpu_model(),
        "isa": detect().isa.name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The name that the CPU gives itself, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@cache
def environment() -> dict[str, str]:
    """Versions and git commit of this run; "none" for the commit outside a checkout."""
    return {"hybrimoe": _version("hybrimoe"), "python": platform.python_version(), "commit": _commit(),
            **{name: _version(name) for name in PACKAGES}}  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return asked.stdout.strip()
