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
    """The language model of a directory, hub id or configuration, on the meta device. No weights are read.

    Raises ModelError where `model_config` and `auto_class` do.
    """
    config: Any = model_config(source) if source is None or isinstance(source, str | Path) else source
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers auto class that builds the language model of a configuration: causal, else image and text.

    Raises ModelError for a model type that has neither.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise ModelError(f"{config.model_type}: transformers {_transformers_version()} has no language model of this type")


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


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
