"""`learned` predictors: they learn what can be learned, and the ONNX file computes what was trained."""

import builtins

import numpy as np
import pytest

from hybrimoe.errors import CheckpointError, ConfigError, ModelError
from hybrimoe.tracing.learning.learn import TARGETS, average_precision, fit_net, replay, train_predictor
from hybrimoe.tracing.learning.onnx_net import OnnxScorer, write_net
from scheduler.traces.synthetic import Locality, generate


@pytest.fixture(scope="module")
def trace():
    return generate(3, 8, 2, 60, 4, locality=Locality(1.5, 3.0, 0.8, 1.0), seed=2)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_trained_predictor_beats_chance_on_unseen_sequences(trace, target, tmp_path):
    facts = train_predictor([trace], target, tmp_path / "net.onnx", epochs=4)
    assert facts["average_precision"] > facts["base_rate"] + 0.1
    assert facts["runtime"] in ("onnxruntime", "onnx reference evaluator")
    assert OnnxScorer(tmp_path / "net.onnx").features == TARGETS[target]


def test_both_runtimes_compute_the_trained_net(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.random((64, 4), dtype=np.float32)
    w1, b1, w2, b2 = fit_net(x, (x[:, 0] > 0.5).astype(np.float32), epochs=2, seed=0)
    write_net(tmp_path / "net.onnx", (w1, b1, w2, b2), TARGETS["cache"], "cache")
    expected = 1 / (1 + np.exp(-(np.maximum(x @ w1 + b1, 0) @ w2 + b2)[:, 0]))
    np.testing.assert_allclose(OnnxScorer(tmp_path / "net.onnx")(x), expected, atol=1e-6)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    fallback = OnnxScorer(tmp_path / "net.onnx")
    assert fallback.runtime == "onnx reference evaluator"
    np.testing.assert_allclose(fallback(x), expected, atol=1e-6)


def test_examples_are_the_policies_own_features(trace):
    x, y = next(replay(trace.head(5), "prefetch"))
    assert x.shape == (8, 4)
    assert y.sum() == 2  # top-2 of the next layer
    assert (x >= 0).all()


def test_average_precision_by_hand():
    assert average_precision(np.array([0.9, 0.8, 0.1]), np.array([1, 0, 1], np.float32)) == pytest.approx(
        (1 + 2 / 3) / 2
    )


def test_bad_input(trace, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'cache'"):
        train_predictor([trace], "cash", tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="too short"):
        train_predictor([trace.head(2)], "cache", tmp_path / "net.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="no ONNX predictor"):
        OnnxScorer(tmp_path / "bad.onnx")
    with pytest.raises(CheckpointError, match="no ONNX predictor"):
        OnnxScorer(tmp_path / "missing.onnx")
