"""What a model keeps of each token, layer by layer, as its configuration says."""

from __future__ import annotations

from typing import Any


def text_config_of(model: Any) -> Any:
    """The configuration of a model's language model; None where it has none."""
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return (getattr(config, "text_config", None) or config) if find is None else find(decoder=True)


def number_of(config: Any, name: str) -> int:
    """A number of the configuration; 0 where it has none, or (as some do by raising) none for all layers."""
    try:
        value = getattr(config, name, None)
    except (RuntimeError, AttributeError):
        return 0
    return value if isinstance(value, int) else 0


def layer_configs(config: Any) -> list[Any]:
    """The configuration of each layer: some have other heads than others, and the whole says nothing of those then."""
    n_layers, each = number_of(config, "num_hidden_layers"), getattr(config, "per_layer_config", None)
    if each is None or isinstance(each, dict) or len(each) != n_layers:
        return [config] * n_layers
    return [each[number] for number in range(n_layers)]


def rows_per_token(config: Any) -> list[int]:
    """Numbers in each row that a layer of this configuration keeps of a token: a head's key, or its value."""
    heads = number_of(config, "num_attention_heads")
    if number_of(config, "kv_lora_rank"):  # latent attention: the compressed keys and values, and the rotated part
        return [number_of(config, "kv_lora_rank"), number_of(config, "qk_rope_head_dim")]
    size = number_of(config, "head_dim") or (number_of(config, "hidden_size") // heads if heads else 0)
    kv_heads = number_of(config, "num_key_value_heads") or heads
    return [*[size] * kv_heads, *[number_of(config, "v_head_dim") or size] * kv_heads]


def values_kept(config: Any, n_tokens: int) -> int:
    """Numbers that `n_tokens` leave in a cache over all layers: keys and values, in windows of no more tokens than
    these hold, and keys of an index.

    States of linear attention, which do not grow, are not counted. 0 where the configuration does not say.
    """
    rows = [sum(rows_per_token(one)) for one in layer_configs(config)]
    layers = _cache_layers(config)
    if not all(rows):
        return 0
    if len(layers) != len(rows):
        return n_tokens * sum(rows)
    index = number_of(config, "index_head_dim")
    return sum(
        _tokens(layer, n_tokens) * (row + index * hasattr(layer, "indexer_keys"))
        for layer, row in zip(layers, rows, strict=True)
    )


def values_expanded(config: Any, n_tokens: int) -> int:
    """Numbers that transformers' forward makes of the short vectors of `n_tokens` in one layer of latent attention, for
    as long as that is computed: what their projection gives, and the keys of every head. 0 for other attention."""
    most = 0
    for one in layer_configs(config):
        if number_of(one, "kv_lora_rank"):
            own, rotated, v_dim = (number_of(one, f"{name}_head_dim") for name in ("qk_nope", "qk_rope", "v"))
            most = max(most, number_of(one, "num_attention_heads") * (2 * own + rotated + v_dim))
    return n_tokens * most


def _tokens(layer: Any, n_tokens: int) -> int:
    """Tokens that a layer of transformers' cache keeps of so many."""
    from transformers.cache_utils import DynamicLayer

    if not isinstance(layer, DynamicLayer):
        return 0
    return min(n_tokens, int(layer.sliding_window)) if getattr(layer, "is_sliding", False) else n_tokens


def _cache_layers(config: Any) -> list[Any]:
    from transformers import DynamicCache, PreTrainedConfig

    return list(DynamicCache(config=config).layers) if isinstance(config, PreTrainedConfig) else []
