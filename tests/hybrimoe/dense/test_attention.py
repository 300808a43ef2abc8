"""Attention of decode steps in a whole model: the same logits as transformers', who takes part, and the way back."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hybrimoe
from hybrimoe.dense import attention as subject

LOGITS = 0.02
"""bfloat16 rounds at each of 2 layers, in another order: relative to the largest logit."""


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    counted = []

    def count(*arguments):
        counted.append(arguments)
        return kernel(*arguments)

    kernel = subject.decode_attention
    monkeypatch.setattr(subject, "decode_attention", count)
    return counted


def model(dtype=torch.bfloat16, implementation="sdpa"):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval().to(dtype)


def logits(subject_model, ids, mask=None):
    """Of the prompt's end and of one decode step after it."""
    with torch.inference_mode():
        first = subject_model(ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1], use_cache=True)
        then = subject_model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    return torch.cat([first.logits[:, -1], then.logits[:, -1]])


def test_a_model_gives_the_same_logits_and_is_restored(calls):
    plain, ids = model(), torch.arange(40)[None] % 64
    expected = logits(plain, ids)
    attention = plain.model.layers[0].self_attn
    config = attention.config
    injection = hybrimoe.inject(plain, accelerator="none")
    assert len(calls) == 1, "compiled before the first reply"
    calls.clear()
    found = logits(plain, ids)
    assert len(calls) == 2, "each layer's decode step, not the prompt"
    assert float((found - expected).abs().max()) <= LOGITS * float(expected.abs().max())
    assert plain.config._attn_implementation == "sdpa", "the model's own configuration stays"
    injection.restore()
    assert attention.config is config
    assert torch.equal(logits(plain, ids), expected)
    assert len(calls) == 2


def test_padded_prompts_are_masked(calls):
    plain, ids = model(), torch.arange(60).view(2, 30) % 64
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = logits(plain, ids, mask)
    hybrimoe.inject(plain, accelerator="none")
    calls.clear()
    found = logits(plain, ids, mask)
    assert len(calls) == 2
    assert calls[0][4] is not None
    assert float((found - expected).abs().max()) <= LOGITS * float(expected.abs().max())


@pytest.mark.parametrize(
    ("dtype", "implementation", "options"),
    [(torch.float32, "sdpa", {}), (torch.bfloat16, "eager", {}), (torch.bfloat16, "sdpa", {"attention": "torch"})],
    ids=["float32", "eager", "attention: torch"],
)
def test_who_stays_with_torch(calls, dtype, implementation, options):
    plain, ids = model(dtype, implementation), torch.arange(20)[None]
    hybrimoe.inject(plain, accelerator="none", expert_dtype="float32", **options)
    logits(plain, ids)
    assert calls == []


def test_the_threads_of_the_deployment_are_used(calls):
    plain = model()
    hybrimoe.inject(plain, accelerator="none", threads=1)
    logits(plain, torch.arange(20)[None])
    assert [words[5] for words in calls] == [1, 1, 1]


@pytest.mark.parametrize("name", subject.UNKNOWN_HERE)
def test_calls_with_what_the_kernel_does_not_know_are_not_its(calls, name, monkeypatch):
    taken = []
    monkeypatch.setattr(subject, "sdpa_attention_forward", lambda *words, **more: taken.append(more) or (None, None))
    q, k = torch.zeros(1, 2, 1, 32).bfloat16(), torch.zeros(1, 2, 5, 32).bfloat16()
    subject.attention_forward(torch.nn.Module(), q, k, k, None, **{name: torch.ones(1)})
    assert (len(taken), calls) == (1, [])
    subject.attention_forward(torch.nn.Module(), q, k, k, torch.zeros(1, 2, 1, 5).bool())
    assert (len(taken), calls) == (2, []), "a mask of its own for each head"
    subject.attention_forward(torch.nn.Module(), q, k, k, None, **{name: None})
    assert (len(taken), len(calls)) == (2, 1)


def test_modules_that_ask_for_sdpa_by_name_stay_out():
    class Asks(torch.nn.Module):
        def forward(self, x):
            attention = functions.get_interface(self.config._attn_implementation, sdpa_attention_forward)
            return attention(x) if self.config._attn_implementation == "sdpa" else x

    class Looks(torch.nn.Module):
        def forward(self, x):
            return functions.get_interface(self.config._attn_implementation, sdpa_attention_forward)(x)

    class Own(torch.nn.Module):
        def forward(self, x):
            return x

    functions = None
    chosen = {kind: subject._chooses_by_name(kind.forward) for kind in (Asks, Looks, Own)}
    assert chosen == {Asks: False, Looks: True, Own: False}
