"""docs/kernels.md has a section for each backend, and names each path, tolerance and environment variable."""

import re
from pathlib import Path

import pytest

from cpu_kernels.backends import BACKENDS
from cpu_kernels.backends.ipex_backend import BFLOAT16_TOLERANCE
from cpu_kernels.format.reference import TOLERANCES
from cpu_kernels.host.isa import PATHS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def table_rows(section: str) -> dict[str, list[str]]:
    """First cell -> cells of the tables of a section."""
    body = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    return {row[0]: row for row in rows}


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_has_a_section_and_a_row(name: str) -> None:
    assert f"\n## `{name}`\n" in TEXT
    assert f"\n| `{name}` |" in TEXT


def test_no_section_of_a_backend_that_is_not_there() -> None:
    assert set(re.findall(r"^## `(\w+)`$", TEXT, re.MULTILINE)) == set(BACKENDS)


def test_tolerances_are_those_of_the_code() -> None:
    rows = table_rows("Accuracy")
    for dtype, allowed in TOLERANCES.items():
        for cell in rows[dtype][1:4]:
            assert float(cell.split(":")[0]) == allowed
    assert float(rows["float32"][4]) == TOLERANCES["float32"]
    assert float(rows["bfloat16"][4].split(":")[0]) == BFLOAT16_TOLERANCE


def test_paths_are_those_of_the_code_in_their_order() -> None:
    rows = table_rows("`numba`")
    assert [name for name in rows if name.startswith("`")] == [f"`{path.name}`" for path in PATHS]


def test_every_variable_that_the_package_reads_is_listed() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cpu_kernels").rglob("*.py"))
    read = set(re.findall(r'"(HYBRIMOE_[A-Z_]+|NUMBA_[A-Z_]+)"', sources))
    listed = set(re.findall(r"`((?:HYBRIMOE|NUMBA)_[A-Z_]+)`", " ".join(table_rows("Environment variables"))))
    assert read <= listed, read - listed
