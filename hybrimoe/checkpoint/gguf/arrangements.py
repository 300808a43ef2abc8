"""How a parameter is made from tensors of the file: what llama.cpp's conversion did to it, undone.

A join takes the tensors of a place, whole or one expert's entry [1, ...] of each, and gives the parameter or its entry.
Many need sizes of the model, so that they are made for a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from hybrimoe.checkpoint.gguf.places import Arrangement

Join = Callable[..., torch.Tensor]


def join_of(how: Arrangement, config: Mapping[str, Any]) -> Join:
    """The join of that name. config: as `config_of` gives it."""
    if how in JOINS:
        return JOINS[how]
    return partial(SIZED[how], config)


def _query_heads(config: Mapping[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    return _halves(tensor, config["num_attention_heads"])


def _key_heads(config: Mapping[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    return _halves(tensor, config["num_key_value_heads"])


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from neighbours that are rotated together to first and second half."""
    pairs = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, pairs, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _keys_and_values(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[heads, rank, d_k] and [heads, d_v, rank] -> kv_b [heads x (d_k + d_v), rank]."""
    return torch.cat([k.transpose(1, 2), v], dim=1).flatten(0, 1)


def _by_key_head(config: Mapping[str, Any], qkv: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Rows of all q, k, v and those of z -> those of one key head after the other, each q, k, v and z (Qwen3-Next)."""
    heads = config["linear_num_key_heads"]
    n_keys = heads * config["linear_key_head_dim"]
    parts = (*qkv.split([n_keys, n_keys, z.shape[0]]), z)
    return torch.cat([part.reshape(heads, -1, z.shape[1]) for part in parts], dim=1).flatten(0, 1)


def _grouped_values(config: Mapping[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    """Rows of value heads: of every key head the first, of every one the second, ... -> by key head."""
    heads = config["linear_num_key_heads"]
    each = config["linear_num_value_heads"] // heads
    return tensor.reshape(each, heads, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


def _last_grouped_values(config: Mapping[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    """The same of rows below those of queries and keys."""
    n_values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    others, values = tensor.split([tensor.shape[0] - n_values, n_values])
    return torch.cat([others, _grouped_values(config, values)])


def _unscaled(config: Mapping[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    """The norm of a latent vector without the factor that makes up for its length (dots3-note)."""
    scale: float = (config["hidden_size"] / tensor.shape[0]) ** 0.5
    return tensor / scale


def _log_of_minus(tensor: torch.Tensor) -> torch.Tensor:
    return (-tensor.float()).log()


JOINS: dict[Arrangement, Join] = {
    "rows joined": lambda gate, up: torch.cat([gate, up], dim=-2),
    "rows joined, transposed": lambda gate, up: torch.cat([gate, up], dim=-2).transpose(-1, -2),
    "transposed": lambda tensor: tensor.transpose(-1, -2),
    "interleaved": lambda gate, up: torch.stack([gate, up], dim=-1).flatten(-2),
    "interleaved, transposed": lambda gate, up: torch.stack([gate, up], dim=-2).flatten(-3, -2).transpose(-1, -2),
    "a channel": lambda tensor: tensor.unsqueeze(1),
    "a row": lambda tensor: tensor.reshape(1, -1),
    "heads of k and v": _keys_and_values,
    "less one": lambda tensor: tensor - 1,
    "log of minus": _log_of_minus,
    "flat": torch.Tensor.flatten,
    "flat, log of minus": lambda tensor: _log_of_minus(tensor).flatten(),
    "flat, log": lambda tensor: tensor.float().log().flatten(),
    "by head, log of minus": lambda tensor: _log_of_minus(tensor).reshape(1, 1, -1, 1),
    "channels joined": lambda *parts: torch.cat([part.reshape(-1, 1, part.shape[-1]) for part in parts]),
}
"""Those that need no size."""
SIZED: dict[Arrangement, Callable[..., torch.Tensor]] = {
    "heads of q": _query_heads,
    "heads of k": _key_heads,
    "by key head": _by_key_head,
    "values by key head": _grouped_values,
    "columns of values by key head": lambda config, tensor: _grouped_values(config, tensor.T).T.contiguous(),
    "values by key head, log of minus": lambda config, tensor: _log_of_minus(_grouped_values(config, tensor)),
    "last values by key head": _last_grouped_values,
    "unscaled latents": _unscaled,
    "channels, last values by key head": lambda config, tensor: _last_grouped_values(config, tensor).unsqueeze(1),
}
"""Those that are given the configuration first."""
