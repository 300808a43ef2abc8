"""What llama.cpp's conversion scripts do to models with linear attention or state spaces: metadata and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gguf import GGUFWriter

from .scripts import Script, describe_experts, describe_heads, describe_model

Named = Iterator[tuple[str, torch.Tensor]]


def _describe_qwen(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config)
    describe_heads(writer, config)
    describe_experts(writer, config)
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(len(config["layer_types"]))


def _describe_qwen3_5(writer: GGUFWriter, config: dict[str, Any]) -> None:
    _describe_qwen(writer, config)
    writer.add_rope_dimension_sections([1, 0, 0, 0])


def _qwen3_next(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if "in_proj_qkvz" in key:
        yield from _queries_to_gates(key, tensor, config)
        return
    if key.endswith(".A_log"):
        tensor = -tensor.exp()
    elif key.endswith(".dt_bias"):
        key = key.replace(".dt_bias", ".dt_proj.bias")
    elif "conv1d" in key:
        tensor = tensor.squeeze()
    elif key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    yield from _experts_apart(key, tensor)


def _experts_apart(key: str, tensor: torch.Tensor) -> Named:
    if key.endswith("experts.gate_up_proj"):
        for name, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=-2), strict=True):
            yield key.replace("gate_up_proj", f"{name}.weight"), half
    else:
        yield f"{key}.weight" if key.endswith("experts.down_proj") else key, tensor


def _queries_to_gates(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    """[q, k, v, z] of each head of keys -> all q, k and v, and all z."""
    heads, keys = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    by_head = tensor.T.reshape(-1, heads, 2 * keys + 2 * values)
    q, k, v, z = (part.flatten(1).T for part in by_head.split([keys, keys, values, values], dim=-1))
    block = f"blk.{key.split('.')[2]}"
    yield f"{block}.attn_qkv.weight", torch.cat([q, k, v])
    yield f"{block}.attn_gate.weight", z


def _tiled(tensor: torch.Tensor, dim: int, head_dim: int, config: dict[str, Any]) -> torch.Tensor:
    """Heads of values by key head -> the first of every key head, then the second, ..."""
    heads = config["linear_num_key_heads"]
    shape = list(tensor.shape)
    split = tensor.reshape(*shape[:dim], heads, config["linear_num_value_heads"] // heads, head_dim, *shape[dim + 1 :])
    return split.transpose(dim, dim + 1).reshape(shape)


def _qwen3_5(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    head_dim = config["linear_value_head_dim"]
    others = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    if "in_proj_qkv" in key or "conv1d" in key:
        rows = tensor.squeeze()
        tensor = torch.cat([rows[:others], _tiled(rows[others:], 0, head_dim, config)])
    elif "in_proj_z" in key:
        tensor = _tiled(tensor, 0, head_dim, config)
    elif "in_proj_b" in key or "in_proj_a" in key or ".A_log" in key or ".dt_bias" in key:
        tensor = _tiled(tensor, 0, 1, config)
    elif "linear_attn.out_proj" in key:
        tensor = _tiled(tensor, 1, head_dim, config)
    yield from _qwen3_next(key, tensor, config)


RECURRENT = {
    "qwen3_next": Script("qwen3next", _describe_qwen, _qwen3_next),
    "qwen3_5_moe": Script("qwen35moe", _describe_qwen3_5, _qwen3_5),
}
"""By the family's name in `tiny_families`."""
