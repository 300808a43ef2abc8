"""A model without weights: its modules on the meta device, and its sizes, from its configuration alone."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.checkpoint.gguf.file import is_gguf, open_gguf
from hybrimoe.errors import ConfigError, ModelError, unknown
from hybrimoe.text_files import parse_json, read_text
from scheduler.machine.profile import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hybrimoe.checkpoint.choice import ExpertChoice
    from hybrimoe.config.deploy import RopeConfig

KV_DTYPES = ("float32", "bfloat16", "int8", "int4")
HEADER_LENGTH = struct.Struct("<Q")  # a safetensors file begins with the bytes of its header
TOWER_KEY = re.compile(r"(^|\.)\w*(visual|vision|audio|projector)\w*\.")
EXPERTS_OF_A_LAYER = "_exps.weight"  # in names of GGUF tensors


def meta_model(
    source: str | Path | PreTrainedConfig | None, vision: str = "auto", rope: RopeConfig | None = None
) -> PreTrainedModel:
    """The model of a directory, GGUF file, hub id or configuration, as `hybrimoe.load` builds it before it reads
    weights. vision, rope: as in the deployment file.

    None is the demo model. Of a hub id only config.json is fetched. Raises ModelError for a directory that is no model,
    a hub id that cannot be read, and a model type without a language model.
    """
    from hybrimoe.checkpoint.dense import dense_dtype
    from hybrimoe.checkpoint.dense import meta_model as build
    from hybrimoe.checkpoint.rope import check_stretched, stretch
    from hybrimoe.experts.towers import remove_towers

    config = model_config(source) if source is None or isinstance(source, str | Path) else source
    sees = isinstance(source, str | Path) and vision == "auto" and _has_processor(source)
    stretch(config, rope)
    model = build(config, dense_dtype("auto", config), whole=sees)
    check_stretched(model, rope)
    if vision == "none" or (isinstance(source, str | Path) and is_gguf(Path(source))):
        remove_towers(model)
    return model


def model_config(model: str | Path | None) -> PreTrainedConfig:
    """Configuration of a directory, GGUF file or hub id; None is the demo model. Errors as `meta_model`."""
    from hybrimoe.checkpoint.dense import read_config
    from hybrimoe.checkpoint.source import is_hub_id, model_path

    return _hub_config(str(model)) if is_hub_id(model) else read_config(model_path(model))


def model_shape(model: str | Path | None, vision: str = "auto", rope: RopeConfig | None = None) -> ModelShape:
    """Sizes of a model, and of the part that sees images where it is loaded (vision, rope: as in the deployment file).

    model: a directory, a GGUF file, a hub id (its cached or fetched config.json), None for the demo model, or what
    `hybrimoe.machine.profiles.open_shape` takes (the name of a shipped shape, a file).

    Raises ModelError where the hub's cache has no config.json of that id and none can be fetched, and for a context
    that cannot be stretched so; CheckpointError for a GGUF file that is damaged.
    """
    shape = _own_shape(model, vision)
    return shape if rope is None else replace(shape, max_context=_stretched_context(model, rope))


def _own_shape(model: str | Path | None, vision: str) -> ModelShape:
    from hybrimoe.checkpoint.source import HUB_FILE, hub_config_file, is_hub_id, model_path, read_config_dict
    from hybrimoe.machine.profiles import open_shape
    from yaml_rules.shapes import derive_shape

    path = model_path(None) if model is None else Path(model).expanduser()
    if is_hub_id(model) and path.suffix not in (".json", ".yaml", ".yml"):
        # the hub's cache keeps the file under another name
        return replace(open_shape(hub_config_file(str(model))), name=str(model).rpartition("/")[2])
    if path.is_dir() or HUB_FILE.match(str(model)):
        path = model_path(model)
    if is_gguf(path):
        path = model_path(path)
        return ModelShape.from_mapping(derive_shape(read_config_dict(path), path.stem))
    shape = open_shape(path if model is None or path.is_dir() else str(model))
    return shape if vision == "none" else replace(shape, tower_bytes=_tower_bytes(path))


def _stretched_context(model: str | Path | None, rope: RopeConfig) -> int:
    """Tokens of the context that `rope` gives to `model`, which is what `model_shape` takes. Raises ModelError where it
    gives none."""
    from hybrimoe.checkpoint.rope import stretched
    from yaml_rules import shapes
    from yaml_rules.located import read_yaml

    path = shapes.FOLDER / f"{model}.yaml" if model in shapes.shape_names() else Path(model or "")
    if path.is_file() and path.suffix in (".json", ".yaml", ".yml"):
        data = read_yaml(path).data
        config = {"rope_parameters": {"rope_type": "default"}, **data.get("config", data)}  # files of shapes name none
        return stretched({**config, **(config.get("text_config") or {})}, rope, str(model)).context
    from hybrimoe.generation.context import model_context_tokens

    return model_context_tokens(meta_model(model, "none", rope).config) or 0


def _has_processor(model: str | Path) -> bool:
    """Whether a model's folder, if it is there, has a processor for images."""
    from hybrimoe.checkpoint.source import is_hub_id, model_path
    from hybrimoe.compat import has_processor

    return not is_hub_id(model) and has_processor(model_path(model))


def _tower_bytes(path: Path) -> int:
    """What the weights of towers take in a model's folder; 0 where it has no processor, or its weights are not here.

    Read from the headers of its files, without torch: `hybrimoe plan` does without.
    """
    from hybrimoe.checkpoint.source import has_weights, weight_files
    from hybrimoe.compat import has_processor

    if not has_processor(path) or not has_weights(path):
        return 0
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in weight_files(path).paths
        for name, entry in _safetensors_header(file).items()
        if TOWER_KEY.search(name)
    )


def _safetensors_header(file: Path) -> dict[str, Any]:
    """The entries of a file; none where it is damaged, which loading it tells."""
    try:
        with file.open("rb") as stream:
            (length,) = HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))
            header = parse_json(stream.read(length)) if length <= file.stat().st_size else {}
    except (OSError, ValueError, struct.error):
        return {}
    return {name: entry for name, entry in header.items() if name != "__metadata__"} if isinstance(header, dict) else {}


def with_kv_dtype(shape: ModelShape, model: str | Path | None, kv_dtype: str) -> ModelShape:
    """The shape of `model` with the bytes of a token's keys and values where they are stored as `kv_dtype`; auto:
    in 16 bit. Raises ConfigError for what is no such dtype."""
    from types import SimpleNamespace

    from hybrimoe.checkpoint.source import HUB_FILE, hub_config_file, is_hub_id, model_path, read_config_dict
    from hybrimoe.generation.kv_memory import stored_bytes
    from yaml_rules import shapes
    from yaml_rules.located import read_yaml

    if kv_dtype == "auto":
        return shape
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(unknown("dtype of keys and values", kv_dtype, ("auto", *KV_DTYPES)))
    if model in shapes.shape_names():
        config = read_yaml(shapes.FOLDER / f"{model}.yaml").data["config"]
    elif is_hub_id(model) and not HUB_FILE.match(str(model)):
        config = parse_json(read_text(hub_config_file(str(model))))
    else:
        config = read_config_dict(model_path(model))
    settings = SimpleNamespace(**{**config, **config.get("text_config", {})})
    return replace(shape, kv_bytes=stored_bytes(settings, kv_dtype))


def expert_choice(
    model: str | Path | None, meta: PreTrainedModel, expert_dtype: str, adapters: Sequence[str] = ()
) -> ExpertChoice:
    """What `hybrimoe.load` packs experts as; reads headers only. meta: the model's `meta_model`. adapters: `DIR` or
    `DIR:SCALE`, which are merged.

    Of a hub id, and of a directory without weights, nothing is known of how its experts are stored. Raises
    CheckpointError for files that are damaged, or in a format that is not read.
    """
    from hybrimoe.checkpoint.adapters.file import open_adapter
    from hybrimoe.checkpoint.adapters.merging import merge_adapters
    from hybrimoe.checkpoint.choice import choose_expert_dtype, wanted_dtype
    from hybrimoe.checkpoint.experts import layer_sources
    from hybrimoe.checkpoint.source import has_weights, is_hub_id, model_path, read_config_dict
    from hybrimoe.checkpoint.weights import open_weights
    from hybrimoe.experts.layout import find_experts, read

    path = None if is_hub_id(model) else model_path(model)
    if path is None or (path.is_dir() and not has_weights(path)):
        return choose_expert_dtype(wanted_dtype(expert_dtype), ())
    plan = open_weights(path, read_config_dict(path)).plan(meta)
    merge_adapters(meta, plan, [open_adapter(name) for name in adapters])
    sources = layer_sources({name: read(module) for name, module in find_experts(meta)}, plan.conversions)
    return choose_expert_dtype(wanted_dtype(expert_dtype), sources)


def packing_remark(model: str | Path | None, expert_dtype: str) -> str | None:
    """What a GGUF file's quantised experts become, in a sentence; None for other models. Reads the header only."""
    from hybrimoe.checkpoint.source import is_hub_id, model_path

    path = None if model is None or is_hub_id(model) or not Path(model).expanduser().exists() else model_path(model)
    if path is None or not path.is_file():
        return None
    experts = [tensor for name, tensor in open_gguf(path).tensors.items() if EXPERTS_OF_A_LAYER in name]
    types = ", ".join(sorted({tensor.type_name for tensor in experts}))
    gib = sum(tensor.nbytes for tensor in experts) / 2**30
    return (
        f"{path.name} has its experts as {types} ({gib:.2f} GiB); they are packed once as {expert_dtype}:"
        " `hybrimoe inspect` measures what that adds"
    )


def _hub_config(hub_id: str) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    from hybrimoe.checkpoint.config_numbers import check_config
    from hybrimoe.checkpoint.dense import code_of_its_own

    try:
        raw, _ = PreTrainedConfig.get_config_dict(hub_id)
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise code_of_its_own(hub_id, str(raw.get("model_type")))
        config = AutoConfig.from_pretrained(hub_id, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{hub_id}: its configuration cannot be fetched from the hub: {first}") from error
    check_config(hub_id, config)
    return config
