"""Architectures with latent attention: DeepSeek's, and those that came from it; some choose which tokens they see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.mixed_layers import FULL, WINDOWED, layer_types
from hybrimoe.checkpoint.gguf.places import (
    LATENT_ATTENTION,
    SIGMOID,
    Family,
    Place,
    linear_places,
    rope,
    routed_and_shared,
)

INDEXED = "indexed_attention"


def _latent(fields: Fields) -> dict[str, Any]:
    """Sizes of latent attention, and its rotation."""
    rotated = fields.whole("rope.dimension_count")
    key_length = fields.whole("attention.key_length_mla", fields.whole("attention.key_length"))
    if rotated >= key_length:
        raise fields.wrong("rope.dimension_count", rotated, f"less than the {key_length} dimensions of a key")
    parameters = rope(fields)
    if fields.given("rope.scaling.yarn_log_multiplier"):
        # The file has 0.1 x mscale_all_dim; in every DeepSeek model mscale is the same number.
        mscale = 10 * fields.number("rope.scaling.yarn_log_multiplier")
        parameters |= {"mscale": round(mscale, 6), "mscale_all_dim": round(mscale, 6)}
    elif parameters["rope_type"] == "yarn":
        parameters.setdefault("attention_factor", 1.0)  # without it llama.cpp leaves attention as it is
    return {
        "q_lora_rank": fields.whole("attention.q_lora_rank") if fields.given("attention.q_lora_rank") else None,
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_length - rotated,
        "v_head_dim": fields.whole("attention.value_length_mla", fields.whole("attention.value_length")),
        "head_dim": rotated,
        "num_key_value_heads": fields.whole("attention.head_count"),
        "rope_parameters": parameters,
    }


def _deepseek(fields: Fields) -> dict[str, Any]:
    """DeepSeek-V2 where experts are chosen by softmax, DeepSeek-V3 (and Kimi-K2, GLM-4.7-Flash) by sigmoid."""
    by_sigmoid = fields.whole("expert_gating_func", 1, least=0) == SIGMOID
    found = routed_and_shared(fields)
    if not by_sigmoid:
        found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    kind = "deepseek_v3" if by_sigmoid else "deepseek_v2"
    return found | {"model_type": kind, **_latent(fields)}


def _mistral4(fields: Fields) -> dict[str, Any]:
    """Queries of long texts are scaled by the logarithm of how far they lie in it."""
    sizes = _latent(fields)
    key_length = sizes["qk_rope_head_dim"] + sizes["qk_nope_head_dim"]
    trained = fields.whole("rope.scaling.original_context_length", fields.whole("context_length"))
    return {
        "model_type": "mistral4",
        **routed_and_shared(fields),
        **sizes,
        "head_dim": key_length,
        "rope_parameters": sizes["rope_parameters"]
        | {
            "partial_rotary_factor": sizes["qk_rope_head_dim"] / key_length,
            "original_max_position_embeddings": fields.whole("attention.temperature_length", trained),
            "llama_4_scaling_beta": fields.number("attention.temperature_scale", 0.0),
        },
    }


def _indexer(fields: Fields) -> dict[str, Any]:
    """Sizes of the part that chooses the tokens which a token sees."""
    return {
        "index_n_heads": fields.whole("attention.indexer.head_count"),
        "index_head_dim": fields.whole("attention.indexer.key_length"),
        "index_topk": fields.whole("attention.indexer.top_k"),
    }


def _deepseek32(fields: Fields) -> dict[str, Any]:
    return {"model_type": "deepseek_v32", **routed_and_shared(fields), **_latent(fields), **_indexer(fields)}


def _glm_dsa(fields: Fields) -> dict[str, Any]:
    layers = fields.n_layers()
    return {
        "model_type": "glm_moe_dsa",
        "indexer_types": _indexer_types(fields, layers),
        **routed_and_shared(fields),
        **_latent(fields),
        **_indexer(fields),
    }


def _indexer_types(fields: Fields, layers: int) -> list[str]:
    """A layer without an indexer of its own takes the choice of the last that has one."""
    own = [fields.has(f"blk.{layer}.indexer.attn_k.weight") for layer in range(layers)]
    if not own[0]:
        raise fields.wrong("attention.indexer.types", own, "an indexer in the first layer")
    return ["full" if chooses else "shared" for chooses in own]


def _hy_v4(fields: Fields) -> dict[str, Any]:
    """Several streams beside each other, mixed before and after each part of a layer."""
    layers = fields.whole("block_count")
    found = routed_and_shared(fields)
    dense = found["first_k_dense_replace"]
    limits = fields.each("swiglu_clamp_exp", 0.0)
    given = set(limits[dense:layers]) if isinstance(limits, list) else {limits}
    limit = given.pop() if len(given) == 1 else 0.0
    if not isinstance(limit, float) or limit <= 0:
        raise fields.wrong("swiglu_clamp_exp", limits, "one positive number for all layers with experts")
    return {
        "model_type": "hy_v4",
        **found,
        **_latent(fields),
        **_indexer(fields),
        "indexer_types": _indexer_types(fields, layers),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "swiglu_limit": limit,
        "hc_mult": fields.whole("hyper_connection.count"),
        "hc_eps": fields.number("hyper_connection.epsilon"),
        "hc_magnitude": fields.number("hyper_connection.magnitude"),
    }


def _dots3(fields: Fields) -> dict[str, Any]:
    """Layers with a window have heads, sizes and a rotation of their own."""
    kinds = layer_types(fields)
    heads = fields.each_whole("attention.head_count", len(kinds), least=1)
    rotated, key_length = fields.whole("rope.dimension_count"), fields.whole("attention.key_length_mla")
    if rotated >= key_length:
        raise fields.wrong("rope.dimension_count", rotated, f"less than the {key_length} dimensions of a key")
    full = [n for n, kind in zip(heads, kinds, strict=True) if kind == FULL]
    seen = [n for n, kind in zip(heads, kinds, strict=True) if kind != FULL]
    if len(set(full)) != 1 or len(set(seen)) > 1:
        raise fields.wrong("attention.head_count", heads, "one number for layers with a window, one for the others")
    found = routed_and_shared(fields)
    sparse = [f"blk.{layer}.ffn_up_shexp.weight" for layer in range(len(kinds))]
    ranks = {"q_lora_rank": fields.whole("attention.q_lora_rank"), "qk_rope_head_dim": rotated}
    own = {
        "num_attention_heads": full[0],
        "num_key_value_heads": full[0],
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_nope_head_dim": key_length - rotated,
        "head_dim": key_length,
        "v_head_dim": fields.whole("attention.value_length_mla"),
        **ranks,
    }
    kinds = [INDEXED if kind == FULL else WINDOWED for kind in kinds]
    rotations = {INDEXED: rope(fields)}
    window: dict[str, Any] = {}
    if seen:
        size = fields.whole("attention.key_length_mla_swa")
        if rotated >= size:
            raise fields.wrong("attention.key_length_mla_swa", size, f"more than the {rotated} that are rotated")
        window = {
            "num_attention_heads": seen[0],
            "num_key_value_heads": seen[0],
            "kv_lora_rank": fields.whole("attention.kv_lora_rank_swa"),
            "qk_nope_head_dim": size - rotated,
            "head_dim": size,
            "v_head_dim": fields.whole("attention.value_length_mla_swa"),
            **ranks,
        }
        rotations[WINDOWED] = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa")}
    return {
        "model_type": "dots3_note_text",
        **found,
        **own,
        **_indexer(fields),
        "intermediate_size": fields.whole("feed_forward_length"),
        "shared_experts_intermediate_size": fields.shape(*sparse)[-2] // found["n_shared_experts"],
        "layer_types": kinds,
        "sliding_window": fields.whole("attention.sliding_window"),
        "per_layer_config": {layer: window for layer, kind in enumerate(kinds) if kind == WINDOWED},
        "rope_parameters": rotations,
    }


INDEXER = (
    Place("self_attn.indexer.wq_b.weight", ("indexer.attn_q_b.weight",)),
    Place("self_attn.indexer.wk.weight", ("indexer.attn_k.weight",)),
    *linear_places("indexer.k_norm", "self_attn.indexer.k_norm"),
    Place("self_attn.indexer.weights_proj.weight", ("indexer.proj.weight",)),
)
"""What chooses the tokens that a token sees."""


def hyper_connection(part: str) -> tuple[Place, ...]:
    """How streams are mixed before and after a part of a layer ("attn" or "ffn")."""
    return tuple(Place(f"{part}_hc.{name}", (f"hc_{part}_{name}.weight",)) for name in ("fn", "base", "scale"))


LATENT: Mapping[str, Family] = {
    "deepseek2": Family(_deepseek, LATENT_ATTENTION),
    "mistral4": Family(_mistral4, LATENT_ATTENTION),
    "deepseek32": Family(_deepseek32, (*INDEXER, *LATENT_ATTENTION)),
    "glm-dsa": Family(_glm_dsa, (*INDEXER, *LATENT_ATTENTION)),
    "hy_v4": Family(
        _hy_v4,
        (
            *INDEXER,
            *LATENT_ATTENTION,
            *hyper_connection("attn"),
            *hyper_connection("ffn"),
            Place("self_attn.gate_proj.weight", ("attn_gate.weight",)),
            Place("self_attn.sinks", ("attn_sinks.weight",)),
        ),
        tuple(Place(f"model.hc_head.hc_{name}", (f"output_hc_{name}.weight",)) for name in ("fn", "base", "scale")),
    ),
    "dots3note": Family(
        _dots3,
        (
            Place("self_attn.q_a_layernorm.weight", ("attn_q_a_norm.weight",), "unscaled latents"),
            Place("self_attn.kv_a_layernorm.weight", ("attn_kv_a_norm.weight",), "unscaled latents"),
            Place("self_attn.k_rope_only_layernorm.weight", ("attn_k_norm.weight",)),
            Place("self_attn.g_proj.weight", ("attn_gate.weight",)),
            *INDEXER,
            *LATENT_ATTENTION,
        ),
        layers="own",
    ),
}
"""By `general.architecture`; a part of `families.FAMILIES`."""
