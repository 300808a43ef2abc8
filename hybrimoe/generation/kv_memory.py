"""Memory that generating takes: keys, values and recurrent states, and how much of a prompt goes through at once.

What a token takes, what a cache holds, what all caches may take together; and chunks of prompts whose intermediate
results fit what is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hybrimoe.amounts import Amount
from hybrimoe.compat import takes_dynamic_cache
from hybrimoe.errors import BudgetError
from hybrimoe.kv_sizes import layer_configs, number_of, rows_per_token
from hybrimoe.machine.memory import available_bytes, total_bytes

__all__ = [
    "chunk_tokens",
    "device_memory",
    "estimated_token_bytes",
    "held_bytes",
    "keeps_every_token",
    "kv_budget_bytes",
    "measured_token_bytes",
    "reads_experts",
    "stored_bytes",
]

AUTO_SHARE = 0.5
"""Share of the memory that is free once the model is loaded which keys and values may take; the other half is for the
prefix cache of a server, activations, copying a cache that grows, and other programs."""

MOST_TOKENS = 2048
"""More gain nothing where experts are in memory: each has so many rows by then that its weights are read in no time."""
FEWEST_TOKENS = 64
"""Fewer would save little memory, and each would read most of the weights."""
WORK_SHARE = 0.125
"""Of the free memory, for the intermediate results of a prompt; the rest is for keys and values and other programs."""
FLOAT_BYTES = 4
STREAMS = 12
"""Rows of the width of the stream that a layer holds of a token at most: stream, norms, queries, keys, values, sums."""


def kv_budget_bytes(model: Any, setting: Amount) -> int:
    """Bytes that the caches of the replies under way may take together, on the device of the model's attention.

    setting: `memory.kv`: a size, a share of that device's memory, or auto.

    Raises:
        BudgetError: a setting of less than one token.
    """
    free_bytes, total_bytes = device_memory(model.device)
    budget = setting.to_bytes(total_bytes, int(AUTO_SHARE * free_bytes))
    if budget < estimated_token_bytes(model):
        raise BudgetError(
            f"memory.kv: {setting} is {budget} bytes, and the keys and values of one token take"
            f" {estimated_token_bytes(model)}; give more, for example 1GiB"
        )
    return budget


def device_memory(device: Any) -> tuple[int, int]:
    """Free and total bytes of the device; of the host, what this process may use."""
    from gpu_kernels.devices import memory_info

    if device.type == "cpu":
        return available_bytes(), total_bytes()
    return memory_info(device)


def estimated_token_bytes(model: Any) -> int:
    """Bytes by which one more token makes a cache grow, from the configuration; 0 where that does not say.

    Room for growth included. Layers of bounded size (sliding windows, linear attention) do not count.
    """
    from hybrimoe.generation.stored import StoredLayer, new_cache

    config = model.config.get_text_config(decoder=True)
    configs, itemsize = layer_configs(config), model.dtype.itemsize
    if not takes_dynamic_cache(model):
        return _with_room(sum(sum(rows_per_token(own)) for own in configs) * itemsize)
    layers = new_cache(model).layers
    if len(configs) != len(layers):
        configs = [config] * len(layers)
    index = number_of(config, "index_head_dim")
    return _with_room(
        sum(
            stored_bytes(own, layer.name) if isinstance(layer, StoredLayer)
            else (sum(rows_per_token(own)) + index * hasattr(layer, "indexer_keys")) * itemsize
            for layer, own in zip(layers, configs, strict=True)
            if keeps_every_token(layer)
        )
    )  # fmt: skip


def stored_bytes(config: Any, kv_dtype: str) -> int:
    """Bytes that one layer keeps of a token where keys and values are stored as `kv_dtype`, from the configuration."""
    from cpu_kernels.step.stored import KIND_OF, row_bytes

    return sum(row_bytes(KIND_OF[kv_dtype], size) for size in rows_per_token(config))


def _with_room(token_bytes: int) -> int:
    """A growing layer's buffers have room for a share more than they hold."""
    from hybrimoe.generation.growing import ROOM_SHARE

    return token_bytes + token_bytes // ROOM_SHARE


def measured_token_bytes(layers: Iterable[Any], n_tokens: int) -> int:
    """The same from the growing `layers` of a cache that holds `n_tokens`."""
    tensors = [(layer.keys, layer.values, getattr(layer, "indexer_keys", None)) for layer in layers]
    held = sum(tensor.nbytes for each in tensors for tensor in each if tensor is not None)
    return _with_room(held // n_tokens)


def keeps_every_token(layer: Any) -> bool:
    """Whether a cache layer has keys and values of every token, so that it can be cropped at any and grows with each.

    Not so: sliding windows, linear attention (alone or beside attention), layers that share another one's cache.
    """
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer) and not layer.is_sliding and not hasattr(layer, "conv_states")


def held_bytes(layers: Iterable[Any]) -> int:
    """Bytes of the memory behind all tensors of cache layers; what several share counts once."""
    storages = {}
    for layer in layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def chunk_tokens(model: Any, free_bytes: int | None = None) -> int:
    """Tokens that the intermediate results of `model` leave room for, between FEWEST_TOKENS and MOST_TOKENS.

    Where experts are read from disk, as many as there is room for: each part of a prompt reads nearly all that host
    memory does not hold, layer after layer, and a longer one reads them for more tokens.
    free_bytes: of the memory that they lie in; None asks for that of the model's device.
    """
    free = device_memory(model.device)[0] if free_bytes is None else free_bytes
    fits = int(free * WORK_SHARE) // max(1, token_bytes(model))
    return max(FEWEST_TOKENS, fits if reads_experts(model) else min(MOST_TOKENS, fits))


def reads_experts(model: Any) -> bool:
    """Whether some of a model's experts are on disk alone."""
    injection = getattr(model, "hybrimoe", None)
    return injection is not None and not injection.session.store.in_memory


def token_bytes(model: Any) -> int:
    """Bytes of the intermediate results of one token in the layer that has most of them."""
    config = model.config.get_text_config(decoder=True)
    width, chosen = number_of(config, "hidden_size"), number_of(config, "num_experts_per_tok")
    injection = getattr(model, "hybrimoe", None)
    inners = [layer.spec.inter for layer in injection.session.layer_specs()] if injection is not None else []
    inner = max(inners, default=number_of(config, "moe_intermediate_size") or number_of(config, "intermediate_size"))
    return FLOAT_BYTES * (STREAMS * width + max(1, chosen) * (width + inner))
