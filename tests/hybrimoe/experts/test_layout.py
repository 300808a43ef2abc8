"""Experts modules outside the decorated families, writing back, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, LlamaConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from cpu_kernels import ExpertWeights
from hybrimoe.errors import UnsupportedExpertsError
from hybrimoe.experts.layout import find_experts, is_experts, read


@pytest.fixture
def gpt_oss() -> GptOssExperts:
    torch.manual_seed(0)
    module = GptOssExperts(GptOssConfig(hidden_size=16, intermediate_size=12, num_local_experts=4))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_gpt_oss_is_untransposed_and_deinterleaved(gpt_oss: GptOssExperts) -> None:
    layout = read(gpt_oss)
    weights = layout.expert(2)
    assert (layout.hidden, layout.inter, layout.num_experts) == (16, 12, 4)
    assert weights.gate is not None
    assert weights.gate_bias is not None
    torch.testing.assert_close(weights.gate, gpt_oss.gate_up_proj[2, :, 0::2].T, rtol=0, atol=0)
    torch.testing.assert_close(weights.up, gpt_oss.gate_up_proj[2, :, 1::2].T, rtol=0, atol=0)
    torch.testing.assert_close(weights.down, gpt_oss.down_proj[2].T, rtol=0, atol=0)
    torch.testing.assert_close(weights.gate_bias, gpt_oss.gate_up_proj_bias[2, 0::2], rtol=0, atol=0)
    weights.check(layout.spec("float32"))


def test_assign_writes_what_expert_reads(gpt_oss: GptOssExperts) -> None:
    layout = read(gpt_oss)
    before = {name: parameter.detach().clone() for name, parameter in gpt_oss.named_parameters()}
    kept = [_copy(layout.expert(i)) for i in range(layout.num_experts)]
    for parameter in gpt_oss.parameters():
        nn.init.zeros_(parameter)
    for i, weights in enumerate(kept):
        layout.assign(i, weights)
    for name, parameter in gpt_oss.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_an_expert_out_of_range_is_an_error(gpt_oss: GptOssExperts) -> None:
    with pytest.raises(IndexError, match="expert 4 of 4"):
        read(gpt_oss).expert(4)


def test_an_undecorated_module_of_the_same_form_is_read() -> None:
    config = Llama4TextConfig(hidden_size=16, num_local_experts=4)
    config.moe_intermediate_size, config.hidden_act = 12, "silu"
    module = Step3p7Experts(config, swiglu_limit=3.0)
    layout = read(module)
    assert is_experts(module)
    assert (layout.activation.act_max, layout.activation.up_limit) == (3.0, 3.0)


def test_a_dense_model_has_no_experts() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
        )
    assert find_experts(model) == []


def test_experts_with_another_call_are_refused_with_the_reason() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedExpertsError, match="no experts module of the common form"):
        read(module)


def test_quantised_weights_are_refused(gpt_oss: GptOssExperts) -> None:
    gpt_oss.down_proj = nn.Parameter(gpt_oss.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedExpertsError, match="float8"):
        read(gpt_oss)


def test_projections_that_disagree_are_refused(gpt_oss: GptOssExperts) -> None:
    gpt_oss.down_proj = nn.Parameter(torch.zeros(4, 10, 16))
    with pytest.raises(UnsupportedExpertsError, match="asks for down_proj"):
        read(gpt_oss)


def _copy(weights: ExpertWeights) -> ExpertWeights:
    names = ("up", "down", "gate", "gate_bias", "up_bias", "down_bias")
    return ExpertWeights(**{name: value.clone() for name in names if (value := getattr(weights, name)) is not None})
