"""docs/models-measured.md and README's block are what `benchmarks/models_report.py` makes of the recorded runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_report", ROOT / "benchmarks" / "models_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_the_recorded_runs(report: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/models-measured.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    report.main(["--folder", str(tmp_path)])
    for name in ("README.md", "docs/models-measured.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), (
            "run: python benchmarks/models_report.py"
        )


def test_peers_had_as_many_threads_and_the_same_weights(report: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "models-measured.json").read_text(encoding="utf-8"))
    for results in data["compared"].values():
        for result in results.values():
            assert result["model"] == report.SHAPE
            assert result["threads"] == result["machine"]["cores"]
            assert {"as configured", "llama.cpp"} <= {row["name"] for row in result["results"]}
