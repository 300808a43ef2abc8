"""What a model directory says about how its weights are quantised, and which of those ways are read.

The method stands in config.json (`quantization_config` or `compression_config`, at the top or in the configuration of a
part, such as `text_config`) or in a file of its own beside it. Nothing here reads weights or needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.errors import CheckpointError

CONFIG_NAME = "config.json"
CONFIG_KEYS = ("quantization_config", "compression_config")
SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, AutoGPTQ, AutoAWQ
FP8, MXFP4 = "fp8", "mxfp4"
FP8_DEFAULT_BLOCK = (128, 128)
"""What transformers' FineGrainedFP8Config takes for an fp8 checkpoint without `weight_block_size`."""
COMPRESSED_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors: a weight and one `weight_scale`
MODELOPT_ALGORITHMS = ("FP8",)
READABLE = "fp8, mxfp4, compressed-tensors float-quantized, ModelOpt FP8, and unquantised weights"
TENSOR_NAMES: dict[str, tuple[str, ...]] = {
    "bitsandbytes": (".SCB", ".absmax", ".nested_absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
    "gptq or awq": (".qweight", ".qzeros"),
    "nvfp4": (".weight_scale_2", "_proj_scale_2", ".weight_global_scale"),
    "compressed-tensors (pack-quantized)": (".weight_packed", "_proj_packed"),
    "hqq": (".W_q",),
    "quanto": (".weight._data", ".weight_qtype"),
    "aqlm": (".codebooks",),
}
"""How the tensors of methods that are not read end, for checkpoints whose configuration says nothing."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How weights are quantised, as far as the directory says.

    method: its name, None where none is named. where: file and key. block: rows and columns that share a scale; None
    where none are stated.
    """

    method: str | None = None
    where: str = CONFIG_NAME
    block: tuple[int, int] | None = None


def read_quantisation(directory: Path, config: Mapping[str, Any]) -> Quantisation:
    """What `directory`, whose config.json is `config`, says about its quantisation.

    Raises UnsupportedCheckpointError for a method that is not read, CheckpointError for a description that is damaged.
    """
    for where, entry in (*_in_config(config), *_in_files(directory)):
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{where} of {directory} is {entry!r}; expected a mapping with quant_method")
        if (method := _method(entry, where)) is not None:
            if method not in (FP8, MXFP4):
                raise refused(method, f"{where} of {directory}")
            return Quantisation(method, where, _block(entry, where))
    return Quantisation()


def check_tensor_names(names: Iterable[str]) -> None:
    """Raises UnsupportedCheckpointError where names of tensors tell of a method that is not read."""
    for name in names:
        for method, suffixes in TENSOR_NAMES.items():
            if name.endswith(suffixes):
                raise refused(method, f"the tensor {name}")


def refused(method: str, where: str) -> UnsupportedCheckpointError:
    """The error for a quantisation that is not read. where: what tells of it."""
    return UnsupportedCheckpointError(
        f"the checkpoint is quantised with {method}; readable are {READABLE} (told by {where}). Use the unquantised"
        " checkpoint, or one of these: hybrimoe quantises experts itself (expert_dtype: int4)"
    )


def _in_config(config: Mapping[str, Any], path: str = f"{CONFIG_NAME}: ") -> Iterator[tuple[str, Any]]:
    """(file and key, entry) of every description in `config`, that of the whole model first."""
    for key in CONFIG_KEYS:
        if config.get(key):
            yield f"{path}{key}", config[key]
    for key, part in config.items():
        if key.endswith("_config") and key not in CONFIG_KEYS and isinstance(part, Mapping):
            yield from _in_config(part, f"{path}{key}.")


def _in_files(directory: Path) -> Iterator[tuple[str, Any]]:
    for name in SIDE_FILES:
        try:
            entry = json.loads((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory / name} cannot be read as JSON: {error}") from error
        if isinstance(entry, Mapping):
            entry = {"quant_method": _DEFAULT_METHODS[name], **entry}
        yield name, entry


_DEFAULT_METHODS = dict(zip(SIDE_FILES, ("modelopt", "gptq", "awq"), strict=True))


def _method(entry: Mapping[str, Any], where: str) -> str | None:
    """`FP8` or `MXFP4` for what is read like them, else a name for the message; None where nothing is quantised."""
    method = entry.get("quant_method")
    match method.lower().replace("_", "-") if isinstance(method, str) else method:
        case None:
            return _unnamed(entry, where)
        case "fp8" | "mxfp4" as readable:
            return readable
        case "compressed-tensors":
            return _compressed(entry)
        case "modelopt" | "modelopt-fp4" | "modelopt-fp8":
            return _modelopt(entry)
        case _:
            return str(method)


def _unnamed(entry: Mapping[str, Any], where: str) -> str | None:
    """The method of a description that does not name it."""
    if "weight_block_size" in entry or str(entry.get("fmt", "")).startswith("e4m3"):
        return FP8
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    if "w_bit" in entry:
        return "awq"
    if "config_groups" in entry:
        return _compressed(entry)
    if "quant_algo" in entry or "quantization" in entry:
        return _modelopt(entry)
    if "bits" in entry:
        return "gptq"
    raise CheckpointError(f"{where} has no quant_method, and its keys tell of none: {', '.join(map(str, entry))}")


def _compressed(entry: Mapping[str, Any]) -> str:
    name = str(entry.get("format"))
    weights = [group.get("weights") or {} for group in _groups(entry)]
    is_fp8 = all(weight.get("type") == "float" and weight.get("num_bits") == 8 for weight in weights)
    return FP8 if name in COMPRESSED_FORMATS and is_fp8 else f"compressed-tensors ({name})"


def _modelopt(entry: Mapping[str, Any]) -> str | None:
    inner = entry.get("quantization")
    algorithm = (inner if isinstance(inner, Mapping) else entry).get("quant_algo")
    if algorithm is None:  # only the KV cache is quantised
        return None
    return FP8 if algorithm in MODELOPT_ALGORITHMS else f"modelopt ({algorithm})"


def _groups(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = entry.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _block(entry: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """The one block size that a description states. Raises CheckpointError where it is no pair of whole numbers."""
    found = [entry.get("weight_block_size")]
    found += [(group.get("weights") or {}).get("block_structure") for group in _groups(entry)]
    stated = {_pair(value, where) for value in found if value is not None}
    if len(stated) > 1:
        raise CheckpointError(f"{where} states several block sizes ({sorted(stated)}); expected one")
    return stated.pop() if stated else None


def _pair(value: Any, where: str) -> tuple[int, int]:
    numbers = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(number) for number in numbers)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{where}: a block size of {value!r}; expected rows and columns, such as [128, 128]")
    return rows, columns
