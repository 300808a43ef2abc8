"""One table: for each architecture of llama.cpp the model type of transformers, what its metadata are in the
configuration, and which parameters its tensors make (`places` has the words of it, `latent_layers`,
`mixed_layers`, `recurrent_layers`, `streamed_layers` and `windowed_layers` are parts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.latent_layers import LATENT
from hybrimoe.checkpoint.gguf.mixed_layers import MIXED
from hybrimoe.checkpoint.gguf.places import (
    GRANITE,
    PERMUTED_HEADS,
    Family,
    Place,
    attention_bias,
    expert_counts,
    expert_size,
    linear_places,
    mlp_places,
    own_heads,
    partly_rotated,
    rope,
    routed_and_shared,
)
from hybrimoe.checkpoint.gguf.recurrent_layers import RECURRENT
from hybrimoe.checkpoint.gguf.streamed_layers import STREAMED
from hybrimoe.checkpoint.gguf.windowed_layers import WINDOWED_FAMILIES


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "sliding_window": None,
        **expert_counts(fields, "num_local_experts"),
        **own_heads(fields),
    }


def _olmoe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "intermediate_size": expert_size(fields),
        "clip_qkv": fields.number("attention.clamp_kqv") if fields.given("attention.clamp_kqv") else None,
        **expert_counts(fields, "num_experts"),
    }


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "qkv_bias": attention_bias(fields),
        "moe_intermediate_size": expert_size(fields),
        "shared_expert_intermediate_size": fields.shape("blk.0.ffn_up_shexp.weight")[-2],
        **expert_counts(fields, "num_experts"),
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "attention_bias": attention_bias(fields),
        "moe_intermediate_size": expert_size(fields),
        **expert_counts(fields, "num_experts"),
        **own_heads(fields),
    }


def _glm4_moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        "use_qk_norm": fields.has("blk.0.attn_q_norm.weight"),
        "attention_bias": attention_bias(fields),
        **routed_and_shared(fields),
        **partly_rotated(fields),
    }


def _dots1(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "dots1",
        "attention_bias": attention_bias(fields),
        "sliding_window": None,
        "max_window_layers": fields.whole("block_count"),
        **routed_and_shared(fields),
        **own_heads(fields),
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    parameters = rope(fields)
    if parameters["rope_type"] == "yarn":
        parameters["truncate"] = False  # as in every gpt-oss; the file does not say
    return {
        "model_type": "gpt_oss",
        "intermediate_size": expert_size(fields),
        "sliding_window": fields.whole("attention.sliding_window"),
        "rope_parameters": parameters,
        **expert_counts(fields, "num_local_experts"),
        **own_heads(fields),
    }


def _granite(fields: Fields) -> dict[str, Any]:
    found = {
        "attention_multiplier": fields.number("attention.scale", 1.0),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
        **expert_counts(fields, "num_local_experts"),
    }
    if not fields.has("blk.0.ffn_up_shexp.weight"):
        return found | {"model_type": "granitemoe"}
    shared = fields.shape("blk.0.ffn_up_shexp.weight")[-2]
    return found | {"model_type": "granitemoeshared", "shared_intermediate_size": shared}


def _phimoe(fields: Fields) -> dict[str, Any]:
    parameters = rope(fields)
    if (
        parameters["rope_type"] == "longrope"
    ):  # what cosines are multiplied by; the file has only llama.cpp's own factor
        parameters |= {"short_mscale": PHIMOE_MSCALE, "long_mscale": PHIMOE_MSCALE}
        del parameters["attention_factor"]
    return {
        "model_type": "phimoe",
        "sliding_window": None,  # all that is published sees as much as its context
        "attention_bias": attention_bias(fields),
        "lm_head_bias": fields.has("output.bias"),
        "rope_parameters": parameters,
        **expert_counts(fields, "num_local_experts"),
    }


def _ernie(fields: Fields) -> dict[str, Any]:
    layers = fields.whole("block_count")
    return {
        "model_type": "ernie4_5_moe",
        "use_bias": attention_bias(fields),
        "moe_intermediate_size": expert_size(fields),
        "moe_num_shared_experts": fields.whole("expert_shared_count", 0, least=0),
        "moe_layer_interval": fields.whole("interleave_moe_layer_step", 1),
        "moe_layer_start_index": fields.whole("leading_dense_block_count", 0, least=0),
        "moe_layer_end_index": layers - 1,
        **expert_counts(fields, "moe_num_experts", "moe_k"),
        **own_heads(fields),
    }


def _hy_v3(fields: Fields) -> dict[str, Any]:
    layers, size = range(fields.whole("block_count")), expert_size(fields)
    shared = fields.whole("expert_shared_feed_forward_length", size)
    return {
        "model_type": "hy_v3",
        "moe_intermediate_size": size,
        "num_shared_experts": shared // size,
        "router_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "mlp_layer_types": ["sparse" if fields.has(f"blk.{i}.ffn_gate_inp.weight") else "dense" for i in layers],
        "attention_bias": attention_bias(fields),
        **expert_counts(fields, "num_experts"),
        **own_heads(fields),
    }


def _hunyuan(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "hunyuan_v1_moe",
        "intermediate_size": expert_size(fields),
        "attention_bias": attention_bias(fields),
        **expert_counts(fields, "num_experts", "moe_topk"),
        **own_heads(fields),
    }


def _minimax(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "intermediate_size": expert_size(fields),
        **expert_counts(fields, "num_local_experts"),
        **partly_rotated(fields),
    }


def _deepseek_ocr(fields: Fields) -> dict[str, Any]:
    """DeepSeek-V2's experts beside plain attention."""
    if fields.whole("attention.sliding_window", 0, least=0):
        raise UnsupportedCheckpointError(
            f"{fields.model.path} is an Unlimited-OCR, whose window over what it wrote is not read from GGUF; use the"
            " model's safetensors"
        )
    if fields.whole("expert_gating_func", 1, least=0) != 1 or fields.flag("expert_weights_norm", False):
        raise fields.wrong("expert_gating_func", "another one, or normed", "weights of a softmax")
    found, layers = routed_and_shared(fields), range(fields.whole("block_count"))
    return {
        "mlp_layer_types": ["sparse" if fields.has(f"blk.{i}.ffn_gate_inp.weight") else "dense" for i in layers],
        "topk_method": "group_limited_greedy" if found["n_group"] > 1 else "greedy",
        **{key: value for key, value in found.items() if key not in ("first_k_dense_replace", "norm_topk_prob")},
    }


PHIMOE_MSCALE = 1.243163121016122  # of Phi-3.5-MoE, the one published model with such a rotation
FAMILIES: Mapping[str, Family] = {
    "llama": Family(_mixtral, PERMUTED_HEADS),
    "olmoe": Family(_olmoe),
    "qwen2moe": Family(
        _qwen2_moe,
        (
            *mlp_places("_shexp", "mlp.shared_expert"),
            Place("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), "a row"),
        ),
    ),
    "qwen3moe": Family(_qwen3_moe),
    "qwen3vlmoe": Family(_qwen3_moe),  # of text: positions of images are not asked for
    "glm4moe": Family(_glm4_moe),
    "dots1": Family(_dots1),
    "gpt-oss": Family(
        _gpt_oss,
        (
            *linear_places("ffn_gate_inp", "mlp.router"),
            Place("self_attn.sinks", ("attn_sinks.weight",)),
            Place(
                "mlp.experts.gate_up_proj",
                ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                "interleaved, transposed",
            ),
            Place("mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), "interleaved"),
            Place("mlp.experts.down_proj", ("ffn_down_exps.weight",), "transposed"),
            Place("mlp.experts.down_proj_bias", ("ffn_down_exps.bias",)),
        ),
    ),
    "granitemoe": Family(_granite, GRANITE),
    "phimoe": Family(
        _phimoe,
        (
            Place("input_layernorm.bias", ("attn_norm.bias",)),
            Place("post_attention_layernorm.bias", ("ffn_norm.bias",)),
            Place("mlp.router.weight", ("ffn_gate_inp.weight",)),
        ),
        (Place("model.norm.bias", ("output_norm.bias",)), Place("lm_head.bias", ("output.bias",))),
    ),
    "ernie4_5-moe": Family(
        _ernie, (Place("mlp.gate.moe_statics.e_score_correction_bias", ("exp_probs_b.bias",), "a row"),)
    ),
    "hunyuan-moe": Family(
        _hunyuan,
        (
            Place("self_attn.query_layernorm.weight", ("attn_q_norm.weight",)),
            Place("self_attn.key_layernorm.weight", ("attn_k_norm.weight",)),
            Place("mlp.gate.wg.weight", ("ffn_gate_inp.weight",)),
            *mlp_places("_shexp", "mlp.shared_mlp"),
        ),
    ),
    "hy_v3": Family(_hy_v3, (Place("mlp.e_score_correction_bias", ("exp_probs_b",)),)),
    "deepseek2-ocr": Family(_deepseek_ocr, wrapper="deepseek_ocr2"),
    "minimax-m2": Family(_minimax, (Place("mlp.e_score_correction_bias", ("exp_probs_b.bias",)),)),
    **LATENT,
    **MIXED,
    **RECURRENT,
    **STREAMED,
    **WINDOWED_FAMILIES,
}
"""By `general.architecture`."""


NOT_READ: Mapping[str, str] = {
    "dbrx": "its experts are cut out of one matrix by each layer, which HybriMoE refuses in every file",
    "minimax-01": "transformers' MiniMax rotates whole heads, and the published models half of each",
}
"""By `general.architecture`: why files of a mixture of experts that transformers knows are not read."""
NO_MODELS = {
    "adapter": "a LoRA adapter for llama.cpp: give a model, and the adapter as PEFT has written it (--adapter DIR)",
    "mmproj": "the part of a model that sees or hears (mmproj): give the model's own file, read as one of text",
    "imatrix": "an importance matrix, made for quantising: give the model's own file",
    "vocab": "a vocabulary alone: give a model",
}
"""By `general.type`."""
PROJECTOR = "clip"
"""The architecture of parts that see or hear, also in files without a type."""


def family_of(fields: Fields) -> Family:
    """Raises UnsupportedCheckpointError, with the list of those that are read, for another architecture, and for a file
    that is no model at all."""
    kind = "mmproj" if fields.architecture == PROJECTOR else fields.metadata.get("general.type")
    if isinstance(kind, str) and kind in NO_MODELS:
        raise UnsupportedCheckpointError(f"{fields.model.path} is {NO_MODELS[kind]}")
    if fields.architecture in NOT_READ:
        raise UnsupportedCheckpointError(
            f"{fields.model.path} is a {fields.architecture} model, which is not read from GGUF:"
            f" {NOT_READ[fields.architecture]}. Use the model's safetensors, if its family is read (hybrimoe inspect)"
        )
    if fields.architecture not in FAMILIES:
        raise UnsupportedCheckpointError(
            f"{fields.model.path} is a {fields.architecture} model; of GGUF files the architectures"
            f" {', '.join(sorted(FAMILIES))} are read. Use the model's safetensors, if it is a mixture of experts"
        )
    return FAMILIES[fields.architecture]
