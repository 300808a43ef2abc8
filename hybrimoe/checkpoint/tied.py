"""Output layers that a checkpoint leaves out because they are the input embeddings, while config.json does not say so.

What config.json says holds. Where it says nothing, a family's own default decides (Gemma ties, Mixtral does not), and
where a family does not tie and the checkpoint has no output layer, it can only be the input embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hybrimoe.checkpoint.errors import TiedEmbeddingsWarning

KEY = "tie_word_embeddings"


def tie_where_unsaid(model: PreTrainedModel, config: Mapping[str, Any], stored: Container[str]) -> None:
    """Marks the output layer of `model` (on the meta device) as tied where only the checkpoint tells that it is.

    config: config.json as it is. stored: the parameters that the checkpoint has weights for. The model's configuration
    says so afterwards, and a TiedEmbeddingsWarning says what was assumed.
    """
    output = model.get_output_embeddings()
    if output is None or _says(config):
        return
    tied: dict[str, str] = dict(model._tied_weights_keys or {})
    weights = model.named_parameters(remove_duplicate=False)
    name = next((name for name, weight in weights if weight is output.weight and name in tied), None)
    if name is None or name in stored or tied[name] not in stored or name in model.all_tied_weights_keys:
        return
    _set(model.config)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    warnings.warn(
        TiedEmbeddingsWarning(
            f"config.json does not say whether the embeddings are tied ({KEY}), and the checkpoint has no {name}:"
            f" the output layer is taken to be {tied[name]}"
        ),
        stacklevel=2,
    )


def _says(config: Mapping[str, Any]) -> bool:
    """Whether config.json, or a part of it, has the key."""
    return KEY in config or any(_says(part) for part in config.values() if isinstance(part, Mapping))


def _set(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = True
