"""LongCat-Flash's zero-computation experts: they give back their input, have no weights, and nothing plans them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

import hybrimoe
from hybrimoe.experts.layout import find_experts, read
from hybrimoe.tracing.record import listening

N_EXPERTS, N_IDENTITY = 6, 3
CPU_ONLY = {"accelerator": "none", "expert_dtype": "float32", "policy": "static"}


@pytest.fixture
def longcat() -> LongcatFlashForCausalLM:
    """Two layers whose routers choose experts of both kinds."""
    torch.manual_seed(0)
    config = LongcatFlashConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=2, ffn_hidden_size=24, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=8, moe_topk=3,
        n_routed_experts=N_EXPERTS, zero_expert_num=N_IDENTITY, expert_ffn_hidden_size=16, pad_token_id=0,
    )  # fmt: skip
    model = LongcatFlashForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.normal_(std=0.4)
    return model


PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])


def test_the_layout_tells_experts_with_weights_from_identity_ones(longcat: LongcatFlashForCausalLM) -> None:
    layouts = [read(module) for _, module in find_experts(longcat)]
    assert [(layout.num_experts, layout.num_identity) for layout in layouts] == [(N_EXPERTS, N_IDENTITY)] * 2


@pytest.mark.parametrize("placement", [{}, {"accelerator": "emulated", "gpu_expert_slots": 5}], ids=["cpu", "slots"])
def test_logits_and_gradients_are_the_models_own(
    longcat: LongcatFlashForCausalLM, placement: dict[str, object]
) -> None:
    expected, expected_gradient = _logits_and_gradient(longcat)
    injection = hybrimoe.inject(longcat, **CPU_ONLY | placement)
    found, gradient = _logits_and_gradient(longcat)
    injection.restore()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def test_identity_experts_are_absent_from_plans_and_traces(longcat: LongcatFlashForCausalLM) -> None:
    ids = []
    for _, module in find_experts(longcat):
        module.register_forward_pre_hook(lambda _, args: ids.append(args[1]))
    injection = hybrimoe.inject(longcat, **CPU_ONLY)
    ids.clear()  # of the trial
    with listening(longcat) as tap, torch.no_grad():
        tap.begin_sequence()
        longcat(PROMPT, use_cache=False)
        trace = tap.trace("longcat", "none")
    chosen = torch.stack(ids[:2], dim=1)  # the calls after these two are the tap's own
    assert chosen.ge(N_EXPERTS).any(), "no token was sent to an identity expert: the test sees nothing"
    assert trace.meta["num_experts"] == N_EXPERTS
    assert (trace.expert_ids == torch.where(chosen < N_EXPERTS, chosen, -1).numpy()).all()
    computed = injection.stats().as_dict()["total"]["cpu_experts"]
    injection.restore()
    assert computed == sum(len(layer[layer < N_EXPERTS].unique()) for layer in chosen.unbind(dim=1))


@pytest.mark.parametrize("with_identity", [True, False], ids=["as transformers writes it", "as LongCat's own files"])
def test_a_checkpoint_loads(longcat: LongcatFlashForCausalLM, tmp_path: Path, with_identity: bool) -> None:
    longcat.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    unread = [name for name in tensors if any(f".experts.{N_EXPERTS + i}." in name for i in range(N_IDENTITY))]
    assert unread, "transformers no longer writes entries of identity experts"
    if not with_identity:
        save_file({name: value for name, value in tensors.items() if name not in unread}, file, {"format": "pt"})
    loaded = hybrimoe.load(tmp_path, packed_file=False, progress=False, **CPU_ONLY)
    with torch.no_grad():
        torch.testing.assert_close(loaded(PROMPT).logits, longcat(PROMPT).logits, rtol=1e-4, atol=1e-4)
    loaded.hybrimoe.restore()
    with torch.no_grad():
        torch.testing.assert_close(loaded(PROMPT).logits, longcat(PROMPT).logits, rtol=1e-4, atol=1e-4)


def _logits_and_gradient(model: LongcatFlashForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a prompt: its logits, and the gradient of their squares with respect to the input embeddings."""
    embeddings = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), embeddings)
    return logits.detach(), gradient
