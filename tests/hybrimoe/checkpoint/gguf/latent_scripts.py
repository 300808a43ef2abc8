"""What llama.cpp's conversion scripts do to models with latent attention after DeepSeek-V3: metadata and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from gguf import ExpertGatingFuncType, GGUFWriter

from .scripts import Script, describe_experts, describe_latent, describe_model, describe_rotation

Named = Iterator[tuple[str, torch.Tensor]]


def _block(key: str) -> str:
    return f"blk.{key.split('.')[2]}" if ".layers." in key else ""


def _describe_deepseek(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config)
    describe_experts(writer, config)
    describe_latent(writer, config)
    describe_rotation(writer, config["rope_parameters"])
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


def _describe_mistral4(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rotary = config["rope_parameters"]
    _describe_deepseek(writer, config)
    writer.add_attn_temperature_scale(rotary["llama_4_scaling_beta"])
    writer.add_attn_temperature_length(rotary["original_max_position_embeddings"])


def _describe_indexed(writer: GGUFWriter, config: dict[str, Any]) -> None:
    _describe_deepseek(writer, config)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])


def _describe_glm(writer: GGUFWriter, config: dict[str, Any]) -> None:
    _describe_indexed(writer, config)
    writer.add_array(f"{writer.arch}.attention.indexer.types", [kind == "full" for kind in config["indexer_types"]])


def _latent(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key.endswith("kv_b_proj.weight"):
        keys = config["qk_nope_head_dim"]
        parts = tensor.view(config["num_attention_heads"], keys + config["v_head_dim"], -1)
        yield f"{_block(key)}.attn_k_b.weight", parts[:, :keys].transpose(1, 2)
        yield f"{_block(key)}.attn_v_b.weight", parts[:, keys:]
    elif key.endswith(("experts.gate_up_proj", "experts.down_proj")):
        yield f"{key}.weight", tensor
    else:
        yield key.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _describe_hy(writer: GGUFWriter, config: dict[str, Any]) -> None:
    dense = config["mlp_layer_types"].index("sparse")
    _describe_glm(writer, config | {"first_k_dense_replace": dense})
    writer.add_swiglu_clamp_exp([config["swiglu_limit"]] * config["num_hidden_layers"])
    for name, key in (("count", "hc_mult"), ("epsilon", "hc_eps"), ("magnitude", "hc_magnitude")):
        value = config[key]
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
            f"{writer.arch}.hyper_connection.{name}", value
        )


def _hy(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    block = _block(key)
    own = {
        "self_attn.learnable_sink_param": "attn_sinks.weight",
        "self_attn.linear_gate.weight": "attn_gate.weight",
        "shared_experts.linear_gate.weight": "ffn_gate_shexp.weight",
        "mlp.linear_gate.weight": "ffn_gate.weight",
    }
    mixing = re.search(r"hc_(attn|mlp)_layer.*hc_(fn|base|scale)$", key)
    if mixing:
        yield f"{block}.hc_{'attn' if mixing[1] == 'attn' else 'ffn'}_{mixing[2]}.weight", tensor
    elif key.endswith("experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
            yield f"{block}.ffn_{part}_exps.weight", half
    elif key.endswith("experts.down_proj"):
        yield f"{block}.ffn_down_exps.weight", tensor
    elif ".hc_head." in key:
        yield f"output_hc_{key.rpartition('_')[2]}.weight", tensor
    else:
        mine = next((f"{block}.{name}" for end, name in own.items() if key.endswith(end)), None)
        yield from [(mine, tensor)] if mine else _latent(key, tensor, config)


def _describe_dots3(writer: GGUFWriter, config: dict[str, Any]) -> None:
    windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
    window = config["per_layer_config"][str(windowed.index(True))]
    rotary, rotated = config["rope_parameters"], config["qk_rope_head_dim"]
    heads = [(window if seen else config)["num_attention_heads"] for seen in windowed]
    dense = config["mlp_layer_types"].index("sparse")
    whole = config | {"rope_parameters": rotary["indexed_attention"], "first_k_dense_replace": dense}
    _describe_indexed(writer, whole)
    writer.add_head_count(heads)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(windowed)
    writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
    writer.add_key_length_swa(window["kv_lora_rank"] + rotated)
    writer.add_value_length_swa(window["kv_lora_rank"])
    attention = f"{writer.arch}.attention"
    writer.add_uint32(f"{attention}.kv_lora_rank_swa", window["kv_lora_rank"])
    writer.add_uint32(f"{attention}.key_length_mla_swa", window["qk_nope_head_dim"] + rotated)
    writer.add_uint32(f"{attention}.value_length_mla_swa", window["v_head_dim"])
    writer.add_array(f"{attention}.indexer.types", [not seen for seen in windowed])


def _dots3(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    own = {"k_rope_only_layernorm.weight": "attn_k_norm.weight", "g_proj.weight": "attn_gate.weight"}
    mine = next((f"{_block(key)}.{name}" for end, name in own.items() if key.endswith(end)), None)
    if key.endswith(("q_a_layernorm.weight", "kv_a_layernorm.weight")):
        yield key, tensor * (config["hidden_size"] / tensor.shape[0]) ** 0.5
    elif mine:
        yield mine, tensor
    elif key.endswith("kv_b_proj.weight"):
        layer = config | config["per_layer_config"].get(key.split(".")[2], {})
        yield from _latent(key, tensor, layer)
    else:
        yield from _latent(key, tensor, config)


LATENT = {
    "mistral4": Script("mistral4", _describe_mistral4, _latent),
    "deepseek_v32": Script("deepseek32", _describe_indexed, _latent, "glm-dsa"),
    "glm_moe_dsa": Script("glm-dsa", _describe_glm, _latent),
    "hy_v4": Script("hy_v4", _describe_hy, _hy, "glm-dsa"),
    "dots3_note": Script("dots3note", _describe_dots3, _dots3, "glm-dsa"),
}
"""By the family's name in `tiny_families`."""
