"""The disk tier's benchmark on a tiny shape: what it reports, that it refuses wrong results and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrimoe.bench.tiers import layers as tiers_bench
from hybrimoe.errors import BudgetError, ConfigError, ModelError


@pytest.fixture
def tiny(small_shape: Callable[..., str], tmp_path: Path) -> tiers_bench.Request:
    return tiers_bench.Request(small_shape(num_hidden_layers=3), 3, "float32", 0.5, 6, 4, 1, None, tmp_path)


def test_reports_each_contender(tiny: tiers_bench.Request) -> None:
    result = tiers_bench.measure(tiny)
    names = [row["name"] for row in result["contenders"]]
    assert {"ours", "least recently used", "static"} <= set(names)
    assert (result["n_slots"], result["n_records"]) == (12, 24)
    assert result["disk_gbps"] > 0
    for row in result["contenders"]:
        assert row["prefill"]["median"] > 0
        assert len(row["decode"]["rounds"]) == 1
        assert (row["counters"]["prefill"]["disk_reads"] > 0) is (row["name"] != "mmap")
    json.dumps(result)
    assert list(tiny.folder.iterdir()) == [tiny.folder / "config.json"]


def test_refuses_to_measure_wrong_results(tiny: tiers_bench.Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with pytest.raises(ModelError, match="refusing to measure"):
        tiers_bench.measure(tiny)


def test_refuses_what_does_not_fit(tiny: tiers_bench.Request) -> None:
    with pytest.raises(BudgetError, match="at least 8"):
        tiers_bench.measure(replace(tiny, share=0.1))
    with pytest.raises(ConfigError, match="needs 8 experts"):
        tiers_bench.measure(replace(tiny, trace=_other_trace(tiny.folder)))


def _other_trace(folder: Path) -> Path:
    from scheduler.traces.synthetic import generate

    generate(3, 4, 2, 20, recall=None).save(folder / "other.npz")
    return folder / "other.npz"
