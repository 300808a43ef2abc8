"""From the keys of a Hugging Face configuration to the sizes that decide what a step costs.

Families name the same size differently; each tuple below lists the names in use, most specific first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yaml_rules.errors import YamlRulesError

N_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_routed_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
EXPERT_INTER = (
    "moe_intermediate_size",
    "expert_intermediate_size",
    "moe_ffn_hidden_size",
    "intermediate_size_moe",
    "ffn_dim",
)
SHARED_INTER = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
N_SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "first_k_dense")
EVERY = (
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "expert_layer_period",
    "moe_layer_freq",
    "moe_layer_interval",
)
#: Families whose experts have no gate projection (two matrices each).
NOT_GATED = ("nemotron_h",)
KV_BYTES_PER_VALUE = 2  # bfloat16 cache
#: Families with norms of queries and keys, and those that keep a state in most layers.
NORMED = ("qwen3", "olmoe")
LINEAR = ("qwen3_next", "qwen3_5")
NORM_KERNELS, LATENT_KERNELS, LINEAR_KERNELS = 2, 10, 10


def derive_shape(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Sizes of the decoder described by ``config``; raises YamlRulesError for a dense model or a missing size."""
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, Mapping) else dict(config)
    n_experts = _first(merged, N_EXPERTS)
    if not n_experts:
        raise YamlRulesError(f"{name} is a dense model: its configuration has none of {', '.join(N_EXPERTS)}")
    n_layers = _need(merged, ("num_hidden_layers", "n_layer"), name)
    hidden = _need(merged, ("hidden_size", "d_model"), name)
    inter = _need(merged, (*EXPERT_INTER, "intermediate_size"), name)
    n_moe = len(moe_layers(merged, n_layers))
    return {
        "name": name,
        "n_layers": n_moe,
        "n_experts": n_experts,
        "top_k": _need(merged, TOP_K, name),
        "hidden": hidden,
        "inter": inter,
        "gated": merged.get("model_type") not in NOT_GATED,
        "attention_params": _attention_params(merged, hidden, name),
        "shared_params": 3 * hidden * _shared_inter(merged, inter),
        "head_params": hidden * _need(merged, ("vocab_size",), name),
        "kv_bytes": _kv_values(merged, hidden, name) * KV_BYTES_PER_VALUE,
        "n_dense_layers": n_layers - n_moe,
        "dense_params": 3 * hidden * int(merged.get("intermediate_size") or 0) if n_layers > n_moe else 0,
        "max_context": _max_context(merged),
        "attention_kernels": _attention_kernels(merged),
        "attention_width": _attention_width(merged),
        "full_attention": _full_attention(merged),
    }


def _attention_kernels(config: Mapping[str, Any]) -> int:
    """Kernels a layer beyond those of plain attention and one MLP, as llama.cpp launches them."""
    if _is_linear(config):
        return LINEAR_KERNELS
    if config.get("kv_lora_rank"):
        return LATENT_KERNELS
    return NORM_KERNELS if str(config.get("model_type")).startswith(NORMED) else 0


def _attention_width(config: Mapping[str, Any]) -> int:
    """Query heads times the mean width of a key and a value; 0 where the configuration does not say."""
    heads = _first(config, ("num_attention_heads", "n_head")) or 0
    if config.get("kv_lora_rank"):
        key = sum(int(config.get(name) or 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
        return heads * (key + int(config.get("v_head_dim") or 0)) // 2
    return heads * (_first(config, ("head_dim",)) or 0)


def _full_attention(config: Mapping[str, Any]) -> float:
    """Share of layers that see the whole context: the listed ones, every fourth of linear ones, else all."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return max(1, kinds.count("full_attention")) / len(kinds)
    if _is_linear(config):
        return 1.0 / int(config.get("full_attention_interval") or 4)
    return 0.5 if config.get("model_type") == "gpt_oss" else 1.0


def _is_linear(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(LINEAR)


def _max_context(config: Mapping[str, Any]) -> int:
    """Longest sequence in tokens, with YaRN's factor where the configuration has one; 0 where it sets no limit."""
    limit = _first(config, ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions")) or 0
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) != "yarn":
        return limit
    original = scaling.get("original_max_position_embeddings")
    factor = scaling.get("factor")
    if not isinstance(original, int) or not isinstance(factor, int | float):
        return limit
    return max(limit, int(original * factor))


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """How many experts of a layer a token visits; None where the configuration does not say."""
    return _first(config, TOP_K)


def moe_layers(config: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """Decoder layers that have experts, by whichever convention the configuration uses."""
    frequency = _first(config, EVERY) if not isinstance(config.get("moe_layer_freq"), list) else 1
    every = max(1, int(frequency or 1))
    offset = int(config.get("expert_layer_offset") or 0)
    first = int(_first(config, FIRST_DENSE) or 0)
    dense = {int(index) for index in config.get("mlp_only_layers") or ()}
    listed = config.get("moe_layers")
    if isinstance(listed, list) and listed:
        return tuple(int(index) for index in listed)
    flags = config.get("moe_layer_freq")
    if isinstance(flags, list):
        return tuple(index for index, flag in enumerate(flags[:n_layers]) if flag)
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and kinds:
        return tuple(index for index, kind in enumerate(kinds) if kind in ("sparse", "moe"))
    if "expert_layer_period" in config:
        return tuple(index for index in range(n_layers) if index % every == offset)
    if "decoder_sparse_step" in config or "interleave_moe_layer_step" in config:
        return tuple(i for i in range(n_layers) if i >= first and i not in dense and (i + 1) % every == 0)
    return tuple(i for i in range(first, n_layers) if i not in dense and i % every == 0)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _need(config: Mapping[str, Any], names: tuple[str, ...], model: str) -> int:
    value = _first(config, names)
    if value is None or value < 1:
        raise YamlRulesError(f"{model}: the configuration has no positive {' or '.join(names)}")
    return value


def _shared_inter(config: Mapping[str, Any], inter: int) -> int:
    total = _first(config, SHARED_INTER)
    if total is not None:
        return total
    return (_first(config, N_SHARED) or 0) * inter


def _head_dim(config: Mapping[str, Any], hidden: int, name: str) -> int:
    return _first(config, ("head_dim",)) or hidden // _need(config, ("num_attention_heads", "n_head"), name)


def _attention_params(config: Mapping[str, Any], hidden: int, name: str) -> int:
    heads = _need(config, ("num_attention_heads", "n_head"), name)
    if _first(config, ("kv_lora_rank",)):
        return _mla_params(config, hidden, heads)
    head_dim = _head_dim(config, hidden, name)
    kv_heads = _first(config, ("num_key_value_heads",)) or heads
    if _is_linear(config) and config.get("linear_num_key_heads"):  # else it is not told how large a delta net is
        share, gated = _full_attention(config), hidden * head_dim * (3 * heads + 2 * kv_heads)
        return round(share * gated + (1 - share) * _linear_params(config, hidden, name))
    return 2 * hidden * head_dim * (heads + kv_heads)


def _linear_params(config: Mapping[str, Any], hidden: int, name: str) -> int:
    """A gated delta net: queries, keys, values, their gate, two numbers for each head, and the output."""
    n_keys, n_values = (_need(config, (f"linear_num_{part}_heads",), name) for part in ("key", "value"))
    key, value = (_need(config, (f"linear_{part}_head_dim",), name) for part in ("key", "value"))
    return hidden * (2 * n_keys * key + 3 * n_values * value + 2 * n_values)


def _mla_params(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """Multi-head latent attention: low-rank query and key/value projections (DeepSeek-V2, section 2.1)."""
    nope, rope, value = (int(config.get(key) or 0) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    kv_rank, q_rank = int(config["kv_lora_rank"]), int(config.get("q_lora_rank") or 0)
    query = q_rank * (hidden + heads * (nope + rope)) if q_rank else hidden * heads * (nope + rope)
    whole = query + hidden * (kv_rank + rope) + kv_rank * heads * (nope + value) + heads * value * hidden
    return whole + _index_params(config, hidden, q_rank)


def _index_params(config: Mapping[str, Any], hidden: int, q_rank: int) -> int:
    """The index that chooses tokens (DeepSeek-V3.2, section 2.1): queries, one key, and a weight of each head."""
    heads, dim = int(config.get("index_n_heads") or 0), int(config.get("index_head_dim") or 0)
    return q_rank * heads * dim + hidden * (dim + heads)


def _kv_values(config: Mapping[str, Any], hidden: int, name: str) -> int:
    """Cached numbers per token and layer."""
    rank = _first(config, ("kv_lora_rank",))
    if rank:
        return rank + sum(int(config.get(name) or 0) for name in ("qk_rope_head_dim", "index_head_dim"))
    heads = _need(config, ("num_attention_heads", "n_head"), name)
    return 2 * (_first(config, ("num_key_value_heads",)) or heads) * _head_dim(config, hidden, name)
