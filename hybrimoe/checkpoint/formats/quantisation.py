"""What a model directory says about how its weights are quantised, and which of those ways are read.

The method stands in config.json (`quantization_config` or `compression_config`, at the top or in the configuration of a
part, such as `text_config`) or in a file of its own beside it. Nothing here reads weights or needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError, unreadable
from hybrimoe.errors import CheckpointError
from hybrimoe.text_files import parse_json, read_text

CONFIG_NAME = "config.json"
CONFIG_KEYS = ("quantization_config", "compression_config")
SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, AutoGPTQ, AutoAWQ
FP8, MXFP4, GPTQ, AWQ = "fp8", "mxfp4", "gptq", "awq"
COMPRESSED, NVFP4, BITSANDBYTES = "compressed-tensors", "nvfp4", "bitsandbytes"
METHODS = (FP8, MXFP4, GPTQ, AWQ, COMPRESSED, NVFP4, BITSANDBYTES)
FP8_DEFAULT_BLOCK = (128, 128)
"""What transformers' FineGrainedFP8Config takes for an fp8 checkpoint without `weight_block_size`."""
FLOAT_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors: a weight and one `weight_scale`
INT_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
FP4_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
COMPRESSED_FORMATS = frozenset(
    {*FLOAT_FORMATS, *INT_FORMATS, *FP4_FORMATS, "mxfp8-quantized", "mixed-precision", "dense"}
)
MODELOPT_ALGORITHMS = {"FP8": FP8, "NVFP4": NVFP4}
ZERO_SHIFTS = {None: 1, "gptq": 1, "gptq_v2": 0}
"""What is added to the zero points of a GPTQ checkpoint, by its checkpoint_format: "gptq" stores them less one."""
AWQ_VERSIONS = (None, "gemm", "exllama", "ipex")  # all of them lie on disk as "gemm" does
READABLE = (
    "fp8, mxfp4, nvfp4, GPTQ (2, 3, 4, 8 bits), AWQ (gemm), compressed-tensors (int, float8, nvfp4, mxfp4),"
    " ModelOpt FP8 and NVFP4, bitsandbytes (nf4, fp4, int8), and unquantised weights"
)
TENSOR_NAMES: dict[str, tuple[str, ...]] = {
    "hqq": (".W_q",),
    "quanto": (".weight._data", ".weight_qtype"),
    "aqlm": (".codebooks",),
    "eetq": (".weight_scales",),
    "vptq": (".centroids.weight",),
    "exl2": (".q_weight",),
    "exl3": (".trellis",),
}
"""How the tensors of methods that are not read end, for checkpoints whose configuration says nothing."""


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """A config group of compressed-tensors: the layers that it is for (names, `re:` and an expression, or classes such
    as Linear), and the bits of their codes."""

    targets: tuple[str, ...]
    bits: int | None

    def names(self, module: str) -> bool:
        """Whether a target is the name of `module`, or an expression that it matches."""
        return any(_matches(target, module) for target in self.targets)

    @property
    def is_general(self) -> bool:
        """Whether it is for all layers of a class, which names of tensors do not tell."""
        return any(not target.startswith("re:") and "." not in target for target in self.targets)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How weights are quantised, as far as the directory says.

    method: its name, None where none is named. where: file and key. block: rows and columns that share a scale; None
    where none are stated. bits, group_size (columns that share a scale), symmetric, act_order and zero_shift (added to
    stored zero points): of GPTQ and AWQ, None where not said or one group for all columns. groups: of
    compressed-tensors.
    """

    method: str | None = None
    where: str = CONFIG_NAME
    block: tuple[int, int] | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    zero_shift: int = 1
    groups: tuple[WeightGroup, ...] = ()

    def group_of(self, key: str) -> WeightGroup | None:
        """The group of the weight `key`: one that names its layer, else one for all layers of a class."""
        module = key.removesuffix(".weight")
        named = next((group for group in self.groups if group.names(module)), None)
        return named or next((group for group in self.groups if group.is_general), None)


def read_quantisation(directory: Path, config: Mapping[str, Any]) -> Quantisation:
    """What `directory`, whose config.json is `config`, says about its quantisation.

    Raises UnsupportedCheckpointError for a method that is not read, CheckpointError for a description that is damaged.
    """
    for where, entry in (*_in_config(config), *_in_files(directory)):
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{where} of {directory} is {entry!r}; expected a mapping with quant_method")
        if (method := _method(entry, where)) is not None:
            if method not in METHODS:
                raise refused(method, f"{where} of {directory}")
            return _described(method, where, entry)
    return Quantisation()


def _described(method: str, where: str, entry: Mapping[str, Any]) -> Quantisation:
    if method not in (GPTQ, AWQ):
        return Quantisation(method, where, _block(entry, where), groups=_weight_groups(entry, where))
    group_size = _whole(entry, ("group_size", "q_group_size"), where)
    return Quantisation(
        method,
        where,
        bits=_whole(entry, ("bits", "w_bit"), where),
        group_size=group_size if group_size is not None and group_size > 0 else None,
        symmetric=_truth(entry.get("sym")),
        act_order=_truth(entry.get("desc_act")),
        zero_shift=ZERO_SHIFTS[entry.get("checkpoint_format", entry.get("format"))] if method == GPTQ else 0,
    )


def _whole(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> int | None:
    for name in names:
        if (value := entry.get(name)) is not None:
            if type(value) is not int:
                raise CheckpointError(f"{where}: {name} is {value!r}; expected a whole number")
            return value
    return None


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _weight_groups(entry: Mapping[str, Any], where: str) -> tuple[WeightGroup, ...]:
    """Raises CheckpointError for a group whose targets or bits are none."""
    groups = []
    for group in _groups(entry):
        targets, bits = group.get("targets") or (), (group.get("weights") or {}).get("num_bits")
        try:
            for target in targets:
                re.compile(target.removeprefix("re:"))
        except (re.error, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where}: the targets {targets!r} of a config group are damaged ({error})"
            ) from error
        groups.append(WeightGroup(tuple(targets), bits if type(bits) is int else None))
    return tuple(groups)


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
            entry = parse_json(read_text(directory / name))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(unreadable(directory / name, error, "fetch it again")) from error
        if isinstance(entry, Mapping):
            entry = {"quant_method": _DEFAULT_METHODS[name], **entry}
        yield name, entry


_DEFAULT_METHODS = dict(zip(SIDE_FILES, ("modelopt", "gptq", "awq"), strict=True))


def _method(entry: Mapping[str, Any], where: str) -> str | None:
    """One of `METHODS` for what is read like it, else a name for the message; None where nothing is quantised."""
    method = entry.get("quant_method")
    match method.lower().replace("_", "-") if isinstance(method, str) else method:
        case None:
            return _unnamed(entry, where)
        case "fp8" | "mxfp4" | "bitsandbytes" as readable:
            return readable
        case "gptq":
            return _gptq(entry)
        case "awq":
            return _awq(entry)
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
        return BITSANDBYTES
    if "w_bit" in entry:
        return _awq(entry)
    if "config_groups" in entry:
        return _compressed(entry)
    if "quant_algo" in entry or "quantization" in entry:
        return _modelopt(entry)
    if "bits" in entry:
        return _gptq(entry)
    raise CheckpointError(f"{where} has no quant_method, and its keys tell of none: {', '.join(map(str, entry))}")


def _gptq(entry: Mapping[str, Any]) -> str:
    layout = entry.get("checkpoint_format", entry.get("format"))
    return GPTQ if layout in ZERO_SHIFTS else f"gptq ({layout})"


def _awq(entry: Mapping[str, Any]) -> str:
    version = entry.get("version")
    known = (version.lower() if isinstance(version, str) else version) in AWQ_VERSIONS
    return AWQ if known else f"awq ({version})"


def _compressed(entry: Mapping[str, Any]) -> str:
    name, weights = str(entry.get("format")), [group.get("weights") or {} for group in _groups(entry)]
    own = {str(group["format"]) for group in _groups(entry) if group.get("format")}
    formats = own | ({name} if entry.get("format") or not own else set())
    sparse = (entry.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        return f"{COMPRESSED} ({sparse})"
    floats = [weight for weight in weights if weight.get("type") == "float"]
    small_floats = name in FLOAT_FORMATS and any(weight.get("num_bits") != 8 for weight in floats)
    if small_floats or not formats <= COMPRESSED_FORMATS:
        return f"{COMPRESSED} ({', '.join(sorted(formats - COMPRESSED_FORMATS) or [name])})"
    return FP8 if formats <= {*FLOAT_FORMATS} and len(floats) == len(weights) else COMPRESSED


def _modelopt(entry: Mapping[str, Any]) -> str | None:
    inner = entry.get("quantization")
    algorithm = (inner if isinstance(inner, Mapping) else entry).get("quant_algo")
    if algorithm is None:  # only the KV cache is quantised
        return None
    return MODELOPT_ALGORITHMS.get(str(algorithm), f"modelopt ({algorithm})")


def _groups(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = entry.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _block(entry: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """The one block size that a description states. Raises CheckpointError where it is no pair of whole numbers."""
    found = [entry.get("weight_block_size")]
    found += [_group_block(group.get("weights") or {}) for group in _groups(entry)]
    stated = {_pair(value, where) for value in found if value is not None}
    if len(stated) > 1:
        raise CheckpointError(f"{where} states several block sizes ({sorted(stated)}); expected one")
    return stated.pop() if stated else None


def _group_block(weights: Mapping[str, Any]) -> Any:
    """The block of float8 weights of a config group: stated, or a group of columns as one row of a block."""
    if weights.get("type") == "float" and weights.get("num_bits") == 8 and weights.get("strategy") == "group":
        return [1, weights.get("group_size")]
    return weights.get("block_structure")


def _pair(value: Any, where: str) -> tuple[int, int]:
    numbers = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(number) for number in numbers)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{where}: a block size of {value!r}; expected rows and columns, such as [128, 128]")
    return rows, columns
