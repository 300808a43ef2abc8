"""The ipex backend where it does not fit: refused with what to do, before anything is imported.

The parity suite is ipex_parity.py, which tests/ipex/run.sh runs in an environment that has the extension.
"""

import importlib
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest

import cpu_kernels as ck
from cpu_kernels.backends import ipex_backend

IMPORT = importlib.import_module
EXTENSION = "intel_extension_for_pytorch"


@pytest.fixture
def machine(monkeypatch):
    """machine(ipex, torch, ...): what the metadata, the platform and the CPU say."""

    def pretend(ipex="2.8.0", torch="2.8.0+cu128", system="linux", processor="x86_64", features=frozenset({"avx2"})):
        found = {ipex_backend.PACKAGE: ipex, "torch": torch}
        monkeypatch.setattr(ipex_backend, "_version", found.__getitem__)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(ipex_backend.platform, "machine", lambda: processor)
        monkeypatch.setattr(ipex_backend, "cpu_features", lambda: features)

    def refuse(name):
        assert name != EXTENSION
        return IMPORT(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    return pretend


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"ipex": None}, "intel-extension-for-pytorch is not installed"),
        ({"ipex": "2.7.0+cpu"}, r"must be 2\.8\.0 \(its last release\), found 2\.7\.0\+cpu"),
        ({"torch": "2.13.0+cpu"}, r"works with torch 2\.8\.\* alone, found torch 2\.13\.0\+cpu"),
        ({"torch": "2.80.0"}, r"found torch 2\.80\.0"),
        ({"torch": None}, "found torch none"),
        ({"features": frozenset({"sse4.2"})}, "needs AVX2"),
        ({"system": "darwin"}, "exists for Linux on x86-64, this is darwin"),
        ({"processor": "aarch64"}, "this is linux on aarch64"),
    ],
)
def test_refused_without_an_import(machine, setting, reason) -> None:
    machine(**setting)
    with pytest.raises(ck.BackendError, match=f"backend 'ipex' does not run here: .*{reason}"):
        ck.get_backend("ipex")


@pytest.mark.parametrize("setting", [{"ipex": None}, {"ipex": "2.9"}, {"torch": "2.13"}])
def test_versions_that_do_not_fit_come_with_the_way_out(machine, setting) -> None:
    machine(**setting)
    assert "pip install 'hybrimoe[ipex]'" in (ipex_backend.unfit() or "")


@pytest.mark.parametrize("torch_version", ["2.8.0", "2.8.0+cpu", "2.8.1"])
def test_the_right_versions_fit(machine, torch_version) -> None:
    machine(ipex="2.8.0+cpu", torch=torch_version)
    assert ipex_backend.unfit() is None


def test_an_import_that_fails_is_a_backend_error(machine, monkeypatch) -> None:
    machine()

    def fail(name):
        if name != EXTENSION:
            return IMPORT(name)
        raise AttributeError("module 'torch._C' has no attribute 'x'")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ck.BackendError, match=r"importing intel_extension_for_pytorch failed: module 'torch\._C'"):
        ck.get_backend("ipex")


def test_dtypes_are_refused_by_name(machine, monkeypatch) -> None:
    machine()
    without = types.SimpleNamespace(_C=types.SimpleNamespace(onednn_has_bf16_support=lambda: False))
    monkeypatch.setattr(importlib, "import_module", lambda name: without if name == EXTENSION else IMPORT(name))
    backend = ipex_backend.IpexBackend(1)
    assert backend.supports(ck.ExpertSpec(8, 8, "float32")) is None
    assert "AVX512-BF16 or AMX" in backend.supports(ck.ExpertSpec(8, 8, "bfloat16"))
    for dtype in ("int8", "int4"):
        assert "use numba" in backend.supports(ck.ExpertSpec(8, 8, dtype))


def test_a_missing_distribution_has_no_version() -> None:
    assert ipex_backend._version("no-such-distribution-1") is None
    assert ipex_backend._version("torch")


def test_the_script_refuses_another_python(tmp_path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    script = Path(__file__).resolve().parents[1] / "ipex" / "run.sh"
    environment = os.environ | {"PYTHON": str(old), "HYBRIMOE_IPEX_VENV": str(tmp_path / "venv")}
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    on_linux = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    assert ("Python 3.9.1 found" if on_linux else "exists for Linux on x86-64") in result.stderr
    assert not (tmp_path / "venv").exists()
