"""The weights of a model directory, sharded or in one file: every tensor by its key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrimoe.checkpoint.safetensors_file import SafetensorsFile, StoredTensor, open_safetensors
from hybrimoe.checkpoint.source import INDEX_NAME, listed, weight_files
from hybrimoe.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a model directory: every stored tensor by its key, and the files that hold them."""

    directory: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, StoredTensor]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens the safetensors files of `directory` and checks their headers.

    Raises CheckpointError for missing, truncated or damaged shards, UnsupportedCheckpointError where there are weights
    in other formats only.
    """
    found = weight_files(directory)
    files = {path.name: open_safetensors(path) for path in found.paths}
    if found.file_of_key is None:
        (only,) = files.values()
        return Checkpoint(directory, (only,), only.tensors)
    absent = [key for key, name in found.file_of_key.items() if key not in files[name].tensors]
    if absent:
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {listed(absent)}, not found in {found.file_of_key[absent[0]]}; fetch that"
            " shard again"
        )
    tensors = {key: files[name].tensors[key] for key, name in found.file_of_key.items()}
    return Checkpoint(directory, tuple(files.values()), tensors)
