"""ARCHITECTURE.md names every module with the first sentence of its docstring.

`HYBRIMOE_UPDATE_DOCS=1 python -m pytest tests/test_architecture.py` rewrites the list.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
PACKAGES = ("hybrimoe", "scheduler", "cpu_kernels", "gpu_kernels", "yaml_rules")
BEGIN, END = "<!-- modules: begin (generated) -->", "<!-- modules: end -->"


def _sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _modules(package: str) -> list[tuple[str, str]]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__").replace("/", ".")
        found.append((name, _sentence(path)))
    return found


def _listing() -> str:
    lines = []
    for package in PACKAGES:
        lines.append(f"\n### {package}\n")
        lines.extend(f"- `{name}`: {sentence}" for name, sentence in _modules(package))
    return "\n".join(lines).strip() + "\n"


def test_every_module_says_what_it_is() -> None:
    silent = [name for package in PACKAGES for name, sentence in _modules(package) if not sentence]
    assert not silent, f"modules without a docstring: {silent}"


def test_the_architecture_lists_every_module() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    expected = f"{head}{BEGIN}\n{_listing()}{END}{tail}"
    if os.environ.get("HYBRIMOE_UPDATE_DOCS") == "1":
        DOCUMENT.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected, "ARCHITECTURE.md is not up to date; run with HYBRIMOE_UPDATE_DOCS=1"
