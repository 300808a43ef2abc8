"""What llama.cpp's conversion scripts do to models with linear attention or state spaces: metadata and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from gguf import ExpertGatingFuncType, GGUFWriter

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


def describe_qwen3_5(writer: GGUFWriter, config: dict[str, Any]) -> None:
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


def qwen3_5(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
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


def _describe_granite(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config | {"max_position_embeddings": 1 << 20})
    describe_experts(writer, config)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    heads = config["mamba_n_heads"]
    _describe_state(writer, config["mamba_d_conv"], config["mamba_d_state"], heads, heads * config["mamba_d_head"])
    writer.add_ssm_group_count(config["mamba_n_groups"])
    writer.add_head_count_kv(
        [config["num_key_value_heads"] if kind == "full_attention" else 0 for kind in config["layer_types"]]
    )
    writer.add_rope_scaling_finetuned(False)


def _describe_state(writer: GGUFWriter, kernel: int, size: int, rank: int, inner: int) -> None:
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(size)
    writer.add_ssm_time_step_rank(rank)
    writer.add_ssm_inner_size(inner)


def _granite(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    block = f"blk.{key.split('.')[2]}" if ".layers." in key else ""
    if key.endswith("input_linear.weight"):
        end = "shexp" if "shared_mlp" in key else "exps"
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
            yield f"{block}.ffn_{part}_{end}.weight", half
    elif ".mamba." in key:
        yield _mamba2(key, tensor, config["mamba_n_groups"])
    else:
        yield key, _permuted(key, tensor, config)


def _mamba2(key: str, tensor: torch.Tensor, groups: int) -> tuple[str, torch.Tensor]:
    if key.endswith(".dt_bias"):
        return key.replace(".dt_bias", ".dt_proj.bias"), tensor
    if key.endswith("conv1d.weight"):
        return key, tensor.squeeze()
    if key.endswith((".A_log", ".D")):
        return key, (-tensor.exp() if key.endswith(".A_log") else tensor).reshape(-1, 1)
    return key, tensor.reshape(groups, -1) if key.endswith(".norm.weight") else tensor


def _permuted(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    if not key.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"]
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _describe_jamba(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config)
    describe_experts(writer, config)
    offset, period = config["attn_layer_offset"], config["attn_layer_period"]
    heads = config["num_key_value_heads"]
    layers = range(config["num_hidden_layers"])
    writer.add_head_count_kv([heads if layer % period == offset else 0 for layer in layers])
    inner = config["mamba_expand"] * config["hidden_size"]
    _describe_state(writer, config["mamba_d_conv"], config["mamba_d_state"], config["mamba_dt_rank"], inner)


def _jamba(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key.endswith("conv1d.weight"):
        tensor = tensor.squeeze()
    elif key.endswith(".A_log"):
        tensor = -tensor.exp()
    yield key, tensor


def _describe_kimi(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config | {"max_position_embeddings": config["model_max_length"]})
    describe_experts(writer, config | {"num_experts_per_tok": config["num_experts_per_token"]})
    writer.add_head_count_kv([1 if kind == "full_attention" else 0 for kind in config["layer_types"]])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_kda_head_dim(config["linear_head_dim"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def kimi(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    """Kimi-Linear's tensors."""
    block = f"blk.{key.split('.')[2]}" if ".layers." in key else ""
    key = re.sub(
        r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj", key
    )  # of dense layers, as published ones say
    if "_conv1d" in key:
        tensor = tensor.reshape(1, tensor.shape[0], 1, tensor.shape[-1])
    elif key.endswith(".A_log"):
        tensor = -tensor.exp()
    elif key.endswith(".dt_bias"):
        key = key.replace(".dt_bias", ".dt_proj.bias")
    elif key.endswith("kv_b_proj.weight"):
        keys = config["qk_nope_head_dim"]
        parts = tensor.view(config["num_attention_heads"], keys + config["v_head_dim"], -1)
        yield f"{block}.attn_k_b.weight", parts[:, :keys].transpose(1, 2)
        key, tensor = f"{block}.attn_v_b.weight", parts[:, keys:]
    yield key.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _describe_nemotron(writer: GGUFWriter, config: dict[str, Any]) -> None:
    kinds = config["layers_block_type"]
    sizes = {name: value for name, value in config.items() if name != "intermediate_size"}
    describe_model(writer, sizes | {"num_hidden_layers": len(kinds), "rms_norm_eps": config["layer_norm_epsilon"]})
    describe_experts(writer, config)
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_feed_forward_length([config["moe_intermediate_size"] if kind == "moe" else 0 for kind in kinds])
    writer.add_head_count_kv([config["num_key_value_heads"] if kind == "full_attention" else 0 for kind in kinds])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    if config["moe_latent_size"] is not None:
        writer.add_moe_latent_size(config["moe_latent_size"])
    heads = config["mamba_num_heads"]
    _describe_state(writer, config["conv_kernel"], config["ssm_state_size"], heads, heads * config["mamba_head_dim"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_rope_scaling_finetuned(False)


def _nemotron(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if ".mixer." in key:
        key, tensor = _mamba2(key, tensor, config["n_groups"])
        key = key.replace("dt_proj.bias", "dt.bias").replace("e_score_correction_bias", "e_score_correction.bias")
    if ".mixer.experts." in key:
        key = key.replace("backbone.", "model.").replace(".mixer.", ".mlp.")  # of stacked experts
    yield key, _permuted(key, tensor, config)


def _describe_bailing(writer: GGUFWriter, config: dict[str, Any]) -> None:
    _describe_kimi(writer, config | {"q_lora_rank": None})
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_weights_norm(config["moe_renormalize"])
    writer.add_bool(f"{writer.arch}.kda.safe_gate", config["kda_safe_gate"])
    writer.add_float32(f"{writer.arch}.kda.gate_lower_bound", config["kda_lower_bound"])


def _bailing(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    linear = ".layers." in key and config["layer_types"][int(key.split(".")[2])] == "linear_attention"
    block = f"blk.{key.split('.')[2]}" if ".layers." in key else ""
    if key.endswith(".A_log"):
        yield f"{block}.ssm_a", tensor.exp().reshape(-1, 1)
        return
    own = {
        "attention.f_proj.weight": "ssm_f_a.weight",
        "attention.g_proj.weight": "ssm_g_a.weight" if linear else "attn_gate.weight",
        "attention.b_proj.weight": "ssm_beta.weight",
        "attention.o_norm.weight": "ssm_norm.weight",
        "attention.dense.weight": "attn_output.weight",
        "attention.dt_bias": "ssm_dt.bias",
        "gate.expert_bias": "exp_probs_b.bias",
        **{f"{part}_conv1d.weight": f"ssm_conv1d_{part}.weight" for part in "qkv"},
    }
    mine = next((f"{block}.{name}" for end, name in own.items() if key.endswith(end)), None)
    if "_conv1d" in key:
        tensor = tensor.reshape(1, tensor.shape[0], 1, tensor.shape[-1])
    if mine:
        yield mine, tensor
    else:
        key = key.replace(".attention.", ".self_attn.").replace("word_embeddings", "embed_tokens")
        yield from kimi(key, tensor, config)


RECURRENT = {
    "qwen3_next": Script("qwen3next", _describe_qwen, _qwen3_next),
    "qwen3_5_moe": Script("qwen35moe", describe_qwen3_5, qwen3_5),
    "granitemoehybrid": Script("granitehybrid", _describe_granite, _granite),
    "jamba": Script("jamba", _describe_jamba, _jamba),
    "kimi_linear": Script("kimi-linear", _describe_kimi, kimi),
    "bailing_hybrid": Script("bailingmoe3", _describe_bailing, _bailing, "kimi-linear"),
    "nemotron_h": Script("nemotron_h_moe", _describe_nemotron, _nemotron),
}
"""By the family's name in `tiny_families`."""
