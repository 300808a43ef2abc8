"""The configuration of a GGUF model, as config.json would have it. Needs neither torch nor transformers."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.families import family_of
from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.file import GgufModel
from hybrimoe.checkpoint.gguf.places import Layers, rope
from hybrimoe.errors import CheckpointError

TOKEN_KEYS = {"bos_token_id": "bos", "pad_token_id": "padding"}
OF_WRAPPERS = ("tie_word_embeddings", "dtype", "bos_token_id", "pad_token_id", "eos_token_id")
"""What the configuration of a wrapper has once more."""
DENSE_DTYPES = {"F32": "float32", "F16": "float16"}  # of a file whose dense matrices are in it; else bfloat16


def config_of(model: GgufModel) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError for metadata that are missing or cannot be true,
    UnsupportedCheckpointError for an architecture that is not read, and for a model without experts."""
    fields = Fields(model)
    family = family_of(fields)  # before values are asked for that another architecture has not
    if fields.each("expert_count", 0) == 0:
        key = f"{fields.architecture}.expert_count"
        raise UnsupportedCheckpointError(f"{model.path} is a dense model: it has no experts ({key} is missing or 0)")
    config = shared_config(fields, family.layers) | family.config(fields)
    if family.wrapper is None:
        return config
    return {"model_type": family.wrapper, "text_config": config, **{key: config[key] for key in OF_WRAPPERS}}


def shared_config(fields: Fields, layers: Layers = "alike") -> dict[str, Any]:
    """What every architecture's configuration has, dense ones included. layers: what may differ between them. Errors as
    `config_of`."""
    return {
        **_sizes_of_layers(fields, layers),
        "num_hidden_layers": num_hidden_layers(fields),
        "hidden_size": fields.whole("embedding_length"),
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": _rms_eps(fields, layers),
        "vocab_size": fields.shape("token_embd.weight")[0],
        "tie_word_embeddings": not fields.has("output.weight"),
        "dtype": _dense_dtype(fields.model),
        **_special_tokens(fields),
    }


def _rms_eps(fields: Fields, layers: Layers) -> float | None:
    """None of models that may have layer norms instead, where the file says so."""
    if layers == "any norm" and not fields.given("attention.layer_norm_rms_epsilon"):
        return None
    return fields.number("attention.layer_norm_rms_epsilon")


def _sizes_of_layers(fields: Fields, layers: Layers) -> dict[str, Any]:
    if layers == "own":
        return {}
    number = fields.most_whole if layers == "some without attention" else fields.whole
    head_count = fields.whole("attention.head_count")
    return {
        "rope_parameters": rope(fields),
        "intermediate_size": number("feed_forward_length", 1),
        "num_attention_heads": head_count,
        "num_key_value_heads": number("attention.head_count_kv", head_count),
    }


def num_hidden_layers(fields: Fields) -> int:
    """Layers without those that predict several tokens. Raises CheckpointError where the file lacks a layer."""
    layers = fields.n_layers()
    present = {name.split(".")[1] for name in fields.model.tensors if name.startswith("blk.")}
    if not 1 <= layers <= len(present):
        raise CheckpointError(
            f"{fields.model.path}: {fields.architecture}.block_count asks for {layers} layers, the file has tensors of"
            f" {len(present)}; the file is damaged, fetch it again"
        )
    return layers


def _special_tokens(fields: Fields) -> dict[str, Any]:
    """Ids of special tokens. Where a reply may end in several ways, `eos_token_id` is a list."""
    found: dict[str, Any] = {name: fields.token(key) for name, key in TOKEN_KEYS.items()}
    ends = fields.end_tokens()
    return found | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _dense_dtype(model: GgufModel) -> str:
    """What most values of matrices outside the experts are in; quantised ones are computed in bfloat16."""
    n_values = Counter[str]()
    for name, tensor in model.tensors.items():
        if "ffn_gate_inp" not in name and len(tensor.shape) == 2:
            n_values[tensor.kind.name] += prod(tensor.shape)
    most = n_values.most_common(1)
    return DENSE_DTYPES.get(most[0][0] if most else "", "bfloat16")
