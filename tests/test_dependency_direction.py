"""The five packages import each other in one direction only (ARCHITECTURE.md, "Who may import whom")."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hybrimoe", "cpu_kernels", "gpu_kernels", "scheduler", "yaml_rules")
STDLIB = set(sys.stdlib_module_names)

EVERYWHERE: dict[str, set[str]] = {
    "scheduler": {"scheduler", "numpy", "networkx", "numba"},
    "cpu_kernels": {"cpu_kernels", "numpy", "numba", "llvmlite", "torch", "psutil"},
    "gpu_kernels": {"gpu_kernels", "cpu_kernels", "numpy", "torch"},
    "yaml_rules": {"yaml_rules", "yaml", "pydantic", "pydantic_core"},
}
# Only inside a function: optional parts that must not be needed to import the package.
LAZILY: dict[str, set[str]] = {
    "scheduler": set(),
    "cpu_kernels": {"intel_extension_for_pytorch", "onnx", "onnxruntime"},
    "gpu_kernels": {"triton"},
    "yaml_rules": set(),
}
FORBIDDEN_IN_SCHEDULER = {"time", "threading", "os", "logging", "asyncio", "multiprocessing", "subprocess"}
# Folders whose modules are imported only where their extra is needed.
LOADED_ON_DEMAND = {"triton", "backends", "server"}
OPTIONAL = {
    "triton", "onnxruntime", "intel_extension_for_pytorch", "ray", "matplotlib", "joblib", "scipy", "pyarrow", "pandas",
    "fastapi", "uvicorn", "prometheus_client", "llama_cpp", "httpx", "starlette", "gguf", "accelerate",
}  # fmt: skip


def _imports(path: Path) -> list[tuple[str, bool, int]]:
    """(top-level module, at module level?, line) of each import of a file; TYPE_CHECKING blocks do not count."""
    found: list[tuple[str, bool, int]] = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name.split(".")[0], top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 or child.module is not None or child.names, path
                if child.level == 0:
                    found.append(((child.module or "").split(".")[0], top, child.lineno))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            walk(child, top and not inside)

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def _files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no modules"
    return files


@pytest.mark.parametrize("package", sorted(EVERYWHERE))
def test_lower_packages_import_only_what_they_may(package: str) -> None:
    wrong = []
    for path in _files(package):
        for name, top, line in _imports(path):
            allowed = EVERYWHERE[package] | STDLIB | (set() if top else LAZILY[package])
            if name not in allowed and not (name in LAZILY[package] and path.parent.name in LOADED_ON_DEMAND):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_scheduler_is_pure() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _files("scheduler")
        for name, _, line in _imports(path)
        if name in FORBIDDEN_IN_SCHEDULER
    ]
    assert not wrong, "no clock, thread, environment or logging in scheduler:\n" + "\n".join(wrong)


def test_optional_parts_are_imported_lazily() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name} at module level"
        for package in PACKAGES
        for path in _files(package)
        if path.parent.name not in LOADED_ON_DEMAND
        for name, top, line in _imports(path)
        if top and name in OPTIONAL
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_imports_without_the_extras(package: str) -> None:
    blocked = ", ".join(repr(name) for name in sorted(OPTIONAL))
    code = (
        "import sys\n"
        "class Block:\n"
        f"    names = {{{blocked}}}\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in self.names: raise ImportError(f'{name} is blocked by the test')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"import {package}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
