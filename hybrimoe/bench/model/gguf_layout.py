"""How llama.cpp stores the gated delta nets of Qwen3-Next and Qwen3.5, whose tensors it turns and splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def describe_delta_net(writer: Any, config: Any) -> None:
    """The metadata of such a model beside that of others. writer: of the package gguf."""
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    kinds = list(config.layer_types)
    writer.add_full_attention_interval(kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds))
    if config.model_type == "qwen3_5_moe_text":  # of its multimodal rotation, which text has one part of
        rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1))
        writer.add_rope_dimension_sections([rotated // 2, 0, 0, 0])


def laid_out(dense: Mapping[str, torch.Tensor], config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their names in transformers, or in the file (`blk.`), with the values and shapes of the file."""
    for key, tensor in dense.items():
        if not hasattr(config, "linear_conv_kernel_dim"):
            yield key, tensor
        elif "in_proj_qkvz" in key:
            yield from _queries_to_gates(key, tensor, config)
        else:
            yield _named(key), _values(key, tensor.detach().float(), config)


def _named(key: str) -> str:
    return key.replace(".dt_bias", ".dt_proj.bias")


def _values(key: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    if config.model_type == "qwen3_5_moe_text" and ".linear_attn." in key:
        tensor = _heads_in_turn(key, tensor, config)
    if key.endswith(".A_log"):
        return -tensor.exp()
    if key.endswith("conv1d.weight"):
        return tensor.squeeze()
    if key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        return tensor + 1  # a weight of 0 leaves values as they are
    return tensor


def _queries_to_gates(key: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows of q, k, v, z for each head of keys -> all q, k and v, and all z."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // heads * config.linear_value_head_dim
    rows = tensor.reshape(heads, 2 * keys + 2 * values, -1)
    q, k, v, z = (part.flatten(0, 1) for part in rows.split([keys, keys, values, values], dim=1))
    block = f"blk.{key.split('.')[2]}"
    yield f"{block}.attn_qkv.weight", torch.cat([q, k, v])
    yield f"{block}.attn_gate.weight", z


def _heads_in_turn(key: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Heads of values, which stand by head of keys: the first of each head of keys, then the second ones."""
    head_dim, queries = config.linear_value_head_dim, 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if "in_proj_qkv" in key or "conv1d" in key:
        return torch.cat([tensor[:queries], _turned(tensor[queries:], 0, head_dim, config)])
    if "in_proj_z" in key:
        return _turned(tensor, 0, head_dim, config)
    if key.endswith(("in_proj_b.weight", "in_proj_a.weight", ".A_log", ".dt_bias")):
        return _turned(tensor, 0, 1, config)
    if "out_proj" in key:
        return _turned(tensor, 1, head_dim, config)
    return tensor


def _turned(tensor: torch.Tensor, dim: int, head_dim: int, config: Any) -> torch.Tensor:
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    shape = tensor.shape
    heads = tensor.reshape(*shape[:dim], keys, values // keys, head_dim, *shape[dim + 1 :])
    return heads.transpose(dim, dim + 1).reshape(shape)
