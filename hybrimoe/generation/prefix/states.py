"""What the layers of a cache hold of a sequence: keys and values of every token, or states of its end alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe.compat import takes_dynamic_cache
from hybrimoe.generation.kv_memory import held_bytes, keeps_every_token

__all__ = ["Checkpoint", "checkpoint_of", "copied", "is_bounded", "is_plain", "reason_against_blocks", "treats_prompts"]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What cropping to `n_tokens` could not bring back, in host memory. Nobody changes it: who goes on copies it again.

    layers: of those that cannot give back their past, index in the cache to copied layer. logits: [V] after the last
    token, where a prompt ended there and the same prompt may come again.
    """

    n_tokens: int
    layers: dict[int, Any]
    logits: Any = None

    def n_bytes(self) -> int:
        """Memory that it takes."""
        return held_bytes(self.layers.values()) + (0 if self.logits is None else int(self.logits.nbytes))


def checkpoint_of(n_tokens: int, layers: Sequence[Any]) -> Checkpoint:
    """Of the layers as they are, after `n_tokens`."""
    bounded = {index: layer for index, layer in enumerate(layers) if is_bounded(layer)}
    return Checkpoint(n_tokens, {index: copied(layer, "cpu") for index, layer in bounded.items()})


def is_bounded(layer: Any) -> bool:
    """Whether a layer keeps states that are not those of every token: it cannot be cropped at any."""
    return bool(vars(layer)) and not keeps_every_token(layer)


def is_plain(layer: Any) -> bool:
    """Whether a layer has keys and values of every token, and nothing else (such as an index of the tokens)."""
    from hybrimoe.generation.growing import GrowingLayer
    from hybrimoe.generation.stored import StoredLayer

    return type(layer) in (GrowingLayer, StoredLayer)


def treats_prompts(layer: Any) -> bool:
    """Whether a layer treats the tokens of its first prompt in another way than later ones, so that no second prompt
    can follow (reference sliding-window attention)."""
    return hasattr(layer, "set_prefill_length")


def reason_against_blocks(model: Any) -> str | None:
    """Why the states of `model` cannot be kept in blocks of tokens; None where they can."""
    from hybrimoe.generation.growing import growing_cache

    if not takes_dynamic_cache(model):
        return "the model makes a cache of its own kind"
    layers = growing_cache(model.config.get_text_config(decoder=True)).layers
    if any(treats_prompts(layer) for layer in layers):
        return "its layers treat the tokens of the first prompt in another way than later ones"
    if any(keeps_every_token(layer) and not is_plain(layer) for layer in layers):
        return "its layers keep an index of the tokens beside keys and values"
    return None


def copied(layer: Any, device: Any) -> Any:
    """A cache layer with tensors of its own on `device`, no larger than what it holds."""
    from hybrimoe.generation.growing import GrowingLayer

    source = layer.compact() if isinstance(layer, GrowingLayer) else layer
    twin = copy.copy(source)
    for name, value in vars(source).items():
        setattr(twin, name, _copied_value(value, device))
    return twin


def _copied_value(value: Any, device: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied_value(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied_value(item, device) for item in value)
    return value
