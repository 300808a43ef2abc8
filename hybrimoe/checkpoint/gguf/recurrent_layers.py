"""Architectures of which most layers carry a state along the text: linear attention and state spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.places import (
    Family,
    Place,
    attention_bias,
    expert_counts,
    expert_size,
    mlp_places,
    partly_rotated,
)

LINEAR, FULL = "linear_attention", "full_attention"


def kinds_of_layers(fields: Fields, of_state: str, state: str = LINEAR, attention: str = FULL) -> list[str]:
    """The kind of every layer: `state` where it has the tensor `of_state`, else `attention`."""
    layers = range(fields.whole("block_count") - fields.whole("nextn_predict_layers", 0, least=0))
    return [state if fields.has(f"blk.{layer}.{of_state}") else attention for layer in layers]


def _delta_net(fields: Fields) -> dict[str, Any]:
    """Qwen's layers of linear attention (gated delta net), and its experts."""
    value_heads = fields.whole("ssm.time_step_rank")
    n_values = fields.whole("ssm.inner_size")
    if n_values % value_heads:
        raise fields.wrong("ssm.inner_size", n_values, f"a multiple of the {value_heads} heads of values")
    key_heads = fields.whole("ssm.group_count")
    if value_heads % key_heads:
        raise fields.wrong("ssm.time_step_rank", value_heads, f"a multiple of the {key_heads} heads of keys")
    kinds = kinds_of_layers(fields, "ssm_a")
    shared = (f"blk.{layer}.ffn_up_shexp.weight" for layer in range(len(kinds)))
    return {
        "layer_types": kinds,
        "linear_conv_kernel_dim": fields.whole("ssm.conv_kernel"),
        "linear_key_head_dim": fields.whole("ssm.state_size"),
        "linear_value_head_dim": n_values // value_heads,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "attention_bias": attention_bias(fields),
        "moe_intermediate_size": expert_size(fields),
        "shared_expert_intermediate_size": fields.shape(*shared)[-2],
        **expert_counts(fields, "num_experts"),
        **partly_rotated(fields),
    }


def _qwen3_next(fields: Fields) -> dict[str, Any]:
    return {"model_type": "qwen3_next", "norm_topk_prob": True, **_delta_net(fields)}


def _qwen3_5(fields: Fields) -> dict[str, Any]:
    """As a model of text: every position is one number, so that the sections of a rotation are alike."""
    return {"model_type": "qwen3_5_moe_text", **_delta_net(fields)}


_MINUS_ONE = (
    Place("input_layernorm.weight", ("attn_norm.weight",), "less one"),
    Place("post_attention_layernorm.weight", ("post_attention_norm.weight",), "less one"),
    Place("self_attn.q_norm.weight", ("attn_q_norm.weight",), "less one"),
    Place("self_attn.k_norm.weight", ("attn_k_norm.weight",), "less one"),
)
"""Norms of Qwen3-Next scale by one more than their weights; the file has the sum."""
_DELTA_NET = (
    *_MINUS_ONE,
    Place("linear_attn.norm.weight", ("ssm_norm.weight",)),
    *mlp_places("_shexp", "mlp.shared_expert"),
    Place("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), "a row"),
)
_NORM_OF_ALL = (Place("model.norm.weight", ("output_norm.weight",), "less one"),)

RECURRENT: Mapping[str, Family] = {
    "qwen3next": Family(
        _qwen3_next,
        (
            *_DELTA_NET,
            Place("linear_attn.in_proj_qkvz.weight", ("attn_qkv.weight", "attn_gate.weight"), "by key head"),
            Place("linear_attn.in_proj_qkvz.weight", ("ssm_in.weight",)),  # as the first conversions left it
            Place("linear_attn.in_proj_ba.weight", ("ssm_ba.weight",)),
            Place("linear_attn.conv1d.weight", ("ssm_conv1d.weight",), "a channel"),
            Place("linear_attn.dt_bias", ("ssm_dt.bias",)),
            Place("linear_attn.A_log", ("ssm_a",), "log of minus"),
            Place("linear_attn.out_proj.weight", ("ssm_out.weight",)),
        ),
        _NORM_OF_ALL,
    ),
    "qwen35moe": Family(
        _qwen3_5,
        (
            *_DELTA_NET,
            Place("linear_attn.in_proj_qkv.weight", ("attn_qkv.weight",), "last values by key head"),
            Place("linear_attn.in_proj_z.weight", ("attn_gate.weight",), "values by key head"),
            Place("linear_attn.in_proj_b.weight", ("ssm_beta.weight",), "values by key head"),
            Place("linear_attn.in_proj_a.weight", ("ssm_alpha.weight",), "values by key head"),
            Place("linear_attn.conv1d.weight", ("ssm_conv1d.weight",), "channels, last values by key head"),
            Place("linear_attn.dt_bias", ("ssm_dt.bias",), "values by key head"),
            Place("linear_attn.A_log", ("ssm_a",), "values by key head, log of minus"),
            Place("linear_attn.out_proj.weight", ("ssm_out.weight",), "columns of values by key head"),
        ),
        _NORM_OF_ALL,
    ),
}
"""By `general.architecture`; a part of `families.FAMILIES`."""
