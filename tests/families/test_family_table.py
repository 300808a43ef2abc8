"""The table of families in docs and README is the one that the recorded run gives, for the installed transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from family_check import describe
from tiny_families import FAMILIES
from write_report import BEGIN, END, JSON_FILE, README, TABLE_FILE, long_table, not_supported, short_table, with_table

HOW = "run: python tests/families/write_report.py"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(JSON_FILE.read_text(encoding="utf-8"))
    return data


def test_every_family_has_a_row(recorded: dict[str, Any]) -> None:
    assert set(recorded["families"]) == set(FAMILIES), HOW
    assert recorded["not_supported"] == not_supported(), HOW


def test_every_family_works(recorded: dict[str, Any]) -> None:
    assert [family for family, row in recorded["families"].items() if not row["works"]] == []


@pytest.mark.families
def test_the_rows_describe_the_installed_transformers(recorded: dict[str, Any]) -> None:
    if recorded["transformers"] != transformers.__version__:
        pytest.skip(f"recorded with transformers {recorded['transformers']}, installed is {transformers.__version__}")
    for family in FAMILIES:
        row = recorded["families"][family]
        assert {key: row[key] for key in describe(family)} == describe(family), HOW


def test_the_tables_are_up_to_date(recorded: dict[str, Any]) -> None:
    assert TABLE_FILE.read_text(encoding="utf-8") == long_table(recorded), HOW
    readme = README.read_text(encoding="utf-8")
    assert readme == with_table(readme, short_table(recorded)), HOW


def test_a_readme_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no markers"):
        with_table(f"{BEGIN} but no end", "table")
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb"
