"""Architectures of which most layers carry a state along the text: linear attention and state spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.places import (
    GRANITE,
    LATENT_ATTENTION,
    Family,
    Place,
    attention_bias,
    expert_counts,
    expert_places,
    expert_size,
    linear_places,
    mlp_places,
    own_heads,
    partly_rotated,
)
from hybrimoe.errors import CheckpointError

_UP_DOWN = ("up", "down")
LINEAR, FULL = "linear_attention", "full_attention"


def kinds_of_layers(fields: Fields, of_state: str, state: str = LINEAR, attention: str = FULL) -> list[str]:
    """The kind of every layer: `state` where it has the tensor `of_state`, else `attention`."""
    layers = range(fields.n_layers())
    return [state if fields.has(f"blk.{layer}.{of_state}") else attention for layer in layers]


def delta_net(fields: Fields) -> dict[str, Any]:
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
    return {"model_type": "qwen3_next", "norm_topk_prob": True, **delta_net(fields)}


def _qwen3_5(fields: Fields) -> dict[str, Any]:
    """As a model of text: every position is one number, so that the sections of a rotation are alike."""
    return {"model_type": "qwen3_5_moe_text", **delta_net(fields)}


def _divided(fields: Fields, name: str, parts: int) -> int:
    """A size of so many equal parts: that of one."""
    whole = fields.whole(name)
    if whole % parts:
        raise fields.wrong(name, whole, f"a multiple of {parts}")
    return whole // parts


def _granite_hybrid(fields: Fields) -> dict[str, Any]:
    heads = fields.whole("ssm.time_step_rank")
    kinds = kinds_of_layers(fields, "ssm_a")
    shared = (f"blk.{layer}.ffn_up_shexp.weight" for layer in range(len(kinds)))
    return {
        "model_type": "granitemoehybrid",
        "layer_types": kinds,
        "position_embedding_type": "rope" if fields.flag("rope.scaling.finetuned", True) else None,
        "attention_multiplier": fields.number("attention.scale", 1.0),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
        "attention_bias": _in_any_layer(fields, "attn_q.bias"),
        "shared_intermediate_size": fields.shape(*shared)[-2],
        "mamba_n_heads": heads,
        "mamba_d_head": _divided(fields, "ssm.inner_size", heads),
        "mamba_n_groups": fields.whole("ssm.group_count"),
        "mamba_d_state": fields.whole("ssm.state_size"),
        "mamba_d_conv": fields.whole("ssm.conv_kernel"),
        "mamba_expand": _divided(fields, "ssm.inner_size", fields.whole("embedding_length")),
        "mamba_conv_bias": _in_any_layer(fields, "ssm_conv1d.bias"),
        "mamba_proj_bias": _in_any_layer(fields, "ssm_in.bias"),
        **expert_counts(fields, "num_local_experts"),
    }


def _in_any_layer(fields: Fields, tensor: str) -> bool:
    return any(fields.has(f"blk.{layer}.{tensor}") for layer in range(fields.whole("block_count")))


def _jamba(fields: Fields) -> dict[str, Any]:
    attention, experts = _every(fields, "attn_q.weight"), _every(fields, "ffn_gate_inp.weight")
    return {
        "model_type": "jamba",
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "mamba_d_state": fields.whole("ssm.state_size"),
        "mamba_d_conv": fields.whole("ssm.conv_kernel"),
        "mamba_expand": _divided(fields, "ssm.inner_size", fields.whole("embedding_length")),
        "mamba_dt_rank": fields.whole("ssm.time_step_rank"),
        "mamba_conv_bias": _in_any_layer(fields, "ssm_conv1d.bias"),
        "mamba_proj_bias": _in_any_layer(fields, "ssm_in.bias"),
        **expert_counts(fields, "num_experts"),
    }


def _every(fields: Fields, tensor: str) -> tuple[int, int]:
    """(period, first) of the layers with a tensor. Raises CheckpointError where they are not one in so many."""
    n_layers = fields.whole("block_count")
    found = [layer for layer in range(n_layers) if fields.has(f"blk.{layer}.{tensor}")]
    if not found:
        raise CheckpointError(f"{fields.model.path}: no layer has the tensor {tensor}; fetch the file again")
    period = found[1] - found[0] if len(found) > 1 else max(n_layers, found[0] + 1)
    if found != list(range(found[0], n_layers, period)) or found[0] >= period:
        raise UnsupportedCheckpointError(
            f"{fields.model.path}: the layers with {tensor} are {found}, of {n_layers}; of {fields.architecture} models"
            " those are read in which they come at equal distances"
        )
    return period, found[0]


def _kimi_linear(fields: Fields) -> dict[str, Any]:
    kinds = kinds_of_layers(fields, "ssm_a")
    groups = fields.whole("expert_group_count", 1)
    rotated = fields.whole("rope.dimension_count")
    key_length = fields.whole("attention.key_length_mla")
    if rotated >= key_length:
        raise fields.wrong("rope.dimension_count", rotated, f"less than the {key_length} dimensions of a key")
    return {
        "model_type": "kimi_linear",
        "model_max_length": fields.whole("context_length"),
        "layer_types": kinds,
        "mlp_layer_types": kinds_of_layers(fields, "ffn_gate_inp.weight", "sparse", "dense"),
        "linear_head_dim": fields.whole("kda.head_dim"),
        "linear_num_heads": fields.whole("attention.head_count"),
        "linear_conv_kernel_dim": fields.whole("ssm.conv_kernel"),
        "num_key_value_heads": fields.whole("attention.head_count"),
        "q_lora_rank": fields.whole("attention.q_lora_rank") if fields.given("attention.q_lora_rank") else None,
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_length - rotated,
        "v_head_dim": fields.whole("attention.value_length_mla"),
        "moe_intermediate_size": expert_size(fields),
        "num_shared_experts": fields.whole("expert_shared_count"),
        "moe_renormalize": fields.flag("expert_weights_norm", True),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "num_expert_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1 if groups == 1 else None),
        **expert_counts(fields, "num_experts", "num_experts_per_token"),
    }


def _bailing(fields: Fields) -> dict[str, Any]:
    """Ling 3: Kimi's linear attention with gates that are bounded, and latent attention with a gate a head."""
    kinds = kinds_of_layers(fields, "ssm_a")
    groups = fields.whole("expert_group_count", 1)
    rotated, key_length = fields.whole("rope.dimension_count"), fields.whole("attention.key_length_mla")
    if rotated >= key_length:
        raise fields.wrong("rope.dimension_count", rotated, f"less than the {key_length} dimensions of a key")
    for unknown in ("attention.q_lora_rank", "swiglu_clamp_exp", "swiglu_clamp_shexp"):
        given = fields.each(unknown, None)
        if any(given) if isinstance(given, list) else given:
            raise UnsupportedCheckpointError(
                f"{fields.model.path}: it has {fields.architecture}.{unknown}, which transformers' model of this family"
                " has not"
            )
    return {
        "model_type": "bailing_hybrid",
        "model_max_length": fields.whole("context_length"),
        "layer_types": kinds,
        "mlp_layer_types": kinds_of_layers(fields, "ffn_gate_inp.weight", "sparse", "dense"),
        "head_dim": fields.whole("kda.head_dim"),
        "short_conv_kernel_size": fields.whole("ssm.conv_kernel"),
        "kda_safe_gate": fields.flag("kda.safe_gate", True),
        "kda_lower_bound": fields.number("kda.gate_lower_bound"),
        "num_key_value_heads": fields.whole("attention.head_count"),
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_length - rotated,
        "v_head_dim": fields.whole("attention.value_length_mla"),
        "moe_intermediate_size": expert_size(fields),
        "num_shared_experts": fields.whole("expert_shared_count"),
        "moe_renormalize": fields.flag("expert_weights_norm", True),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "num_expert_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1 if groups == 1 else None),
        **expert_counts(fields, "num_experts", "num_experts_per_token"),
    }


def _nemotron(fields: Fields) -> dict[str, Any]:
    of_state, of_attention, of_experts = (
        kinds_of_layers(fields, tensor) for tensor in ("ssm_a", "attn_q.weight", "ffn_gate_inp.weight")
    )
    kinds = [
        LINEAR if state == LINEAR else FULL if attention == LINEAR else "moe" if experts == LINEAR else "mlp"
        for state, attention, experts in zip(of_state, of_attention, of_experts, strict=True)
    ]
    layers = range(len(kinds))
    shared = [f"blk.{layer}.ffn_up_shexp.weight" for layer in layers]
    groups, heads = fields.whole("expert_group_count", 1), fields.whole("ssm.time_step_rank")
    return {
        "model_type": "nemotron_h",
        "layers_block_type": kinds,
        "layer_norm_epsilon": fields.number("attention.layer_norm_rms_epsilon"),
        "intermediate_size": _dense_size(fields, kinds),
        "attention_bias": _in_any_layer(fields, "attn_q.bias"),
        "mamba_num_heads": heads,
        "mamba_head_dim": _divided(fields, "ssm.inner_size", heads),
        "n_groups": fields.whole("ssm.group_count"),
        "ssm_state_size": fields.whole("ssm.state_size"),
        "conv_kernel": fields.whole("ssm.conv_kernel"),
        "use_conv_bias": _in_any_layer(fields, "ssm_conv1d.bias"),
        "moe_intermediate_size": expert_size(fields),
        "moe_shared_expert_intermediate_size": fields.shape(*shared)[-2],
        "moe_latent_size": fields.whole("moe_latent_size") if fields.given("moe_latent_size") else None,
        "n_shared_experts": fields.whole("expert_shared_count", 1),
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1 if groups == 1 else None),
        "sliding_window": None,
        **expert_counts(fields, "n_routed_experts"),
        **own_heads(fields),
    }


def _dense_size(fields: Fields, kinds: list[str]) -> int:
    """Rows of the layers that are only a dense part; that of experts where there is none."""
    dense = [f"blk.{layer}.ffn_up.weight" for layer, kind in enumerate(kinds) if kind == "mlp"]
    return fields.shape(*dense)[-2] if dense else expert_size(fields)


_MINUS_ONE = (
    Place("input_layernorm.weight", ("attn_norm.weight",), "less one"),
    Place("post_attention_layernorm.weight", ("post_attention_norm.weight",), "less one"),
    Place("self_attn.q_norm.weight", ("attn_q_norm.weight",), "less one"),
    Place("self_attn.k_norm.weight", ("attn_k_norm.weight",), "less one"),
)
"""Norms of Qwen3-Next scale by one more than their weights; the file has the sum."""
DELTA_NET = (
    *_MINUS_ONE,
    Place("linear_attn.norm.weight", ("ssm_norm.weight",)),
    *mlp_places("_shexp", "mlp.shared_expert"),
    Place("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), "a row"),
)

HEADS_IN_TURN = (
    Place("linear_attn.in_proj_qkv.weight", ("attn_qkv.weight",), "last values by key head"),
    Place("linear_attn.in_proj_z.weight", ("attn_gate.weight",), "values by key head"),
    Place("linear_attn.in_proj_b.weight", ("ssm_beta.weight",), "values by key head"),
    Place("linear_attn.in_proj_a.weight", ("ssm_alpha.weight",), "values by key head"),
    Place("linear_attn.conv1d.weight", ("ssm_conv1d.weight",), "channels, last values by key head"),
    Place("linear_attn.dt_bias", ("ssm_dt.bias",), "values by key head"),
    Place("linear_attn.A_log", ("ssm_a",), "values by key head, log of minus"),
    Place("linear_attn.out_proj.weight", ("ssm_out.weight",), "columns of values by key head"),
)
"""Heads of values stand by turns of the key heads in the file, in the model by key head."""


def _mamba2(target: str) -> tuple[Place, ...]:
    """A layer of Mamba-2: A and D are columns in the file, the norm has a row a group."""
    return (
        *linear_places("ssm_in", f"{target}.in_proj"),
        Place(f"{target}.conv1d.weight", ("ssm_conv1d.weight",), "a channel"),
        Place(f"{target}.conv1d.bias", ("ssm_conv1d.bias",)),
        Place(f"{target}.dt_bias", ("ssm_dt.bias",)),
        Place(f"{target}.A_log", ("ssm_a",), "flat, log of minus"),
        Place(f"{target}.D", ("ssm_d",), "flat"),
        Place(f"{target}.norm.weight", ("ssm_norm.weight",), "flat"),
        *linear_places("ssm_out", f"{target}.out_proj"),
    )


_MAMBA1 = (
    *linear_places("ssm_in", "mamba.in_proj"),
    Place("mamba.conv1d.weight", ("ssm_conv1d.weight",), "a channel"),
    Place("mamba.conv1d.bias", ("ssm_conv1d.bias",)),
    Place("mamba.x_proj.weight", ("ssm_x.weight",)),
    *linear_places("ssm_dt", "mamba.dt_proj"),
    Place("mamba.A_log", ("ssm_a",), "log of minus"),
    Place("mamba.D", ("ssm_d",)),
    *(Place(f"mamba.{part}_layernorm.weight", (f"ssm_{part}_norm.weight",)) for part in ("dt", "b", "c")),
    *linear_places("ssm_out", "mamba.out_proj"),
)
KIMI_DELTA = (
    Place("self_attn.conv1d.weight", tuple(f"ssm_conv1d_{part}.weight" for part in "qkv"), "channels joined"),
    Place("self_attn.forget_gate.dt_bias", ("ssm_dt.bias",)),
    Place("self_attn.forget_gate.f_a_proj.weight", ("ssm_f_a.weight",)),
    Place("self_attn.forget_gate.f_b_proj.weight", ("ssm_f_b.weight",)),
    Place("self_attn.b_proj.weight", ("ssm_beta.weight",)),
    Place("self_attn.g_a_proj.weight", ("ssm_g_a.weight",)),
    Place("self_attn.g_b_proj.weight", ("ssm_g_b.weight",)),
    Place("self_attn.o_norm.weight", ("ssm_norm.weight",)),
)
"""Kimi's linear attention, but for `A_log`, whose shape is each family's."""
_BAILING_DELTA = (
    Place("self_attn.conv1d.weight", tuple(f"ssm_conv1d_{part}.weight" for part in "qkv"), "channels joined"),
    Place("self_attn.forget_gate.dt_bias", ("ssm_dt.bias",)),
    Place("self_attn.forget_gate.A_log", ("ssm_a",), "flat, log"),
    Place("self_attn.forget_gate.f_proj.weight", ("ssm_f_a.weight",)),
    Place("self_attn.b_proj.weight", ("ssm_beta.weight",)),
    Place("self_attn.g_proj.weight", ("ssm_g_a.weight",)),
    Place("self_attn.g_proj.weight", ("attn_gate.weight",)),
    Place("self_attn.o_norm.weight", ("ssm_norm.weight",)),
)
_NORM_OF_ALL = (Place("model.norm.weight", ("output_norm.weight",), "less one"),)

RECURRENT: Mapping[str, Family] = {
    "qwen3next": Family(
        _qwen3_next,
        (
            *DELTA_NET,
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
            *DELTA_NET,
            *HEADS_IN_TURN,
        ),
        _NORM_OF_ALL,
    ),
    "granitehybrid": Family(_granite_hybrid, (*_mamba2("mamba"), *GRANITE), layers="some without attention"),
    "jamba": Family(
        _jamba,
        (
            *_MAMBA1,
            Place("pre_ff_layernorm.weight", ("ffn_norm.weight",)),
            Place("feed_forward.router.weight", ("ffn_gate_inp.weight",)),
            *expert_places("feed_forward.experts"),
            *mlp_places("", "feed_forward"),
        ),
        (Place("model.final_layernorm.weight", ("output_norm.weight",)),),
        layers="some without attention",
    ),
    "kimi-linear": Family(
        _kimi_linear,
        (
            *KIMI_DELTA,
            Place("self_attn.forget_gate.A_log", ("ssm_a",), "by head, log of minus"),
            *LATENT_ATTENTION,
        ),
        layers="some without attention",
    ),
    "bailingmoe3": Family(_bailing, (*_BAILING_DELTA, *LATENT_ATTENTION), layers="some without attention"),
    "nemotron_h_moe": Family(
        _nemotron,
        (
            Place("norm.weight", ("attn_norm.weight",)),
            *_mamba2("mixer"),
            *linear_places("attn_q", "mixer.q_proj", "heads of q"),
            *linear_places("attn_k", "mixer.k_proj", "heads of k"),
            *linear_places("attn_v", "mixer.v_proj"),
            *linear_places("attn_output", "mixer.o_proj"),
            Place("mixer.gate.weight", ("ffn_gate_inp.weight",)),
            Place("mixer.gate.e_score_correction_bias", ("exp_probs_b.bias",)),
            *(Place(f"mixer.experts.{part}_proj", (f"ffn_{part}_exps.weight",)) for part in _UP_DOWN),
            *(Place(f"mixer.shared_experts.{part}_proj.weight", (f"ffn_{part}_shexp.weight",)) for part in _UP_DOWN),
            *(Place(f"mixer.{part}_proj.weight", (f"ffn_{part}.weight",)) for part in _UP_DOWN),
            Place("mixer.fc1_latent_proj.weight", ("ffn_latent_down.weight",)),
            Place("mixer.fc2_latent_proj.weight", ("ffn_latent_up.weight",)),
        ),
        (
            Place("model.embeddings.weight", ("token_embd.weight",)),
            Place("model.norm_f.weight", ("output_norm.weight",)),
        ),
        layers="some without attention",
    ),
}
"""By `general.architecture`; a part of `families.FAMILIES`."""
