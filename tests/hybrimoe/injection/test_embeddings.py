"""Embeddings and output layers of an injected model: tied again, resized and replaced as transformers does it, or
refused with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hybrimoe
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.errors import ModelError

VOCAB = 64
PROMPT = torch.arange(9)[None]
PLAIN = {"accelerator": "none", "expert_dtype": "float32"}


def make(tied: bool) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def steps(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a prompt and of two decode steps after it."""
    with torch.inference_mode():
        out = model(PROMPT, use_cache=True)
        logits = [out.logits[:, -1]]
        for token in (3, 5):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.cat(logits)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dense_dtype", ["auto", "int8", "int4"])
def test_tying_again_changes_nothing(dense_dtype: str, tied: bool) -> None:
    model = make(tied)
    injection = hybrimoe.inject(model, dense_dtype=dense_dtype, **PLAIN)
    assert isinstance(model.get_output_embeddings(), PackedLinear if dense_dtype != "auto" else nn.Linear)
    before = steps(model)
    model.tie_weights()
    assert torch.equal(steps(model), before)
    injection.restore()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    close(steps(model), steps(make(tied)))


@pytest.mark.parametrize("dense_dtype", ["int8", "int4"])
def test_tying_a_packed_output_layer_to_other_weights_is_refused(dense_dtype: str) -> None:
    model = make(tied=False)
    hybrimoe.inject(model, dense_dtype=dense_dtype, **PLAIN)
    before = steps(model)
    model.config.tie_word_embeddings = True
    with pytest.raises(ModelError, match=r"packed as int8 .*is not the packed one: call model\.hybrimoe\.restore"):
        model.tie_weights()
    with pytest.raises(ModelError, match="not the packed one"):
        model.lm_head.weight = nn.Parameter(torch.zeros(3, 3))
    assert torch.equal(steps(model), before)


def change(model: PreTrainedModel, how: str) -> Any:
    torch.manual_seed(1)
    if how == "larger":
        return model.resize_token_embeddings(VOCAB + 8)
    if how == "smaller":
        return model.resize_token_embeddings(VOCAB - 8)
    if how == "input":
        return model.set_input_embeddings(nn.Embedding(VOCAB, 64, _weight=0.02 * torch.randn(VOCAB, 64)))
    return model.set_output_embeddings(nn.Linear(64, VOCAB, bias=False))


CHANGES = ("larger", "smaller", "input", "output")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", CHANGES)
def test_replaced_embeddings_are_used_in_prompts_and_decode_steps(how: str) -> None:
    plain, model = make(tied=False), make(tied=False)
    injection = hybrimoe.inject(model, **PLAIN)
    assert injection.step is not None, injection.explain().ways
    close(steps(model), steps(plain))
    change(plain, how)
    change(model, how)
    close(steps(model), steps(plain))
    assert injection.step is not None
    injection.restore()
    assert "resize_token_embeddings" not in vars(model)
    assert torch.equal(steps(model), steps(plain))


def adapter(model: PreTrainedModel) -> nn.Module:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return wrapped.eval()


def module(model: PreTrainedModel) -> nn.Module:
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 128, bias=False)
    return model


def weight(model: PreTrainedModel) -> nn.Module:
    model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.randn(64, 128))
    return model


def storage(model: PreTrainedModel) -> nn.Module:
    model.lm_head.weight.data = torch.randn(VOCAB, 64)
    return model


def values(model: PreTrainedModel) -> nn.Module:
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    return model


def bias(model: PreTrainedModel) -> nn.Module:
    model.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.randn(64))
    return model


def norm(model: PreTrainedModel) -> nn.Module:
    model.model.layers[1].input_layernorm = nn.Identity()
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("replace", [adapter, module, weight, storage, values, bias, norm])
def test_a_compiled_step_sees_what_is_replaced_in_the_model(replace: Callable[[Any], Any]) -> None:
    """It reads weights where they lay when the model was injected: what lies elsewhere now is not its to compute."""
    plain, model = make(tied=False), make(tied=False)
    injection = hybrimoe.inject(model, **PLAIN)
    assert injection.step is not None
    before = steps(model)
    torch.manual_seed(1)
    expected = steps(replace(plain))
    torch.manual_seed(1)
    found = steps(replace(model))
    close(found, expected)
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("where", ["model.layers.1.self_attn", "model.layers.1", ""])
def test_what_is_added_or_taken_away_is_seen(where: str) -> None:
    model = make(tied=False)
    hybrimoe.inject(model, **PLAIN)
    step, place = model.hybrimoe.step, model.get_submodule(where)
    assert step.usable()
    place.added = nn.Identity()
    assert not step.usable()
    del place.added
    assert step.usable()
    name, taken = list(place.named_children())[-1]
    delattr(place, name)
    assert not step.usable()
    place.add_module(name, taken)
    assert step.usable()


@pytest.mark.parametrize("how", CHANGES)
def test_packed_dense_layers_keep_their_embeddings(how: str) -> None:
    model = make(tied=False)
    hybrimoe.inject(model, dense_dtype="int8", **PLAIN)
    before, embedding = steps(model), model.get_input_embeddings()
    with pytest.raises(ModelError, match=r"packed as int8 .*restore\(\) first and inject again"):
        change(model, how)
    assert model.get_input_embeddings() is embedding
    assert torch.equal(steps(model), before)


@pytest.mark.filterwarnings("ignore")
def test_a_copy_has_guards_of_its_own() -> None:
    model = make(tied=False)
    hybrimoe.inject(model, **PLAIN)
    twin = copy.deepcopy(model)
    before = steps(model)
    change(twin, "larger")
    assert twin.get_input_embeddings().weight.shape[0] == VOCAB + 8
    assert model.get_input_embeddings().weight.shape[0] == VOCAB
    assert torch.equal(steps(model), before)
