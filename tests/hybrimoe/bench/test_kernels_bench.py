"""`hybrimoe bench kernels` and `bench quality`: rows, refusal of wrong results, files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrimoe.bench.kernels import kt as kernel_kt
from hybrimoe.bench.kernels import measure as kernels_bench
from hybrimoe.bench.kernels import peers as kernel_peers
from hybrimoe.bench.kernels.setting import Call, Setting, Shape
from hybrimoe.cli.app import app


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_bench, "SHAPES", (Shape("tiny", 128, 64, 2),))
    monkeypatch.setattr(kernels_bench, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(kernels_bench, "ROUND_SECONDS", 0.001)


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        app(arguments)
    return int(left.value.code or 0)


def test_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, figure = tmp_path / "rows.csv", tmp_path / "figure.png"
    options = ["--shape", "tiny", "--tokens", "1", "--tokens", "3", "--rounds", "2", "--json"]
    assert run(["bench", "kernels", *options, "--csv", str(table), "--plot", str(figure)]) == 0
    result = json.loads(capsys.readouterr().out)
    names = {row["contender"] for row in result["rows"]}
    assert {"ours int4", "ours int8", "ours bfloat16", "ours float32", "torch float32", "torch int8 dynamic"} <= names
    assert len(result["rows"]) == 2 * len(names)
    assert all(row["ms_min"] <= row["ms"] <= row["ms_max"] for row in result["rows"])
    with table.open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
    assert figure.stat().st_size > 1000


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(setting: Setting) -> object:
        def for_tokens(n_tokens: int) -> Call:
            return lambda number: 1.5 * setting.expected(setting.x(n_tokens))

        return for_tokens

    wrong = kernels_bench.Contender("wrong", 32, broken)  # type: ignore[arg-type]
    monkeypatch.setattr(kernels_bench, "CONTENDERS", (wrong,))
    assert run(["bench", "kernels", "--shape", "tiny"]) == 1
    assert "wrong is off by 50.00%" in capsys.readouterr().err


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--shape", "huge"]) == 1
    assert "expected tiny" in capsys.readouterr().err
    assert run(["bench", "kernels", "--only", "nobody"]) == 1
    assert "ours int4" in capsys.readouterr().err


def test_sets_exceed_the_pool() -> None:
    setting = Setting(Shape("tiny", 128, 64, 2), 1 << 20)
    assert setting.n_sets(4.5) * setting.shape.weights * 4.5 / 8 >= 1 << 20
    assert setting.shape.flops(3) == 2 * 3 * 3 * 128 * 64 * 2


def test_onnx_layer_matches_float32_within_its_quantisation() -> None:
    pytest.importorskip("onnxruntime")
    setting = Setting(Shape("tiny", 128, 64, 2), 1 << 16)
    result = kernel_peers.onnxruntime_int4(setting)(3)(0)
    expected = setting.expected(setting.x(3))
    assert np.linalg.norm(result - expected) < 0.2 * np.linalg.norm(expected)


def test_kt_kernel_codes_stand_for_the_weights() -> None:
    weight = Setting(Shape("tiny", 128, 64, 2), 1 << 16).gate
    codes, scales = kernel_kt.codes_and_scales(weight)
    pairs = torch.stack([codes & 15, codes >> 4], dim=2).view(weight.shape).float() - 8
    restored = (pairs.view(64, -1, 32) * scales.float().unsqueeze(2)).view(weight.shape)
    assert (restored - weight).norm() < 0.12 * weight.norm()


ROOT = Path(__file__).resolve().parents[3]
REPORT = ROOT / "benchmarks" / "kernels_report.py"
BEGIN, END = "<!-- kernels:begin (python benchmarks/kernels_report.py) -->", "<!-- kernels:end -->"


def test_report_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--tokens", "1", "--tokens", "3", "--rounds", "1", "--only", "ours int", "--json"]
    runs = [tmp_path / "1.json", tmp_path / "2.json"]
    for path in runs:
        assert run(["bench", "kernels", *options]) == 0
        path.write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "kernels.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    folder = ["--folder", tmp_path]
    subprocess.run([sys.executable, REPORT, *runs, "--avx2", runs[0], *folder], check=True)
    written = tmp_path / "docs" / "kernels-measured.md"
    made = written.read_text(encoding="utf-8")
    assert "2 runs; a cell is the median" in made
    assert made.count("| ours int4 |") == 5  # ms, share and GFLOP/s; ms of the other path at 1 and 3 tokens
    assert "| 3 | -, - |" in made
    assert made.count("| not measured: tiny |") >= 8  # ratios to peers that did not run, and bfloat16
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n| tokens an expert | 1 | 3 |")
    assert text.endswith(f"{END}\nafter\n")
    written.unlink()
    subprocess.run([sys.executable, REPORT, *folder], check=True)
    assert written.read_text(encoding="utf-8") == made


def test_report_keeps_runs_with_and_without_amx(tmp_path: Path) -> None:
    def result(ms: float, isa: str) -> dict[str, object]:
        row = {"shape": "tiny", "tokens": 64, "gflops": 1.0, "bandwidth_share": 0.5, "read_gbps": 30.0}
        rows = [row | {"contender": "ours bfloat16", "ms": ms}, row | {"contender": "torch bfloat16", "ms": 3.0}]
        return {"machine": {"cpu": "a Xeon", "isa": isa, "cores": 2, "torch_threads": 2}, "rows": rows}

    docs = tmp_path / "docs"
    docs.mkdir()
    kept = docs / "kernels-measured.json"
    columns = ["shape", "tokens", "contender", "ms", "gflops", "bandwidth_share", "read_gbps"]
    rows = [["tiny", 1, "ours int4", 2.0, 1.0, 0.8, 30.0]]
    base = {"machine": {"cpu": "an EPYC", "cores": 2, "torch_threads": 2}, "columns": columns, "runs": [rows]}
    kept.write_text(json.dumps(base | {"avx2": [], "quality": []}), encoding="utf-8")
    (docs / "kernels.md").write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, ms, isa in zip(paths, (1.0, 2.0, 6.0), ("amx", "amx", "avx512bf16"), strict=True):
        path.write_text(json.dumps(result(ms, isa)), encoding="utf-8")
    command = [sys.executable, REPORT, "--folder", tmp_path]
    subprocess.run([*command, "--amx", *paths[:2], "--without-amx", paths[2]], check=True)
    made = (docs / "kernels-measured.md").read_text(encoding="utf-8")
    assert "an EPYC" in made
    assert "On another machine: a Xeon" in made
    assert "| tiny | 64 | 1.50 (1.00 - 2.00) | 6.00 | 3.00 | 4.00 | 2.00 |" in made
    swapped = subprocess.run([*command, "--amx", paths[2], "--without-amx", paths[0]], capture_output=True, text=True)
    assert swapped.returncode != 0
    assert "is of avx512bf16, expected amx" in swapped.stderr
    assert json.loads(kept.read_text(encoding="utf-8"))["amx"]["with"] != []


def test_goals_say_where_they_are_missed(tmp_path: Path) -> None:
    columns = ["shape", "tokens", "contender", "ms", "gflops", "bandwidth_share", "read_gbps"]
    rows = [["tiny", 1, "ours int4", 2.0, 1.0, 0.8, 30.0], ["tiny", 1, "llama.cpp Q4_0", 2.4, 1.0, 0.7, 30.0]]
    data = {"machine": {"cpu": "a CPU", "cores": 2, "torch_threads": 2}, "columns": columns, "runs": [rows]}
    (tmp_path / "docs").mkdir()
    kept = tmp_path / "docs" / "kernels-measured.json"
    kept.write_text(json.dumps(data | {"avx2": [], "quality": []}), encoding="utf-8")
    (tmp_path / "docs" / "kernels.md").write_text(BEGIN + END, encoding="utf-8")
    subprocess.run([sys.executable, REPORT, "--folder", tmp_path], check=True)
    made = (tmp_path / "docs" / "kernels-measured.md").read_text(encoding="utf-8")
    assert "| int4 / best int4 peer, 1 token | 1.30 | 1.20 | missed: tiny |" in made
    assert "| ours int4, share of read bandwidth, 1 token | 75% | 80% | met |" in made


def test_documents_are_those_of_the_kept_runs(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("docs/kernels.md", "docs/kernels-measured.json"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, REPORT, "--folder", tmp_path], check=True)
    for name in ("docs/kernels.md", "docs/kernels-measured.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


def test_quality_table(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--windows", "1", "--experts", "1", "--dtype", "int8", "--dtype", "int4", "--json"]
    assert run(["bench", "quality", *options]) == 0
    int8, int4 = json.loads(capsys.readouterr().out)["rows"]
    assert int8["weight_error"] < int4["weight_error"] < 0.2
    assert int8["kernel_error"] < 0.05
    assert int8["greedy_agreement"] > 0.9
    assert int4["logit_cosine"] > 0.99
