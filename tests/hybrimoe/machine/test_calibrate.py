"""`hybrimoe calibrate`: a profile that the scheduler reads, with spread, quickly."""

import json
import threading
from pathlib import Path

import pytest

from hybrimoe.cli.app import app
from hybrimoe.errors import FileError
from hybrimoe.machine import calibrate, calibration
from hybrimoe.machine.disks import device_of
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.runtime.tier import disk_speed

QUICK = calibrate.Request(shapes=((64, 128),), dtypes=("int4", "float32"), accelerator="emulated", budget_s=3600)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibrate, "TOKEN_POINTS", (1, 4, 16))
    monkeypatch.setattr(calibrate, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(calibrate, "CONTENTION_SECONDS", 0.05)
    monkeypatch.setattr(calibrate, "write_choice", lambda choice: None)  # the machine's own choice stays


def test_profile_is_read_back(tmp_path: Path) -> None:
    result = calibrate.calibrate(QUICK)
    path = tmp_path / "machine.yaml"
    calibration.write_profile(result, path)
    profile = open_hardware(path)
    assert profile.provenance == "measured"
    assert "emulated" in profile.source
    assert profile.cpu.read_gbps > 0
    assert profile.link.gbps > 0
    assert 0 < profile.contention.cpu_with_link <= 1
    for table in (profile.cpu.table, profile.accel.table):
        assert set(table) == {"64x128/int4", "64x128/float32"}
        for points in table.values():
            assert [n for n, _ in points] == [1, 4, 16]
            assert sorted(us for _, us in points) == [us for _, us in points]
    assert all(low <= middle <= high for low, middle, high in result.spread.values())
    assert {"numba", "torch"} <= set(result.backends["int4"])


@pytest.mark.parametrize("broken", ["_run_us", "_link_gbps"])
def test_a_failure_beside_the_other_lane_is_raised_and_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before, working = set(threading.enumerate()), getattr(calibrate, broken)

    def fails_beside_the_copies(*args: object) -> float:
        names = [thread.name for thread in threading.enumerate()]
        if any(name.startswith("ThreadPoolExecutor") for name in names):
            raise RuntimeError("broken while both lanes ran")
        return float(working(*args))

    monkeypatch.setattr(calibrate, broken, fails_beside_the_copies)
    with pytest.raises(RuntimeError, match="broken while both lanes ran"):
        calibrate.calibrate(calibrate.Request(((64, 64),), ("int8",), "emulated", 60, backends=()))
    left = set(threading.enumerate()) - before
    lanes = ("ThreadPoolExecutor", "hybrimoe-copy", "hybrimoe-compute")
    assert [thread.name for thread in left if thread.name.startswith(lanes)] == []


def test_without_an_accelerator_the_source_says_so() -> None:
    result = calibrate.calibrate(calibrate.Request(((64, 64),), ("int8",), "none", 60))
    assert "no accelerator" in result.profile.source
    assert result.profile.accel.table == result.profile.cpu.table


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.yaml"
    monkeypatch.setattr(calibrate, "TOKEN_POINTS", (1,))
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(CONFIG), encoding="utf-8")
    arguments = ["calibrate", "--dtype", "int8", "--shape", str(shape), "--accelerator", "none", "--output", str(path)]
    arguments += ["--disk", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        app([*arguments, "--json"])
    assert left.value.code in (0, None)
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(path)
    profile = open_hardware(path)
    assert profile.cpu.table.keys() == {"64x32/int8"}
    assert profile.disk is not None
    assert profile.disk.device == device_of(tmp_path)
    assert {"disk.gbps, 1 in flight", "disk, one read alone, us"} <= printed["spread"].keys()


@pytest.mark.parametrize("disk", ["none", "full"])
def test_without_the_disk_there_is_a_profile_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    def full(place: Path, record_bytes: int) -> None:
        raise FileError(f"{place} has too little room")

    monkeypatch.setattr(calibrate, "TOKEN_POINTS", (1,))
    monkeypatch.setattr(disk_speed, "measure_disk", full)
    words = ["calibrate", "--dtype", "int8", "--accelerator", "none", "--output", str(tmp_path / "p.yaml")]
    (tmp_path / "shape.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        app([*words, "--shape", str(tmp_path / "shape.json"), "--disk", "none" if disk == "none" else str(tmp_path)])
    assert left.value.code in (0, None)
    assert open_hardware(tmp_path / "p.yaml").disk is None
    assert ("has too little room" in " ".join(capsys.readouterr().err.split())) is (disk == "full")


def test_a_disk_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["calibrate", "--disk", "/not/there"])
    assert left.value.code == 2
    assert "--disk /not/there: expected a folder or a file" in " ".join(capsys.readouterr().err.split())


def test_wrong_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["calibrate", "--dtype", "int9"])
    assert left.value.code == 2
    assert "bfloat16, int8, int6, int5, int4" in capsys.readouterr().err


CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
