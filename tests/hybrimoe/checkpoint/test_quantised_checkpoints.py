"""fp8 and mxfp4 checkpoints are read as the weights they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, GptOssConfig, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hybrimoe.checkpoint import load
from hybrimoe.checkpoint.dequantise import scale_fp8, scale_mxfp4
from hybrimoe.errors import CheckpointError

TOKENS = torch.arange(3, 15)[None]
OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "expert_dtype": "float32", "progress": False}
BLOCK = 16


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_mxfp4_blocks_as_transformers_reads_them() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 135, (3, 10, 4), dtype=torch.uint8, generator=generator)
    assert torch.equal(scale_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def test_fp8_scales_per_tensor_per_row_and_per_block() -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0], [0.5, 8.0, 1.0]]).to(torch.float8_e4m3fn)
    assert scale_fp8(weight, torch.tensor(2.0)).tolist() == [[2.0, 4.0, 8.0], [1.0, 16.0, 2.0]]
    assert scale_fp8(weight, torch.tensor([1.0, 10.0])).tolist() == [[1.0, 2.0, 4.0], [5.0, 80.0, 10.0]]
    assert scale_fp8(weight, torch.tensor([[1.0, 10.0]])).tolist() == [[1.0, 2.0, 40.0], [0.5, 8.0, 10.0]]


def test_a_gpt_oss_checkpoint_in_mxfp4(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "vocab_size": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = GptOssConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=rope)
    plain = make_model(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    plain.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, parameter in plain.model.layers[0].mlp.experts.named_parameters():
        if parameter.dim() != 3:
            continue
        experts, columns, rows = parameter.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            parameter.copy_(convert_moe_packed_tensors(blocks, scales))
        del tensors[f"model.layers.0.mlp.experts.{name}"]
        tensors[f"model.layers.0.mlp.experts.{name}_blocks"] = blocks
        tensors[f"model.layers.0.mlp.experts.{name}_scales"] = scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    model = load(tmp_path, **OPTIONS)
    model.hybrimoe.restore()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def quantise_fp8(tensors: dict[str, torch.Tensor]) -> None:
    """Every projection in blocks of BLOCK x BLOCK, as DeepSeek stores them."""
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors[key].float()
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        scale = torch.full((rows, columns), 2.0**-4)
        tensors[key] = (weight / 2.0**-4).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scale


@pytest.fixture
def fp8(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> tuple[Path, PreTrainedModel]:
    """A DeepSeek-V3 in fp8 on disk, and the same weights as a plain model."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    dims = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "vocab_size": 64}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    plain = make_model(DeepseekV3Config(**sizes, **heads, **dims, **experts))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith(("_proj.weight", "_proj")):
                parameter.copy_((parameter / 2.0**-4).to(torch.float8_e4m3fn).float() * 2.0**-4)
    plain.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    quantise_fp8(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, plain


def test_a_deepseek_checkpoint_in_fp8(fp8: tuple[Path, PreTrainedModel]) -> None:
    directory, plain = fp8
    torch.testing.assert_close(logits(load(directory, **OPTIONS)), logits(plain), rtol=1e-5, atol=1e-5)


def test_fp8_without_its_scales(fp8: tuple[Path, PreTrainedModel]) -> None:
    directory, _ = fp8
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.weight is quantised and its scales are missing"):
        load(directory, **OPTIONS)
