"""`pytest -m gpu`, where the tests and pytest are: in a checkout, not beside an installed wheel."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import hybrimoe
from hybrimoe.bench.gpu_check.child import python_child, run_child
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.setting import Setting

KEPT_S = 12.0
NONE_SELECTED = 5
"""pytest's exit code."""


def run(setting: Setting, findings: Findings) -> None:
    """All tests with the marker, in the files that name it."""
    root = Path(hybrimoe.__file__).parents[1]
    files = [str(path) for path in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    if not files:
        raise SkippedError("the tests are not part of an installed package: `make gpu-check` in a checkout runs them")
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is not installed: `make gpu-check` installs it, or pip install 'hybrimoe[dev]'")
    if setting.emulated:
        raise SkippedError(f"{len(files)} files have tests that need a card, and there is none")
    argv = python_child("-m", "pytest", "-m", "gpu", "-q", "-rfE", "-W", "default", "-p", "no:cacheprovider", *files)
    with tempfile.TemporaryDirectory(prefix="hybrimoe-") as folder:
        ended = run_child(argv, setting.limit_s - KEPT_S, Path(folder) / "log", cwd=root)
    last = next((line for line in reversed(ended.output.splitlines()) if line.strip()), "")
    findings.row("pytest -m gpu", files=len(files), seconds=round(ended.seconds, 1), result=last.strip("= "))
    if ended.code == NONE_SELECTED:
        raise SkippedError("no test has the marker gpu")
    if ended.why:
        findings.problem(f"{ended.why}: {last}")
        findings.remark(f"{ended.output}\n{ended.threads}")
