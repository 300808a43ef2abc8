"""One table: for each architecture of llama.cpp the model type of transformers, what its metadata are in the
configuration, and which parameters its tensors make.

Names on the right are those of parameters in transformers' model (its `state_dict`), where the experts of a layer are
one tensor. What llama.cpp's conversion changed (rows of q and k permuted, gate and up taken apart, kv_b split) is
named as an arrangement; `weights` undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.fields import Fields

Arrangement = Literal[
    "as it is", "rows joined", "transposed", "interleaved", "interleaved, transposed", "a row",
    "heads of q", "heads of k", "heads of k and v",
]  # fmt: skip
"""How a parameter is made from its tensors; see `hybrimoe.checkpoint.gguf.weights`."""

SIGMOID = 2  # of llama.cpp's gating functions; 1 is softmax


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter, and the tensors that it is made from. Both are names within a layer, or of the whole model."""

    target: str
    parts: tuple[str, ...]
    how: Arrangement = "as it is"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp. config: its part of the configuration; places: before those that all share."""

    config: Callable[[Fields], dict[str, Any]]
    places: tuple[Place, ...] = ()


def _linear(part: str, target: str, how: Arrangement = "as it is") -> tuple[Place, ...]:
    """A linear layer with its bias."""
    return tuple(Place(f"{target}.{kind}", (f"{part}.{kind}",), how) for kind in ("weight", "bias"))


def _mlp(kind: str, target: str) -> tuple[Place, ...]:
    """Gate, up and down of a dense or shared expert. kind: how its tensors' names end."""
    return tuple(
        Place(f"{target}.{part}_proj.weight", (f"ffn_{part}{kind}.weight",)) for part in ("gate", "up", "down")
    )


def _experts(target: str) -> tuple[Place, ...]:
    """Experts of one layer in the layout that most families have: gate over up, [E, 2 I, H], and down [E, H, I]."""
    return (
        Place(f"{target}.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "rows joined"),
        Place(f"{target}.gate_up_proj", ("ffn_gate_up_exps.weight",)),
        Place(f"{target}.down_proj", ("ffn_down_exps.weight",)),
    )


WHOLE_MODEL = (
    Place("model.embed_tokens.weight", ("token_embd.weight",)),
    Place("model.norm.weight", ("output_norm.weight",)),
    Place("lm_head.weight", ("output.weight",)),
)
SHARED_PLACES = (
    Place("input_layernorm.weight", ("attn_norm.weight",)),
    Place("post_attention_layernorm.weight", ("ffn_norm.weight",)),
    Place("post_attention_layernorm.weight", ("post_attention_norm.weight",)),
    *_linear("attn_q", "self_attn.q_proj"),
    *_linear("attn_k", "self_attn.k_proj"),
    *_linear("attn_v", "self_attn.v_proj"),
    *_linear("attn_output", "self_attn.o_proj"),
    Place("self_attn.q_norm.weight", ("attn_q_norm.weight",)),
    Place("self_attn.k_norm.weight", ("attn_k_norm.weight",)),
    *_mlp("", "mlp"),
    Place("mlp.gate.weight", ("ffn_gate_inp.weight",)),
    Place("mlp.gate.e_score_correction_bias", ("exp_probs_b.bias",)),
    *_experts("mlp.experts"),
    *_mlp("_shexp", "mlp.shared_experts"),
)
"""What the layers of a family have unless its own places come first."""
PERMUTED_HEADS = (
    *_linear("attn_q", "self_attn.q_proj", "heads of q"),
    *_linear("attn_k", "self_attn.k_proj", "heads of k"),
)
"""llama.cpp rotates neighbours, transformers halves: its conversion permuted the rows of q and k for that."""
LATENT_ATTENTION = (
    Place("self_attn.q_a_proj.weight", ("attn_q_a.weight",)),
    Place("self_attn.q_a_layernorm.weight", ("attn_q_a_norm.weight",)),
    Place("self_attn.q_b_proj.weight", ("attn_q_b.weight",)),
    Place("self_attn.kv_a_proj_with_mqa.weight", ("attn_kv_a_mqa.weight",)),
    Place("self_attn.kv_a_layernorm.weight", ("attn_kv_a_norm.weight",)),
    Place("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), "heads of k and v"),
    Place("self_attn.kv_b_proj.weight", ("attn_kv_b.weight",)),
)


def rope(fields: Fields) -> dict[str, Any]:
    """`rope_parameters`. Raises UnsupportedCheckpointError for a scaling that metadata do not describe in full."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10_000.0)}
    scaling = fields.text("rope.scaling.type", "none")
    if fields.has("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
        scaling = "factors by frequency (rope_freqs)"
    if scaling == "none":
        return found
    if scaling == "linear":
        return found | {"rope_type": "linear", "factor": fields.number("rope.scaling.factor")}
    if scaling != "yarn":
        raise UnsupportedCheckpointError(
            f"{fields.model.path}: the rotary embedding is scaled by {scaling}, which is not read from GGUF for"
            f" {fields.architecture}; use the model's safetensors"
        )
    found |= {
        "rope_type": "yarn",
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": fields.whole("rope.scaling.original_context_length"),
    }
    optional = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    names = {key: f"rope.scaling.{name}" for key, name in optional.items()}
    return found | {key: fields.number(name) for key, name in names.items() if fields.given(name)}


def _heads(fields: Fields) -> dict[str, Any]:
    """Attention with a head dimension of its own."""
    hidden, heads = fields.whole("embedding_length"), fields.whole("attention.head_count")
    return {"head_dim": fields.whole("attention.key_length", hidden // heads or 1)}


def _partly_rotated(fields: Fields) -> dict[str, Any]:
    """Attention of which the first dimensions of a head are rotated."""
    head_dim = _heads(fields)["head_dim"]
    rotated = fields.whole("rope.dimension_count", head_dim)
    if rotated > head_dim:
        raise fields.wrong("rope.dimension_count", rotated, f"at most the {head_dim} dimensions of a head")
    return {"head_dim": head_dim, "rope_parameters": rope(fields) | {"partial_rotary_factor": rotated / head_dim}}


def _expert_size(fields: Fields) -> int:
    """Rows of an expert's gate: stated, or as its tensor has them (old files do not state it)."""
    if fields.given("expert_feed_forward_length"):
        return fields.whole("expert_feed_forward_length")
    layers = range(fields.whole("block_count"))
    return fields.shape(*(f"blk.{layer}.ffn_up_exps.weight" for layer in layers))[-2]


def _counts(fields: Fields, experts: str, used: str = "num_experts_per_tok") -> dict[str, int]:
    count, top_k = fields.whole("expert_count"), fields.whole("expert_used_count")
    if top_k > count:
        raise fields.wrong("expert_used_count", top_k, f"at most the {count} experts there are")
    return {experts: count, used: top_k}


def _attention_bias(fields: Fields) -> bool:
    return fields.has("blk.0.attn_q.bias")


def _mixtral(fields: Fields) -> dict[str, Any]:
    if not fields.given("expert_count"):
        raise UnsupportedCheckpointError(f"{fields.model.path} is a dense model ({fields.architecture}): no experts")
    return {"model_type": "mixtral", "sliding_window": None, **_counts(fields, "num_local_experts"), **_heads(fields)}


def _olmoe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "intermediate_size": _expert_size(fields),
        "clip_qkv": fields.number("attention.clamp_kqv") if fields.given("attention.clamp_kqv") else None,
        **_counts(fields, "num_experts"),
    }


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "qkv_bias": _attention_bias(fields),
        "moe_intermediate_size": _expert_size(fields),
        "shared_expert_intermediate_size": fields.shape("blk.0.ffn_up_shexp.weight")[-2],
        **_counts(fields, "num_experts"),
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "attention_bias": _attention_bias(fields),
        "moe_intermediate_size": _expert_size(fields),
        **_counts(fields, "num_experts"),
        **_heads(fields),
    }


def _groups(fields: Fields) -> dict[str, int]:
    return {"n_group": fields.whole("expert_group_count", 1), "topk_group": fields.whole("expert_group_used_count", 1)}


def _routed_and_shared(fields: Fields) -> dict[str, Any]:
    """DeepSeek's kind of layers: some dense ones first, then routed experts beside shared ones."""
    return {
        "moe_intermediate_size": _expert_size(fields),
        "n_shared_experts": fields.whole("expert_shared_count"),
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0, least=0),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        **_counts(fields, "n_routed_experts"),
        **_groups(fields),
    }


def _deepseek(fields: Fields) -> dict[str, Any]:
    """DeepSeek-V2 where experts are chosen by softmax, DeepSeek-V3 (and Kimi-K2, GLM-4.7-Flash) by sigmoid."""
    by_sigmoid = fields.whole("expert_gating_func", 1, least=0) == SIGMOID
    found = _routed_and_shared(fields)
    if not by_sigmoid:
        found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    rotated = fields.whole("rope.dimension_count")
    key_length = fields.whole("attention.key_length_mla", fields.whole("attention.key_length"))
    if rotated >= key_length:
        raise fields.wrong("rope.dimension_count", rotated, f"less than the {key_length} dimensions of a key")
    parameters = rope(fields)
    if fields.given("rope.scaling.yarn_log_multiplier"):
        # The file has 0.1 x mscale_all_dim; in every DeepSeek model mscale is the same number.
        mscale = 10 * fields.number("rope.scaling.yarn_log_multiplier")
        parameters |= {"mscale": round(mscale, 6), "mscale_all_dim": round(mscale, 6)}
    return found | {
        "model_type": "deepseek_v3" if by_sigmoid else "deepseek_v2",
        "q_lora_rank": fields.whole("attention.q_lora_rank") if fields.given("attention.q_lora_rank") else None,
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_length - rotated,
        "v_head_dim": fields.whole("attention.value_length_mla", fields.whole("attention.value_length")),
        "head_dim": rotated,
        "num_key_value_heads": fields.whole("attention.head_count"),
        "rope_parameters": parameters,
    }


def _glm4_moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        "use_qk_norm": fields.has("blk.0.attn_q_norm.weight"),
        "attention_bias": _attention_bias(fields),
        **_routed_and_shared(fields),
        **_partly_rotated(fields),
    }


def _dots1(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "dots1",
        "attention_bias": _attention_bias(fields),
        "sliding_window": None,
        "max_window_layers": fields.whole("block_count"),
        **_routed_and_shared(fields),
        **_heads(fields),
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    parameters = rope(fields)
    if parameters["rope_type"] == "yarn":
        parameters["truncate"] = False  # as in every gpt-oss; the file does not say
    return {
        "model_type": "gpt_oss",
        "intermediate_size": _expert_size(fields),
        "sliding_window": fields.whole("attention.sliding_window"),
        "rope_parameters": parameters,
        **_counts(fields, "num_local_experts"),
        **_heads(fields),
    }


def _granite(fields: Fields) -> dict[str, Any]:
    found = {
        "attention_multiplier": fields.number("attention.scale", 1.0),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
        **_counts(fields, "num_local_experts"),
    }
    if not fields.has("blk.0.ffn_up_shexp.weight"):
        return found | {"model_type": "granitemoe"}
    shared = fields.shape("blk.0.ffn_up_shexp.weight")[-2]
    return found | {"model_type": "granitemoeshared", "shared_intermediate_size": shared}


def _ernie(fields: Fields) -> dict[str, Any]:
    layers = fields.whole("block_count")
    return {
        "model_type": "ernie4_5_moe",
        "use_bias": _attention_bias(fields),
        "moe_intermediate_size": _expert_size(fields),
        "moe_num_shared_experts": fields.whole("expert_shared_count", 0, least=0),
        "moe_layer_interval": fields.whole("interleave_moe_layer_step", 1),
        "moe_layer_start_index": fields.whole("leading_dense_block_count", 0, least=0),
        "moe_layer_end_index": layers - 1,
        **_counts(fields, "moe_num_experts", "moe_k"),
        **_heads(fields),
    }


def _hunyuan(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "hunyuan_v1_moe",
        "intermediate_size": _expert_size(fields),
        "attention_bias": _attention_bias(fields),
        **_counts(fields, "num_experts", "moe_topk"),
        **_heads(fields),
    }


def _minimax(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "intermediate_size": _expert_size(fields),
        **_counts(fields, "num_local_experts"),
        **_partly_rotated(fields),
    }


_SPARSE = "block_sparse_moe"  # what the feed-forward part is called in Granite
FAMILIES: Mapping[str, Family] = {
    "llama": Family(_mixtral, PERMUTED_HEADS),
    "olmoe": Family(_olmoe),
    "qwen2moe": Family(
        _qwen2_moe,
        (
            *_mlp("_shexp", "mlp.shared_expert"),
            Place("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), "a row"),
        ),
    ),
    "qwen3moe": Family(_qwen3_moe),
    "deepseek2": Family(_deepseek, LATENT_ATTENTION),
    "glm4moe": Family(_glm4_moe),
    "dots1": Family(_dots1),
    "gpt-oss": Family(
        _gpt_oss,
        (
            *_linear("ffn_gate_inp", "mlp.router"),
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
    "granitemoe": Family(
        _granite,
        (
            *PERMUTED_HEADS,
            Place(f"{_SPARSE}.router.weight", ("ffn_gate_inp.weight",)),
            *_experts(f"{_SPARSE}.experts"),
            Place("shared_mlp.input_linear.weight", ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), "rows joined"),
            Place("shared_mlp.output_linear.weight", ("ffn_down_shexp.weight",)),
        ),
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
            *_mlp("_shexp", "mlp.shared_mlp"),
        ),
    ),
    "minimax-m2": Family(_minimax, (Place("mlp.e_score_correction_bias", ("exp_probs_b.bias",)),)),
}
"""By `general.architecture`."""


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
    if fields.architecture not in FAMILIES:
        raise UnsupportedCheckpointError(
            f"{fields.model.path} is a {fields.architecture} model; of GGUF files the architectures"
            f" {', '.join(sorted(FAMILIES))} are read. Use the model's safetensors, if it is a mixture of experts"
        )
    return FAMILIES[fields.architecture]
