"""How long a sequence the model is made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_context_tokens"]


def model_context_tokens(config: Any) -> int | None:
    """The longest sequence that the model is made for, prompt and reply together; None where it sets no limit.

    config: of the model. Its max_position_embeddings, or more where YaRN stretches the positions and
    max_position_embeddings was left as trained (as Qwen's documentation has it). The other stretched embeddings come
    with the stretched length as max_position_embeddings (Llama 3, Phi, Gemma 3).
    """
    text_config = config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    if not limit:
        return None
    return max([int(limit), *(_stretched(rope, int(limit)) for rope in _rope_parameters(text_config))])


def _rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """Rope parameters: the one set of the model, or one for each kind of its layers."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _stretched(rope: Mapping[str, Any], limit: int) -> int:
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 0
    original = rope.get("original_max_position_embeddings") or limit
    return int(original * (rope.get("factor") or 1.0))
