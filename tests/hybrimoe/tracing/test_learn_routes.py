"""ExpertFlow's predictor: it learns what a prompt's embeddings tell, its file computes it, bad input is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrimoe.errors import ModelError
from hybrimoe.tracing.learning.learn_routes import TARGET, train_routes
from hybrimoe.tracing.learning.onnx_net import OnnxNet
from scheduler.traces.trace import Trace

LAYERS, EXPERTS, TOP_K, HIDDEN, PROMPT, REPLY = 2, 16, 2, 8, 10, 24


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Texts of two kinds, mixed: a kind has experts of its own, and tokens of its own in three of four places.

    Prompts are routed at random, as if they said nothing yet: only the embeddings tell the kind.
    """
    rng, length, n = np.random.default_rng(0), PROMPT + REPLY, 64
    kinds = rng.integers(0, 2, n)
    ids = kinds[:, None, None, None] * 8 + rng.random((n, length, LAYERS, 8)).argsort(axis=-1)[..., :TOP_K]
    ids[:, :PROMPT] = rng.random((n, PROMPT, LAYERS, EXPERTS)).argsort(axis=-1)[..., :TOP_K]
    own = np.where(rng.random((n, length)) < 0.75, kinds[:, None], rng.integers(0, 2, (n, length)))
    embeddings = rng.standard_normal((2, HIDDEN))[own] + 0.3 * rng.standard_normal((n, length, HIDDEN))
    return Trace(
        expert_ids=ids.reshape(-1, LAYERS, TOP_K).astype(np.int16),
        sequence=np.repeat(np.arange(n, dtype=np.int32), length),
        phase=np.tile(np.repeat([0, 1], [PROMPT, REPLY]), n).astype(np.uint8),
        meta={"model": "two kinds", "num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K},
        embeddings=embeddings.reshape(-1, HIDDEN).astype(np.float16),
    )


def test_it_learns_what_the_prompt_tells(trace: Trace, tmp_path: Path) -> None:
    facts = train_routes([trace], TARGET, tmp_path / "net.onnx", epochs=20)
    assert facts["correlation"] > 0.7
    assert facts["correlation_of_the_prompts_routes"] < 0.3
    assert facts["judged_on"] == 16
    grouped, in_order = facts["distinct_by_prediction"], facts["distinct_in_order"]
    assert grouped < 0.85 * in_order
    assert grouped < facts["distinct_by_the_prompts_routes"]
    assert facts["distinct_replies_known"] <= grouped + 0.2


def test_the_file_tells_its_model_and_gives_shares(trace: Trace, tmp_path: Path) -> None:
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for path in paths:
        train_routes([trace], TARGET, path, epochs=2, seed=5)
    assert paths[0].read_bytes() == paths[1].read_bytes(), "the same seed, the same predictor"
    net = OnnxNet(paths[0])
    assert (net.target, net.n_inputs) == ("routes", HIDDEN)
    assert [net.properties[name] for name in ("n_layers", "n_experts", "model")] == ["2", "16", "two kinds"]
    routes = net.run(np.zeros((3, HIDDEN), np.float32))
    assert routes.shape == (3, LAYERS * EXPERTS)
    assert (routes > 0).all()
    assert routes.sum(axis=1) == pytest.approx(LAYERS * TOP_K, rel=0.2), "a token goes to top-k experts a layer"


def test_bad_traces_are_refused(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    assert trace.embeddings is not None
    with pytest.raises(ModelError, match=r"no embeddings.*--embeddings"):
        train_routes([replace(trace, embeddings=None)], TARGET, out)
    with pytest.raises(ModelError, match="different models"):
        train_routes([trace, replace(trace, embeddings=trace.embeddings[:, :4])], TARGET, out)
    with pytest.raises(ModelError, match="3 sequences: routes need at least 4"):
        train_routes([trace.select_sequences([0, 1, 2])], TARGET, out)
    short = trace.as_prefill(12)
    with pytest.raises(ModelError, match="too short to learn routes from: 16 tokens"):
        train_routes([short], TARGET, out)
    assert not out.exists()
