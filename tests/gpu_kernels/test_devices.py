"""What torch's libraries take of a card, by the card's kind and the user's setting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gpu_kernels.devices import WORKSPACE_SETTINGS, blas_workspace_bytes

CARD = torch.device("cuda", 0)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORKSPACE_SETTINGS:
        monkeypatch.delenv(name, raising=False)


def of_card(monkeypatch: pytest.MonkeyPatch, major: int, *, amd: str = "") -> None:
    properties = SimpleNamespace(major=major, gcnArchName=amd)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)


@pytest.mark.parametrize(
    ("major", "expected"), [(8, 8_519_680), (7, 8_519_680), (9, 32 * MIB), (10, 32 * MIB), (12, 32 * MIB)]
)
def test_nvidia_cards_by_their_capability(monkeypatch: pytest.MonkeyPatch, major: int, expected: int) -> None:
    of_card(monkeypatch, major)
    assert blas_workspace_bytes(CARD) == expected


@pytest.mark.parametrize(("name", "expected"), [("gfx942:sramecc+", 204 * MIB), ("gfx1100", 108 * MIB)])
def test_amd_cards_have_a_second_library(monkeypatch: pytest.MonkeyPatch, name: str, expected: int) -> None:
    of_card(monkeypatch, 9, amd=name)
    assert blas_workspace_bytes(CARD) == expected


def test_the_users_setting_is_read_as_torch_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of_card(monkeypatch, 9)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert blas_workspace_bytes(CARD) == 8_519_680
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "much")
    assert blas_workspace_bytes(CARD) == 32 * MIB, "torch warns, and takes its default"


def test_other_devices_take_none() -> None:
    assert blas_workspace_bytes(torch.device("cpu")) == 0
    assert blas_workspace_bytes(torch.device("xpu", 0)) == 0
