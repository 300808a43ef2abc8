"""`hybrimoe doctor`: every line for a sound machine, and what it says for each thing that can be wrong."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.jit import cache_dir
from gpu_kernels import EmulatedAccelerator
from hybrimoe.errors import ModelError
from hybrimoe.machine import doctor, doctor_machine, doctor_parts, profiles
from hybrimoe.machine.doctor import Check
from tests.fake_device import DEVICE_TYPE, fake_cards

PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
LINES = [
    "Python", "torch", "transformers", "numba", "numpy", "CPU", "instruction set", "threads", "accelerator", "memory",
    "disk", "bytecode", "kernel cache", "packed models", "calibration", "demo model", "extra onnx", "extra gpu",
    "extra serve", "extra fast-serve", "extra otel", "extra gguf", "extra images", "extra smollm2",
    "extra ui", "extra cluster", "extra bench", "extra ipex",
]  # fmt: skip


def line(checks, name) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def test_json_has_every_line_and_exit_code_0(hybrimoe) -> None:
    outcome = hybrimoe("doctor", "--json", "--no-kernels")
    assert outcome.code == 0, outcome.out
    assert outcome.data["ok"] is True
    checks = {check["name"]: check for check in outcome.data["checks"]}
    assert list(checks) == LINES
    assert checks["torch"]["found"] == importlib.metadata.version("torch")
    assert checks["instruction set"]["found"].startswith(ck.get_backend("numba").choice.isa.name + ":")
    assert all(set(check) == {"name", "status", "found", "advice"} for check in checks.values())
    assert all(check["advice"] for check in checks.values() if check["status"] in ("warn", "broken"))


def test_a_torchvision_of_another_torch_is_named_by_every_command(broken_torchvision) -> None:
    """transformers imports it where it finds it, so that nothing runs beside it."""
    fitting = "torchvision 0.20.0 does not import here (operator torchvision::nms does not exist)"
    for words, code in ((["doctor", "--no-kernels"], 1), (["inspect"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "hybrimoe", *words],
            env=os.environ | {"COLUMNS": "400"},
            capture_output=True,
            text=True,
        )
        text = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == code
        assert fitting in text
        assert "pip install 'torchvision==0." in text
        assert "pip uninstall torchvision" in text
        assert "defect" not in text


@pytest.fixture
def broken_torchvision(tmp_path, monkeypatch) -> None:
    """A torchvision on the path of processes that are started, built for another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'import torch\ntorch.library.register_fake("torchvision::nms")(lambda: None)\n'
    )
    (tmp_path / "torchvision-0.20.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.20.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", path)


def test_kernels_are_run(monkeypatch) -> None:
    check = doctor_machine.kernels()
    assert check.status == "ok", check
    assert "relative error" in check.found
    monkeypatch.setattr(ck, "relative_error", lambda *_: 0.5)
    check = doctor_machine.kernels()
    assert check.status == "broken"
    assert "disagrees" in check.found
    assert "HYBRIMOE_ISA=portable" in check.advice


def test_broken_machines_exit_with_1_and_say_so(hybrimoe, monkeypatch) -> None:
    monkeypatch.setenv("HYBRIMOE_ISA", "avx1024")
    outcome = hybrimoe("doctor", "--no-kernels")
    assert outcome.code == 1
    assert "HybriMoE cannot run here: instruction set" in outcome.out
    assert "avx1024" in outcome.out


def test_warnings_are_counted_in_the_verdict(hybrimoe, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda kernels: [Check("disk", "warn", "full [/]", "make room")])
    outcome = hybrimoe("doctor")
    assert outcome.code == 0
    assert "with 1 warning\n" in outcome.out
    assert "full [/]" in outcome.out


def test_a_path_that_the_cpu_lacks_is_broken(monkeypatch) -> None:
    monkeypatch.setattr("cpu_kernels.host.isa.cpu_features", frozenset)
    monkeypatch.setenv("HYBRIMOE_ISA", "avx2")
    check = line(doctor_machine.checks(), "instruction set")
    assert check.status == "broken"
    assert "needs avx2, fma" in check.found
    monkeypatch.delenv("HYBRIMOE_ISA")
    check = line(doctor_machine.checks(), "instruction set")
    assert (check.status, check.found.split(":")[0]) == ("warn", "portable")
    assert "not avx512vnni: lacks" in check.found


def versions(monkeypatch, **changed) -> list[Check]:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda package: changed.get(package, real(package)))
    return doctor.examine(kernels=False)


@pytest.mark.parametrize(
    ("package", "version", "found"),
    [
        ("torch", "2.7.1", "2.7.1; needs 2.8 or later"),
        ("transformers", "6.0.0", "6.0.0; needs 5.23 or later, before 6"),
        ("transformers", "4.57", "4.57; needs 5.23 or later, before 6"),
        ("safetensors", None, "not installed"),
    ],
)
def test_wrong_versions_are_broken_and_end_the_examination(monkeypatch, package, version, found) -> None:
    checks = versions(monkeypatch, **{package: version})
    assert line(checks, package) == Check(package, "broken", found, doctor.REINSTALL)
    assert not doctor.works(checks)
    assert "CPU" not in [check.name for check in checks]


def test_a_package_that_does_not_import_is_broken(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    check = line(doctor.examine(kernels=False), "numba")
    assert check.status == "broken"
    assert "ModuleNotFoundError" in check.found


def test_an_old_python_is_broken(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    check = line(doctor.examine(kernels=False), "Python")
    assert check.status == "broken"
    assert "3.11" in check.advice


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("5.0.0rc1", (5, 0)), ("2", (2,)), ("junk", ())]
)
def test_numbers_of_versions(version, numbers) -> None:
    assert doctor._numbers(version) == numbers


def test_unwritable_caches_are_warnings_with_the_variable_to_set(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cache_dir, "kernel_cache_dir", lambda: None)
    checks = list(doctor_machine.checks())
    for name, variable in (("packed models", "HYBRIMOE_CACHE"), ("kernel cache", "HYBRIMOE_CACHE")):
        assert line(checks, name).status == "warn"
        assert variable in line(checks, name).advice
    assert line(checks, "disk").status == "ok"


def test_modules_that_each_start_compiles_are_a_warning(monkeypatch, tmp_path) -> None:
    for package in doctor_machine.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert doctor_machine._bytecode(tmp_path).status == "ok"  # the next start writes it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    check = doctor_machine._bytecode(tmp_path)
    assert (check.status, check.advice) == ("ok", "")
    assert str(tmp_path / "cache") in check.found
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "file"))
    check = doctor_machine._bytecode(tmp_path)
    assert check.status == "warn"
    subprocess.run([sys.executable, *check.advice.partition("python ")[2].split()], check=True)
    check = doctor_machine._bytecode(tmp_path)
    assert (check.status, check.found) == ("ok", "5 of 5 modules have bytecode beside them")


def test_little_memory_and_disk_are_warnings(monkeypatch) -> None:
    monkeypatch.setattr(doctor_machine, "LEAST_MEMORY_GIB", 1e9)
    monkeypatch.setattr(doctor_machine, "LEAST_DISK_GIB", 1e9)
    checks = list(doctor_machine.checks())
    assert [line(checks, name).status for name in ("memory", "disk")] == ["warn", "warn"]


def test_a_number_of_threads_that_is_none_is_broken(monkeypatch) -> None:
    monkeypatch.setenv("HYBRIMOE_THREADS", "many")
    check = line(doctor_machine.checks(), "threads")
    assert check.status == "broken"
    assert "HYBRIMOE_THREADS='many'" in check.found


def test_accelerators(monkeypatch) -> None:
    if not torch.accelerator.is_available():
        assert line(doctor_machine.checks(), "accelerator").status == "info"

    with monkeypatch.context() as two:
        two.setattr(doctor_machine, "open_accelerator", lambda _: EmulatedAccelerator())
        two.setattr(torch.accelerator, "device_count", lambda: 2)
        two.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        check = line(doctor_machine.checks(), "accelerator")
        assert (check.found, check.advice) == ("2 x cuda", "to use all: accelerator: [cuda:0, cuda:1]")

    def fail(_):
        raise RuntimeError("CUDA driver is too old")

    monkeypatch.setattr(doctor_machine, "open_accelerator", fail)
    check = line(doctor_machine.checks(), "accelerator")
    assert (check.status, check.found) == ("warn", "CUDA driver is too old")


def test_calibration_profiles(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    assert line(doctor_machine.checks(), "calibration").status == "info"
    shipped = Path(doctor_machine.__file__).parents[2] / "yaml_rules" / "hardware" / "laptop.yaml"
    profiles.profile_path().write_text(shipped.read_text())
    check = line(doctor_machine.checks(), "calibration")
    assert check.status == "ok"
    assert "laptop" in check.found
    profiles.profile_path().write_text("name: [")
    assert line(doctor_machine.checks(), "calibration").status == "warn"


def test_a_missing_or_damaged_demo_model_is_a_warning(monkeypatch, tmp_path) -> None:
    def missing():
        raise ModelError("expected the demo model's config.json in x, found none")

    monkeypatch.setattr(doctor_parts, "demo_model_path", missing)
    assert line(doctor_parts.checks(), "demo model").status == "warn"
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    monkeypatch.setattr(doctor_parts, "demo_model_path", lambda: tmp_path)
    check = line(doctor_parts.checks(), "demo model")
    assert check.status == "warn"
    assert "no weights" in check.found
    (tmp_path / "config.json").write_text("{")
    assert line(doctor_parts.checks(), "demo model").status == "warn"


def test_missing_extras_are_named_with_their_command(monkeypatch) -> None:
    monkeypatch.setattr(doctor_parts, "installed", lambda package: None if package == "uvicorn" else "1.0")
    checks = list(doctor_parts.checks())
    assert line(checks, "extra serve").status == "info"
    assert "uvicorn not installed" in line(checks, "extra serve").found
    assert line(checks, "extra serve").advice == "pip install 'hybrimoe[serve]'"
    assert line(checks, "extra gpu") == Check("extra gpu", "ok", "Triton kernels on a GPU: triton 1.0")


def test_tables_agree_with_pyproject() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    written = {f"{name}>={version}" for name, version in doctor.REQUIRED.items()}
    assert written == {text.split(",")[0] for text in project["dependencies"]}
    assert {
        text.split(">=")[0]: text.split(",<")[1] for text in project["dependencies"] if ",<" in text
    } == doctor.TOO_NEW
    assert f">={'.'.join(map(str, doctor.FIRST_PYTHON))}" == project["requires-python"]
    extras = project["optional-dependencies"]
    assert set(doctor_parts.EXTRAS) == set(extras) - {"dev", "browser", "ipex"}
    for extra, (packages, _) in doctor_parts.EXTRAS.items():
        assert set(packages) == {text.split(">=")[0].split("[")[0] for text in extras[extra]}


def test_a_sound_card_has_its_lines() -> None:
    with fake_cards(2):
        checks = list(doctor_machine.checks())
        found = {check.name: (check.status, check.found) for check in checks}
    assert found["accelerator"] == ("ok", f"2 x {DEVICE_TYPE}")
    assert found["accelerator memory"] == ("ok", "4.0 GiB free of 4.0 GiB")
    assert found["page-locked memory"] == ("ok", "1 MiB locked")


def test_memory_that_others_hold_is_told() -> None:
    with fake_cards(1) as cards:
        taken = torch.empty(3 << 30, dtype=torch.uint8, device=f"{DEVICE_TYPE}:0")
        check = line(doctor_machine.checks(), "accelerator memory")
        assert taken.nbytes == cards.used_bytes()
    assert (check.status, check.found) == ("warn", "1.0 GiB free of 4.0 GiB")
    assert "end them, or expect fewer slots" in check.advice


@pytest.mark.filterwarnings("error")
def test_pages_that_cannot_be_locked_are_told() -> None:
    with fake_cards(1, refuses_locking=True):
        check = line(doctor_machine.checks(), "page-locked memory")
    assert (check.status, check.found) == ("warn", "the system refuses to lock pages")
    assert ("ulimit -l" in check.advice, "WSL2" in check.advice) == (True, True)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "too old, or too new, for this torch"),
        ("CUDA error: unspecified launch failure", "until the device works: --accelerator none"),
    ],
)
def test_a_card_that_computes_nothing_is_told(monkeypatch, reason: str, advice: str) -> None:
    with fake_cards(1):

        def failing(device: torch.device) -> None:
            raise torch.AcceleratorError(f"{reason}\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

        monkeypatch.setattr(doctor_machine, "_compute_a_little", failing)
        check = line(doctor_machine.checks(), "accelerator")
    assert check.status == "warn"
    assert check.found.endswith(f"computes nothing: {reason}")
    assert advice in check.advice


def test_a_lost_card_has_a_line_and_no_crash() -> None:
    with fake_cards(1) as cards:
        cards.lose(0)
        checks = list(doctor_machine.checks())
    assert line(checks, "accelerator").status == "warn"


def test_a_card_that_is_too_old_for_triton_is_told(monkeypatch) -> None:
    monkeypatch.setattr(doctor_machine, "graphs_of", lambda device: object())
    monkeypatch.setattr(doctor_machine.importlib.util, "find_spec", lambda name: object())
    with fake_cards(1):
        module = torch.get_device_module(f"{DEVICE_TYPE}:0")
        monkeypatch.setattr(module, "get_device_capability", lambda device: (6, 1), raising=False)
        check = line(doctor_machine.checks(), "card's kernels")
    assert check.status == "warn"
    assert "compute capability 6.1, 7.0 needed" in check.found
    assert "right but slower" in check.advice
