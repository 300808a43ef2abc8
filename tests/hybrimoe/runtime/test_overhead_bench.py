"""The overhead benchmark on a tiny shape: what it reports, and that it refuses wrong results."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from hybrimoe.bench import overhead as overhead_bench
from hybrimoe.errors import ModelError


@pytest.fixture
def request_of_tiny_shape(small_shape: Callable[..., str]) -> overhead_bench.Request:
    return overhead_bench.Request(small_shape(), 2, ("hybrimoe",), "float32", 0.5, steps=3, rounds=2)


def test_reports_layer_and_overhead_of_each_contender(request_of_tiny_shape: overhead_bench.Request) -> None:
    result = overhead_bench.measure(request_of_tiny_shape)
    names = [row["name"] for row in result["contenders"]]
    assert names == ["CPU only", "emulated accelerator, hybrimoe", "sent by a card, hybrimoe"]
    for row in result["contenders"]:
        assert row["layer_us"]["median"] > 0
        assert row["overhead_us"]["median"] > 0
        assert len(row["overhead_us"]["rounds"]) == 2
    json.dumps(result)


def test_refuses_to_measure_wrong_results(
    request_of_tiny_shape: overhead_bench.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead_bench, "reference_ffn", lambda spec, weights, x: torch.ones_like(x))
    with pytest.raises(ModelError, match="refusing to measure"):
        overhead_bench.measure(request_of_tiny_shape)
