"""Dense layers in 8 or 4 bits: right within the rounding, routers left alone, and undone exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hybrimoe
from hybrimoe.dense.linear import PackedDtype, PackedLinear, pack_linears
from hybrimoe.errors import CheckpointError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(96, 64)
        self.gate = nn.Linear(96, 48, bias=False)
        self.chooser = nn.Linear(96, 40, bias=False)
        self.gate_proj = nn.Linear(96, 128, bias=False)
        self.tiny = nn.Linear(96, 8)


@torch.no_grad()
def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("packed_dtype", "error"), [("int8", 0.02), ("int4", 0.15)])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 5, 96), (0, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_computes_what_the_layer_did(
    shape: tuple[int, ...], dtype: torch.dtype, packed_dtype: PackedDtype, error: float
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 130).to(dtype)
    x = torch.randn(*shape).to(dtype)
    out = PackedLinear(linear, packed_dtype)(x)
    assert out.shape == (*shape[:-1], 130)
    assert out.dtype == dtype
    if x.numel():
        assert relative(out.float(), linear(x).float()) < error


def test_the_weights_can_be_read() -> None:
    linear = nn.Linear(96, 64).to(torch.bfloat16)
    packed = PackedLinear(linear)
    assert packed.weight.dtype == torch.bfloat16
    assert relative(packed.weight.float(), linear.weight.float()) < 0.01
    assert packed.record_bytes < linear.weight.numel() * 2


def test_routers_and_tiny_layers_stay_and_undo_gives_the_same_modules_back() -> None:
    block = Block().eval()
    before = dict(block.named_children())
    packed = pack_linears(block, frozenset({40}), keep_originals=True)
    assert packed.paths == ["q_proj", "gate_proj"]
    assert isinstance(block.q_proj, PackedLinear)
    assert block.gate is before["gate"]
    assert block.chooser is before["chooser"]
    packed.undo()
    assert dict(block.named_children()) == before


def test_layers_that_were_let_go_cannot_come_back() -> None:
    packed = pack_linears(Block(), frozenset(), keep_originals=False)
    assert not packed.reversible


def test_a_damaged_weight_is_refused() -> None:
    linear = nn.Linear(96, 64)
    linear.weight.data[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        PackedLinear(linear)


def test_inject_packs_the_dense_layers_and_restore_gives_them_back() -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        plain = model(tokens).logits
        injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32", dense_dtype="int8")
        assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
        assert isinstance(model.lm_head, PackedLinear)
        assert 0 < relative(model(tokens).logits, plain) < 0.1
        injection.restore()
        assert torch.equal(model(tokens).logits, plain)
