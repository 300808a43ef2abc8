"""Architectures whose layers are not alike: some see a window of the text, or have a convolution for attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.places import (
    Family,
    Place,
    attention_bias,
    expert_counts,
    expert_places,
    expert_size,
    own_heads,
    rope,
)

WINDOWED, FULL = "sliding_attention", "full_attention"
FULL_EACH = 4
"""llama.cpp's own pattern where a file has none: of so many layers the last sees everything."""


def layer_types(fields: Fields) -> list[str]:
    """Which layers see only a window. Raises CheckpointError for a pattern that is none."""
    n_layers = fields.n_layers()
    pattern = fields.each("attention.sliding_window_pattern", FULL_EACH)
    if isinstance(pattern, list):
        if len(pattern) < n_layers or not all(windowed in (0, 1) for windowed in pattern):
            raise fields.wrong("attention.sliding_window_pattern", pattern, f"true or false for {n_layers} layers")
        return [WINDOWED if windowed else FULL for windowed in pattern[:n_layers]]
    each = fields.whole("attention.sliding_window_pattern", FULL_EACH)
    return [FULL if (layer + 1) % each == 0 else WINDOWED for layer in range(n_layers)]


def _windows(fields: Fields) -> dict[str, Any]:
    return {"sliding_window": fields.whole("attention.sliding_window"), "layer_types": layer_types(fields)}


def _afmoe(fields: Fields) -> dict[str, Any]:
    if not fields.flag("expert_weights_norm", True):
        raise fields.wrong("expert_weights_norm", False, "true, as in every such model")
    return {
        "model_type": "afmoe",
        "mup_enabled": True,  # llama.cpp always scales embeddings
        "moe_intermediate_size": expert_size(fields),
        "num_shared_experts": fields.whole("expert_shared_count", 0, least=0),
        "num_dense_layers": fields.whole("leading_dense_block_count", 0, least=0),
        "route_scale": fields.number("expert_weights_scale", 1.0),
        **expert_counts(fields, "num_experts"),
        **own_heads(fields),
        **_windows(fields),
    }


def _exaone(fields: Fields) -> dict[str, Any]:
    types, groups = layer_types(fields), fields.whole("expert_group_count", 1)
    dense = min(fields.whole("leading_dense_block_count", 0, least=0), len(types))
    return {
        "model_type": "exaone_moe",
        "moe_intermediate_size": expert_size(fields),
        "num_shared_experts": fields.whole("expert_shared_count", 0, least=0),
        "first_k_dense_replace": dense,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (len(types) - dense),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1 if groups == 1 else None),
        **expert_counts(fields, "num_experts"),
        **own_heads(fields),
        **_windows(fields),
    }


def _mellum(fields: Fields) -> dict[str, Any]:
    parameters = rope(fields)
    theta = fields.number("rope.freq_base_swa", parameters["rope_theta"])
    return {
        "model_type": "mellum",
        "norm_topk_prob": True,
        "attention_bias": attention_bias(fields),
        "moe_intermediate_size": expert_size(fields),
        "mlp_layer_types": ["sparse"] * len(layer_types(fields)),
        "rope_parameters": {FULL: parameters, WINDOWED: {"rope_type": "default", "rope_theta": theta}},
        **expert_counts(fields, "num_local_experts"),
        **own_heads(fields),
        **(_windows(fields) if fields.given("attention.sliding_window") else _no_window(fields)),
    }


def _no_window(fields: Fields) -> dict[str, Any]:
    return {"sliding_window": None, "layer_types": [FULL] * len(layer_types(fields))}


def _lfm2(fields: Fields) -> dict[str, Any]:
    n_layers = fields.whole("block_count")
    heads = fields.each("attention.head_count_kv", None)
    if not isinstance(heads, list) or len(heads) < n_layers:
        raise fields.wrong("attention.head_count_kv", heads, f"a number for each of {n_layers} layers")
    dense = fields.whole("leading_dense_block_count", 0, least=0)
    return {
        "model_type": "lfm2_moe",
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": fields.whole("shortconv.l_cache"),
        "conv_bias": fields.has("blk.0.shortconv.conv.bias"),
        "layer_types": [FULL if n else "conv" for n in heads[:n_layers]],
        "moe_intermediate_size": expert_size(fields),
        "num_dense_layers": dense,
        "use_expert_bias": fields.has(f"blk.{dense}.exp_probs_b.bias"),
        "norm_topk_prob": True,
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        **expert_counts(fields, "num_experts"),
    }


MIXED: Mapping[str, Family] = {
    "afmoe": Family(
        _afmoe,
        (
            Place("self_attn.gate_proj.weight", ("attn_gate.weight",)),
            Place("post_attention_layernorm.weight", ("post_attention_norm.weight",)),
            Place("pre_mlp_layernorm.weight", ("ffn_norm.weight",)),
            Place("post_mlp_layernorm.weight", ("post_ffw_norm.weight",)),
            Place("mlp.router.gate.weight", ("ffn_gate_inp.weight",)),
            Place("mlp.expert_bias", ("exp_probs_b.bias",)),
        ),
    ),
    "exaone-moe": Family(_exaone),
    "mellum": Family(_mellum),
    "lfm2moe": Family(
        _lfm2,
        (
            Place("operator_norm.weight", ("attn_norm.weight",)),
            Place("ffn_norm.weight", ("ffn_norm.weight",)),
            Place("conv.conv.weight", ("shortconv.conv.weight",), "a channel"),
            Place("conv.in_proj.weight", ("shortconv.in_proj.weight",)),
            Place("conv.out_proj.weight", ("shortconv.out_proj.weight",)),
            Place("self_attn.out_proj.weight", ("attn_output.weight",)),
            Place("self_attn.q_layernorm.weight", ("attn_q_norm.weight",)),
            Place("self_attn.k_layernorm.weight", ("attn_k_norm.weight",)),
            Place("feed_forward.w1.weight", ("ffn_gate.weight",)),
            Place("feed_forward.w2.weight", ("ffn_down.weight",)),
            Place("feed_forward.w3.weight", ("ffn_up.weight",)),
            Place("feed_forward.gate.weight", ("ffn_gate_inp.weight",)),
            Place("feed_forward.expert_bias", ("exp_probs_b.bias",)),
            *expert_places("feed_forward.experts"),
        ),
        (Place("model.embedding_norm.weight", ("token_embd_norm.weight",)),),
        layers="some without attention",
    ),
}
"""By `general.architecture`; a part of `families.FAMILIES`."""
