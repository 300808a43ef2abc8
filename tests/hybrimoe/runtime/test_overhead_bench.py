"""The overhead benchmark on a tiny shape: what it reports, and that it refuses wrong results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybrimoe.bench import overhead as overhead_bench
from hybrimoe.errors import ModelError

CONFIG = {
    "model_type": "olmoe", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture
def request_of_tiny_shape(tmp_path: Path) -> overhead_bench.Request:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return overhead_bench.Request(str(path), 2, ("hybrimoe",), "float32", 0.5, steps=3, rounds=2)


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
