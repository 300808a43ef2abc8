"""The public measurements: each has its source, the halves share no machine, and the page is of this file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from scheduler.machine.engine_profile import EngineProfile
from yaml_rules.engines import load_engine

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("calibration_report", ROOT / "benchmarks" / "calibration_report.py")
assert SPEC is not None
assert SPEC.loader is not None
report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report)


def test_rows_have_sources_and_halves_share_no_machine():
    data = report.public()
    assert len(data["rows"]) >= 20
    for row in data["rows"]:
        assert set(data["sources"][row["source"]]) == {"project", "page", "date"}
        assert row["speed"] > 0
        assert 0 <= row["on_gpu"] <= report.shape_of(data, row["model"]).n_layers
    halves = {half: {r["machine"] for r in data["rows"] if r["half"] == half} for half in ("calibrate", "held-out")}
    assert not halves["calibrate"] & halves["held-out"]
    for half in halves:
        assert {r["phase"] for r in data["rows"] if r["half"] == half} == {"decode", "prefill"}


def test_the_page_has_the_figures_of_a_row():
    """One row simulated anew: the page is not of other parameters."""
    data = report.public()
    engine = EngineProfile.from_mapping(load_engine("llama_cpp"))
    row = next(r for r in data["rows"] if r["machine"] == "rtx3090ti")
    speed = report.speed(data, row, engine.on(report.machine(data, row["machine"]), row["graphs"]))
    line = next(line for line in report.PAGE.read_text().splitlines() if line.startswith("| RTX 3090 Ti"))
    assert f"| {speed:.0f} |" in line
    assert len(engine.decode_ratios) + len(engine.prefill_ratios) == sum(r["half"] == "held-out" for r in data["rows"])


def test_the_picture_shows_every_kind_of_row_and_is_the_same_twice():
    pytest.importorskip("matplotlib")
    rows = [report.Row(row, row["speed"], row["speed"]) for row in report.public()["rows"]]
    drawn = report.picture(rows)
    assert drawn == report.picture(rows)
    shown = report.PICTURE.read_text()
    for text in ("within 35%", "calibrate, decode", "held-out, prefill"):
        assert f">{text}<" in drawn
        assert f">{text}<" in shown
