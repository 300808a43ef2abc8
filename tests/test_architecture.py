"""ARCHITECTURE.md stays true: it names every folder, and whatever it names exists; every module says what it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
PACKAGES = ("hybrimoe", "scheduler", "cpu_kernels", "gpu_kernels", "yaml_rules")
MAX_LINES = 120
NAMED_WITH_THEIR_PARENT = ("bench", "runtime", "tracing", "cli", "generation", "demo", "gpu_kernels", "yaml_rules")
"""Folders whose subfolders stand in the parent's line."""


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, f"modules without a docstring: {silent}"


def test_the_architecture_names_every_folder() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    missing = []
    for folder in sorted(folders):
        name = folder.relative_to(ROOT)
        inside_named = name.parent.name in NAMED_WITH_THEIR_PARENT and f"`{name.name}`" in text
        if len(name.parts) > 1 and f"`{name}`" not in text and not inside_named and len(name.parts) < 4:
            missing.append(str(name))
    unnamed = [name for name in missing if not name.startswith("yaml_rules/")]
    assert not unnamed, f"folders that ARCHITECTURE.md does not name: {unnamed}"


def test_what_the_architecture_names_exists_and_it_stays_a_page() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+(?:\.py)?)`", text))
    gone = sorted(path for path in paths if not (ROOT / path).exists())
    assert not gone, f"ARCHITECTURE.md names what is not there: {gone}"
    assert len(text.splitlines()) <= MAX_LINES
