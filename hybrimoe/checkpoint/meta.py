"""A model without weights: its modules on the meta device, from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(source: str | Path | PreTrainedConfig | None) -> PreTrainedModel:
    """The language model of a directory, hub id or configuration, as `hybrimoe.load` builds it before it reads weights.

    None is the demo model. Of a hub id only config.json is fetched. Raises ModelError for a directory that is no model,
    a hub id that cannot be read, and a model type without a language model.
    """
    from hybrimoe.checkpoint.dense import dense_dtype
    from hybrimoe.checkpoint.dense import meta_model as build

    config = model_config(source) if source is None or isinstance(source, str | Path) else source
    return build(config, dense_dtype("auto", config))


def model_config(model: str | Path | None) -> PreTrainedConfig:
    """Configuration of a directory or hub id; None is the demo model. Raises ModelError as `meta_model` does."""
    from hybrimoe.checkpoint.dense import read_config
    from hybrimoe.checkpoint.source import is_hub_id, model_directory

    return _hub_config(str(model)) if is_hub_id(model) else read_config(model_directory(model))


def config_file(model: str) -> str:
    """What `hybrimoe.machine.profiles.open_shape` reads for a model: the cached or fetched config.json of a hub id; a
    directory, a file or the name of a shipped shape stays as it is.

    Raises ModelError where the hub's cache has no config.json of that id and none can be fetched.
    """
    from hybrimoe.checkpoint.source import hub_config_file, is_hub_id

    is_a_file = Path(model).suffix in (".json", ".yaml", ".yml")
    return str(hub_config_file(model)) if is_hub_id(model) and not is_a_file else model


def _hub_config(hub_id: str) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    from hybrimoe.checkpoint.dense import code_of_its_own

    try:
        raw, _ = PreTrainedConfig.get_config_dict(hub_id)
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise code_of_its_own(hub_id, str(raw.get("model_type")))
        return AutoConfig.from_pretrained(hub_id, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{hub_id}: its configuration cannot be fetched from the hub: {first}") from error
