"""Finds a model: a directory, a hub id, or the demo model; and its weights, sharded or in one file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.safetensors_file import SafetensorsFile, StoredTensor, open_safetensors
from hybrimoe.errors import CheckpointError, ModelError

INDEX_NAME, SINGLE_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
HUB_PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
HUB_LEFT_OUT = ("original/*", "consolidated*", "onnx/*", "*/*.safetensors")
"""The same weights once more, in other layouts: Meta's, Mistral's, ONNX, and formats in folders of their own."""
EXPECTED = f"a directory with {CONFIG_NAME} and *.safetensors, or a hub id"
SHOWN_NAMES = 3  # names that an error lists before "and N more"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a model directory: every stored tensor by its key, and the files that hold them."""

    directory: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, StoredTensor]


def model_directory(path_or_hub_id: str | Path | None) -> Path:
    """The directory of a model; None is the demo model, and what looks like `owner/name` is fetched from the hub.

    Raises ModelError where there is no model.
    """
    if path_or_hub_id is None:
        return _demo_directory()
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; expected {EXPECTED}")
    if HUB_ID.match(str(path_or_hub_id)):
        return _from_hub(str(path_or_hub_id))
    raise ModelError(f"no model directory {path}; expected {EXPECTED}")


def read_config_dict(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises ModelError where the directory holds no model."""
    file = directory / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{directory} is no model directory: it has no {CONFIG_NAME}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{file} is no model configuration: it has no model_type")
    return config


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens the safetensors files of `directory` and checks their headers.

    One file with all weights goes before an index of shards that does not name it, as in transformers: the index is
    left from an earlier save.

    Raises CheckpointError for missing, truncated or damaged shards, UnsupportedCheckpointError where there are weights
    in other formats only.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if index.is_file():
        weight_map = _read_index(index)
        if not single.is_file() or SINGLE_NAME in weight_map.values():
            return _open_sharded(directory, index, weight_map)
    candidates = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if len(candidates) != 1:
        raise _no_weights(directory, candidates)
    file = open_safetensors(candidates[0])
    return Checkpoint(directory, (file,), file.tensors)


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _read_index(index: Path) -> dict[str, str]:
    """File name by key. Raises CheckpointError for an index that is damaged."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as a safetensors index: {error!r}") from error


def _open_sharded(directory: Path, index: Path, weight_map: dict[str, str]) -> Checkpoint:
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        lost = sum(shard in missing for shard in weight_map.values())
        raise CheckpointError(f"{directory} lacks {listed(missing)} ({lost} tensors); fetch the missing shards")
    files = {name: open_safetensors(directory / name) for name in names}
    absent = [key for key, name in weight_map.items() if key not in files[name].tensors]
    if absent:
        raise CheckpointError(
            f"{index} names {listed(absent)}, not found in {weight_map[absent[0]]}; fetch that shard again"
        )
    tensors = {key: files[name].tensors[key] for key, name in weight_map.items()}
    return Checkpoint(directory, tuple(files.values()), tensors)


def _no_weights(directory: Path, candidates: list[Path]) -> CheckpointError:
    if candidates:
        found = listed([file.name for file in candidates])
        return CheckpointError(f"{directory} has several weight files ({found}) and no {INDEX_NAME} that joins them")
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf", "*.h5") for file in directory.glob(pattern))
    if others:
        return UnsupportedCheckpointError(
            f"{directory} has {listed(others)} but no *.safetensors; convert it to safetensors"
        )
    return CheckpointError(f"{directory} has no weights: expected {SINGLE_NAME} or {INDEX_NAME} with its shards")


def is_demo(directory: Path) -> bool:
    """True for the directory of the model that the package ships, into which nothing is ever written."""
    from importlib.resources import files

    return directory.resolve().is_relative_to(Path(str(files("hybrimoe"))).resolve())


def _demo_directory() -> Path:
    from hybrimoe.demo import demo_model_path

    try:
        return demo_model_path()
    except FileNotFoundError as error:
        raise ModelError(str(error)) from error


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=[*HUB_PATTERNS], ignore_patterns=[*HUB_LEFT_OUT]))
        index = directory / INDEX_NAME
        weights = sorted(set(_read_index(index).values())) if index.is_file() else ["*.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=weights, ignore_patterns=[*HUB_LEFT_OUT]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"{hub_id} is neither a directory here nor a model that the hub gives: {error}") from error
