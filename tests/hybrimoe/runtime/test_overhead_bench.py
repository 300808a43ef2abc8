"""The overhead benchmark on a tiny shape: what it reports, and that it refuses wrong results."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from cpu_kernels.errors import ActivationValueError
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


def test_reports_the_loop_of_a_token(small_shape: Callable[..., str]) -> None:
    request = overhead_bench.Request(small_shape(), 3, ("ours",), "float32", 0.5, steps=3, rounds=2)
    result = overhead_bench.measure(request)
    row = result["contenders"][-1]
    assert row["name"] == "a token without Python, ours"
    assert row["layer_us"]["median"] > row["overhead_us"]["median"] > 0
    sections = {name: spread["median"] for name, spread in row["sections_us"].items()}
    assert min(sections["bookkeeping"], sections["after the release"]) > 0
    assert row["overhead_us"]["median"] == pytest.approx(sections["bookkeeping"] + sections["after the release"])
    json.dumps(result)


def looped(small_shape: Callable[..., str]) -> overhead_bench.LoopContender:
    """A contender whose gates and layers are known."""
    request = overhead_bench.Request(small_shape(), 3, ("ours",), "float32", 0.5, steps=3, rounds=2)
    contender = overhead_bench.LoopContender(request, "ours")
    contender.run(contender.calls(4))
    assert contender.loop.n_tokens > 0
    return contender


def test_a_layer_without_an_active_expert_stops_the_loop(small_shape: Callable[..., str]) -> None:
    """Its output is nothing, which Python says; the loop goes on behind it."""
    contender = looped(small_shape)
    session, loop, step = contender.session, contender.loop, contender.calls(1)[0]
    for layer, (hidden, ids, weights) in enumerate(step):
        contender.bring(layer, (hidden, torch.full_like(ids, -1) if layer == 1 else ids, weights))
    before = session.stats().total.calls
    session.announce_step("decode")
    assert session.run_token(loop, 0, launched=False) == (1, False)
    session.run_sent(loop.calls[1])
    assert (loop.calls[1].exchange.source == ids.numel()).all()
    assert session.run_token(loop, 2, launched=False) == (3, True)
    assert session.stats().total.calls == before + 2
    session.close()


def test_a_hidden_state_that_is_not_finite_is_told(small_shape: Callable[..., str]) -> None:
    contender = looped(small_shape)
    session, step = contender.session, contender.calls(1)[0]
    for layer, (hidden, ids, weights) in enumerate(step):
        contender.bring(layer, (torch.full_like(hidden, float("nan")), ids, weights))
    with pytest.raises(ActivationValueError, match=r"hidden\[0\] contains NaN"):
        run_often(contender)
    session.close()


def run_often(contender: overhead_bench.LoopContender) -> None:
    """Tokens, until one has an expert that the CPU computes, which reads the hidden states."""
    for _ in range(20):
        contender.session.announce_step("decode")
        contender.session.run_token(contender.loop, 0, launched=False)


def test_refuses_to_measure_wrong_results(
    request_of_tiny_shape: overhead_bench.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead_bench, "reference_ffn", lambda spec, weights, x: torch.ones_like(x))
    with pytest.raises(ModelError, match="refusing to measure"):
        overhead_bench.measure(request_of_tiny_shape)
