"""Finds by itself what orders streams, and what the host waits by, and takes it away: one call at a time."""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "gpu_kernels", "hybrimoe/dense", "hybrimoe/generation", "hybrimoe/machine", "hybrimoe/runtime", "hybrimoe/step",
)  # fmt: skip
"""Where devices are given work, and waited for."""
WITHOUT_DEVICES = (
    "gpu_kernels.emulated", "gpu_kernels.streams", "hybrimoe.generation.prefix", "hybrimoe.runtime.tier",
)  # fmt: skip
"""Modules that wait for threads of the host: those that stand for an accelerator, and those that read a disk."""
METHODS = ("wait_event", "wait_stream", "wait", "synchronize")
"""By which a stream waits for another one's work, or the host for a device: before it reads what that has sent, uses
again what that reads, or asks when it was."""
FUNCTIONS = ("wait_for_stream",)


@dataclass(frozen=True, slots=True)
class Site:
    """One call, which is a statement of a function. number: among those with the same text in it."""

    module: str
    function: str
    text: str
    number: int

    def __str__(self) -> str:
        return f"{self.module}:{self.function}: {self.text}" + (f" ({self.number + 1})" if self.number else "")


def sites() -> list[Site]:
    """All of them, in the order of the code."""
    found: list[Site] = []
    for path in [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module.startswith(WITHOUT_DEVICES):
            continue
        for function, statement in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(statement.value)
            number = sum((site.module, site.function, site.text) == (module, function, text) for site in found)
            found.append(Site(module, function, text, number))
    return found


def _statements(tree: ast.Module) -> Iterator[tuple[str, ast.Expr]]:
    """Calls that wait, with the qualified name of the outermost function around them."""
    owners: list[tuple[str, ast.FunctionDef]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            owners.append((node.name, node))
        elif isinstance(node, ast.ClassDef):
            owners += [(f"{node.name}.{item.name}", item) for item in node.body if isinstance(item, ast.FunctionDef)]
    for name, function in owners:
        for inner in ast.walk(function):
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call) and _waits(inner.value):
                yield name, inner


def _waits(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in METHODS
    return isinstance(call.func, ast.Name) and call.func.id in FUNCTIONS


@contextlib.contextmanager
def without(site: Site) -> Iterator[None]:
    """Within the block the call is not made."""
    module: Any = importlib.import_module(site.module)
    *outer, name = site.function.split(".")
    owner = module if not outer else getattr(module, outer[0])
    own, mutant = vars(owner)[name], _mutant(module, site)
    owners = [owner] if outer else _with(name, own)
    for each in owners:
        setattr(each, name, mutant)
    try:
        yield
    finally:
        for each in owners:
            setattr(each, name, own)


def _with(name: str, function: Any) -> list[Any]:
    """The modules that have imported a function by its name."""
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is function]


def _mutant(module: Any, site: Site) -> Any:
    """The function without the call, compiled from its source."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    statements: Sequence[ast.Expr] = [
        statement for function, statement in _statements(tree)
        if function == site.function and ast.unparse(statement.value) == site.text
    ]  # fmt: skip
    gone = statements[site.number]
    *outer, name = site.function.split(".")
    body = tree.body if not outer else next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == outer[0]
    )  # fmt: skip
    function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    gone.value = ast.Constant(value=None)
    made: dict[str, Any] = {}
    future = ast.parse("from __future__ import annotations").body
    code = compile(ast.fix_missing_locations(ast.Module([*future, function], [])), module.__file__, "exec")
    exec(code, vars(module), made)
    return made[name]
