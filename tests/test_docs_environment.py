"""docs/environment.md names every environment variable that the product reads, and no other of ours."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
PACKAGES = ("hybrimoe", "scheduler", "cpu_kernels", "gpu_kernels", "yaml_rules")
NAME = re.compile(r"\"((?:HYBRIMOE|NUMBA|OMP|GOMP|KMP|XDG)_[A-Z_]+)\"")


def test_the_page_names_what_is_read() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    text = PAGE.read_text(encoding="utf-8")
    read, told = set(NAME.findall(sources)), set(re.findall(r"`([A-Z]+_[A-Z_]+)`", text))
    assert read - told == set()
    assert {name for name in told if name.startswith("HYBRIMOE_")} - read == {"HYBRIMOE_SHARED"}
