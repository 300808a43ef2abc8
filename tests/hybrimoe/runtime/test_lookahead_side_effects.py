"""A transformers model whose routers are probed returns the same router logits, hooks and tokens as before."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.experts import layout as experts_layout
from hybrimoe.runtime import RuntimeConfig, Session
from hybrimoe.runtime.layer_call.lookahead import ProbedGate

from .conftest import PROFILE

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "moe_intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


def hybrid(model: torch.nn.Module) -> Session:
    session = Session(
        RuntimeConfig("emulated", 6, "float32", backend="torch", policy="hybrimoe", profile=PROFILE, lookahead=3)
    )
    for path, module in experts_layout.find_experts(model):
        model.set_submodule(path, session.add_layer(path, module))
    session.finalize(model)
    return session


def tiny_qwen() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, head_dim=16)).eval()


def test_output_recorders_do_not_see_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrimoe.runtime.layer_call.lookahead.MAX_STACK_BYTES", 0)
    model, ids = tiny_qwen(), torch.arange(10).view(1, 10)
    with torch.no_grad():
        before = model(ids, output_router_logits=True)
        session = hybrid(model)
        for _ in range(2):
            after = model(ids, output_router_logits=True)
    lookahead = session._runner.lookahead  # type: ignore[union-attr]
    assert all(isinstance(lookahead.gate(i), ProbedGate) for i in range(4))  # type: ignore[union-attr]
    assert len(after.router_logits) == len(before.router_logits)
    for wanted, found in zip(before.router_logits, after.router_logits, strict=True):
        assert torch.allclose(wanted, found, atol=1e-5)
    assert torch.allclose(before.logits, after.logits, atol=1e-5)
    session.close()


def test_generation_gives_the_same_tokens_and_tells_prefill_from_decode() -> None:
    model = tiny_qwen()
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    session = hybrid(model)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    by_phase = session.stats().by_phase
    session.close()
    assert torch.equal(found, wanted)
    assert by_phase["prefill"].calls == 4
    assert by_phase["decode"].calls == 5 * 4
    assert not model._forward_pre_hooks
