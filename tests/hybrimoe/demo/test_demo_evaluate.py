import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from hybrimoe.demo.training.architecture import new_model
from hybrimoe.demo.training.evaluate import evaluate_stream

LENGTHS = np.array([0, 0, 0, *[1 + i % 4 for i in range(297)]], dtype=np.int32)


@pytest.fixture
def model(tiny_settings):
    return new_model(tiny_settings.shape, seed=5)


def stream(n_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 300, size=n_tokens, dtype=np.int32)


@pytest.mark.parametrize("n_tokens", [2, 9, 17, 18, 150])
def test_every_token_but_the_first_is_scored_once(model, n_tokens):
    tokens = stream(n_tokens)
    result = evaluate_stream(model, tokens, LENGTHS, seq_len=8)
    assert result.n_tokens == n_tokens - 1
    assert result.n_bytes == LENGTHS[tokens[1:]].sum()


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = stream(50)
    result = evaluate_stream(model, tokens, LENGTHS, seq_len=8)
    assert result.nats_per_token == pytest.approx(math.log(300), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(300) * 49 / LENGTHS[tokens[1:]].sum(), rel=1e-5)


def test_windows_are_scored_as_the_model_sees_them_alone(model):
    tokens = torch.from_numpy(stream(17).astype(np.int64))
    with torch.no_grad():
        nats = sum(
            float(functional.cross_entropy(model(part[None, :-1]).logits[0], part[1:], reduction="sum"))
            for part in (tokens[:9], tokens[8:])
        )
    result = evaluate_stream(model, tokens.numpy(), LENGTHS, seq_len=8)
    assert result.nats_per_token == pytest.approx(nats / 16, rel=1e-5)


def test_load_has_one_distribution_a_layer(model):
    result = evaluate_stream(model, stream(30), LENGTHS, seq_len=8)
    assert result.load.shape == (2, 4)
    assert torch.allclose(result.load.sum(dim=1), torch.ones(2))
    assert all(0 < entropy <= 1 for entropy in result.entropies())


def test_a_collapsed_router_shows_in_the_entropy(model):
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    assert evaluate_stream(model, stream(40), LENGTHS, seq_len=8).entropies()[1] == pytest.approx(0.5)


def test_max_windows_limits_the_work(model):
    assert evaluate_stream(model, stream(100), LENGTHS, seq_len=8, max_windows=3).n_tokens == 24


def test_a_stream_without_a_target_is_refused(model):
    with pytest.raises(ValueError, match="at least two tokens"):
        evaluate_stream(model, stream(1), LENGTHS, seq_len=8)
