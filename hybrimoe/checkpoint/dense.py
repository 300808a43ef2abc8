"""The part of a model that is not experts: built on the meta device, then loaded, tied and completed like transformers
does in `from_pretrained`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.loading_report import LoadStateDictInfo

from hybrimoe import compat
from hybrimoe.checkpoint.config_numbers import check_config, check_positions, check_sizes
from hybrimoe.checkpoint.conversion import Conversion, ConversionPlan, ModelShapes
from hybrimoe.checkpoint.errors import LeftOutWarning, listed
from hybrimoe.checkpoint.reading import new_weight
from hybrimoe.checkpoint.source import read_config_dict
from hybrimoe.errors import CheckpointError, ModelError
from hybrimoe.generation.sampling import check_settings
from hybrimoe.text_files import plain_texts

AUTO_CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
)
EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""Integers of a dtype's size, and the bits of its exponent."""
CHECKED_VALUES = 1 << 18  # at a time
SCALE_KEY = re.compile(r"(^|[._])(input|activation|output|[kqv]|kv|prob)_scale(_ub|_inv)?$|\.qscale_act$")
PREDICTION_KEY = re.compile(r"(^|\.)(mtp|mtp_layers|nextn)\.")
BOUND_KEY = re.compile(r"\.(input|output)_(min|max)$")  # Gemma's towers: infinite where nothing is bounded
EXPERTS_BY_TOKEN = ".tid2eid"  # DeepSeek-V4's; a router's weight beside it has a row an expert
LAYER_KEY = re.compile(r"(^|\.)layers\.(\d+)\.")
OTHER_STACKS = re.compile(r"vision|visual|audio|encoder")  # have layers of their own, which num_hidden_layers is not of
DRAWS = (
    "normal_", "trunc_normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
)  # fmt: skip
"""Functions of `torch.nn.init` that fill a tensor with random values."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration of a model directory or GGUF file, without its quantisation (weights are dequantised when they
    are read)."""
    if path.is_file():
        return _described(path, read_config_dict(path))
    return _read_directory(path)


def _described(file: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that a GGUF file's metadata stand for."""
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # whatever transformers raises of metadata is about that file
        raise ModelError(
            f"{file}: transformers makes no {raw['model_type']} of its metadata: {_reason(error)}; fetch the file again"
        ) from error
    check_config(file, config)
    return config


def _read_directory(directory: Path) -> PreTrainedConfig:
    raw = read_config_dict(directory)
    check_sizes(directory, raw)
    if "auto_map" in raw and raw["model_type"] not in CONFIG_MAPPING:
        raise code_of_its_own(str(directory), raw["model_type"])
    try:
        with plain_texts(directory) as plain:
            config = AutoConfig.from_pretrained(plain, trust_remote_code=False)
        config.name_or_path = str(directory)
    except Exception as error:  # whatever transformers raises of a configuration is about that file
        raise ModelError(
            f"{directory}: transformers cannot read config.json ({raw['model_type']}): {_reason(error)}; correct that"
            " entry, or fetch the file again"
        ) from error
    check_config(directory, config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _reason(error: Exception) -> str:
    """The words of an error on one line, with its kind where they alone say little (`KeyError: 'rope_type'`)."""
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: {words}"


def code_of_its_own(model: str, model_type: str) -> ModelError:
    """The error for a model whose architecture is Python code beside its weights, which is never run."""
    return ModelError(
        f"{model} brings code of its own (auto_map in config.json), which hybrimoe never runs, and its model_type"
        f" {model_type!r} is none that transformers {transformers.__version__} knows; use a newer transformers, or a"
        " conversion of the model to a model_type that it knows"
    )


def dense_dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    """The dtype of all weights but experts: by name, or ("auto", "int8", "int4") as the model's configuration says."""
    own = config.get_text_config().dtype or config.dtype
    return DTYPES.get(name, own if isinstance(own, torch.dtype) else torch.float32)


def on_meta(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `make` makes, without storage; small tables of positions may have some. For one thread at a time."""
    with torch.device("meta"):
        torch.empty(0)  # torch now looks up, once and for all, which of its functions make tensors
    try:
        with torch.device("meta"), _without_sympy():
            return make()
    except RuntimeError:  # tensors with and without storage do not mix
        with torch.device("meta"):
            return make()


@contextmanager
def _without_sympy() -> Iterator[None]:
    """Within the block modules are made without what torch imports sympy for, which takes a third of a second: to draw
    values for tensors without storage, and to count with ranges that have none. Of other threads nothing changes."""

    def drawing(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda tensor, *args, **named: tensor if tensor.is_meta else draw(tensor, *args, **named)

    def stored(*args: Any, device: Any = None, **named: Any) -> torch.Tensor:
        here = device is None and torch.get_default_device().type == "meta"
        return arange(*args, device="cpu" if here else device, **named)

    drawn, arange = {name: getattr(nn.init, name) for name in DRAWS}, torch.arange
    try:
        torch.arange = stored
        for name, draw in drawn.items():
            setattr(nn.init, name, drawing(draw))
        yield
    finally:
        torch.arange = arange
        for name, draw in drawn.items():
            setattr(nn.init, name, draw)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, *, whole: bool = False) -> PreTrainedModel:
    """The model of `config` without storage. Raises ModelError where transformers has no language model for it.

    whole: with the part that sees images, also where transformers has its language model alone.
    """
    classes = AUTO_CLASSES[::-1] if whole else AUTO_CLASSES
    auto: Any = next((auto for mapping, auto in classes if type(config) in mapping), None)
    if auto is None:
        raise ModelError(f"transformers has no language model with experts for model_type {config.model_type!r}")
    try:
        model = on_meta(lambda: auto.from_config(config, dtype=dtype))
    except Exception as error:  # and so is whatever is raised of a model that is built from it
        if isinstance(error, KeyError) and error.args[0] in _rope_types(config):
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ModelError(
                f"config.json asks for positions of the type {error.args[0]!r} (rope_type), which transformers"
                f" {transformers.__version__} does not know; it knows {known}: correct that entry, or use a"
                " transformers that knows it"
            ) from error
        raise ModelError(f"config.json describes no valid {config.model_type} model: {_reason(error)}") from error
    return model.eval()


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """The types of rotary positions that a configuration and its parts name."""
    parts = [config.to_dict()]
    found: set[str] = set()
    while parts:
        part = parts.pop()
        found |= {value for name, value in part.items() if name == "rope_type" and isinstance(value, str)}
        parts += [value for value in part.values() if isinstance(value, dict)]
    return found


def read_generation_defaults(model: PreTrainedModel, directory: Path) -> None:
    """Of a model directory: takes over generation_config.json (sampling defaults, end tokens), if there is one, as
    `from_pretrained` does.

    Raises ModelError where the file cannot be read, or has a value that no token could be chosen with.
    """
    if not (directory / GENERATION_CONFIG_NAME).is_file() or not model.can_generate():
        return
    file = directory / GENERATION_CONFIG_NAME
    try:
        with plain_texts(directory) as plain:
            model.generation_config = GenerationConfig.from_pretrained(plain)
    except Exception as error:  # whatever transformers raises here is about that file
        raise ModelError(
            f"{file}: transformers cannot read it: {_reason(error)}; correct the file, or remove it"
        ) from error
    check_settings(model, str(file))


def load_dense(
    model: PreTrainedModel,
    conversions: Iterable[Conversion],
    shapes: ModelShapes,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | None = None,
    only: Set[str] | None = None,
) -> set[str]:
    """Reads the sources of `conversions` into `model`, each cast to its entry of `dtypes`; gives the loaded keys.

    device: where the weights go, None for the CPU. only: keys to keep, where a conversion gives more than is wanted.

    Raises CheckpointError for a shape or dtype that does not match, and for values that are not finite.
    """
    loaded: set[str] = set()
    for conversion in conversions:
        for key, tensor in read_checked(conversion, shapes, dtypes, only).items():
            _set(model, key, tensor.to(device))
            loaded.add(key)
    return loaded


def read_checked(
    conversion: Conversion, shapes: ModelShapes, dtypes: Mapping[str, torch.dtype], only: Set[str] | None = None
) -> dict[str, torch.Tensor]:
    """The parameters that a conversion gives, by key, as the model wants them. Arguments and errors of `load_dense`."""
    checked: dict[str, torch.Tensor] = {}
    for key, tensor in conversion.whole(shapes).items():
        if only is not None and key not in only:
            continue
        if key not in shapes.shapes:
            raise CheckpointError(f"{listed(conversion.source_keys())} gives {key}, which the model does not have")
        _check(key, tensor, shapes.shapes[key], dtypes[key], conversion)
        if key.endswith(EXPERTS_BY_TOKEN):
            _check_experts(key, tensor, shapes.shapes[key.removesuffix(EXPERTS_BY_TOKEN) + ".weight"][0], conversion)
        checked[key] = _cast(tensor, dtypes[key])
    return checked


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else new_weight(tensor.shape, dtype).copy_(tensor)


def complete(
    model: PreTrainedModel, loaded: set[str], later: Set[str], plan: ConversionPlan, *, unknown_keys: str
) -> None:
    """Ties weights, computes buffers that no checkpoint stores, and checks that nothing is missing or left over.

    later: keys of parameters that stay on the meta device for now (the experts).
    Raises CheckpointError naming parameters without weights and (unknown_keys="error") weights without a parameter,
    ModelError where the configuration gives positions that are not finite.
    """
    for key in later:
        model.get_parameter(key)._is_hf_initialized = True
    missing = set(model.state_dict()) - loaded - later
    info = LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=set(plan.unknown),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    _check_keys(model, info, unknown_keys)
    model.mark_tied_weights_as_initialized(info)
    compat.compute_missing(model, missing)
    check_positions(model)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    model.requires_grad_(False)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if left := [name for name, tensor in tensors if tensor.is_meta and name not in later]:
        raise CheckpointError(f"no values for {listed(left)}; the checkpoint does not match its config.json")


def _check_keys(model: PreTrainedModel, info: LoadStateDictInfo, unknown_keys: str) -> None:
    report = LoadStateDictInfo(
        missing_keys=set(info.missing_keys) - set(model.all_tied_weights_keys),
        unexpected_keys=set(info.unexpected_keys),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    compat.forgive_known_keys(model, report)
    if report.missing_keys:
        names = sorted(report.missing_keys)
        raise CheckpointError(
            f"the checkpoint lacks {listed(names)}; a shard is missing or config.json is another model's"
        )
    extras = left_out(report.unexpected_keys, model.config.get_text_config().num_hidden_layers)
    if extras:
        parts = [f"{len(keys)} of {what} ({listed(keys)})" for what, keys in extras.items()]
        warnings.warn(LeftOutWarning(f"weights of the checkpoint were left out: {'; '.join(parts)}"), stacklevel=2)
    unknown = report.unexpected_keys.difference(*extras.values())
    if unknown and unknown_keys == "error":
        names = sorted(unknown)
        raise CheckpointError(
            f"the checkpoint has weights that the model does not know: {listed(names)}; config.json is another model's,"
            " or they may be left out: --unknown-keys ignore, unknown_keys: ignore in the deployment file, or"
            ' hybrimoe.load(..., unknown_keys="ignore")'
        )


def left_out(keys: Iterable[str], num_hidden_layers: int) -> dict[str, list[str]]:
    """Those of `keys` that the model has no place for and that are left out by rule, by what they are."""
    found: dict[str, list[str]] = {}
    for key in sorted(keys):
        if (what := _kind_of_extra(key, num_hidden_layers)) is not None:
            found.setdefault(what, []).append(key)
    return found


def _kind_of_extra(key: str, num_hidden_layers: int) -> str | None:
    if SCALE_KEY.search(key):
        return "scales of activations and of the KV cache"
    if PREDICTION_KEY.search(key):
        return "layers that predict several tokens"
    layer = LAYER_KEY.search(key)
    if layer and int(layer[2]) >= num_hidden_layers and not OTHER_STACKS.search(key):
        return f"layers beyond num_hidden_layers={num_hidden_layers} of config.json"
    return None


def _check(key: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype, conversion: Conversion) -> None:
    names = listed(conversion.source_keys())
    if tensor.shape != shape:
        raise CheckpointError(
            f"{key}: config.json asks for shape {list(shape)}, the checkpoint gives {list(tensor.shape)} ({names})"
        )
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise CheckpointError(f"{key}: the model has {dtype}, the checkpoint gives {tensor.dtype} ({names})")
    if BOUND_KEY.search(key) and not bool(torch.isnan(tensor).any()):
        return
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise CheckpointError(f"{names} has values that are NaN or infinite (for {key}); the checkpoint is damaged")


def _check_experts(key: str, ids: torch.Tensor, num_experts: int, conversion: Conversion) -> None:
    """Of a table that gives each token its experts."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise CheckpointError(
            f"{key} sends tokens to experts {int(ids.min())} to {int(ids.max())}, of {num_experts} that there are"
            f" ({listed(conversion.source_keys())}); the checkpoint is damaged"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: those have all bits of their exponent set.

    Looked at in parts that stay in the caches, by NumPy: torch's `isfinite` takes 20 times as long for bfloat16, and
    memory for several copies of it; and its threads wait for each other in each part, for seconds where other programs
    have the cores.
    """
    if tensor.dtype not in EXPONENTS:
        return bool(torch.isfinite(tensor).all())
    words, exponent = EXPONENTS[tensor.dtype]
    values = tensor.contiguous().view(words).flatten().numpy()
    parts = (values[start : start + CHECKED_VALUES] for start in range(0, values.size, CHECKED_VALUES))
    return all(int((part & exponent).max()) != exponent for part in parts)


def _set(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    value: torch.Tensor = tensor
    if name not in module._buffers:
        value = nn.Parameter(tensor, requires_grad=False)
    value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves such tensors as they are
    setattr(module, name, value)


def strict_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter and buffer: as the (meta) model was built, or float32 where its class insists."""
    plan = compat.dtype_plan(model, dtype)
    patterns = [(re.compile(pattern), wanted) for pattern, wanted in plan.items()]
    return {
        key: next((wanted for pattern, wanted in patterns if pattern.search(key)), tensor.dtype)
        for key, tensor in model.state_dict().items()
    }
