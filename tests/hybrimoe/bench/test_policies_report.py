"""docs/policies.md is what `benchmarks/policies_report.py` makes of its recorded rows, and names every policy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from scheduler.balancing import BALANCE_POLICIES
from scheduler.cache import CACHE_POLICIES
from scheduler.prefetch import PREFETCH_POLICIES

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("policies_report", ROOT / "benchmarks" / "policies_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_recorded_rows(report: ModuleType) -> None:
    data = json.loads(report.JSON_FILE.read_text(encoding="utf-8"))
    assert report.PAGE.read_text(encoding="utf-8") == report.page(data), "run: benchmarks/policies_report.py --tables"


def test_every_part_was_measured_and_is_described(report: ModuleType) -> None:
    rows = json.loads(report.JSON_FILE.read_text(encoding="utf-8"))["rows"]
    for part, known in (("cache", CACHE_POLICIES), ("balance", BALANCE_POLICIES), ("prefetch", PREFETCH_POLICIES)):
        measured = {row["name"] for row in rows if row["part"] == part}
        assert measured == set(known) - set(report.NOT_ALONE if part == "cache" else ())
        assert set(known) <= set(report.WHAT)


def test_bounds_win_no_column(report: ModuleType) -> None:
    keys = [("t", 0.25)]
    values = {("lru", keys[0]): 0.5, ("belady", keys[0]): 0.9}
    lines = report._table(values, keys, ["t"], "{:.1%}", best=max)
    assert lines[2].startswith("| `lru` | **50.0%** |")
    assert lines[3].startswith("| `belady` | 90.0% |")
