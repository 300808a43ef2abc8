"""What llama.cpp's conversion scripts do to models of which some layers see a window: metadata and tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from .scripts import Script, describe_experts, describe_heads, describe_model

Named = Iterator[tuple[str, torch.Tensor]]


def _block(key: str) -> str:
    return f"blk.{key.split('.')[2]}" if ".layers." in key else ""


def _windows(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _describe_llama4(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config | {"intermediate_size": config["intermediate_size_mlp"]})
    describe_heads(writer, config)
    describe_experts(writer, config)
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])


def _llama4(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key == "model.embed_tokens.weight":
        yield "rope_freqs.weight", _llama3_factors(config)
    if key.endswith("gate_up_proj"):
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-1), strict=True):
            yield f"{_block(key)}.ffn_{part}_exps.weight", half.transpose(-1, -2)
    elif key.endswith("experts.down_proj"):
        yield f"{_block(key)}.ffn_down_exps.weight", tensor.transpose(-1, -2)
    else:
        yield key, tensor


def _llama3_factors(config: dict[str, Any]) -> torch.Tensor:
    rotary, factors = config["rope_parameters"], []
    low, high, context = rotary["low_freq_factor"], rotary["high_freq_factor"], 8192
    for frequency in 1.0 / rotary["rope_theta"] ** (torch.arange(0, config["head_dim"], 2) / config["head_dim"]):
        wave = 2 * math.pi / frequency.item()
        if wave < context / high:
            factors.append(1.0)
        elif wave > context / low:
            factors.append(rotary["factor"])
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rotary["factor"] + smooth))
    return torch.tensor(factors)


def _describe_gemma4(writer: GGUFWriter, config: dict[str, Any]) -> None:
    full = config["per_layer_config"]["1"]
    describe_model(writer, {name: value for name, value in config.items() if name != "intermediate_size"})
    describe_experts(writer, config | {"num_experts_per_tok": config["top_k_experts"]})
    _windows(writer, config)
    writer.add_feed_forward_length([config["intermediate_size"]] * config["num_hidden_layers"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_key_length(full["head_dim"])
    writer.add_value_length(full["head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_head_count_kv([config["num_key_value_heads"], full["num_key_value_heads"]])
    writer.add_rope_dimension_count(full["head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _gemma4(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key == "model.embed_tokens.weight":
        pairs = config["per_layer_config"]["1"]["head_dim"] // 2
        turned = int(pairs * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        yield "rope_freqs.weight", torch.tensor([1.0] * turned + [1e30] * (pairs - turned))
    if key.endswith("router.scale"):
        yield f"{_block(key)}.ffn_gate_inp.scale", tensor
    elif key.endswith("per_expert_scale"):
        yield f"{_block(key)}.ffn_down_exps.scale", tensor
    else:
        yield f"{key}.weight" if key.endswith("layer_scalar") or ".experts." in key else key, tensor


def _describe_mimo(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rotary, heads = config["rope_parameters"], config["num_key_value_heads"]
    describe_model(writer, config)
    describe_experts(writer, config)
    windows = [int(kind == "sliding_attention") for kind in config["layer_types"]]
    writer.add_sliding_window(config["sliding_window"] - 1)  # the published sliding_window, without the own token
    writer.add_sliding_window_pattern(windows)
    writer.add_head_count_kv([heads * (1 + windowed) for windowed in windows])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["v_head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rotary["full_attention"]["partial_rotary_factor"]))
    writer.add_rope_freq_base(rotary["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
    writer.add_float32(f"{writer.arch}.attention.value_scale", config["attention_value_scale"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config["norm_topk_prob"])


def _mimo(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key.endswith("attention_sink_bias"):
        key += ".weight"
    yield key.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _describe_laguna(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rotary, head_dim = config["rope_parameters"], config["head_dim"]
    describe_model(writer, config | {"num_attention_heads": config["num_attention_heads_per_layer"]})
    describe_experts(writer, config)
    _windows(writer, config)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rotary["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rotary["full_attention"]["partial_rotary_factor"]))
    writer.add_rope_dimension_count_swa(int(head_dim * rotary["sliding_attention"]["partial_rotary_factor"]))
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config["moe_routed_scaling_factor"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))


def _laguna(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    own = {"self_attn.g_proj.weight": "attn_gate.weight", "e_score_correction_bias": "exp_probs_b.bias"}
    yield next((f"{_block(key)}.{name}" for end, name in own.items() if key.endswith(end)), key), tensor


def _describe_step(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rotary, windows = config["rope_parameters"], [kind == "sliding_attention" for kind in config["layer_types"]]
    heads = config["num_attention_heads"], config["num_sliding_attention_heads"]
    describe_model(writer, config | {"num_attention_heads": [heads[windowed] for windowed in windows]})
    describe_experts(writer, config)
    _windows(writer, config)
    writer.add_head_count_kv([config["num_key_value_heads"]] * len(windows))
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rotary["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
    writer.add_expert_shared_feed_forward_length(config["share_expert_dim"])
    writer.add_expert_weights_scale(config["moe_router_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    writer.add_swiglu_clamp_exp([float(limit or 0) for limit in config["swiglu_limits"]])
    writer.add_swiglu_clamp_shexp([float(limit or 0) for limit in config["swiglu_limits_shared"]])


def _step(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if not key.startswith(("model.embed_tokens", "model.layers", "model.norm", "lm_head")):
        return  # what sees
    full = config["rope_parameters"]["full_attention"]
    if key == "model.embed_tokens.weight" and full["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config | {"rope_parameters": full})
    own = {
        "self_attn.g_proj.weight": "attn_gate.weight",
        "moe.router_bias": "exp_probs_b.bias",
        "moe.gate.weight": "ffn_gate_inp.weight",
        **{f"moe.{part}_proj.weight": f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
        **{f"share_expert.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
    }
    name = next((f"{_block(key)}.{name}" for end, name in own.items() if key.endswith(end)), key)
    yield name, tensor + 1 if key.endswith("norm.weight") else tensor


def _describe_ocr(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config)
    describe_heads(writer, config)
    describe_experts(writer, config)
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])


def _ocr(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key.startswith(("model.embed_tokens", "model.layers", "model.norm", "lm_head")):
        yield key, tensor


def _describe_granite_swa(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config)
    describe_heads(writer, config)
    describe_experts(writer, config)
    _windows(writer, config)
    writer.add_array(f"{writer.arch}.attention.rope_pattern", [theta > 0 for theta in config["layer_rope_theta"]])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])


def _granite_swa(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    own = {
        "self_attn.sinks": "attn_sinks.weight",
        "shared_mlp.input_linear.weight": "ffn_up_shexp.weight",
        "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
        "router.weight": "ffn_gate_inp.weight",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
    }
    if key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"]
        tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    yield next((f"{_block(key)}.{name}" for end, name in own.items() if key.endswith(end)), key), tensor


def _describe_phimoe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rotary = config["rope_parameters"]
    describe_model(writer, config)
    describe_experts(writer, config)
    writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    scale = config["max_position_embeddings"] / rotary["original_max_position_embeddings"]
    factor = math.sqrt(1 + math.log(scale) / math.log(rotary["original_max_position_embeddings"]))
    writer.add_rope_scaling_attn_factors(factor)


def _phimoe(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key == "model.embed_tokens.weight":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", torch.tensor(config["rope_parameters"][f"{kind}_factor"])
    yield key, tensor


def _describe_cohere(writer: GGUFWriter, config: dict[str, Any]) -> None:
    dense = config["mlp_layer_types"].index("sparse")
    describe_model(writer, config | {"intermediate_size": config["prefix_dense_intermediate_size"]})
    describe_heads(writer, config)
    describe_experts(writer, config)
    _windows(writer, config)
    size = config["intermediate_size"]
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_logit_scale(config["logit_scale"])
    writer.add_expert_feed_forward_length(size)
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_shared_feed_forward_length(size * config["num_shared_experts"])
    writer.add_rope_scaling_type(RopeScalingType.NONE)


def _cohere(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    yield key, tensor


def _describe_minimax(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_model(writer, config | {"intermediate_size": config["dense_intermediate_size"]})
    describe_heads(writer, config)
    describe_experts(writer, config)
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_count(config["shared_intermediate_size"] // config["intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk_blocks"])
    writer.add_uint32(f"{writer.arch}.attention.indexer.block_size", config["index_block_size"])
    writer.add_uint32(f"{writer.arch}.attention.indexer.local_blocks", config["index_local_blocks"])


def _minimax(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if key.endswith("norm.weight"):
        tensor = tensor + 1
    if ".indexer." in key:
        yield f"{_block(key)}.{key.split('self_attn.')[1]}", tensor
    elif "gate_up_proj" in key:
        end = "_exps" if ".experts." in key else "_shexp" if "shared" in key else ""
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
            yield f"{_block(key)}.ffn_{part}{end}.weight", half
    elif key.endswith("experts.down_proj"):
        yield f"{_block(key)}.ffn_down_exps.weight", tensor
    elif key.endswith("down_proj.weight"):
        yield f"{_block(key)}.ffn_down{'_shexp' if 'shared' in key else ''}.weight", tensor
    elif key.endswith("e_score_correction_bias"):
        yield f"{_block(key)}.exp_probs_b.bias", tensor
    else:
        yield key, tensor


WINDOWED = {
    "llama4": Script("llama4", _describe_llama4, _llama4),
    "gemma4": Script("gemma4", _describe_gemma4, _gemma4),
    "mimo_v2_flash": Script("mimo2", _describe_mimo, _mimo),
    "step3p7": Script("step35", _describe_step, _step),
    "deepseek_ocr2": Script("deepseek2-ocr", _describe_ocr, _ocr),
    "laguna": Script("laguna", _describe_laguna, _laguna, "dots1"),
    "granitemoe_swa": Script("granite_swa", _describe_granite_swa, _granite_swa, "granitemoe"),
    "phimoe": Script("phimoe", _describe_phimoe, _phimoe),
    "cohere2_moe": Script("cohere2moe", _describe_cohere, _cohere, "dots1"),
    "minimax_m3_vl": Script("minimax-m3", _describe_minimax, _minimax, "minimax-m2"),
}
"""By the family's name in `tiny_families`."""
