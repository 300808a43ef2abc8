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
    kept = json.loads((ROOT / "docs" / "models-measured.json").read_text(encoding="utf-8"))
    assert len({report.title(data) for data in kept["machines"]}) == len(kept["machines"])
    compared = [(kind, runs) for data in kept["machines"] for kind, runs in data["compared"].items()]
    for kind, result in ((kind, each) for kind, runs in compared for each in runs.values()):
        words = report.RUNS[kind][0]
        assert result["model"] == (words[words.index("--shape") + 1] if "--shape" in words else report.SHAPE)
        assert result["threads"] == result["machine"]["cores"]
        assert "llama.cpp" in {row["name"] for row in result["results"]}
        assert report.ours_beside(result)["name"].startswith("as configured")


def test_a_peer_is_compared_with_ours_in_as_many_bits(report: ModuleType) -> None:
    names = ["as configured, bfloat16 keys and values", "as configured, int8 keys and values", "llama.cpp"]
    result = {"results": [{"name": name} for name in [*names, "llama.cpp, q8_0 keys and values"]]}
    assert report.ours_beside(result)["name"] == names[0]
    assert report.ours_beside(result, "llama.cpp")["name"] == names[0]
    assert report.ours_beside(result, "llama.cpp, q8_0 keys and values")["name"] == names[1]
    assert report.ours_beside({"results": [{"name": "as configured"}]}, "llama.cpp")["name"] == "as configured"


def test_a_new_run_takes_the_place_of_the_same_machine_and_set_only(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/models-measured.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    kept = tmp_path / "docs" / "models-measured.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["machines"]
    for isa in ("avx1024", "avx1024", before[0]["compared"]["decode"]["int8"]["machine"]["isa"]):
        again = json.loads(json.dumps(before[0]))
        again["compared"]["decode"]["int8"]["machine"]["isa"] = isa
        monkeypatch.setattr(report, "measured", lambda kinds, again=again: again)
        report.main(["--folder", str(tmp_path), "--measure"])
    after = json.loads(kept.read_text(encoding="utf-8"))["machines"]
    assert [report.title(data) for data in after] == [
        *map(report.title, before),
        report.title(before[0]).replace("avx2", "avx1024"),
    ]


def test_what_is_not_measured_again_stays(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/models-measured.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    kept = tmp_path / "docs" / "models-measured.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["machines"][0]
    asked, machine = [], before["compared"]["decode"]["int8"]["machine"]
    results = {
        "decode": {"results": [{"name": "as configured", "of_read_rate": 0.5, "logits_cosine": None, "resident_mib": 1,
                                "step_bytes": 400e6,
                                "tokens_per_s": {"median": 1.0, "min": 1.0, "max": 1.0}}]},
        "parallel": {"expert_dtype": "int4", "rows": [{"replies": 2, "step_ms": 3.25, "tokens_per_s": {"median": 99.5},
                                                       "experts": None}]},
    }  # fmt: skip

    def run(dense: str, kind: str, *words: str) -> dict[str, object]:
        asked.append((kind, *words))
        return results[kind] | {"machine": machine}

    monkeypatch.setattr(report, "run", run)
    report.main(["--folder", str(tmp_path), "--measure", "--only", "growth", "--about", "now"])
    after = json.loads(kept.read_text(encoding="utf-8"))["machines"][0]
    assert after["compared"] == before["compared"]
    assert after["growth"].keys() == report.GROWTH.keys()
    assert after["about"] == "now"
    assert any(words[-2] == "--active" for words in asked)
    page = (tmp_path / "docs" / "models-measured.md").read_text(encoding="utf-8")
    assert "| 2 layers, context 64,000 | 1000.0 | 50% |" in page
    assert "| 2 | 3.2 | 99.5 | - |" in page
    asked.clear()
    report.main(["--folder", str(tmp_path), "--measure", "--only", "16 layers"])
    again = json.loads(kept.read_text(encoding="utf-8"))["machines"][0]
    assert [words[0] for words in asked] == ["decode"]
    assert again["growth"] == after["growth"]
    assert again["at_once"] == after["at_once"]
    assert again["about"] == "now"
    assert again["compared"].keys() == {*before["compared"], "16 layers"}


def test_what_several_replies_may_reach_follows_from_what_their_step_reads(report: ModuleType) -> None:
    rows = [
        {"replies": n, "step_ms": 1.0, "tokens_per_s": {"median": speed}, "experts": experts}
        for n, speed, experts in ((1, 60.0, 8.0), (2, 99.5, None), (4, 90.0, 16.0))
    ]
    own = {"name": "as configured", "step_bytes": 400e6}
    data = {"compared": {"decode": {"int8": {"results": [own]}}}, "at_once": {"expert_dtype": "int4", "rows": rows}}
    record_bytes = 3 * 2048 * 1024 * (4 + 0.5) / 8  # a scale of 16 bits for 32 weights
    assert report.bytes_at_once(data) == [400e6, None, 400e6 + 8 * 8 * record_bytes]
    lines = report.at_once_table(data).splitlines()
    assert lines[2:4] == ["| 1 | 1.0 | 60.0 | 8.0 | 400 | 60.0 (100% measured) |", "| 2 | 1.0 | 99.5 | - | - | - |"]
    bound = 4 * 60 * 400e6 / (400e6 + 64 * record_bytes)
    assert lines[4].endswith(f"| {bound:.1f} ({90 / bound:.0%} measured) |")
