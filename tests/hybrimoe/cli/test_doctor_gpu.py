"""`hybrimoe doctor --gpu`: what it says, its exit codes and its report, without a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybrimoe.bench.gpu_check import report

WITHOUT_CARD = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a card")


@pytest.mark.slow
def test_the_emulated_device_is_checked(hybrimoe, tmp_path: Path) -> None:
    outcome = hybrimoe(
        "doctor", "--gpu", "--accelerator", "emulated", "--minutes", "5", "--only", "lost_copy", "--only", "overlap",
        "--report", tmp_path / "report", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert (outcome.data["ok"], outcome.data["kind"]) == (True, "emulated")
    lost, overlap = outcome.data["sections"]
    assert (lost["status"], overlap["status"]) == ("ok", "skipped")
    assert all(row["cosine_of_next_prompt"] > 0.999 for row in lost["tables"]["failing copies"])
    assert "calls of a driver" in overlap["why"]
    assert outcome.data["versions"]["torch"] == torch.__version__
    files = {name: (tmp_path / "report" / name).read_text("utf-8") for name in report.NAMES.values()}
    assert json.loads(files[report.NAMES["json"]]) == outcome.data
    assert "1 ok, 0 failed, 1 skipped" in files[report.NAMES["markdown"]]
    assert "A copy that fails" in outcome.err


@WITHOUT_CARD
def test_without_a_card_it_says_so(hybrimoe, tmp_path: Path) -> None:
    outcome = hybrimoe("doctor", "--gpu", "--report", tmp_path)
    assert outcome.code == 1
    assert "no accelerator to check" in outcome.err
    assert "--accelerator emulated" in " ".join(outcome.err.split())
    assert list(tmp_path.iterdir()) == []


def test_its_options_need_it(hybrimoe) -> None:
    outcome = hybrimoe("doctor", "--minutes", "3")
    assert outcome.code == 2
    assert "--minutes go with --gpu" in outcome.err


def test_an_unknown_section_is_refused_at_once(hybrimoe) -> None:
    outcome = hybrimoe("doctor", "--gpu", "--accelerator", "emulated", "--only", "sped")
    assert outcome.code == 2
    assert "did you mean 'speed'" in outcome.err
