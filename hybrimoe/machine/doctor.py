"""`hybrimoe doctor`: what works on this machine, what does not, and what to do. Each check is one line of the answer.

Nothing is changed, except that cache directories are made and that compiled kernels are kept there as in any run.
Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

from hybrimoe.compat import import_fault
from hybrimoe.machine.check import Check, guarded, installed

# What the product cannot run without, with the first version that works (pyproject.toml; a test compares).
REQUIRED = {
    "torch": "2.8",
    "transformers": "5.23",
    "numba": "0.66",
    "llvmlite": "0.48",
    "numpy": "2.0",
    "networkx": "3.2",
    "pyyaml": "6.0",
    "onnx": "1.17",
    "pydantic": "2.8",
    "safetensors": "0.8",
    "tokenizers": "0.23.1",
    "typer": "0.24",
    "markdown-it-py": "2.2",
    "rich": "13.7",
    "prompt_toolkit": "3.0.40",
    "jinja2": "3.1.6",
    "psutil": "5.9",
}
SHOWN = ("torch", "transformers", "numba", "numpy")
FIRST_PYTHON = (3, 11)
TOO_NEW = {"transformers": "6"}
REINSTALL = "pip install --upgrade hybrimoe"


def examine(kernels: bool = True) -> list[Check]:
    """All checks, in the order in which they are shown; `kernels`: also run an expert (compiles on first use)."""
    checks = [_python(), *_packages()]
    if any(check.status == "broken" for check in checks):
        return checks  # what follows imports these packages
    from hybrimoe.machine import doctor_machine, doctor_parts

    for part in (doctor_machine.checks, doctor_parts.checks):
        checks += part()
    if kernels:
        checks.append(doctor_machine.kernels())
    return checks


def works(checks: list[Check]) -> bool:
    """Whether the product can run: nothing is broken."""
    return all(check.status != "broken" for check in checks)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < FIRST_PYTHON:
        wanted = ".".join(map(str, FIRST_PYTHON))
        return Check("Python", "broken", found, f"HybriMoE needs Python {wanted} or later")
    return Check("Python", "ok", found)


def _packages() -> Iterator[Check]:
    """A line for each of SHOWN, and for every other required package that is missing or of the wrong version."""
    for package, lowest in REQUIRED.items():
        check = guarded(package, partial(_package, package, lowest), (ImportError, OSError, AttributeError), REINSTALL)
        if package in SHOWN or check.status != "ok":
            yield check


def _package(package: str, lowest: str) -> Check:
    found = installed(package)
    if found is None:
        return Check(package, "broken", "not installed", REINSTALL)
    highest = TOO_NEW.get(package)
    if _numbers(found) < _numbers(lowest) or (highest is not None and _numbers(found) >= _numbers(highest)):
        wanted = f"{lowest} or later" + (f", before {highest}" if highest else "")
        return Check(package, "broken", f"{found}; needs {wanted}", REINSTALL)
    if package in SHOWN:
        module = importlib.import_module(package)  # a damaged installation shows here
        if package == "transformers" and (fault := _fault_of_models(module)):
            return Check(package, "broken", f"{found}: {fault[0]}", fault[1])
    return Check(package, "ok", found)


def _fault_of_models(transformers: ModuleType) -> tuple[str, str] | None:
    """What keeps transformers' models from being imported, where that is another package; transformers itself imports
    without them."""
    try:
        _ = transformers.PreTrainedModel
    except ImportError as error:
        fault = import_fault(error)
        if fault is None:
            raise
        return fault
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
