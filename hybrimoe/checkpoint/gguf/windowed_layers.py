"""Architectures of which some layers see a part of the text, and have heads, sizes or rotations of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.mixed_layers import FULL, WINDOWED, layer_types
from hybrimoe.checkpoint.gguf.places import (
    GRANITE,
    SIGMOID,
    Family,
    Place,
    attention_bias,
    expert_counts,
    expert_places,
    expert_size,
    mlp_places,
    own_heads,
    partly_rotated,
    rope,
    rotated_part,
)

NO_WINDOW_EACH = 4  # of llama4: the last of so many layers sees everything, without a rotation
CHUNK = 8192  # of llama4, in the file nowhere
WITHOUT_NORM = 128  # experts of the llama4 whose queries and keys are not normed
PADDING = 1  # of step35, where the file names none: its configuration must
SWA_HEADS = 2  # in mimo2 layers with a window have so many times the heads of keys and values


def _sparse(fields: Fields, layers: int) -> list[str]:
    """Which layers have experts, as `mlp_layer_types` has it."""
    return ["sparse" if fields.has(f"blk.{layer}.ffn_gate_inp.weight") else "dense" for layer in range(layers)]


def _shared_size(fields: Fields, layers: int) -> int:
    return fields.shape(*(f"blk.{layer}.ffn_up_shexp.weight" for layer in range(layers)))[-2]


def _llama4(fields: Fields) -> dict[str, Any]:
    layers = range(fields.whole("block_count"))
    counts = expert_counts(fields, "num_local_experts")
    windows = not fields.given("attention.sliding_window") or fields.whole("attention.sliding_window", least=0) > 0
    rotated = [1 if not windows or (layer + 1) % NO_WINDOW_EACH else 0 for layer in layers]
    return {
        "model_type": "llama4_text",
        "intermediate_size": expert_size(fields),
        "intermediate_size_mlp": fields.whole("feed_forward_length"),
        "moe_layers": [layer for layer in layers if fields.has(f"blk.{layer}.ffn_gate_inp.weight")],
        "interleave_moe_layer_step": fields.whole("interleave_moe_layer_step", 1),
        "no_rope_layers": rotated,
        "layer_types": ["chunked_attention" if windows and turns else FULL for turns in rotated],
        "attention_chunk_size": CHUNK,
        "use_qk_norm": counts["num_local_experts"] != WITHOUT_NORM,
        "attention_bias": attention_bias(fields),
        **counts,
        **own_heads(fields),
    }


def _gemma4(fields: Fields) -> dict[str, Any]:
    kinds = layer_types(fields)
    heads = fields.each_whole("attention.head_count_kv", len(kinds), fields.whole("attention.head_count"), least=1)
    sizes = fields.each_whole("feed_forward_length", len(kinds), least=1)
    head_dim = fields.whole("attention.key_length")
    full = kinds.index(FULL) if FULL in kinds else None
    turned = fields.values("rope_freqs.weight") if fields.has("rope_freqs.weight") else [1.0]
    found = {
        "model_type": "gemma4_text",
        "layer_types": kinds,
        "sliding_window": fields.whole("attention.sliding_window"),
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": sizes[-1] == 2 * sizes[0],
        "num_attention_heads": fields.whole("attention.head_count"),
        "num_key_value_heads": heads[kinds.index(WINDOWED)] if WINDOWED in kinds else heads[0],
        "head_dim": fields.whole("attention.key_length_swa", head_dim),
        "global_head_dim": head_dim,
        "attention_k_eq_v": full is not None and not fields.has(f"blk.{full}.attn_v.weight"),
        "num_kv_shared_layers": fields.whole("attention.shared_kv_layers", 0, least=0),
        "hidden_size_per_layer_input": fields.whole("embedding_length_per_layer_input", 0, least=0),
        "enable_moe_block": fields.has("blk.0.ffn_gate_inp.weight"),
        "moe_intermediate_size": expert_size(fields),
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "rope_theta": fields.number("rope.freq_base"),
                # the others are divided by 1e30
                "partial_rotary_factor": sum(factor == 1 for factor in turned) / len(turned),
            },
            WINDOWED: {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10_000.0)},
        },
        "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0) or None,
        **expert_counts(fields, "num_experts", "top_k_experts"),
    }
    if found["attention_k_eq_v"] and full is not None:
        found["num_global_key_value_heads"] = heads[full]
    if fields.has("per_layer_token_embd.weight"):
        found["vocab_size_per_layer_input"] = fields.shape("per_layer_token_embd.weight")[0]
    return found


def _mimo2(fields: Fields) -> dict[str, Any]:
    kinds = layer_types(fields)
    head_dim = own_heads(fields)["head_dim"]
    heads = fields.each_whole("attention.head_count_kv", len(kinds), least=1)
    few = min(n if kind == FULL else n // SWA_HEADS for n, kind in zip(heads, kinds, strict=True))
    if heads != [few if kind == FULL else SWA_HEADS * few for kind in kinds]:
        raise fields.wrong("attention.head_count_kv", heads, "twice as many in layers with a window as in the others")
    parameters = rope(fields) | rotated_part(fields.whole("rope.dimension_count", head_dim), head_dim)
    groups = fields.whole("expert_group_count", 1)
    return {
        "model_type": "mimo_v2_flash",
        "layer_types": kinds,
        "mlp_layer_types": _sparse(fields, len(kinds)),
        # the scripts write how many tokens are seen before the own one
        "sliding_window": fields.whole("attention.sliding_window") + 1,
        "intermediate_size": fields.whole("feed_forward_length", 1),
        "num_attention_heads": fields.whole("attention.head_count"),
        "num_key_value_heads": few,
        "head_dim": head_dim,
        "v_head_dim": fields.whole("attention.value_length", head_dim),
        "attention_value_scale": fields.number("attention.value_scale", 1.0),
        "attention_bias": attention_bias(fields),
        "rope_parameters": {
            FULL: parameters,
            WINDOWED: parameters | {"rope_theta": fields.number("rope.freq_base_swa", parameters["rope_theta"])},
        },
        "moe_intermediate_size": expert_size(fields),
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1 if groups == 1 else None),
        **expert_counts(fields, "n_routed_experts"),
    }


def _laguna(fields: Fields) -> dict[str, Any]:
    layers = fields.whole("block_count")
    windows = fields.given("attention.sliding_window")
    heads = fields.each_whole("attention.head_count", layers, least=1)
    head_dim = fields.whole("attention.key_length")
    parameters = rope(fields)
    theta = fields.number("rope.freq_base_swa", parameters["rope_theta"])
    turned = fields.whole("rope.dimension_count", head_dim)
    turned_in_windows = fields.whole("rope.dimension_count_swa", head_dim)
    return {
        "model_type": "laguna",
        "layer_types": layer_types(fields) if windows else [FULL] * layers,
        "mlp_layer_types": _sparse(fields, layers),
        "sliding_window": fields.whole("attention.sliding_window") if windows else None,
        "intermediate_size": fields.whole("feed_forward_length", 1),
        "num_attention_heads": max(heads),
        "num_attention_heads_per_layer": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv"),
        "head_dim": head_dim,
        "gating": "per-element" if fields.shape("blk.0.attn_gate.weight")[0] > heads[0] else True,
        "attention_bias": attention_bias(fields),
        "rope_parameters": {
            FULL: parameters | rotated_part(turned, head_dim),
            WINDOWED: {"rope_type": "default", "rope_theta": theta} | rotated_part(turned_in_windows, head_dim),
        },
        "moe_intermediate_size": expert_size(fields),
        "shared_expert_intermediate_size": _shared_size(fields, layers),
        "moe_routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "moe_router_logit_softcapping": fields.number("router_logit_softcapping", 0.0),
        **expert_counts(fields, "num_experts"),
    }


def _step35(fields: Fields) -> dict[str, Any]:
    """Layers with a window have heads of their own and rotate them whole, the others half of each."""
    kinds = layer_types(fields)
    head_dim = fields.whole("attention.key_length")
    heads = fields.each_whole("attention.head_count", len(kinds), least=1)
    of_full = {n for n, kind in zip(heads, kinds, strict=True) if kind == FULL}
    of_windowed = {n for n, kind in zip(heads, kinds, strict=True) if kind == WINDOWED}
    key_heads = set(fields.each_whole("attention.head_count_kv", len(kinds), least=1))
    if len(of_full) > 1 or len(of_windowed) > 1 or len(key_heads) > 1:
        raise fields.wrong("attention.head_count", heads, "one number for layers with a window, one for the others")
    if fields.whole("expert_gating_func", SIGMOID, least=0) != SIGMOID or not fields.flag("expert_weights_norm", True):
        raise fields.wrong("expert_gating_func", "another one", "sigmoids, normed, as in every such model")
    turned = fields.whole("rope.dimension_count", head_dim)
    parameters = rope(fields)
    theta = fields.number("rope.freq_base_swa", parameters["rope_theta"])
    return {
        "model_type": "step3p5",
        "pad_token_id": PADDING if (padding := fields.token("padding")) is None else padding,
        "layer_types": kinds,
        "mlp_layer_types": _sparse(fields, len(kinds)),
        "sliding_window": fields.whole("attention.sliding_window"),
        "intermediate_size": fields.whole("feed_forward_length", 1),
        "num_attention_heads": max(of_full or of_windowed),
        "num_sliding_attention_heads": max(of_windowed or of_full),
        "num_key_value_heads": key_heads.pop(),
        "head_dim": head_dim,
        "attention_bias": attention_bias(fields),
        "rope_parameters": {
            FULL: parameters | rotated_part(turned // 2, head_dim),
            WINDOWED: {"rope_type": "default", "rope_theta": theta} | rotated_part(turned, head_dim),
        },
        "moe_intermediate_size": expert_size(fields),
        "share_expert_dim": _shared_size(fields, len(kinds)),
        "moe_router_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "swiglu_limits": _limits(fields, "swiglu_clamp_exp", len(kinds)),
        "swiglu_limits_shared": _limits(fields, "swiglu_clamp_shexp", len(kinds)),
        **expert_counts(fields, "n_routed_experts"),
    }


def _limits(fields: Fields, name: str, layers: int) -> list[float] | None:
    """What is cut off in each layer; 0 where nothing is."""
    limits = fields.each(name, None)
    if limits is None:
        return None
    found = limits[:layers] if isinstance(limits, list) else [limits] * layers
    if len(found) < layers or not all(isinstance(limit, float) and 0 <= limit < math.inf for limit in found):
        raise fields.wrong(name, limits, f"a number of 0 or more for each of {layers} layers")
    return found


def _granite_swa(fields: Fields) -> dict[str, Any]:
    kinds = layer_types(fields)
    theta = fields.number("rope.freq_base", 10_000.0)
    turned = fields.each_whole("attention.rope_pattern", len(kinds), 1)
    return {
        "model_type": "granitemoe_swa",
        "layer_types": kinds,
        "layer_rope_theta": [theta if turns else 0.0 for turns in turned],
        "sliding_window": fields.whole("attention.sliding_window"),
        "attention_multiplier": fields.number("attention.scale", 1.0),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
        "attention_bias": attention_bias(fields),
        "shared_intermediate_size": _shared_size(fields, len(kinds)) // 2,
        **expert_counts(fields, "num_local_experts"),
    }


def _cohere2_moe(fields: Fields) -> dict[str, Any]:
    """Layers with a window are rotated, and dense ones; an attention and its experts read the same norm."""
    kinds = layer_types(fields)
    gating = fields.whole("expert_gating_func", SIGMOID, least=0)
    if gating != SIGMOID:
        raise fields.wrong("expert_gating_func", gating, f"{SIGMOID} (sigmoid), as the conversion writes")
    if fields.number("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise fields.wrong("expert_weights_scale", fields.number("expert_weights_scale"), "1")
    found = {
        "model_type": "cohere2_moe",
        "layer_types": kinds,
        "mlp_layer_types": _sparse(fields, len(kinds)),
        "sliding_window": fields.whole("attention.sliding_window"),
        "logit_scale": fields.number("logit_scale"),
        "intermediate_size": expert_size(fields),
        "prefix_dense_intermediate_size": fields.whole("feed_forward_length"),
        "prefix_dense_sliding_window_pattern": 1,
        "num_shared_experts": fields.whole("expert_shared_count", 0, least=0),
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "sigmoid",
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "attention_bias": attention_bias(fields),
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        **expert_counts(fields, "num_experts"),
        **own_heads(fields),
    }
    if not fields.given("attention.layer_norm_rms_epsilon"):
        found["layer_norm_eps"] = fields.number("attention.layer_norm_epsilon")
    return found


def _minimax_m3(fields: Fields) -> dict[str, Any]:
    """As a model of text. Layers with an indexer see the blocks of the text that it chooses."""
    layers = range(fields.n_layers())
    indexed = [fields.has(f"blk.{layer}.indexer.q_proj.weight") for layer in layers]
    found = {
        "model_type": "minimax_m3_vl_text",
        "layer_types": ["minimax_m3_sparse" if chooses else FULL for chooses in indexed],
        "mlp_layer_types": _sparse(fields, len(layers)),
        "intermediate_size": expert_size(fields),
        "dense_intermediate_size": fields.whole("feed_forward_length"),
        "shared_intermediate_size": _shared_size(fields, len(layers)),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        **expert_counts(fields, "num_local_experts"),
        **partly_rotated(fields),
    }
    if any(indexed):
        found |= {
            "index_n_heads": fields.whole("attention.indexer.head_count"),
            "index_head_dim": fields.whole("attention.indexer.key_length"),
            "index_topk_blocks": fields.whole("attention.indexer.top_k"),
            "index_block_size": fields.whole("attention.indexer.block_size"),
            "index_local_blocks": fields.whole("attention.indexer.local_blocks", least=0),
        }
    return found


_NORMS_LESS_ONE = (
    Place("input_layernorm.weight", ("attn_norm.weight",), "less one"),
    Place("post_attention_layernorm.weight", ("ffn_norm.weight",), "less one"),
    Place("self_attn.q_norm.weight", ("attn_q_norm.weight",), "less one"),
    Place("self_attn.k_norm.weight", ("attn_k_norm.weight",), "less one"),
    Place("self_attn.indexer.q_norm.weight", ("indexer.q_norm.weight",), "less one"),
    Place("self_attn.indexer.k_norm.weight", ("indexer.k_norm.weight",), "less one"),
)
"""Norms scale by one more than their weights; the file has the sum."""

WINDOWED_FAMILIES: Mapping[str, Family] = {
    "llama4": Family(
        _llama4,
        (
            Place("feed_forward.router.weight", ("ffn_gate_inp.weight",)),
            Place(
                "feed_forward.experts.gate_up_proj",
                ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                "rows joined, transposed",
            ),
            Place("feed_forward.experts.down_proj", ("ffn_down_exps.weight",), "transposed"),
            *mlp_places("_shexp", "feed_forward.shared_expert"),
            *mlp_places("", "feed_forward"),
        ),
    ),
    "gemma4": Family(
        _gemma4,
        (
            Place("pre_feedforward_layernorm.weight", ("ffn_norm.weight",)),
            Place("post_feedforward_layernorm.weight", ("post_ffw_norm.weight",)),
            Place("pre_feedforward_layernorm_2.weight", ("pre_ffw_norm_2.weight",)),
            Place("post_feedforward_layernorm_1.weight", ("post_ffw_norm_1.weight",)),
            Place("post_feedforward_layernorm_2.weight", ("post_ffw_norm_2.weight",)),
            Place("layer_scalar", ("layer_output_scale.weight",)),
            Place("router.proj.weight", ("ffn_gate_inp.weight",)),
            Place("router.scale", ("ffn_gate_inp.scale",)),
            Place("router.per_expert_scale", ("ffn_down_exps.scale",)),
            *expert_places("experts"),
            Place("per_layer_input_gate.weight", ("inp_gate.weight",)),
            Place("per_layer_projection.weight", ("proj.weight",)),
            Place("post_per_layer_input_norm.weight", ("post_norm.weight",)),
        ),
        (
            Place("model.embed_tokens_per_layer.weight", ("per_layer_token_embd.weight",)),
            Place("model.per_layer_model_projection.weight", ("per_layer_model_proj.weight",)),
            Place("model.per_layer_projection_norm.weight", ("per_layer_proj_norm.weight",)),
        ),
        "own",
    ),
    "mimo2": Family(_mimo2, (Place("self_attn.sinks", ("attn_sinks.weight",)),), layers="own"),
    "step35": Family(
        _step35,
        (*_NORMS_LESS_ONE, Place("self_attn.g_proj.weight", ("attn_gate.weight",))),
        (Place("model.norm.weight", ("output_norm.weight",), "less one"),),
        layers="own",
        wrapper="step3p7",
    ),
    "laguna": Family(
        _laguna,
        (
            Place("self_attn.g_proj.weight", ("attn_gate.weight",)),
            Place("mlp.gate.e_score_correction_bias", ("exp_probs_b.bias",)),
        ),
        layers="own",
    ),
    "granite_swa": Family(
        _granite_swa,
        (
            Place("self_attn.sinks", ("attn_sinks.weight",)),
            Place("shared_mlp.input_linear.weight", ("ffn_up_shexp.weight",)),
            *GRANITE,
        ),
    ),
    "cohere2moe": Family(_cohere2_moe, layers="any norm"),
    "minimax-m3": Family(
        _minimax_m3,
        (
            *_NORMS_LESS_ONE,
            Place("self_attn.indexer.q_proj.weight", ("indexer.q_proj.weight",)),
            Place("self_attn.indexer.k_proj.weight", ("indexer.k_proj.weight",)),
            Place("mlp.gate_up_proj.weight", ("ffn_gate.weight", "ffn_up.weight"), "rows joined"),
            Place(
                "mlp.shared_experts.gate_up_proj.weight",
                ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
                "rows joined",
            ),
        ),
        (Place("model.norm.weight", ("output_norm.weight",), "less one"),),
    ),
}
"""By `general.architecture`; a part of `families.FAMILIES`."""
