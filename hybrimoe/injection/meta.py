"""A model without weights: its modules on the meta device, from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybrimoe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def model_config(model: str | Path | None) -> PreTrainedConfig:
    """Configuration of a local directory or a hub id; None is the demo model of the package.

    Raises ModelError for a directory that is no model, an unknown model type, and a hub id that cannot be read.
    """
    from transformers import AutoConfig

    name = _model_name(model)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: its configuration cannot be read: {first}") from error


def meta_model(source: str | Path | PreTrainedConfig | None) -> PreTrainedModel:
    """The causal language model of a directory, hub id or configuration, on the meta device. No weights are read.

    Raises ModelError where `model_config` does, and for a configuration without a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config: Any = model_config(source) if source is None or isinstance(source, str | Path) else source
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{config.model_type}: transformers has no causal language model for it: {reason}") from error


def _model_name(model: str | Path | None) -> str:
    if model is None:
        from hybrimoe.demo import demo_model_path

        return str(demo_model_path())
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path} is no model directory: expected a config.json in it, found none")
    if path.is_file():
        raise ModelError(f"{path} is a file: expected a model directory in Hugging Face layout, or a hub id")
    if not path.exists() and (path.is_absolute() or str(model).startswith((".", "~"))):
        raise ModelError(f"{path}: no such directory")
    return str(path) if path.exists() else str(model)
