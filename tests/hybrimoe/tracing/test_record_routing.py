"""Recording: what is written is what the router chose, on plain and on injected models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import hybrimoe
from hybrimoe.errors import ModelError
from hybrimoe.tracing.record import listening
from scheduler.cache.simple import mrs_update
from scheduler.traces.analysis import predictor_quality
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import recorded
from scheduler.traces.trace import Trace, TraceError

LAYERS, EXPERTS, TOP_K = 3, 8, 2


@pytest.fixture
def model():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        decoder_sparse_step=1, max_position_embeddings=64, output_router_logits=True,
        norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def run(model, tap, n_sequences=2):
    """A prompt of 5 tokens and 3 decode steps, twice; returns the router's own top-k, [tokens, layers, k]."""
    chosen = []
    with torch.no_grad():
        for sequence in range(n_sequences):
            tap.begin_sequence()
            cache = None
            for ids in [torch.arange(5)[None] + sequence, *(torch.tensor([[7 + i]]) for i in range(3))]:
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                picks = [logits.reshape(-1, EXPERTS).topk(TOP_K).indices for logits in out.router_logits]
                chosen.append(torch.stack(picks, dim=1).numpy())
    return np.concatenate(chosen)


def test_records_what_the_router_chose(model):
    with listening(model, horizon=2) as tap:
        truth = run(model, tap)
        trace = tap.trace("tiny", "Apache-2.0")
    assert (trace.n_tokens, trace.n_layers, trace.top_k, trace.n_experts) == (16, LAYERS, TOP_K, EXPERTS)
    np.testing.assert_array_equal(np.sort(trace.expert_ids), np.sort(truth))
    assert trace.expert_weights.astype(float).sum(-1) == pytest.approx(1.0, abs=0.01)
    assert [(s.sequence, s.phase, s.n_tokens) for s in trace.steps()][:2] == [(0, "prefill", 5), (0, "decode", 1)]
    assert trace.sequence.tolist() == [0] * 8 + [1] * 8
    assert model._forward_pre_hooks == {}


def test_predictions_are_the_next_gates_on_this_hidden_state(model):
    seen = {}
    experts = model.model.layers[0].mlp.experts
    with listening(model, horizon=1) as tap:
        handle = experts.register_forward_pre_hook(lambda _, args: seen.update(hidden=seen.get("hidden", args[0])))
        run(model, tap, n_sequences=1)
        handle.remove()
        trace = tap.trace("tiny", "Apache-2.0")
    logits = seen["hidden"].detach().reshape(-1, 32) @ model.model.layers[1].mlp.gate.weight.detach().T
    best = logits.argsort(dim=-1, descending=True)[:, : 2 * TOP_K].numpy()
    np.testing.assert_array_equal(trace.predicted_ids[:5, 0, 0], best)
    assert (trace.predicted_ids[:, -1] == -1).all()
    assert 0.0 < predictor_quality(trace, recorded(trace))[0].recall <= 1.0


def test_an_injected_model_gives_the_same_trace(model):
    with listening(model, horizon=2) as tap:
        run(model, tap)
        plain = tap.trace("tiny", "Apache-2.0")
    injection = hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=6, expert_dtype="float32")
    try:
        with listening(model, horizon=2) as tap:
            run(model, tap)
            hybrid = tap.trace("tiny", "Apache-2.0")
    finally:
        injection.restore()
    np.testing.assert_array_equal(plain.expert_ids, hybrid.expert_ids)
    np.testing.assert_array_equal(plain.predicted_ids, hybrid.predicted_ids)


def test_a_dense_model_and_silence_are_errors(model):
    with pytest.raises(ModelError, match="no experts"), listening(torch.nn.Linear(2, 2)):
        pass
    with listening(model) as tap, pytest.raises(ModelError, match="nothing was recorded"):
        tap.trace("tiny", "Apache-2.0")


def test_embeddings_are_those_of_the_tokens(model):
    with listening(model, embeddings=True) as tap:
        run(model, tap)
        trace = tap.trace("tiny", "Apache-2.0")
    tokens = [0, 1, 2, 3, 4, 7, 8, 9, 1, 2, 3, 4, 5, 7, 8, 9]
    expected = model.get_input_embeddings().weight.detach()[tokens].half().numpy()
    np.testing.assert_array_equal(trace.embeddings, expected)
    with listening(model) as tap:
        run(model, tap)
        assert tap.trace("tiny", "Apache-2.0").embeddings is None
    model.get_input_embeddings = None
    with pytest.raises(ModelError, match="does not name its input embeddings"), listening(model, embeddings=True):
        pass


def test_hidden_states_are_what_the_router_saw_or_projections_that_keep_its_angles(model):
    seen = []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 32)))
    traces = {}
    for width in (0, 24, 32, 4096):
        with listening(model, hidden=width) as tap:
            run(model, tap)
            traces[width] = tap.trace("tiny", "Apache-2.0")
    handle.remove()
    assert traces[0].hidden is None
    states = torch.cat(seen)[:16].numpy()
    states /= np.sqrt(np.square(states).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(traces[32].hidden[:, 1].astype(np.float32), states, atol=2e-3)
    np.testing.assert_array_equal(traces[32].hidden, traces[4096].hidden)
    sketched = traces[24].hidden[:, 1].astype(np.float32)
    assert sketched.shape == (16, 24)
    truth, kept = ((rows @ rows.T) / rows.shape[1] for rows in (states, sketched))
    assert np.corrcoef(truth.ravel(), kept.ravel())[0, 1] > 0.8, "16 tokens, 24 of 32 dimensions: 0.86"


def test_token_ids_are_those_that_the_model_was_given(model):
    with listening(model) as tap:
        run(model, tap)
        assert tap.trace("tiny", "Apache-2.0").token_ids.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 1, 2, 3, 4, 5, 7, 8, 9]
    with listening(model, token_ids=False) as tap:
        run(model, tap)
        assert tap.trace("tiny", "Apache-2.0").token_ids is None


def test_full_scores_are_the_gates_probabilities_of_all_experts(model):
    tokens = torch.tensor([[3, 5, 7, 9]])
    with listening(model, full_scores=True) as tap, torch.no_grad():
        tap.begin_sequence()
        model(tokens)
        trace = tap.trace("tiny", "Apache-2.0")
    scores = trace.gate_scores
    assert scores is not None
    assert scores.shape == (4, trace.n_layers, trace.n_experts)
    np.testing.assert_allclose(scores.sum(axis=-1), 1.0, atol=2e-3)
    best = np.sort(np.argsort(-scores.astype(np.float32), axis=-1)[..., : trace.top_k], axis=-1)
    np.testing.assert_array_equal(best, np.sort(trace.expert_ids, axis=-1))
    with listening(model) as tap, torch.no_grad():
        tap.begin_sequence()
        model(tokens)
        assert tap.trace("tiny", "Apache-2.0").gate_scores is None


def test_mrs_sees_experts_that_were_not_routed(model, tmp_path):
    """Without full scores the (k+1)-th best expert of a token has the score 0, whatever its probability."""
    with listening(model, full_scores=True) as tap, torch.no_grad():
        tap.begin_sequence()
        model(torch.tensor([[3, 5, 7, 9]]))
        trace = tap.trace("tiny", "Apache-2.0")
    trace.save(tmp_path / "t.npz")
    full = Trace.load(tmp_path / "t.npz")
    step = next(full.steps())
    demand = DemandSource(full).layer(step, 0)
    np.testing.assert_allclose(demand.gate_scores, full.gate_scores[:, 0].mean(axis=0, dtype=np.float32), atol=1e-6)
    row = np.zeros(full.n_experts)
    mrs_update(row, demand.gate_scores, 2 * full.top_k, 0.5)
    assert np.count_nonzero(row) == min(2 * full.top_k, full.n_experts)
    with pytest.raises(TraceError, match="gate_scores must be"):
        replace(full, gate_scores=full.gate_scores[..., :1])
