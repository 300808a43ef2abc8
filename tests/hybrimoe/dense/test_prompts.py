"""Prompts of bfloat16 models are computed in float32 where the CPU has no bfloat16 products, and only those."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hybrimoe
from hybrimoe.dense import prompts
from hybrimoe.dense.calls import MAX_TOKENS
from hybrimoe.dense.prompts import WideProducts, WidePrompts


@pytest.fixture
def narrow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16 products, whichever this one is."""
    monkeypatch.setattr(prompts, "multiplies_bfloat16", lambda: False)


def model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval().to(torch.bfloat16)


def test_a_product_is_rounded_once_at_its_end() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(33, 96).bfloat16()
    with WideProducts():
        found = linear(x, weight)
    assert torch.equal(found, linear(x.float(), weight.float()).bfloat16())


def test_attention_with_a_mask_and_a_scale() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 40, 16).bfloat16(), torch.randn(1, 2, 64, 16).bfloat16()
    mask = torch.randn(1, 1, 40, 64).bfloat16()
    with WideProducts():
        found = scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=0.3)
    wide = scaled_dot_product_attention(query.float(), key.float(), key.float(), attn_mask=mask.float(), scale=0.3)
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("what", ["float32", "few rows", "a gradient"])
def test_what_is_left_alone(what: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    x = torch.randn(MAX_TOKENS if what == "few rows" else 40, 96).to(dtype)
    weight = torch.randn(33, 96).to(dtype).requires_grad_(what == "a gradient")
    expected = linear(x, weight)
    with WideProducts():
        found = linear(x, weight)
    assert torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad


@pytest.mark.usefixtures("narrow_cpu")
def test_prompts_of_an_injected_model_are_wide_and_steps_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = prompts._widened

    def noted(value: Any) -> Any:
        calls.append(1)
        return real(value)

    monkeypatch.setattr(prompts, "_widened", noted)
    plain = model()
    tokens = torch.arange(40)[None] % 64
    with torch.no_grad():
        expected = plain.float()(tokens).logits
        own = model()
        injection = hybrimoe.inject(own, accelerator="none", expert_dtype="float32")
        calls.clear()
        found = own(tokens).logits.float()
        assert calls
        assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.99
        twin = copy.deepcopy(own)
        assert torch.equal(twin(tokens).logits.float(), found)
        calls.clear()
        own(tokens[:, :4])
        assert not calls
        injection.restore()
        own(tokens)
        assert not calls, "nothing is left of it"


@pytest.mark.usefixtures("narrow_cpu")
def test_a_call_that_fails_leaves_torch_as_it_was() -> None:
    own = model()
    wide = WidePrompts(own)
    with pytest.raises(IndexError), torch.no_grad():
        own(torch.full((1, 40), 1000))
    assert torch.overrides._get_current_function_mode() is None
    wide.undo()


def test_a_float32_model_needs_nothing() -> None:
    assert not WidePrompts(model().float()).applies
