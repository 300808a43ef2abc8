"""Files of random weights for llama.cpp: read back, they compute what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybrimoe.bench.model.gguf_file import ARCHITECTURES, write_gguf
from hybrimoe.checkpoint import load
from hybrimoe.errors import ConfigError

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "num_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
DELTA_NET = {
    "head_dim": 32, "shared_expert_intermediate_size": 32, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32}, "qwen3_moe": {"head_dim": 16, "norm_topk_prob": True}, "qwen3_next": DELTA_NET,
    "qwen3_5_moe_text": DELTA_NET,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_computes_what_its_model_computes(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | MORE[model_type]
    if model_type == "qwen3_5_moe_text":
        del sizes["intermediate_size"]  # it has no dense layers, and no such number
    config = AutoConfig.for_model(model_type, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    parameters = dict(model.named_parameters())
    for weight in parameters.values():  # norms too, which are all alike in a new model
        weight.data = (weight.data + 0.05 * torch.randn_like(weight)).bfloat16().float()
    stacked = {key: value for key, value in parameters.items() if ".mlp.experts." in key}
    first = {key.rpartition(".")[2]: value.detach() for key, value in stacked.items() if ".layers.0." in key}
    for key, weight in stacked.items():  # experts are the same in all layers of such a file
        weight.data = first[key.rpartition(".")[2]].clone()
    gate, up = first["gate_up_proj"].chunk(2, dim=1)
    which = range(config.num_experts)
    experts = {part: (values, which) for part, values in (("gate", gate), ("up", up), ("down", first["down_proj"]))}
    dense = {key: value for key, value in parameters.items() if key not in stacked}
    file = tmp_path / "model.gguf"
    write_gguf(file, config, dense, experts, lambda *_: None, "bf16")
    tokens = torch.arange(3, 40)[None]
    read = load(file, accelerator="none", expert_dtype="float32", packed_file=False)
    read.float()
    with torch.inference_mode():
        assert float((read(tokens).logits - model(tokens).logits).abs().max()) < 1e-4


@pytest.mark.parametrize(("model_type", "found"), [("mixtral", "found mixtral"), ("qwen3_moe", "norm_topk_prob: true")])
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(model_type: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=found):
        write_gguf(tmp_path / "model.gguf", AutoConfig.for_model(model_type), {}, {}, lambda *_: None)
    assert not list(tmp_path.iterdir())
