"""Architectures in which several streams run beside each other through the layers, mixed before and after each part:
DeepSeek-V4, whose attention also sees compressed stretches of the text, Qwen4, whose tokens look n-grams up, and
GLM-5.3, whose attention is linear, or sees pools of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.latent_layers import INDEXED, INDEXER, hyper_connection
from hybrimoe.checkpoint.gguf.places import (
    LATENT_ATTENTION,
    SIGMOID,
    SQRT_SOFTPLUS,
    Family,
    Place,
    expert_counts,
    expert_size,
    groups_of_experts,
    rope,
    rotated_part,
)
from hybrimoe.checkpoint.gguf.recurrent_layers import (
    DELTA_NET,
    HEADS_IN_TURN,
    KIMI_DELTA,
    LINEAR,
    delta_net,
    kinds_of_layers,
)

KINDS_BY_RATIO = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
"""What a layer of DeepSeek-V4 is, by how many tokens it compresses into one."""
NGRAM_LAYERS = "ple.layers"
NGRAM_TABLE = "per_layer_token_embd.weight"
"""Of Qwen4 a tensor outside of the layers, which one of them has."""
MAX_INT64 = (1 << 63) - 1
EPSILON_OF_KEYS = 1e-6
"""Of the layer norm of keys that pools are made of, in transformers' GLM-5.3."""


def _deepseek4(fields: Fields) -> dict[str, Any]:
    layers, head_dim = fields.n_layers(), fields.whole("attention.key_length")
    ratios = fields.each_whole("attention.compress_ratios", layers)
    if unknown := sorted(set(ratios) - KINDS_BY_RATIO.keys()):
        raise fields.wrong("attention.compress_ratios", unknown, f"of {', '.join(map(str, KINDS_BY_RATIO))} only")
    if (scores := fields.whole("expert_gating_func", least=0)) != SQRT_SOFTPLUS:
        raise fields.wrong("expert_gating_func", scores, f"{SQRT_SOFTPLUS}, as in every such model")
    if not fields.flag("expert_weights_norm", True):
        raise fields.wrong("expert_weights_norm", False, "true, as in every such model")
    hashed = min(fields.whole("hash_layer_count", 0, least=0), layers)
    return {
        "model_type": "deepseek_v4",
        "head_dim": head_dim,
        "num_attention_heads": fields.whole("attention.head_count"),
        "num_key_value_heads": 1,
        "q_lora_rank": fields.whole("attention.q_lora_rank"),
        "o_lora_rank": fields.whole("attention.output_lora_rank"),
        "o_groups": _groups_of_heads(fields),
        "layer_types": [KINDS_BY_RATIO[ratio] for ratio in ratios],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "sliding_window": fields.whole("attention.sliding_window"),
        "index_n_heads": fields.whole("attention.indexer.head_count"),
        "index_head_dim": fields.whole("attention.indexer.key_length"),
        "index_topk": fields.whole("attention.indexer.top_k"),
        "moe_intermediate_size": expert_size(fields),
        "n_shared_experts": fields.whole("expert_shared_count"),
        "scoring_func": "sqrtsoftplus",
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "swiglu_limit": _swiglu_limit(fields, layers),
        "hc_mult": fields.whole("hyper_connection.count"),
        "hc_sinkhorn_iters": fields.whole("hyper_connection.sinkhorn_iterations"),
        "hc_eps": fields.number("hyper_connection.epsilon"),
        **expert_counts(fields, "n_routed_experts"),
        **_two_rotations(fields, head_dim),
    }


def _groups_of_heads(fields: Fields) -> int:
    """Groups whose results are put together apart from each other."""
    groups, heads = fields.whole("attention.output_group_count"), fields.whole("attention.head_count")
    if heads % groups:
        raise fields.wrong("attention.output_group_count", groups, f"a divisor of the {heads} heads")
    return groups


def _swiglu_limit(fields: Fields, layers: int) -> float:
    """What gates and values of all experts are cut off at."""
    limits = [fields.each(f"swiglu_clamp_{kind}", None) for kind in ("exp", "shexp")]
    routed, shared = limits[0], limits[1] if fields.given("swiglu_clamp_shexp") else limits[0]
    given = {n for part in (routed, shared) for n in (part[:layers] if isinstance(part, list) else [part])}
    limit = given.pop() if len(given) == 1 else None
    if not isinstance(limit, float) or not 0 < limit < float("inf"):
        raise fields.wrong("swiglu_clamp_exp", limits, "one positive number for all experts")
    return limit


def _two_rotations(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Of layers that compress nothing, and of the others, whose rotation alone is stretched for long texts."""
    rotated = fields.whole("rope.dimension_count")
    if rotated > min(head_dim, fields.whole("attention.indexer.key_length")):
        raise fields.wrong("rope.dimension_count", rotated, f"at most the {head_dim} dimensions of a head")
    part = rotated_part(rotated, head_dim)
    stretched = rope(fields) | {"rope_theta": fields.number("attention.compress_rope_freq_base")}
    if stretched["rope_type"] == "yarn":
        stretched["attention_factor"] = 1.0  # cosines are not scaled, in llama.cpp neither
    theta = fields.number("rope.freq_base", 10_000.0)
    return {
        **part,
        "rope_theta": theta,
        "compress_rope_theta": stretched["rope_theta"],
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": theta, **part},
            "compress": stretched | part,
        },
    }


def _qwen4(fields: Fields) -> dict[str, Any]:
    """As a model of text: every position is one number, so that the sections of a rotation are alike."""
    found = delta_net(fields)
    kinds = found["layer_types"]
    ratios = set(fields.each_whole("attention.compress_ratios", len(kinds))) - {0}
    if len(ratios) != 1:
        raise fields.wrong("attention.compress_ratios", sorted(ratios), "one number for all layers with full attention")
    return {
        "model_type": "qwen4_exp_text",
        "norm_topk_prob": True,
        "output_gate_type": "sigmoid",  # as llama.cpp computes it; the file does not say
        "hc_count": fields.whole("hyper_connection.count"),
        "hc_lowrank": fields.whole("hyper_connection.low_rank"),
        "indexer_n_heads": fields.whole("attention.indexer.head_count"),
        "indexer_kv_heads": 1,
        "indexer_head_dim": fields.whole("attention.indexer.key_length"),
        "indexer_budget": fields.whole("attention.indexer.top_k"),
        "indexer_compress_ratio": ratios.pop(),
        **found,
        **(_ngrams(fields) if fields.given(NGRAM_LAYERS) else {"ple_layer_ids": []}),
    }


def ngram_layer(fields: Fields) -> int:
    """The layer that looks n-grams up. Raises UnsupportedCheckpointError for several."""
    layers = fields.each(NGRAM_LAYERS, None)
    if isinstance(layers, list) and len(layers) > 1:
        raise UnsupportedCheckpointError(
            f"{fields.model.path}: {len(layers)} layers look n-grams up; of {fields.architecture} models those are read"
            " in which one does"
        )
    return fields.wholes(NGRAM_LAYERS, 1, fields.n_layers() - 1)[0]


def _ngrams(fields: Fields) -> dict[str, Any]:
    """Sizes of the table of n-grams. What a vocabulary is numbered from is a prime, and those of the other heads are
    the primes after it."""
    heads = _ngram_heads(fields)
    end = fields.whole("ple.eos_token_id", least=0)
    rows, head_dim = fields.shape(NGRAM_TABLE)
    sizes = fields.wholes("ple.head_vocab_sizes", heads, rows, least=1)
    if sum(sizes) > rows:
        raise fields.wrong("ple.head_vocab_sizes", sizes, f"at most the {rows} rows of the table together")
    return {
        "ple_layer_ids": [ngram_layer(fields) + 1],
        "ple_embed_dim": heads * head_dim,
        "ple_conv_kernel_size": fields.whole("ple.conv_kernel"),
        "ngram_size": fields.whole("ple.ngram_size", least=2),
        "heads_per_ngram": fields.whole("ple.heads_per_ngram"),
        "ngram_vocab_size_base": sizes[0],
        "make_ngram_vocab_size_divisible_by": rows,
        "eos_token_id": list(dict.fromkeys([end, *fields.end_tokens()])),  # n-grams end at the first
    }


def _ngram_heads(fields: Fields) -> int:
    return (fields.whole("ple.ngram_size", least=2) - 1) * fields.whole("ple.heads_per_ngram")


def _ngram_numbers(fields: Fields) -> dict[str, tuple[str, list[int]]]:
    """What n-grams are hashed with, and which rows of the table are whose."""
    if not fields.given(NGRAM_LAYERS):
        return {}
    heads, factors = _ngram_heads(fields), fields.whole("ple.ngram_size", least=2)
    rows = fields.shape(NGRAM_TABLE)[0]
    sizes = fields.wholes("ple.head_vocab_sizes", heads, rows, least=1)
    offsets = fields.wholes("ple.head_offsets", heads, rows)
    if any(start + size > rows for start, size in zip(offsets, sizes, strict=True)):
        raise fields.wrong("ple.head_offsets", offsets, f"rows of the table, which has {rows}")
    multipliers = fields.wholes("ple.layer_multipliers", factors, MAX_INT64)
    found = {"layer_multipliers": multipliers, "ngram_heads_offsets": offsets, "ngram_heads_vocab_sizes": sizes}
    names = dict(zip(found, ("layer_multipliers", "head_offsets", "head_vocab_sizes"), strict=True))
    part = f"model.layers.{ngram_layer(fields)}.ple.ple_embedding"
    return {f"{part}.{name}": (f"{fields.architecture}.ple.{names[name]}", values) for name, values in found.items()}


def _glm5(fields: Fields) -> dict[str, Any]:
    """GLM-5.3: layers of Kimi's linear attention, and others with latent attention that is not rotated."""
    kinds = kinds_of_layers(fields, "ssm_a", LINEAR, INDEXED)
    heads = fields.whole("attention.head_count")
    if rotated := fields.whole("rope.dimension_count", least=0):
        raise fields.wrong("rope.dimension_count", rotated, "0: no such model rotates queries and keys")
    if (scores := fields.whole("expert_gating_func", SIGMOID, least=0)) != SIGMOID:
        raise fields.wrong("expert_gating_func", scores, f"{SIGMOID}, as in every such model")
    if (epsilon := fields.number("attention.layer_norm_epsilon", EPSILON_OF_KEYS)) != EPSILON_OF_KEYS:
        raise fields.wrong("attention.layer_norm_epsilon", epsilon, f"{EPSILON_OF_KEYS}, as in every such model")
    return {
        "model_type": "glm5_next_text",
        "layer_types": kinds,
        "mlp_layer_types": kinds_of_layers(fields, "ffn_gate_inp.weight", "sparse", "dense"),
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": fields.whole("attention.q_lora_rank"),
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": fields.whole("attention.key_length_mla"),
        "v_head_dim": fields.whole("attention.value_length_mla"),
        "linear_head_dim": fields.whole("kda.head_dim"),
        "linear_num_heads": heads,
        "linear_conv_kernel_dim": fields.whole("ssm.conv_kernel"),
        "linear_lower_bound": _lower_bound(fields),
        "moe_intermediate_size": expert_size(fields),
        "n_shared_experts": fields.whole("expert_shared_count"),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "swiglu_limit": _swiglu_limit(fields, len(kinds)),
        "hc_mult": fields.whole("hyper_connection.count"),
        "hc_sinkhorn_iters": fields.whole("hyper_connection.sinkhorn_iterations"),
        "hc_eps": fields.number("hyper_connection.epsilon"),
        **_pools(fields, kinds),
        **expert_counts(fields, "n_routed_experts"),
        **groups_of_experts(fields),
    }


def _lower_bound(fields: Fields) -> float | None:
    """The least logarithm of what a state keeps of itself at a token; None where it has none."""
    if not fields.given("kda.gate_lower_bound"):
        return None
    if (bound := fields.number("kda.gate_lower_bound")) >= 0:
        raise fields.wrong("kda.gate_lower_bound", bound, "a number below 0")
    return bound


def _pools(fields: Fields, kinds: list[str]) -> dict[str, Any]:
    """How the tokens that a token sees are chosen: by pools of neighbours, and those after the last whole pool."""
    size, chosen = fields.whole("attention.indexer.kpool"), fields.whole("attention.indexer.top_k")
    if chosen % size:
        raise fields.wrong("attention.indexer.top_k", chosen, f"a multiple of the {size} tokens of a pool")
    own = fields.each_whole("attention.indexer.types", len(kinds), 1)
    for layer, kind in enumerate(kinds):
        taken = kind == INDEXED and not own[layer]
        if taken and not (layer and kinds[layer - 1] == INDEXED and own[layer - 1]):
            raise UnsupportedCheckpointError(
                f"{fields.model.path}: layer {layer} chooses no tokens of its own, and the layer before it does not"
                " either; transformers' model takes the choice of that layer only"
            )
    return {
        "index_n_heads": fields.whole("attention.indexer.head_count"),
        "index_head_dim": fields.whole("attention.indexer.key_length"),
        "index_topk": chosen,
        "index_kpool": size,
        "index_kpool_always_select_tail": fields.flag("attention.indexer.kpool_select_tail"),
        "indexer_types": ["full" if chooses else "shared" for chooses in own],
    }


def _compressor(part: str, target: str) -> tuple[Place, ...]:
    return (
        Place(f"{target}.kv_proj.weight", (f"{part}_kv.weight",)),
        Place(f"{target}.gate_proj.weight", (f"{part}_gate.weight",)),
        Place(f"{target}.position_bias", (f"{part}_ape.weight",)),
        Place(f"{target}.kv_norm.weight", (f"{part}_norm.weight",)),
    )


def _mixer(part: str, target: str) -> tuple[Place, ...]:
    """How Qwen4 mixes streams before a part, or after the last."""
    return (
        Place(f"{target}.hc_norm.weight", (f"{part}_norm.weight",), "less one"),
        Place(f"{target}.input_mix_weight_down.weight", (f"{part}_down.weight",)),
        Place(f"{target}.input_mix_weight_up.weight", (f"{part}_up.weight",)),
        Place(f"{target}.block_inject_weight.weight", (f"{part}_inject.weight",)),
    )


STREAMED: Mapping[str, Family] = {
    "deepseek4": Family(
        _deepseek4,
        (
            *hyper_connection("attn"),
            *hyper_connection("ffn"),
            Place("self_attn.q_a_proj.weight", ("attn_q_a.weight",)),
            Place("self_attn.q_a_norm.weight", ("attn_q_a_norm.weight",)),
            Place("self_attn.q_b_proj.weight", ("attn_q_b.weight",)),
            Place("self_attn.kv_proj.weight", ("attn_kv.weight",)),
            Place("self_attn.kv_norm.weight", ("attn_kv_a_norm.weight",)),
            Place("self_attn.o_a_proj.weight", ("attn_output_a.weight",)),
            Place("self_attn.o_b_proj.weight", ("attn_output_b.weight",)),
            Place("self_attn.sinks", ("attn_sinks.weight",)),
            *_compressor("attn_compressor", "self_attn.compressor"),
            *_compressor("indexer_compressor", "self_attn.compressor.indexer"),
            Place("self_attn.compressor.indexer.q_b_proj.weight", ("indexer.attn_q_b.weight",)),
            Place("self_attn.compressor.indexer.scorer.weights_proj.weight", ("indexer.proj.weight",)),
            Place("mlp.gate.tid2eid", ("ffn_gate_tid2eid.weight",)),
        ),
        tuple(Place(f"model.hc_head.hc_{name}", (f"output_hc_{name}.weight",)) for name in ("fn", "base", "scale")),
        layers="own",
    ),
    "qwen4exp": Family(
        _qwen4,
        (
            *DELTA_NET,
            *HEADS_IN_TURN,
            *_mixer("hc_attn", "attn_hyper_connection"),
            *_mixer("hc_ffn", "mlp_hyper_connection"),
            Place(
                "self_attn.indexer.index_qk_proj.weight",
                ("indexer.q_proj.weight", "indexer.k_proj.weight"),
                "rows joined",
            ),
            Place("self_attn.indexer.q_layernorm.weight", ("indexer.q_norm.weight",), "less one"),
            Place("self_attn.indexer.k_layernorm.weight", ("indexer.k_norm.weight",), "less one"),
            Place("ple.key_proj.weight", ("ple_key.weight",)),
            Place("ple.value_proj.weight", ("ple_value.weight",)),
            *(
                Place(f"ple.norm_{name}.weight", (f"ple_norm_{name}.weight",), "less one")
                for name in ("key", "query", "conv")
            ),
            Place("ple.conv1d.weight", ("ple_conv1d.weight",), "a channel"),
            Place("ple.ple_embedding.ngram_embedding.weight", (NGRAM_TABLE,)),
        ),
        _mixer("output_hc", "model.hyper_connection_mixer"),
        numbers=_ngram_numbers,
    ),
    "glm5-next": Family(
        _glm5,
        (
            *KIMI_DELTA,
            Place("self_attn.forget_gate.A_log", ("ssm_a",), "flat, log of minus"),
            *LATENT_ATTENTION,
            *INDEXER,
            Place("self_attn.indexer.index_kpool_compress_gate", ("indexer_compressor_gate.weight",)),
            Place("self_attn.indexer.index_kpool_compress_ape", ("indexer_compressor_ape.weight",)),
            *hyper_connection("attn"),
            *hyper_connection("ffn"),
        ),
        layers="own",
        wrapper="glm5_next",
    ),
}
"""By `general.architecture`; a part of `families.FAMILIES`."""
