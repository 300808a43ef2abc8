"""docs/environment.md names every environment variable that the product reads, and no other of ours."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
PACKAGES = ("hybrimoe", "scheduler", "cpu_kernels", "gpu_kernels", "yaml_rules")
OURS = re.compile(r"(HYBRIMOE|NUMBA|OMP|GOMP|KMP|XDG)_[A-Z_]+")
NAME = re.compile(r"[A-Z]+_[A-Z_]+")
READS = re.compile(r"os\.(environ|getenv)\b")


def variables(path: Path) -> set[str]:
    """Names in a module that look like ours or like those that libraries share, and all that it reads from the
    environment: by a text, or by a constant whose text stands in the module."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OURS.fullmatch(node.value):
            found.add(node.value)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = texts(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.Subscript | ast.Compare) and READS.search(ast.unparse(node)):
            found |= texts(node)
            found |= set().union(*(constants.get(n.id, set()) for n in ast.walk(node) if isinstance(n, ast.Name)))
    return found


def texts(node: ast.AST) -> set[str]:
    """Texts within it that may name a variable."""
    values = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return {value for value in values if NAME.fullmatch(value)}


def test_the_page_names_what_is_read() -> None:
    read = set().union(*(variables(path) for name in PACKAGES for path in (ROOT / name).rglob("*.py")))
    told = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", PAGE.read_text(encoding="utf-8")))
    assert {"OTEL_SERVICE_NAME", "RAY_ADDRESS", "HYBRIMOE_CACHE"} <= read, "nothing was found"
    assert read - told == set()
    assert {name for name in told if name.startswith("HYBRIMOE_")} - read == {"HYBRIMOE_SHARED"}
