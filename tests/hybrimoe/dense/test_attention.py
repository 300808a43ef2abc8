"""Attention of decode steps in transformers' forward: the same logits, who takes part, and the way back.

The compiled step is off in these models: it computes attention itself.
"""

import copy
import gc

import pytest
import torch
from transformers import AttentionInterface, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
    registered = AttentionInterface()["sdpa"]
    injection = hybrimoe.inject(plain, accelerator="none", step="transformers")
    assert len(calls) == 1, "compiled before the first reply"
    calls.clear()
    found = logits(plain, ids)
    assert len(calls) == 2, "each layer's decode step, not the prompt"
    assert float((found - expected).abs().max()) <= LOGITS * float(expected.abs().max())
    assert plain.config._attn_implementation == "sdpa", "the model's own configuration stays"
    injection.restore()
    assert attention.config is config
    assert subject.MARK not in vars(attention)
    assert AttentionInterface()["sdpa"] is registered
    assert torch.equal(logits(plain, ids), expected)
    assert len(calls) == 2


def test_padded_prompts_are_masked(calls):
    plain, ids = model(), torch.arange(60).view(2, 30) % 64
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = logits(plain, ids, mask)
    hybrimoe.inject(plain, accelerator="none", step="transformers")
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
    hybrimoe.inject(plain, accelerator="none", step="transformers", expert_dtype="float32", **options)
    logits(plain, ids)
    assert calls == []


def test_the_threads_of_the_deployment_are_used(calls):
    plain = model()
    hybrimoe.inject(plain, accelerator="none", step="transformers", threads=1)
    logits(plain, torch.arange(20)[None])
    assert [words[5] for words in calls] == [1, 1, 1]


@pytest.mark.parametrize("name", subject.UNKNOWN_HERE)
def test_calls_with_what_the_kernel_does_not_know_are_not_its(calls, name, monkeypatch):
    taken = []
    monkeypatch.setattr(subject.registry, "passed_on", lambda *words, **more: taken.append(more) or (None, None))
    module = torch.nn.Module()
    q, k = torch.zeros(1, 2, 1, 32).bfloat16(), torch.zeros(1, 2, 5, 32).bfloat16()
    subject.attention_forward(module, q, k, k, None)
    assert (len(taken), calls) == (1, []), "another model's module"
    setattr(module, subject.MARK, subject.KernelUse(1))
    subject.attention_forward(module, q, k, k, None, **{name: torch.ones(1)})
    assert (len(taken), calls) == (2, [])
    subject.attention_forward(module, q, k, k, torch.zeros(1, 2, 1, 5).bool())
    assert (len(taken), calls) == (3, []), "a mask of its own for each head"
    subject.attention_forward(module, q, k, k, None, **{name: None})
    assert (len(taken), len(calls)) == (3, 1)


@pytest.mark.parametrize("learned", ["query", "key", "value", "mask"])
def test_what_needs_a_gradient_is_not_the_kernels(calls, learned):
    module = torch.nn.Module()
    setattr(module, subject.MARK, subject.KernelUse(1))
    parts = {
        "query": torch.randn(1, 2, 1, 32).bfloat16(),
        "key": torch.randn(1, 2, 5, 32).bfloat16(),
        "value": torch.randn(1, 2, 5, 32).bfloat16(),
        "mask": torch.zeros(1, 1, 1, 5).bfloat16(),
    }
    parts[learned].requires_grad_()
    out, _ = subject.attention_forward(module, *parts.values())
    out.sum().backward()
    assert calls == []
    assert parts[learned].grad is not None


@pytest.fixture
def before(monkeypatch):
    """The entry of a registry that no model of other tests' fixtures uses."""
    gc.collect()  # models of earlier tests leave the other registry now, and not in the middle of this test
    found, entry = AttentionInterface()["sdpa"], subject.registry.passed_on
    monkeypatch.setattr(subject, "registry", subject.RegistryEntry())
    AttentionInterface.register("sdpa", entry)
    yield entry
    AttentionInterface.register("sdpa", found)


def test_the_registry_is_as_it_was_once_no_model_uses_the_kernel(before):
    gone = hybrimoe.inject(model(), accelerator="none", step="transformers")
    assert AttentionInterface()["sdpa"] is subject.attention_forward
    del gone
    gc.collect()
    assert AttentionInterface()["sdpa"] is before, "models that are gone do not count"
    one, two = (hybrimoe.inject(model(), accelerator="none", step="transformers") for _ in range(2))
    assert AttentionInterface()["sdpa"] is subject.attention_forward
    one.restore()
    assert AttentionInterface()["sdpa"] is subject.attention_forward
    two.restore()
    assert AttentionInterface()["sdpa"] is before


def test_other_models_are_left_alone(calls):
    mine, other = model(), model()
    hybrimoe.inject(mine, accelerator="none")
    calls.clear()
    logits(other, torch.arange(20)[None])
    assert calls == []


def test_stats_say_which_layers_the_kernel_computed(calls):
    plain = model()
    injection = hybrimoe.inject(plain, accelerator="none", step="transformers")
    assert injection.stats().attention_calls == {}
    for _ in range(2):
        logits(plain, torch.arange(20)[None])
    expected = {f"model.layers.{layer}.self_attn": 2 for layer in range(2)}
    assert injection.stats().as_dict()["attention_calls"] == expected


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_implementation_that_is_set_later_is_used(calls, implementation, when):
    plain, ids = model(implementation="eager" if implementation == "sdpa" else "sdpa"), torch.arange(20)[None]
    if when == "before":
        plain.set_attn_implementation(implementation)
    hybrimoe.inject(plain, accelerator="none", step="transformers")
    plain.set_attn_implementation(implementation)
    calls.clear()
    logits(plain, ids)
    assert len(calls) == (2 if implementation == "sdpa" else 0)


def test_a_copy_uses_the_kernel_by_itself(calls):
    plain, ids = model(), torch.arange(20)[None]
    injection = hybrimoe.inject(plain, accelerator="none", step="transformers")
    twin = copy.deepcopy(plain)
    injection.restore()
    calls.clear()
    logits(plain, ids)
    assert calls == []
    logits(twin, ids)
    assert len(calls) == 2
    assert twin.hybrimoe.stats().attention_calls
    twin.hybrimoe.restore()
    logits(twin, ids)
    assert len(calls) == 2


# Over families, float32 and bfloat16 ----------------------------------------------------------------------------------


def family(name, dtype=torch.float32):
    from tiny_families import tiny_model

    return tiny_model(name).to(dtype)


FAMILIES = ("qwen3_moe", "deepseek_v2", "qwen3_vl_moe")


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
def test_eager_attention_set_after_injection_gives_transformers_attentions(name):
    from tiny_families import prompt

    plain = family(name)
    hybrimoe.inject(plain, accelerator="none", step="transformers", expert_dtype="float32")
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        found = plain(input_ids=prompt(), output_attentions=True).attentions
        plain.hybrimoe.restore()
        expected = plain(input_ids=prompt(), output_attentions=True).attentions
    assert len(found) == len(expected) > 0
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_flex_attention_set_after_injection_is_used(name, monkeypatch):
    from tiny_families import prompt

    plain = family(name)
    with torch.no_grad():
        expected = plain(input_ids=prompt()).logits
        try:
            plain.set_attn_implementation("flex_attention")
            plain(input_ids=prompt())
        except (ValueError, NotImplementedError, RuntimeError) as error:
            pytest.skip(f"plain transformers cannot: {type(error).__name__}: {str(error)[:80]}")
        plain.set_attn_implementation("sdpa")
        with hybrimoe.inject(plain, accelerator="none", step="transformers", expert_dtype="float32"):
            plain.set_attn_implementation("flex_attention")
            torch.testing.assert_close(plain(input_ids=prompt()).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, "lfm2_moe", "minimax"])
def test_decode_steps_of_other_families_in_bfloat16(calls, name):
    """The kernel is chosen by what an attention call is given, so every family that asks the registry may use it."""
    from tiny_families import prompt

    plain, ids = family(name, torch.bfloat16), prompt(2)
    expected = logits(plain, ids)
    options = {"accelerator": "none", "expert_dtype": "bfloat16", "step": "transformers"}
    with hybrimoe.inject(plain, attention="torch", **options):
        torch_attention = logits(plain, ids)
    with hybrimoe.inject(plain, **options):
        found = logits(plain, ids)
    scale = float(expected.abs().max())
    assert float((found - torch_attention).abs().max()) <= LOGITS * scale
