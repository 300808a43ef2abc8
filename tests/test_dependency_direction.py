"""Packages, folders and modules import each other in one direction only.

Inside each folder its modules and subfolders form a graph without a circle. Imports inside functions and under
`TYPE_CHECKING` count too: a circle that is hidden there is still a circle to the reader.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hybrimoe", "cpu_kernels", "gpu_kernels", "scheduler", "yaml_rules")
STDLIB = set(sys.stdlib_module_names)

EVERYWHERE: dict[str, set[str]] = {
    "scheduler": {"scheduler", "numpy", "numba"},
    "cpu_kernels": {"cpu_kernels", "numpy", "numba", "llvmlite", "torch", "psutil"},
    "gpu_kernels": {"gpu_kernels", "cpu_kernels", "numpy", "torch"},
    "yaml_rules": {"yaml_rules", "yaml", "pydantic", "pydantic_core"},
}
# Only inside a function: parts that are optional, or that few commands need and every start would pay for.
LAZILY: dict[str, set[str]] = {
    "scheduler": {"networkx"},
    "cpu_kernels": {"intel_extension_for_pytorch", "onnx", "onnxruntime"},
    "gpu_kernels": {"triton"},
    "yaml_rules": set(),
}
# Modules that have one home for all packages; nothing else of their package may be imported.
SHARED = {"scheduler.compiled"}
FORBIDDEN_IN_SCHEDULER = {"time", "threading", "os", "logging", "asyncio", "multiprocessing", "subprocess"}
# Folders whose modules are imported only where their extra is needed.
LOADED_ON_DEMAND = {"triton", "backends", "server", "apis", "page", "live"}
OPTIONAL = {
    "triton", "onnxruntime", "intel_extension_for_pytorch", "ray", "matplotlib", "joblib", "scipy", "pyarrow", "pandas",
    "fastapi", "uvicorn", "prometheus_client", "llama_cpp", "httpx", "starlette", "gguf", "accelerate",
    "llguidance", "opentelemetry",
}  # fmt: skip


def _imports(path: Path) -> list[tuple[str, bool, int]]:
    """(top-level module, at module level?, line) of each import of a file.

    TYPE_CHECKING blocks do not count; a module of SHARED counts by its full name.
    """
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
                    module = child.module or ""
                    found.append((module if module in SHARED else module.split(".")[0], top, child.lineno))
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
            allowed = EVERYWHERE[package] | STDLIB | SHARED | (set() if top else LAZILY[package])
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


def _product_modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in _files(package)
    }


def _imported(path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module of ours, line) of every import of a file, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)


def _graphs(modules: dict[str, Path]) -> dict[Path, nx.DiGraph]:
    """For each folder the graph of its modules and subfolders; an edge's `why` names the importing lines."""
    graphs: dict[Path, nx.DiGraph] = defaultdict(nx.DiGraph)
    for path in modules.values():
        here = path.relative_to(ROOT).with_suffix("").parts
        for name, line in _imported(path, modules):
            if name not in modules or modules[name] == path:
                continue
            there = modules[name].relative_to(ROOT).with_suffix("").parts
            depth = next(i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b)
            graph = graphs[Path(*here[:depth])]
            graph.add_edge(here[depth], there[depth])
            why = graph.edges[here[depth], there[depth]].setdefault("why", [])
            why.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return graphs


def test_every_folder_has_one_direction() -> None:
    circles = []
    for folder, graph in _graphs(_product_modules()).items():
        for circle in nx.strongly_connected_components(graph):
            if len(circle) > 1:
                edges = nx.find_cycle(graph.subgraph(circle))
                lines = [graph.edges[edge[0], edge[1]]["why"][0] for edge in edges]
                circles.append(f"{folder}: {' -> '.join(edge[0] for edge in edges)}\n    " + "\n    ".join(lines))
    assert not circles, "circles of imports:\n" + "\n".join(circles)


def test_what_the_wheel_leaves_out_is_not_imported_by_what_it_has() -> None:
    """The wheel is these packages without what its table excludes: an import of that works in the repository only."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    left_out = [Path(folder.strip("/")) for folder in wheel["wheel"]["exclude"]]
    assert all((ROOT / folder).is_dir() for folder in left_out)
    modules, wrong = _product_modules(), []
    for path in modules.values():
        if any(path.relative_to(ROOT).is_relative_to(folder) for folder in left_out):
            continue
        for name, line in _imported(path, modules):
            if any(Path(*name.split(".")).is_relative_to(folder) for folder in left_out):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_private_of_another_package_and_no_benchmark_is_imported() -> None:
    """A name with a leading underscore belongs to its folder; `benchmarks/` and `hybrimoe.bench` to measurements."""
    modules, wrong = _product_modules(), []
    for path in modules.values():
        folder = path.relative_to(ROOT).parent
        may_measure = folder.is_relative_to("hybrimoe/bench") or folder.is_relative_to("hybrimoe/cli")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            name = node.module
            if name.split(".")[0] == "benchmarks" or (name.startswith("hybrimoe.bench") and not may_measure):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
            if name in modules and modules[name].relative_to(ROOT).parent != folder:
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno} imports {name}.{private[0]}"] if private else []
    assert not wrong, "\n".join(wrong)
